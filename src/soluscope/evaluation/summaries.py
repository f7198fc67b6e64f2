"""From a probe's values to rows: means, splits, curves and their intervals, for all probes alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from soluscope import results
from soluscope.comparison.stats import (
    MIN_CLUSTERS,
    Interval,
    bootstrap_sums,
    cluster_bootstrap,
    n_distinct,
)
from soluscope.data import streams
from soluscope.hooked.activations import HookedRun
from soluscope.probes import Estimate, Probe, Quantity
from soluscope.results import Row

CURVE_POINTS = 24

POSITIONS: dict[str, Callable[[pd.Series], Any]] = {
    "not BOS": lambda pos: pos > 0,
    "BOS": lambda pos: pos == 0,
    "1": lambda pos: pos == 1,
    "2-15": lambda pos: (pos >= 2) & (pos <= 15),
    ">=16": lambda pos: pos >= 16,
}
"""The prefix rules of science.md section 5. BOS is never averaged with the rest."""


def token_table(one: Probe, run: HookedRun) -> pd.DataFrame:
    """The probe's values with each token's place: string, pos, token, then one column a quantity."""
    measured = one.measure(run, parameters(one))
    place = {"string": run.string, "pos": run.pos, "token": run.tokens}
    return pd.DataFrame({name: values.numpy() for name, values in (place | measured).items()})


def estimates(one: Probe, run: HookedRun, table: pd.DataFrame) -> Iterator[Estimate]:
    """The probe's numbers that are not averages over tokens."""
    if one.estimate is not None:
        yield from one.estimate(run, table, parameters(one))


def parameters(one: Probe) -> Any:
    return None if one.params is type(None) else one.params()


def summarise(
    one: Probe, run: HookedRun, table: pd.DataFrame, base: Row, n_draws: int, seed: int
) -> Iterator[Row]:
    """Every number the probe asks for, each with the interval for other documents (or strings).

    Args:
        one: the probe.
        run: what it was measured on.
        table: its `token_table`.
        base: what the rows have in common.
        n_draws: resamples.
        seed: of the resampling.
    """
    make = _Summary(streams.unit_of(base.stream), n_draws, seed)
    for name, quantity in one.quantities.items():
        if table[name].notna().any():
            row = replace(base, quantity=name, unit=quantity.unit)
            yield from _quantity_rows(table, name, quantity, row, make)
    for estimate in estimates(one, run, table):
        unit = one.estimates[estimate.quantity].unit
        row = replace(base, quantity=estimate.quantity, unit=unit, statistic="")
        yield make.of_sums(estimate, row)


def _quantity_rows(
    table: pd.DataFrame, name: str, quantity: Quantity, base: Row, make: _Summary
) -> Iterator[Row]:
    if quantity.curve:
        last = int(table["pos"].max())
        for pos in sorted({int(p) for p in np.geomspace(1, max(1, last), CURVE_POINTS).round()}):
            yield make.of_tokens(
                table[table["pos"] == pos], name, "mean", replace(base, x=float(pos))
            )
        return
    for positions, mask in POSITIONS.items():
        here = table[mask(table["pos"])]
        if here[name].notna().any():
            for statistic in quantity.statistics:
                yield make.of_tokens(here, name, statistic, replace(base, positions=positions))
    content = table[(table["pos"] > 0) & table[name].notna()]
    for column in quantity.split_by:
        if n_distinct(content[column]) < 4:
            continue  # one constant: there are no quartiles
        edges = content[column].quantile([0.25, 0.5, 0.75])
        quartile = pd.Series(np.searchsorted(edges, content[column]), index=content.index)
        for q in sorted(
            quartile.unique()
        ):  # with ties some are empty, and the others keep their names
            row = replace(base, group=f"{column} Q{q + 1}")
            yield make.of_tokens(content[quartile == q], name, "mean", row)


class _Summary:
    """One row from many values, with its interval or the reason why there is none."""

    def __init__(self, cluster: str, n_draws: int, seed: int) -> None:
        self.cluster, self.n_draws, self.seed = cluster, n_draws, seed

    def of_tokens(self, table: pd.DataFrame, name: str, statistic: str, base: Row) -> Row:
        table = table[table[name].notna()]
        values = table[name]
        interval = cluster_bootstrap(values, table["string"], statistic, self.n_draws, self.seed)
        row = self._filled(replace(base, statistic=statistic), interval)
        if n_distinct(values) == 1 and interval.n_clusters >= MIN_CLUSTERS:
            # BOS has one context, a static norm one gain: nothing varies that could be resampled.
            return replace(row, low=None, high=None, note=results.ONE_NUMBER)
        return row

    def of_sums(self, estimate: Estimate, base: Row) -> Row:
        interval = bootstrap_sums(
            estimate.sums, estimate.value, estimate.n, n_draws=self.n_draws, seed=self.seed
        )
        base = replace(base, x=estimate.x, group=estimate.group, note=estimate.note)
        return self._filled(base, interval)

    def _filled(self, base: Row, interval: Interval) -> Row:
        why = ""
        if 0 < interval.n_clusters < MIN_CLUSTERS:
            why = f"no interval from {interval.n_clusters} {self.cluster}s, it takes {MIN_CLUSTERS}"
        elif interval.low is None and not np.isnan(interval.value):
            why = f"no interval: resampled {self.cluster}s do not spread around this number"
        note = "; ".join(part for part in (base.note, why) if part)
        return replace(
            base, value=interval.value, low=interval.low, high=interval.high, n=interval.n,
            n_clusters=interval.n_clusters, cluster=self.cluster, note=note,
        )  # fmt: skip
