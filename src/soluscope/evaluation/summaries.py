"""Measurements from a probe's values: means, splits, curves and their intervals, the same for all probes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from soluscope.comparison.stats import (
    MIN_CLUSTERS,
    Interval,
    bootstrap_sums,
    cluster_bootstrap,
    difference_of_sums,
    n_distinct,
    statistic_difference,
)
from soluscope.data import streams
from soluscope.hooked.activations import Text
from soluscope.probes import Estimate, Measured, Probe, Quantity
from soluscope.probes._tokens import array
from soluscope.results import Measurement, ProbeWords, Untrained
from soluscope.runs.weights import Facts, commit
from soluscope.text import plural

CURVE_POINTS = 24

Bools = NDArray[np.bool_]
Floats = NDArray[np.floating]

POSITIONS: dict[str, Callable[[NDArray[np.int64]], Bools]] = {
    "not BOS": lambda pos: pos > 0,
    "BOS": lambda pos: pos == 0,
    "1": lambda pos: pos == 1,
    "2-15": lambda pos: (pos >= 2) & (pos <= 15),
    ">=16": lambda pos: pos >= 16,
}
"""Groups of positions, by the prefix rules of protocol.md section 5. BOS is never averaged with other tokens."""


def token_table(text: Text, measured: Measured) -> pd.DataFrame:
    """Return a table with each token's string, pos and id, then one column per quantity."""
    columns = {"string": text.string, "pos": text.pos, "token": text.tokens} | measured.tokens
    return pd.DataFrame({name: array(values) for name, values in columns.items()})


def stored_words(name: str, probe: Probe, study: str) -> ProbeWords:
    """Return the description of the probe in file `name`, as it is stored with its results."""
    return ProbeWords(
        study=study, commit=commit(), probe=name, name=probe.name, section=probe.section,
        question=probe.question, formula=probe.formula, reading=probe.reading, pitfalls=probe.pitfalls,
        source=probe.source, tested=probe.tested, quantities=probe.quantities | probe.estimates,
        figures=probe.figures, gates=probe.gates, answers=probe.answers,
    )  # fmt: skip


def about_run(facts: Facts, pretrained: bool = False) -> dict[str, Any]:
    """Return the fields that all records about a run share. A pretrained model has no seed."""
    return {
        "study": facts.study, "run": facts.run, "arm": facts.arm, "variant": facts.variant,
        "seed": None if pretrained else facts.seed, "pretrained": pretrained,
        "commit": commit(), "config": facts.config,
    }  # fmt: skip


def summarise(
    probe: Probe,
    table: pd.DataFrame,
    estimates: Iterable[Estimate],
    base: Measurement,
    n_draws: int,
    seed: int,
) -> Iterator[Measurement]:
    """Yield every number that the probe defines, each with its interval over documents (or strings).

    Args:
        probe: the probe.
        table: `token_table` of the probe's values.
        estimates: the probe's estimates, which are not in the table.
        base: fields shared by all measurements.
        n_draws: number of resamples.
        seed: seed of the resampling.
    """
    make = Summary(streams.unit_of(base.stream), n_draws, seed)
    for name, quantity in probe.quantities.items():
        if table[name].notna().any():
            row = replace(base, quantity=name, unit=quantity.unit)
            values, string = (table[column].to_numpy() for column in (name, "string"))
            for place in _places(table, name, quantity):
                here = replace(row, **place.fields, x=place.x)
                yield make.of_tokens(values[place.which], string[place.which], here)
    for estimate in estimates:
        unit = probe.estimates[estimate.quantity].unit
        row = replace(base, quantity=estimate.quantity, unit=unit, statistic="")
        yield make.of_sums(estimate, row)


def against_untrained(
    probe: Probe,
    trained: tuple[pd.DataFrame, Sequence[Estimate]],
    untrained: tuple[pd.DataFrame, Sequence[Estimate]],
    base: Untrained,
    n_draws: int,
    seed: int,
) -> Iterator[Untrained]:
    """Yield each number of the run's own initialisation, and the trained number minus it.

    Curves are left out. A split has each model's own quartiles: its highest gains beside those before training.

    Args:
        probe: the probe.
        trained: `token_table` and estimates of the trained model.
        untrained: the same of its initialisation, on the same tokens.
        base: fields shared by all records.
        n_draws: number of resamples.
        seed: seed of the resampling.
    """
    (here, estimates), (there, others) = trained, untrained
    string = here["string"].to_numpy()
    for name, quantity in probe.quantities.items():
        now, before = (side[name].to_numpy() for side in (here, there))
        twins = [(twin.fields, twin.which) for twin in _places(there, name, quantity)]
        for place in _places(here, name, quantity):
            which = next((which for fields, which in twins if fields == place.fields), None)
            if place.x is not None or which is None:
                continue
            alone = cluster_bootstrap(before[which], string[which], place.statistic, n_draws=1)
            found = statistic_difference(
                np.where(place.which, now, np.nan), np.where(which, before, np.nan), string,
                place.statistic, n_draws, seed,
            )  # fmt: skip
            row = replace(base, quantity=name, unit=quantity.unit, **place.fields)
            yield _twin(row, alone.value, found)
    by_name = {(each.quantity, each.group): each for each in others if each.x is None}
    for each in estimates:
        other = by_name.get((each.quantity, each.group))
        if each.x is not None or other is None:
            continue
        row = replace(base, quantity=each.quantity, group=each.group, statistic="")
        row = replace(row, unit=probe.estimates[each.quantity].unit)
        alone = bootstrap_sums(other.sums, other.value, other.n, n_draws=1)
        if len(each.sums) == len(other.sums):  # the same strings
            found = difference_of_sums(
                each.sums, each.value, other.sums, other.value, each.n, n_draws, seed
            )
        else:
            after = bootstrap_sums(each.sums, each.value, each.n, n_draws=1)
            found = replace(after, value=after.value - alone.value, low=None, high=None)
        yield _twin(row, alone.value, found)


def _twin(base: Untrained, value: float, found: Interval) -> Untrained:
    difference = None if np.isnan(found.value) else found.value
    return replace(
        base, value=None if np.isnan(value) else value, difference=difference, low=found.low,
        high=found.high, n=found.n, n_clusters=found.n_clusters, cluster=streams.unit_of(base.stream),
    )  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """Tokens that one number summarises, and by which statistic."""

    which: Bools
    statistic: str
    positions: str = "not BOS"
    group: str = ""
    x: float | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """Return the fields of a record that name this place."""
        return {"statistic": self.statistic, "positions": self.positions, "group": self.group}


def _places(table: pd.DataFrame, name: str, quantity: Quantity) -> Iterator[_Place]:
    """Yield the tokens of each number of a quantity: a curve's points; or groups of positions, then splits."""
    pos, values = table["pos"].to_numpy(), table[name].to_numpy()
    if quantity.curve:
        last = int(pos.max())
        for at in sorted({int(p) for p in np.geomspace(1, max(1, last), CURVE_POINTS).round()}):
            yield _Place(pos == at, "mean", x=float(at))
        return
    has_value = ~np.isnan(values)
    for positions, mask in POSITIONS.items():
        here = mask(pos) & has_value
        if here.any():
            for statistic in quantity.statistics:
                yield _Place(here, statistic, positions)
    content = POSITIONS["not BOS"](pos) & has_value
    for column in quantity.split_by:
        split = table[column].to_numpy()
        if n_distinct(split[content]) < 4:
            continue  # too few distinct values for quartiles
        quartile = np.searchsorted(np.nanquantile(split[content], [0.25, 0.5, 0.75]), split)
        # With ties some quartiles are empty; the remaining quartiles keep their names.
        for q in np.unique(quartile[content]):
            yield _Place(content & (quartile == q), "mean", group=f"{column} Q{q + 1}")


class Summary:
    """Builder of one measurement from many values, with its interval or the reason for a missing interval."""

    def __init__(self, cluster: str, n_draws: int, seed: int) -> None:
        self.cluster, self.n_draws, self.seed = cluster, n_draws, seed

    def of_tokens(
        self, values: Floats, string: NDArray[np.int64], base: Measurement
    ) -> Measurement:
        interval = cluster_bootstrap(values, string, base.statistic, self.n_draws, self.seed)
        row = self._filled(base, interval)
        if n_distinct(values[~np.isnan(values)]) == 1 and interval.n_clusters >= MIN_CLUSTERS:
            # BOS has one context and a static norm has one gain, so there is no variation to resample.
            return replace(row, low=None, high=None, constant=True, note=base.note)
        return row

    def of_sums(self, estimate: Estimate, base: Measurement) -> Measurement:
        interval = bootstrap_sums(
            estimate.sums, estimate.value, estimate.n, n_draws=self.n_draws, seed=self.seed
        )
        base = replace(base, x=estimate.x, group=estimate.group, note=estimate.note)
        return self._filled(base, interval)

    def _filled(self, base: Measurement, interval: Interval) -> Measurement:
        why = ""
        units = interval.n_clusters if interval.n_effective is None else interval.n_effective
        if 0 < units < MIN_CLUSTERS:
            noun = plural(interval.n_clusters, self.cluster)
            alike = f" (as good as {units:.0f} of equal size)" * (units < interval.n_clusters)
            why = f"no interval from {interval.n_clusters} {noun}{alike}: at least {MIN_CLUSTERS} are needed"
        elif interval.low is None and not np.isnan(interval.value):
            why = f"no interval: values from resampled {self.cluster}s do not spread around this number"
        note = "; ".join(part for part in (base.note, why) if part)
        return replace(
            base, value=interval.value, low=interval.low, high=interval.high, n=interval.n,
            n_clusters=interval.n_clusters, n_effective=interval.n_effective, cluster=self.cluster, note=note,
        )  # fmt: skip
