"""The tokens at which the best static arm loses more than an arm with a per-token norm.

Source: protocol.md section 4, "Where".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from soluscope.report import figures
from soluscope.report.blocks import Block, Bullets, Paragraph, Table, plot
from soluscope.report.figures import Style
from soluscope.report.findings import (
    comparisons,
    estimate,
    for_these_models,
    nothing_at_high_gain,
    number,
    of_size,
    remarks,
    rescales,
    seeds,
    sizes,
)
from soluscope.report.verdicts import SUPPLIED
from soluscope.results import HIGH_GAIN, Located, Record, Term, Where, of_kind

LEAD = (
    "Loss of the best static arm minus loss of the arm with LayerNorm, both trained, token by token. Tokens are "
    "sorted by LayerNorm's log gain and by K_eff, the number of neurons that share a token's code: Q4 has the "
    "highest values. Lower and upper: the halves by K_eff of tokens with equal gain. Each run's tokens are sorted "
    "by the means over the other seeds. H-dyn predicts that the static arm loses more at high gain, and H-smear "
    "that it does so at high gain and high K_eff. Two contrasts test this, at equal loss; their p-values are "
    "corrected over all arms, and all other rows are exploratory. Bars as above."
)
MEANINGS = {
    Where.DIFFUSE: "The static arm loses more at tokens of high gain, and of these at the diffuse codes, as "
    "H-smear predicts.",
    Where.HIGH_GAIN: "The static arm loses more at tokens of high gain, and no more at their diffuse codes than "
    "at others. H-dyn predicts this, and H-smear does not.",
    Where.ALL_DIFFUSE: "The static arm loses more at tokens of high gain. Their codes are all equally diffuse, so "
    "this does not distinguish H-smear from H-dyn.",
    Where.CODE_OPEN: "The static arm loses more at tokens of high gain. It is not settled at which codes.",
    Where.NOT_HIGH_GAIN: "The static arm loses no more at tokens of high gain than at others.",
    Where.OPEN: "It is not settled at which tokens the arms differ.",
}  # fmt: skip
"""Meaning of each verdict in words."""


def blocks(records: Sequence[Record], look: Mapping[str, Style]) -> list[Block]:
    """Return the verdicts, the differences by their tokens, and their table; empty without losses by token."""
    table = _table(records)
    if not table:
        return []
    result: list[Block] = [Bullets(sentences(records)), Paragraph(LEAD)]
    for size, of_one in sizes(records).items():
        result += plot(figures.where(of_one, look), of_size("Static minus LN by tokens", size))
    return [*result, *table]


def of_design(records: Sequence[Record], design: str) -> list[Block]:
    """Return the verdicts and the table of a fixed design; empty without losses by token."""
    table = _table(records, design)
    return [Bullets(sentences(records, design)), *table] if table else []


def _table(records: Sequence[Record], design: str = "") -> list[Block]:
    rows = [
        row
        for term in (Term.CONTRAST, Term.WHERE)
        for row in comparisons(records, term, design=design)
    ]
    lines = []
    for row in rows:
        fixed = for_these_models(records, row)
        numbers = [estimate(row, 4), estimate(fixed, 4) if fixed else "", str(row.n)]
        verdict = "" if row.verdict is None else str(row.verdict)
        lines.append([f"{row.arm}: {row.group}", *numbers, verdict, remarks(row)])
    heads = ["", "static minus LN, nats [95%, new seeds and documents]", "[95%, these models]", "seeds",
             "against .005 nats", "note"]  # fmt: skip
    return [Table(heads, lines)] if lines else []


def sentences(records: Sequence[Record], design: str = "") -> list[str]:
    """Return sentences on each arm with a per-token norm: where the static arm loses more, with the numbers."""
    return [
        f"Where {each.against} differs from {each.arm} ({seeds(each.n)}): {MEANINGS[each.where]}"
        f"{_smear(records, each)}{_supplied(records, each)}{_numbers(records, each)}{_agreement(each)}"
        for each in of_kind(records, Located)
        if each.design == design
    ]


def _smear(records: Sequence[Record], each: Located) -> str:
    """Return a sentence on H-smear where tokens of high gain lose no more than others; empty elsewhere."""
    if each.where is not Where.NOT_HIGH_GAIN:
        return ""
    if nothing_at_high_gain(records, each.arm, each.design):
        return " Its loss there is equivalent or lower, so there is no sign of H-smear here."
    return (
        " This does not rule out H-smear, because most tokens may have nearly the same high gain."
    )


def _supplied(records: Sequence[Record], each: Located) -> str:
    """Return a sentence on a static arm in which ln_final may rescale each token; empty for other arms."""
    is_zero = each.where is Where.NOT_HIGH_GAIN
    return SUPPLIED[rescales(records, each.against)] if is_zero else ""


def _numbers(records: Sequence[Record], each: Located) -> str:
    by_tokens = comparisons(records, Term.WHERE, each.arm, design=each.design)
    rows = [row for row in by_tokens if row.group == HIGH_GAIN]
    rows += comparisons(records, Term.CONTRAST, each.arm, design=each.design)
    shown = [f"{row.group} {estimate(row, 4)}" for row in rows]
    return f" Differences in nats [95%, new seeds]: {'; '.join(shown)}." if shown else ""


def _agreement(each: Located) -> str:
    if each.agreement is None:
        return ""
    return (
        f" Log gains correlate by {number(each.agreement, 2)} with the mean over the other seeds."
    )
