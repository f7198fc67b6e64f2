"""Gaps between arms during training, and their change after a LayerNorm is no longer pinned.

Source: protocol.md section 7, P23.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from soluscope.comparison import stats
from soluscope.comparison.stats import Floats
from soluscope.errors import UserError
from soluscope.results import (
    CROSSES,
    DYNAMICS,
    MARGIN,
    UNPINNED,
    Comparison,
    Measurement,
    Record,
    Setting,
    Term,
    Verdict,
    of_kind,
)

if TYPE_CHECKING:
    import pandas as pd

BEFORE, AFTER = f"until r crosses {UNPINNED}", f"after r crosses {UNPINNED}"
"""Stretches of training: from the first step to the last one before the crossing, and from there to the end."""
Tables = Callable[[str], Mapping[int, "pd.DataFrame"]]
"""Function from an arm to a table for each reported seed: tokens, document, loss_sum and n_tokens."""
Curve = dict[float, Floats]
"""Loss sums [document] by the number of training tokens."""


def dynamics(records: Sequence[Record], tables: Tables) -> list[Comparison]:
    """Compare arms at the steps whose weights both kept.

    Args:
        records: the measurements of the study's runs, and the records of `compare`.
        tables: losses by step and document of an arm's reported runs; empty for an arm without snapshots.

    Returns:
        `GAP`s of each arm to plain SoLU, and of each arm with a per-token norm to the best static arm, at each
        step that all their runs have. `SINCE` for the latter: the change of that gap until r crosses `UNPINNED`,
        and after that, over the seeds at which it does. Below 0 the arm gained on the static arm.

    Raises:
        UserError: if two runs were not measured on the same documents.
    """
    plain = {each.arm for each in of_kind(records, Setting) if each.role == "plain"}
    crossings = _crossings(records)
    found: list[Comparison] = []
    for row in of_kind(records, Comparison):
        if (row.cluster, row.lr, row.design) != ("seed", None, ""):
            continue
        if row.term is Term.STATIC or (row.term is Term.DIFFERENCE and row.against in plain):
            gaps, counts = _gaps(row, tables(row.arm), tables(row.against))
            found += _along(row, gaps, counts)
            if row.term is Term.STATIC and gaps:
                found += _since(row, gaps, counts, crossings.get(row.arm, {}))
    return found


def _crossings(records: Sequence[Record]) -> dict[str, dict[int, float]]:
    """Return, by arm and seed, the number of tokens at which r crosses `UNPINNED`, where it does."""
    result: dict[str, dict[int, float]] = {}
    for row in of_kind(records, Measurement):
        is_crossing = (row.probe, row.quantity) == (DYNAMICS, CROSSES)
        if is_crossing and row.value is not None and row.seed is not None:
            result.setdefault(row.arm, {})[row.seed] = row.value
    return result


def _gaps(
    row: Comparison, of_arm: Mapping[int, pd.DataFrame], of_other: Mapping[int, pd.DataFrame]
) -> tuple[dict[int, Curve], Floats]:
    """Return the differences of loss sums by seed, at the seeds of both arms, and the token counts [document]."""
    gaps: dict[int, Curve] = {}
    counts = np.zeros(0)
    for seed in sorted(of_arm.keys() & of_other.keys()):
        sides = [_curve(each[seed]) for each in (of_arm, of_other)]
        for _, _, n_tokens in sides:
            counts = counts if len(counts) else n_tokens
        if any(
            not np.array_equal(documents, sides[0][1]) or not np.array_equal(n_tokens, counts)
            for _, documents, n_tokens in sides
        ):
            raise UserError(
                f"runs of {row.arm!r} and {row.against!r} in {row.study!r} were not measured on the same documents "
                "during training: probe them again"
            )
        (left, *_), (right, *_) = sides
        gaps[seed] = {x: left[x] - right[x] for x in left.keys() & right.keys()}
    return gaps, counts


def _curve(table: pd.DataFrame) -> tuple[Curve, Floats, Floats]:
    """Return the loss sums by the number of tokens seen, the documents' numbers, and their token counts."""
    ordered = table.sort_values(["tokens", "document"], kind="stable")
    parts = {float(x): ordered[ordered["tokens"] == x] for x in ordered["tokens"].unique()}
    first = next(iter(parts.values()))
    documents, counts = (first[name].to_numpy(np.float64) for name in ("document", "n_tokens"))
    return (
        {x: part["loss_sum"].to_numpy(np.float64) for x, part in parts.items()},
        documents,
        counts,
    )


def _along(row: Comparison, gaps: Mapping[int, Curve], counts: Floats) -> Iterator[Comparison]:
    """Yield the gap at each step of all seeds, with both intervals."""
    common = set.intersection(*(set(curve) for curve in gaps.values())) if gaps else set()
    for x in sorted(common):
        sums = np.stack([curve[x] for curve in gaps.values()])
        base = replace(_base(row), term=Term.GAP, x=x)
        yield from _both(base, sums, counts)


def _since(
    row: Comparison, gaps: Mapping[int, Curve], counts: Floats, crossing: Mapping[int, float]
) -> Iterator[Comparison]:
    """Yield the change of the gap until the crossing and after it, over the seeds at which r crosses."""
    base = replace(_base(row), term=Term.SINCE)
    changes: dict[str, list[Floats]] = {BEFORE: [], AFTER: []}
    at = []
    for seed, curve in gaps.items():
        steps = sorted(curve)
        earlier = [x for x in steps if x <= crossing.get(seed, -math.inf)]
        if earlier:
            at.append(crossing[seed])
            changes[BEFORE].append(curve[earlier[-1]] - curve[steps[0]])
            changes[AFTER].append(curve[steps[-1]] - curve[earlier[-1]])
    for stretch, sums in changes.items():
        if not sums:
            note = f"the median r crosses {UNPINNED} at none of {len(gaps)} seeds"
            undefined = replace(
                base, group=stretch, value=None, verdict=Verdict.UNDEFINED, note=note
            )
            yield replace(undefined, n=len(gaps))
            continue
        note = f"r crosses at {min(at):,.0f} to {max(at):,.0f} tokens, at {len(at)} of {len(gaps)} seeds"
        tested = stats.seeds_and_documents(np.stack(sums), counts, level=0.90)
        judged = Verdict(stats.equivalence(tested, MARGIN))
        yield from _both(
            replace(base, group=stretch, verdict=judged, note=note), np.stack(sums), counts
        )


def _base(row: Comparison) -> Comparison:
    """Return the fields that all comparisons of one pair share; these tests are exploratory, so without p."""
    return replace(
        row, value=None, low=None, high=None, verdict=None, choice="", n_candidates=0, optimism=0.0,
        p=None, p_adj=None, note="", n=0, n_clusters=0, n_effective=None,
    )  # fmt: skip


def _both(base: Comparison, sums: Floats, counts: Floats) -> Iterator[Comparison]:
    """Yield the mean difference with the interval for new seeds, and with that for new documents."""
    new = stats.seeds_and_documents(sums, counts)
    fixed = stats.bootstrap_mean(sums.mean(axis=0), counts)
    yield replace(base, value=new.value, low=new.low, high=new.high, n=new.n, n_clusters=new.n)
    yield replace(
        base, cluster="document", value=fixed.value, low=fixed.low, high=fixed.high, n=new.n,
        n_clusters=fixed.n_clusters, n_effective=fixed.n_effective,
    )  # fmt: skip
