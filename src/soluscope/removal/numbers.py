"""The numbers of a removal, from tables of losses: of one run over its documents, and of an arm over its seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from soluscope.comparison.stats import Interval, cluster_bootstrap, seeds_and_documents
from soluscope.hooked.ablation import FINAL_NORMS
from soluscope.removal.losses import ONE_GAIN, OWN_GAINS
from soluscope.results import OfRemoval, Order, Removal, RemovalOfArm, Removed

T = TypeVar("T", bound=OfRemoval)

NAMES = {Removed.FROZEN: "frozen", Removed.REFIT: "refit"}
"""Name of each step's files in a run's folder of results, in the order of the steps."""


@dataclass(frozen=True)
class Line:
    """One number of the removal, with its values by token."""

    step: Removed
    final_norm: Literal["live", "frozen"]
    values: NDArray[np.float64]
    before: Removed | None = None
    against: Literal["as trained", "same adaptation"] = "as trained"


def lines(tables: Mapping[Removed, pd.DataFrame]) -> Iterator[Line]:
    """Yield the numbers of the steps whose tables are given."""
    for final_norm, how in FINAL_NORMS.items():
        earlier: tuple[Removed, NDArray[np.float64]] | None = None
        for step, table in tables.items():
            one = table[f"{ONE_GAIN}{how}"].to_numpy()
            yield Line(step, final_norm, one)
            if f"{OWN_GAINS}{how}" in table:
                kept = table[f"{OWN_GAINS}{how}"].to_numpy()
                yield Line(step, final_norm, one - kept, against="same adaptation")
            if earlier:
                yield Line(step, final_norm, earlier[1] - one, before=earlier[0])
            earlier = step, one


def of_run(
    tables: Mapping[Removed, pd.DataFrame], base: Removal, n_draws: int, seed: int
) -> list[Removal]:
    """Return the numbers of one run, with intervals from resampling its documents.

    Args:
        tables: a table of losses for each step.
        base: fields that all records share.
        n_draws: number of resamples.
        seed: seed of the resampling.
    """
    documents = next(iter(tables.values()))["document"].to_numpy()
    result = []
    for line in lines(tables):
        found = cluster_bootstrap(line.values, documents, n_draws=n_draws, seed=seed)
        row = replace(
            base, step=line.step, before=line.before, against=line.against,
            final_norm=line.final_norm, cluster="document", n_effective=found.n_effective,
        )  # fmt: skip
        result.append(_filled(row, found))
    return result


def of_arm(
    seeds: Sequence[Mapping[Removed, pd.DataFrame]], base: RemovalOfArm
) -> Iterator[RemovalOfArm]:
    """Yield the means over the seeds of an arm, with intervals for new seeds and documents.

    Numbers of steps that a seed lacks are left out, and so is everything if the seeds have different documents.
    """
    shared = [step for step in NAMES if all(step in tables for tables in seeds)]
    tables = [{step: each[step] for step in shared} for each in seeds]
    owners = [next(iter(each.values()))["document"].to_numpy() for each in tables if each]
    if len(owners) < 2 or any(not np.array_equal(owners[0], other) for other in owners[1:]):
        return
    _, owner = np.unique(owners[0], return_inverse=True)
    counts = np.bincount(owner)
    for of_seeds in zip(*map(lines, tables), strict=True):
        sums = [np.bincount(owner, each.values) for each in of_seeds]
        found, line = seeds_and_documents(sums, counts), of_seeds[0]
        row = replace(
            base, step=line.step, before=line.before, against=line.against,
            final_norm=line.final_norm, cluster="seed",
        )  # fmt: skip
        yield _filled(row, found)


def _filled(row: T, found: Interval) -> T:
    order = None if row.before is None else _order(found)
    return replace(
        row, value=found.value, low=found.low, high=found.high, n=found.n,
        n_clusters=found.n_clusters, order=order,
    )  # fmt: skip


def _order(found: Interval) -> Order:
    """Return whether an earlier step's number is at least the later one's, from their difference's interval."""
    if found.low is None or found.high is None:
        return Order.OPEN
    if found.high < 0:
        return Order.VIOLATED
    return Order.HOLDS if found.low >= 0 else Order.OPEN
