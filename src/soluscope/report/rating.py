"""The section on people's blind ratings of neurons, and its table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from soluscope.report.blocks import Block, Cell, Paragraph, Table
from soluscope.report.findings import estimate, listed, number
from soluscope.results import Rated, Rating, Record, of_kind
from soluscope.text import plural

if TYPE_CHECKING:
    from rich.table import Table as Printed

LEAD = (
    "People saw examples of single neurons, without knowing the model, and answered whether 80% or more of "
    "the firings can be explained by a single rule or category (Elhage et al. 2022, section 6.1). A share is "
    "the mean over an arm's neurons and over these raters, from a mixed logistic model. Its interval is for "
    "other neurons of these models."
)
NONE = (
    "Nobody has rated the neurons of this study. To rate them without knowing the model, which takes one to two "
    "minutes per neuron: 'soluscope rate DIR', then 'soluscope rate DIR --analyse'."
)
MODES = {"top": "largest activations", "full": "whole range of activation"}
STAGES = {"mid": "before the norm", "post": "after the norm", "": ""}
TERMS = {
    Rating.SHARE: "share interpretable",
    Rating.DIFFERENCE: "difference",
    Rating.STAGES: "after minus before the norm",
}
"""Quantities of the first table, in its order."""


def blocks(records: Sequence[Record]) -> list[Block]:
    """Return the section: the shares and their differences, then the raters; without ratings, how to make some."""
    rows = of_kind(records, Rated)
    if not rows:
        return [Paragraph(NONE, style="soft")]
    raters = sorted({row.rater for row in rows if row.term is Rating.SECONDS})
    n = sum(row.n for row in rows if row.term is Rating.SECONDS)
    by = f"{n} {plural(n, 'rating')} by {len(raters)} {plural(len(raters), 'person')}".replace(
        "persons", "people"
    )
    result: list[Block] = [Paragraph(LEAD), Paragraph(f"{by}. {_power(rows)}".strip())]
    shares = _lines(rows)
    if shares:
        heads = [
            "",
            "examples",
            "activations",
            "estimate [95%, other neurons]",
            "ratings",
            "neurons",
            "note",
        ]
        result.append(Table(heads, shares))
    return [*result, *_raters(rows)]


def table(rows: Sequence[Rated]) -> Printed:
    """Return the shares and differences as a table for the terminal."""
    from rich.table import Table as Printed
    from rich.text import Text

    result = Printed()
    for head in ("", "examples", "activations", "estimate", "ratings", "neurons", "note"):
        result.add_column(Text(head), overflow="fold")
    for line in [*_lines(rows), *_agreement(rows)]:
        result.add_row(*(Text(cell if isinstance(cell, str) else "") for cell in line))
    return result


def _lines(rows: Sequence[Rated]) -> list[list[Cell]]:
    return [
        [
            f"{_name(row)}",
            MODES.get(row.mode, row.mode),
            STAGES.get(row.stage, row.stage),
            estimate(row, decimals=2),
            str(row.n),
            str(row.n_clusters),
            row.note,
        ]
        for term in TERMS
        for row in rows
        if row.term is term
    ]


def _name(row: Rated) -> str:
    """Return an arm, a difference of arms, or a difference of stages in words."""
    if row.untrained:
        return "all arms before training: share interpretable"
    if row.term is Rating.DIFFERENCE:
        return f"{row.arm} minus {row.against}"
    return f"{row.arm}: {TERMS[row.term]}"


def _agreement(rows: Sequence[Rated]) -> list[list[Cell]]:
    """Return the raters' numbers as lines of the first table."""
    terms = (Rating.BETWEEN, Rating.WITHIN, Rating.KNOWN, Rating.SECONDS)
    return [
        [
            f"{listed([row.rater, row.against]) if row.against else row.rater}: {row.term}",
            MODES.get(row.mode, row.mode),
            "",
            f"{estimate(row, decimals=2)}{' s' if row.term is Rating.SECONDS else ''}",
            str(row.n),
            "",
            row.note,
        ]
        for term in terms
        for row in rows
        if row.term is term
    ]


def _raters(rows: Sequence[Rated]) -> list[Block]:
    """Return the table of agreement and of the answers to planted neurons, with the meaning of its numbers."""
    lines = _agreement(rows)
    if not lines:
        return []
    text = (
        "Kappa is the agreement of two answers beyond chance: 1 if all answers are equal, 0 at chance. With "
        "oneself, it compares a rater's two answers to the same examples. A planted neuron is made from the "
        "study's text. It follows one rule or four unrelated rules, so its answer is known."
    )
    heads = ["", "examples", "", "estimate [95%]", "ratings", "", "note"]
    kept = [[line[0], line[1], line[3], line[4], line[6]] for line in lines]
    return [Paragraph(text), Table([head for i, head in enumerate(heads) if i not in (2, 5)], kept)]


def _power(rows: Sequence[Rated]) -> str:
    least = [row for row in rows if row.term is Rating.DETECTABLE]
    return (
        f"A study of this size finds a difference of {number(least[0].value)} between two arms in 85% of cases "
        f"({least[0].note})."
        if least
        else ""
    )
