"""The numbers by which the arms differ most from plain SoLU, chosen over all probes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from soluscope.report import controls, figures
from soluscope.report.blocks import Block, Cell, Line, Paragraph, Table
from soluscope.report.contrasts import Contrast, before
from soluscope.report.findings import by_stream, number_key, settings, sizes, span
from soluscope.results import Measurement, ProbeWords, Record, Untrained, of_kind

N_COLUMNS = 4
"""Largest number of columns; each is of another probe."""
LARGEST = "largest difference / interval"
N_ARMS = 9
"""Largest number of arms in the table. With more arms, it has plain SoLU, the baselines and the arms with a
per-token norm."""
ROLES = ("plain", "baseline", "per_token")


@dataclass(frozen=True)
class Candidate:
    """A number of a probe in each arm, one row for each seed."""

    by_arm: Mapping[str, Sequence[Measurement]]
    ratio: float
    """Largest difference between an arm and plain SoLU, divided by the joint half width of the intervals."""

    @property
    def first(self) -> Measurement:
        return next(iter(self.by_arm.values()))[0]


def blocks(records: Sequence[Record]) -> list[Block]:
    """Return a table with one column per number, for the largest size; empty if no number can be compared.

    The candidates are the numbers in the validated probes' figures of dots, on natural text or else one stream. A
    number whose interval has no width, such as the gain without a norm, is compared with no arm.
    """
    words = _validated(records)
    for of_one in reversed(sizes(records).values()):
        found = _candidates(of_one, words)
        if found:
            return _table(of_one, words, found)
    return []


def _table(
    records: Sequence[Record], words: Mapping[str, ProbeWords], found: Sequence[Candidate]
) -> list[Block]:
    untrained = {number_key(each): each for each in of_kind(records, Untrained)}
    best: dict[str, Candidate] = {}
    for each in sorted(found, key=lambda each: -each.ratio):
        best.setdefault(each.first.probe, each)
    chosen = [*best.values()][:N_COLUMNS]
    lines: list[list[Cell]] = [["definition", *(_meaning(words, each.first) for each in chosen)]]
    for arm in _arms(records):
        cells = (each.by_arm.get(arm, ()) for each in chosen)
        lines.append(
            [arm, *([span(row.value for row in rows), *before(rows, untrained)] for rows in cells)]
        )
    lines.append([LARGEST, *(f"{each.ratio:.1f}" for each in chosen)])
    lead = (
        f"Of {len(found)} numbers of the validated probes, these differ most between an arm and plain SoLU. The "
        "last line is that difference, divided by the joint half width of the intervals for other documents. No "
        "test corrects for this choice, so these numbers are exploratory; the tab Probes has the confirmatory "
        "tests, with corrected p-values. A cell has all seeds, and the same models before training."
    )
    return [
        Paragraph(lead, style="soft"),
        Table(["", *(_name(words, each.first) for each in chosen)], lines, n_text=1 + len(chosen)),
    ]


def _validated(records: Sequence[Record]) -> dict[str, ProbeWords]:
    """Return the descriptions of the probes that passed their controls, in the order of their sections."""
    probes = {row.probe for row in of_kind(records, Measurement)}
    found = {
        probe: controls.words_of(records, probe)
        for probe in controls.in_order(records, probes)
        if controls.standing(records, probe) == "passed"
    }
    return {probe: words for probe, words in found.items() if words is not None}


def _candidates(records: Sequence[Record], words: Mapping[str, ProbeWords]) -> list[Candidate]:
    """Return the numbers that can be compared between plain SoLU and at least one other arm."""
    plain = next(
        (arm for arm, each in settings(records).items() if each.role == "plain"),
        "",
    )
    result = []
    for rows in _numbers(records, words):
        by_arm: dict[str, list[Measurement]] = {}
        for row in rows:
            by_arm.setdefault(row.arm, []).append(row)
        bounded = {arm: rows for arm, rows in by_arm.items() if all(map(_has_width, rows))}
        there = bounded.pop(plain, [])
        ratios = [Contrast(rows[0].probe, here, there).ratio for here in bounded.values() if there]
        if known := [ratio for ratio in ratios if ratio is not None]:
            result.append(Candidate(by_arm, max(known)))
    return result


def _has_width(row: Measurement) -> bool:
    return row.low is not None and row.high is not None and row.low < row.high


def _numbers(
    records: Sequence[Record], words: Mapping[str, ProbeWords]
) -> Iterator[list[Measurement]]:
    """Yield the rows of each number in the probes' figures of dots, on natural text or else the first stream."""
    of_probe: dict[str, list[Measurement]] = {}
    for row in of_kind(records, Measurement):
        of_probe.setdefault(row.probe, []).append(row)
    for probe, of_words in words.items():
        found: dict[tuple[str, str], set[Measurement]] = {}
        for spec in of_words.figures:
            if spec.kind == "dots" and not spec.group:
                for row in of_probe.get(probe, []):
                    if not row.group and figures.is_drawn(row, spec):
                        found.setdefault((row.quantity, row.statistic), set()).add(row)
        for rows in found.values():
            stream = min(rows, key=by_stream).stream
            yield sorted((row for row in rows if row.stream == stream), key=lambda row: row.run)


def _arms(records: Sequence[Record]) -> list[str]:
    """Return the arms of the table, in their order on the page."""
    known = settings(records)
    arms = [arm for arm in figures.styles(records) if arm in known]
    return [arm for arm in arms if len(arms) <= N_ARMS or known[arm].role in ROLES]


def _name(words: Mapping[str, ProbeWords], row: Measurement) -> str:
    name = f"{row.statistic} of {row.quantity}" if row.statistic else row.quantity
    return f"{words[row.probe].section} {name}, {row.unit}"


def _meaning(words: Mapping[str, ProbeWords], row: Measurement) -> Cell:
    known = words[row.probe].quantities.get(row.quantity)
    return [Line(known.meaning, "soft")] if known else ""
