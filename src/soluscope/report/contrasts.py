"""The probes sorted by how much their main number differs between an arm and its reference arm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from soluscope.report import controls, meaning
from soluscope.report.blocks import Block, Paragraph, Table, fold
from soluscope.report.findings import number, number_key, per_token, settings, span, twins
from soluscope.results import Measurement, Number, Record, Untrained, of_kind

MOST_RATIO = 1000
"""Ratio above which only this bound is shown: the interval has almost no width."""
N_SHOWN = 12
"""Number of contrasts in view; the others are folded."""


@dataclass(frozen=True)
class Contrast:
    """A probe's main number in an arm with a per-token norm and in its reference arm."""

    probe: str
    here: Sequence[Measurement]
    there: Sequence[Measurement]

    @property
    def difference(self) -> float:
        return _mean(self.here) - _mean(self.there)

    @property
    def ratio(self) -> float | None:
        """Return the difference over the joint half width of the intervals; None without intervals."""
        widths = [_half_width(rows) for rows in (self.here, self.there)]
        known = [width for width in widths if width is not None]
        joint = math.hypot(*known)
        return abs(self.difference) / joint if len(known) == len(widths) and joint else None


def blocks(records: Sequence[Record]) -> list[Block]:
    """Return a table of the contrasts, largest ratio first; probes that failed a control are left out."""
    found = sorted(_contrasts(records), key=lambda each: -(each.ratio or 0.0))
    if not found:
        return []
    untrained = {number_key(each): each for each in of_kind(records, Untrained)}
    lines = []
    for each in found:
        first = each.here[0]
        name = f"{first.statistic} of {first.quantity}" if first.statistic else first.quantity
        lines.append(
            [
                f"{each.probe}: {name}, {first.unit}",
                *(
                    [rows[0].arm, span(row.value for row in rows), *before(rows, untrained)]
                    for rows in (each.here, each.there)
                ),
                number(each.difference),
                "" if each.ratio is None else _ratio(each.ratio),
            ]
        )
    heads = [
        "number",
        "arm with a per-token norm",
        "reference",
        "difference",
        "difference / interval",
    ]
    lead = (
        "Main number of each probe in an arm with a per-token norm and in its static twin, or in plain SoLU if "
        "there is no twin. The last column is the difference of the means over seeds, divided by the joint half "
        "width of the intervals for other documents. It orders the table and is not a test: these numbers are "
        "exploratory, and a number about the spread of the gain differs from the static twin by construction. "
        "Probes that failed a control are left out."
    )
    return [
        Paragraph(lead, style="soft"),
        Table(heads, lines[:N_SHOWN]),
        *fold(
            f"{len(lines) - N_SHOWN} more",
            [Table(heads, lines[N_SHOWN:])] if lines[N_SHOWN:] else [],
        ),
    ]


def main_numbers(records: Sequence[Record]) -> dict[str, list[Measurement]]:
    """Return the main number of each run by probe, on one stream; probes that failed a control are left out."""
    rows = of_kind(records, Measurement)
    result = {}
    for probe in controls.in_order(records, {row.probe for row in rows}):
        words = controls.words_of(records, probe)
        if words is None or controls.standing(records, probe) == "failed":
            continue
        main = meaning.main(words, [row for row in rows if row.probe == probe])
        if main:
            result[probe] = [row for row in main if row.stream == main[0].stream]
    return result


def _contrasts(records: Sequence[Record]) -> list[Contrast]:
    result = []
    for probe, main in main_numbers(records).items():
        for arm in per_token(records):
            here = [row for row in main if row.arm == arm]
            for other in _references(records, arm):
                there = [row for row in main if row.arm == other]
                if here and there:
                    result.append(Contrast(probe, here, there))
                    break
    return result


def _references(records: Sequence[Record], arm: str) -> list[str]:
    """Return the arms to compare an arm with: its static twins, then plain arms."""
    known = settings(records)
    of = known[arm]
    alike = {name: each for name, each in known.items() if each.size == of.size}
    return [*twins(records, arm), *(name for name, each in alike.items() if each.role == "plain")]


def before(
    rows: Sequence[Measurement], untrained: Mapping[tuple[object, ...], Untrained]
) -> list[str]:
    """Return the span of the same numbers before training as one line of a cell; none without such numbers."""
    twins = [untrained[key] for row in rows if (key := number_key(row)) in untrained]
    return [f"untrained {span(each.value for each in twins)}"] if twins else []


def _ratio(value: float) -> str:
    return f"{value:.1f}" if value < MOST_RATIO else f"above {MOST_RATIO}"


def _mean(rows: Sequence[Number]) -> float:
    return statistics.fmean(row.value for row in rows if row.value is not None)


def _half_width(rows: Sequence[Measurement]) -> float | None:
    """Return the widest half width of the rows' intervals; 0 if the values are constant over tokens."""
    widths = []
    for row in rows:
        if row.constant:
            widths.append(0.0)
        elif row.low is None or row.high is None:
            return None
        else:
            widths.append((row.high - row.low) / 2)
    return max(widths)
