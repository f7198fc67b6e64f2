"""The numbers of a removal, from tables of losses: of one run over its documents, and of an arm over its seeds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from soluscope.comparison.stats import Interval, cluster_bootstrap, seeds_and_documents
from soluscope.hooked.ablation import FINAL_NORMS
from soluscope.removal.losses import FROM_START, ONE_GAIN, OWN_GAINS
from soluscope.results import OfRemoval, Order, Removal, RemovalOfArm, Removed

T = TypeVar("T", bound=OfRemoval)

STEPS = {"frozen": Removed.FROZEN, "refit": Removed.REFIT}
"""The first steps by the names of their files in a run's folder of results, in their order."""
TUNED = {"fine_tuned": Removed.FINE_TUNED, "no_norms": Removed.ALL}
"""The steps with further training by the beginnings of the names of their files. The number of tokens and the
rate's share follow."""


def name_of_tuning(step: Removed, n_tokens: int, lr_share: float) -> str:
    """Return the name of the files of a step with further training."""
    begin = next(name for name, each in TUNED.items() if each is step)
    return f"{begin}-{n_tokens}-{lr_share:g}"


def step_of(name: str) -> tuple[Removed, int]:
    """Return the step whose results have this name, and the number of tokens of its further training.

    Raises:
        ValueError: if no results have this name.
    """
    if name in STEPS:
        return STEPS[name], 0
    tuned = re.fullmatch(rf"({'|'.join(TUNED)})-(\d{{1,18}})-[\d.e+-]+", name, re.ASCII)
    if not tuned:
        raise ValueError(f"{name[:80]!r} is not the name of a result of 'soluscope remove'")
    return TUNED[tuned[1]], int(tuned[2])


def in_order(names: Iterable[str]) -> list[str]:
    """Return names of results in the order of their steps, and by the number of tokens of further training."""
    steps = [*Removed]
    return sorted(names, key=lambda name: (steps.index(step_of(name)[0]), step_of(name)[1], name))


@dataclass(frozen=True)
class Line:
    """One number of the removal, with its values by token."""

    step: Removed
    final_norm: Literal["live", "frozen"]
    values: NDArray[np.float64]
    n_tuned: int = 0
    before: Removed | None = None
    against: str = "as trained"


def lines(tables: Mapping[str, pd.DataFrame]) -> Iterator[Line]:
    """Yield the numbers of the steps whose tables are given by name, in their order."""
    for final_norm, how in FINAL_NORMS.items():
        earlier: tuple[Removed, NDArray[np.float64]] | None = None
        for name, table in tables.items():
            if (
                f"{ONE_GAIN}{how}" not in table
            ):  # further training changes ln_final, so its scale is not held
                continue
            step, n_tuned = step_of(name)
            one = table[f"{ONE_GAIN}{how}"].to_numpy()
            line = Line(step, final_norm, one, n_tuned)
            yield line
            if f"{OWN_GAINS}{how}" in table:
                kept = table[f"{OWN_GAINS}{how}"].to_numpy()
                yield replace(line, values=one - kept, against="same adaptation")
            for column in table.columns[table.columns.str.startswith(FROM_START)]:
                other = table[column].to_numpy()
                yield replace(line, values=one - other, against=column.removeprefix(FROM_START))
            if earlier and step is not Removed.ALL:
                yield replace(line, values=earlier[1] - one, before=earlier[0])
            if name in STEPS:
                earlier = step, one


def of_run(
    tables: Mapping[str, pd.DataFrame], base: Removal, n_draws: int, seed: int
) -> list[Removal]:
    """Return the numbers of one run, with intervals from resampling its documents.

    Args:
        tables: tables of losses by the names of their results, in the order of `in_order`.
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
            final_norm=line.final_norm, n_tuned=line.n_tuned, cluster="document", n_effective=found.n_effective,
        )  # fmt: skip
        result.append(_filled(row, found))
    return result


def of_arm(
    seeds: Sequence[Mapping[str, pd.DataFrame]], base: RemovalOfArm
) -> Iterator[RemovalOfArm]:
    """Yield the means over the seeds of an arm, with intervals for new seeds and documents.

    Numbers of steps that a seed lacks are left out, and so is everything if the seeds have different documents.
    """
    if len(seeds) < 2:
        return
    shared = in_order(name for name in seeds[0] if all(name in tables for tables in seeds))
    tables = [{name: each[name] for name in shared} for each in seeds]
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
            final_norm=line.final_norm, n_tuned=line.n_tuned, cluster="seed",
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
