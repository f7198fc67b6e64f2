"""Robustness to the learning rate, and the comparison at a fixed scale of the MLP's output.

Source: protocol.md section 4, "Robustness" and "Surfaces".
"""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from soluscope.report import where
from soluscope.report.blocks import Block, Paragraph, Table, plot
from soluscope.report.figures import Point, along, styles
from soluscope.report.findings import comparisons, estimate, listed, seeds, settings, sizes
from soluscope.results import Comparison, Record, Term

DESIGNS = {
    "alpha 1": "alpha is 1 in every arm, as published.",
    "alpha matched": "alpha is such that |mlp_out| / |resid_mid| starts as in plain GELU.",
}


def blocks(records: Sequence[Record]) -> list[Block]:
    """Return the losses along the common rates, each arm's sensitivity and the steps of the chain."""
    result: list[Block] = []
    for of_one in sizes(records).values():
        found = comparisons(of_one, Term.SENSITIVITY)
        if not found:
            continue
        result += [
            Paragraph(
                "Each arm was trained at the same learning rates, with alpha 1. Its rate sensitivity is the mean "
                "over these rates of its loss above that at its best rate, which was chosen on the select split. A "
                "loss counts at most as much as that of an untrained model. 0: every rate is as good as the best. "
                f"Here: {found[0].note.split(';')[0]}."
            ),
            *plot(_lines(of_one, found), "Loss on the report split against the learning rate"),
            Table(["arm", "rate sensitivity, nats [95%, new seeds]", "seeds", "note"],
                   [[row.arm, *_cells(row)] for row in found]),
        ]  # fmt: skip
        steps = comparisons(of_one, Term.SENSITIVITY_STEP)
        if steps:
            result += [
                Paragraph(
                    "The steps of the chain: sensitivity of the arm before a step minus that of the arm after it. "
                    "They add up to the difference between plain SoLU and the arm with a per-token norm."
                ),
                Table(
                    ["arm", "step", "adds", "sensitivity removed, nats [95%, new seeds]", "seeds", "note"],
                    [[row.arm, " to ".join(row.step), row.adds, *_cells(row)] for row in steps],
                ),
            ]  # fmt: skip
        parts = comparisons(of_one, Term.SENSITIVITY_PART)
        if parts:
            result += [
                Paragraph("The same steps, in three groups: one gain, a scale for each token, its gradient."),
                Table(
                    ["arm", "part", "sensitivity removed, nats [95%, new seeds]", "seeds", "note",
                     "against .005 nats"],
                    [[row.arm, str(row.part), *_cells(row), str(row.verdict)] for row in parts],
                ),
            ]  # fmt: skip
    return result


def designs(records: Sequence[Record]) -> list[Block]:
    """Return the main comparisons and their tokens at each fixed design; empty without designs."""
    result: list[Block] = []
    for design, meaning in DESIGNS.items():
        rows = [
            row
            for term in (Term.BENEFIT, Term.STATIC, Term.SHARE, Term.STEP)
            for row in comparisons(records, term, design=design)
        ]
        lines = [
            [
                row.arm,
                " ".join([row.term, " to ".join(row.step)]).strip(),
                row.against,
                *_cells(row),
            ]
            for row in rows
        ]
        if lines:
            heads = ["arm", "term", "against", "estimate [95%, new seeds]", "seeds", "note"]
            result += [Paragraph(f"{design}: {meaning}"), Table(heads, lines)]
            result += where.of_design(records, design)
    return result


def sentences(records: Sequence[Record]) -> list[str]:
    """Return, for each arm with a per-token norm, a sentence on how much less it depends on the learning rate."""
    result = []
    for of_one in sizes(records).values():
        known = {row.arm: row for row in comparisons(of_one, Term.SENSITIVITY)}
        by_arm: dict[str, list[Comparison]] = {}
        for step in comparisons(of_one, Term.SENSITIVITY_STEP):
            by_arm.setdefault(step.arm, []).append(step)
        for arm, steps in by_arm.items():
            first, last = known.get(steps[0].against), known.get(arm)
            if first is None or last is None:
                continue
            parts = [f"{step.adds or ' to '.join(step.step)} {estimate(step, 4)}" for step in steps]
            result.append(
                f"Robustness to the learning rate ({first.note.split(';')[0]}, {seeds(last.n)}): averaged over the "
                f"rates, {first.arm} loses {estimate(first, 4)} nats above its best rate and {arm} "
                f"{estimate(last, 4)}. The steps remove: {listed(parts)}."
            )
    return result


def _lines(records: Sequence[Record], found: Sequence[Comparison]) -> go.Figure:
    """Draw the losses of each arm with a sensitivity along its rates."""
    known = settings(records)
    loss = {row.arm: row for row in comparisons(records, Term.LOSS)}
    points = []
    for row in found:
        of = known[row.arm]
        for arm, each in known.items():
            on_line = each.family == of.family and each.values.get("mlp_out_scale", 1.0) == 1
            if on_line and arm in loss:
                points.append(Point(each.values["lr"], loss[arm], row.arm, ringed=arm == row.arm))
    look = styles(found)
    return along({"alpha 1": points}, "learning rate", look, {arm: arm for arm in look})


def _cells(row: Comparison) -> list[str]:
    return [estimate(row, 4), str(row.n), row.note]
