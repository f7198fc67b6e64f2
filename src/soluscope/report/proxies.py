"""The section on the automatic proxies for blind ratings, and its table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from soluscope.report.blocks import Block, Cell, Paragraph, Table
from soluscope.report.findings import estimate
from soluscope.report.rating import STAGES
from soluscope.results import Proxied, ProxyTerm, Record, of_kind

if TYPE_CHECKING:
    from rich.table import Table as Printed

LEAD = (
    "Programs compute these numbers; nobody has rated a neuron for them. A proxy sees stored examples of single "
    "neurons. It chooses on one half of the documents and is measured on the other."
)
CALIBRATION = (
    "An AUC is the probability that a neuron of the first group has a higher number than a neuron of the second: "
    ".5 if the proxy cannot distinguish the groups, 1 if it always can. Planted neurons fire for one class of "
    "tokens or for four unrelated classes (C10 and C11), and a person should call only the first interpretable. "
    "Untrained "
    "neurons are the neurons of the same arm before training. A small distance between two means is easily lost "
    "among other differences between neurons, even where their AUC is high."
)
UNRATED = (
    "No AUC against people's answers: too few of these neurons are rated. 'soluscope rate DIR' makes ratings, and "
    "'soluscope proxy DIR' compares them."
)
NO_USE = "does not distinguish planted neurons of one class from neurons of four classes"
OF_ARM = (ProxyTerm.MEAN, ProxyTerm.DIFFERENCE, ProxyTerm.STAGES)
OF_PROXY = (ProxyTerm.PLANTED, ProxyTerm.TWIN, ProxyTerm.RATINGS)
"""Terms of the two tables, in their order."""
HEADS = ("proxy", "", "activations", "estimate [95%, other neurons]", "neurons", "note")


def blocks(records: Sequence[Record]) -> list[Block]:
    """Return the section; empty without proxies."""
    rows = of_kind(records, Proxied)
    if not rows:
        return []
    result: list[Block] = [Paragraph(LEAD, lead="Not ratings.")]
    result += [Paragraph(text, style="warn") for text in _warnings(rows)]
    result += [Table(HEADS, _lines(rows, OF_ARM)), Paragraph(CALIBRATION, lead="Calibration.")]
    result += [Table(HEADS, _lines(rows, OF_PROXY))]
    if not any(row.term is ProxyTerm.RATINGS for row in rows):
        result.append(Paragraph(UNRATED, style="soft"))
    return result


def table(rows: Sequence[Proxied]) -> Printed:
    """Return all numbers as a table for the terminal."""
    from rich.table import Table as Printed
    from rich.text import Text

    result = Printed(title="automatic proxies, not ratings")
    for head in HEADS:
        result.add_column(Text(head), overflow="fold")
    for line in _lines(rows, (*OF_ARM, *OF_PROXY)):
        result.add_row(*(Text(cell if isinstance(cell, str) else "") for cell in line))
    return result


def _warnings(rows: Iterable[Proxied]) -> list[str]:
    """Return a sentence for each proxy that fails on the planted neurons."""
    failed = {
        row.label: None
        for row in rows
        if row.term is ProxyTerm.PLANTED and (row.low is None or row.low <= 0.5)
    }
    return [
        f"{label} {NO_USE}. Its numbers say nothing about readable neurons." for label in failed
    ]


def _lines(rows: Sequence[Proxied], terms: Sequence[ProxyTerm]) -> list[list[Cell]]:
    labels = dict.fromkeys(row.label for row in rows)
    return [
        [
            row.label,
            _name(row),
            STAGES.get(row.stage, row.stage),
            estimate(row, decimals=2),
            str(row.n),
            row.note,
        ]
        for label in labels
        for term in terms
        for row in rows
        if (row.label, row.term) == (label, term)
    ]


def _name(row: Proxied) -> str:
    """Return an arm and its number, or the calibration, in words."""
    if row.term is ProxyTerm.MEAN:
        return f"{row.arm}, before training: mean" if row.untrained else f"{row.arm}: mean"
    if row.term is ProxyTerm.DIFFERENCE:
        return f"{row.arm} minus {row.against}"
    return f"{row.arm}: {row.term}" if row.arm else str(row.term)
