"""The baseline's loss against its size, and each arm's effective size, as in Figure 1 of the SoLU paper.

Source: Elhage et al. 2022, section 5; protocol.md section 5, "Effective size".
"""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from soluscope.report import figures
from soluscope.report.blocks import Block, Bullets, Paragraph, Table, plot
from soluscope.report.figures import Point, Style, along
from soluscope.report.findings import comparisons, number, seeds, series
from soluscope.report.sheet import DOTTED
from soluscope.results import (
    Bound,
    Comparison,
    Curve,
    Multiplier,
    Record,
    ScalingCurve,
    Term,
    of_kind,
)

LEAD = (
    "The multiplier of an arm is the number of times by which the baseline must be larger to have the arm's loss. "
    "Sizes are counted in weights of the blocks' matrices, without embeddings, biases and norms. An arm's loss is "
    "the curve's at its own size plus its difference from the baseline, paired by seed. Beyond the largest and the "
    "smallest baseline the curve is not continued: a multiplier there is a bound. The intervals are 95%, for new "
    "seeds and documents, and hold if the curve has this form."
)
WEIGHTS = "weights"


def blocks(records: Sequence[Record]) -> list[Block]:
    """Return the curve, the multipliers and their sentences; empty in a study of one size."""
    curves = of_kind(records, ScalingCurve)
    if not curves:
        return []
    rows = of_kind(records, Multiplier)
    result: list[Block] = [Bullets([*map(_about, curves), *sentences(records)]), Paragraph(LEAD)]
    look = figures.styles_of(list(dict.fromkeys(series(records).values())))
    for curve in curves:
        of_curve = [row for row in rows if row.against in curve.arms]
        result += plot(_losses(records, curve, of_curve, look), "Loss against the size")
        shown = [row for row in of_curve if row.curve is _main(of_curve)]
        kind = "by the power law" if _main(of_curve) is Curve.POWER_LAW else "between sizes"
        result += plot(
            figures.bars(shown, series(records), look, 1.0),
            f"Effective size, {kind}",
            "Bars begin at 1, the baseline of the same size. A triangle marks a bound.",
        )
    return [*result, _table(records, rows)] if rows else result


def sentences(records: Sequence[Record]) -> list[str]:
    """Return a sentence for each arm and size, by the power law, or else between sizes."""
    rows = of_kind(records, Multiplier)
    return [
        _sentence(row)
        for curve in of_kind(records, ScalingCurve)
        for of_curve in [[row for row in rows if row.against in curve.arms]]
        for row in of_curve
        if row.curve is _main(of_curve)
    ]


def _main(rows: Sequence[Multiplier]) -> Curve:
    return Curve.POWER_LAW if any(row.curve is Curve.POWER_LAW for row in rows) else Curve.LOCAL


def _about(curve: ScalingCurve) -> str:
    """Return a sentence on the baseline's curve, or on why there is none."""
    if curve.floor is None or curve.centre is None:
        use = " Multipliers come from straight lines between the sizes." if curve.losses else ""
        return f"The baseline's loss has no fitted curve: {curve.note}.{use}"
    text = (
        f"The baseline's loss over {len(curve.n_weights)} sizes ({seeds(curve.n)}) is about "
        f"{number(curve.floor)} + {number(curve.scale)} (n / {number(curve.centre)})^-{number(curve.exponent)} "
        f"nats, with n the number of weights; no size is farther from it than {number(curve.misfit)} nats."
    )
    return f"{text} {curve.note[:1].upper()}{curve.note[1:]}." if curve.note else text


def _sentence(row: Multiplier) -> str:
    where = f" at {row.size}" if row.size else ""
    if row.bound is not Bound.NONE:
        side, end = ("below", "largest") if row.bound is Bound.AT_LEAST else ("above", "smallest")
        return (
            f"The loss of {row.arm}{where} lies {side} that of the {end} baseline, so its multiplier is "
            f"{row.bound} {number(row.value)}{_interval(row)}."
        )
    return f"{row.arm}{where} has the loss of a baseline of {number(row.value)} times its size{_interval(row)}."


def _interval(row: Multiplier) -> str:
    if row.low is None or row.high is None:
        return " (no interval)"
    low = f"{'below ' if row.low_is_bound else ''}{number(row.low)}"
    high = f"{'above ' if row.high_is_bound else ''}{number(row.high)}"
    return f" [{low}, {high}]"


def _losses(
    records: Sequence[Record],
    curve: ScalingCurve,
    rows: Sequence[Multiplier],
    look: dict[str, Style],
) -> go.Figure:
    """Draw the losses of all arms against their weights, with the fitted curve."""
    n_weights = dict(zip(curve.arms, curve.n_weights, strict=True))
    n_weights |= {row.arm: row.n_weights for row in rows}
    line_of = series(records)
    points = [
        Point(n_weights[row.arm], row, line_of[row.arm])
        for row in comparisons(records, Term.LOSS)
        if row.arm in n_weights and isinstance(row, Comparison)
    ]
    drawn = along({"loss": points}, WEIGHTS, look, {line: line for line in look})
    if curve.floor is None or curve.scale is None or curve.exponent is None or not curve.centre:
        return drawn
    low, high = curve.n_weights[0], curve.n_weights[-1]
    x = [low * (high / low) ** (i / 60) for i in range(61)]
    y = [curve.floor + curve.scale * (n / curve.centre) ** -curve.exponent for n in x]
    drawn.add_scatter(
        x=x, y=y, mode="lines", name="fitted curve of the baseline", hoverinfo="skip",
        line=DOTTED,
    )  # fmt: skip
    return drawn


def _table(records: Sequence[Record], rows: Sequence[Multiplier]) -> Table:
    lines = [
        [row.arm, row.size, f"{row.n_weights:,}", str(row.curve),
         f"{'' if row.bound is Bound.NONE else f'{row.bound} '}{number(row.value)}{_interval(row)}", str(row.n),
         row.against]
        for row in rows
    ]  # fmt: skip
    heads = ["arm", "size", WEIGHTS, "curve", "multiplier [95%]", "seeds", "baseline"]
    return Table(heads, lines)
