"""Numbers against one setting: a constant gain, the entropy penalty, or the number of neurons.

Source: protocol.md section 7, P25.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from soluscope.report import figures
from soluscope.report.blocks import Block, Bullets, Paragraph, Table, fold, plot
from soluscope.report.figures import Point, Style, along
from soluscope.report.findings import comparisons, estimate, number, seeds, settings
from soluscope.results import AtDose, Ladder, Record, Term, of_kind

BEFORE = "before training"
GREY = Style("#777777", "circle", "3px,4px")
"""Style of the numbers before training."""
PROXY = (
    "Only people can say how readable a neuron is. Proxies stand in for them: the F1 of a neuron's best rule "
    "(after 'soluscope neurons'), and the kurtosis of its activations. SoLU gives heavy tails to any input, so "
    "read the kurtosis together with that over Gaussian pre-activations."
)
MEANING = (
    "Means over seeds; bars are 95% intervals for new seeds on these documents, and exploratory. Grey: the same "
    "numbers before training. max_p is the largest weight of SoLU's softmax over neurons, exp_entropy the "
    "exponential of its entropy H, the number of neurons that share it; medians over tokens without BOS. "
)


@dataclass(frozen=True)
class _Words:
    """Texts about a ladder's setting."""

    axis: str
    lead: str
    caption: str


WORDS = {
    Ladder.GAIN: _Words(
        "gain",
        "The arms differ in one constant gain for all tokens, so no LayerNorm takes part. A higher gain lets the "
        "output be large while the softmax stays flat. ",
        "Against the constant gain",
    ),
    Ladder.ENTROPY: _Words(
        "penalty lambda",
        "The arms differ in the weight lambda of a penalty in the training loss, lambda (log n - H). Above 0 it "
        "makes the softmax less peaked, below 0 more. The losses here do not contain the penalty. ",
        "Against the weight of the entropy penalty",
    ),
    Ladder.WIDTH: _Words(
        "d_mlp",
        "The arms differ in the number of neurons at one d_model. SoLU's outputs are about 1 / d_mlp, so the "
        "output of a wider layer starts smaller unless a norm or a gain makes up for it. ",
        "Against the number of neurons",
    ),
}


def blocks(records: Sequence[Record], setting: Ladder) -> list[Block]:
    """Return the sentences, curves, trade-off and table of a setting's ladders; empty without such a ladder."""
    rows = [row for row in of_kind(records, AtDose) if row.setting is setting]
    zero = {row.quantity for row in rows} - {row.quantity for row in rows if row.value}
    rows = [row for row in rows if row.quantity not in zero]  # r, where no arm has an epsilon
    if not rows:
        return []
    words = WORDS[setting]
    look = _look(rows)
    has_proxy = any(row.proxy for row in rows)
    lead = words.lead + MEANING + (PROXY if has_proxy else "")
    found = sentences(rows)
    return [
        *([Bullets(found)] if found else []),
        Paragraph(lead),
        *plot(_curves(records, rows, setting, look), words.caption),
        *_trade_off(rows, look),
        *fold("Table: numbers at each dose", [_table(rows)]),
    ]


def sentences(rows: Sequence[AtDose]) -> list[str]:
    """Return a sentence for each ladder: the changes from its reference dose to its last one, and the best dose."""
    result = []
    for line in _lines(rows):
        of_line = [row for row in rows if _line(row) == line and not row.untrained]
        losses = {row.x: row for row in of_line if row.quantity == "loss" and row.since is None}
        changes = [row for row in of_line if row.since is not None]
        last = max(changes, key=lambda row: abs(row.x), default=None)
        if last is None:
            continue
        parts = [
            f"{row.quantity}{' (a proxy)' if row.proxy else ''} {estimate(row)}"
            for row in changes
            if row.x == last.x
        ]
        axis = WORDS[last.setting].axis
        text = (
            f"{line}: from {axis} {number(last.since)} to {number(last.x)} ({seeds(last.n)}), these numbers change "
            f"by: {'; '.join(parts)}."
        )
        if losses:
            best = min(losses.values(), key=lambda row: row.value or 0.0)
            text += f" The loss is least at {axis} {number(best.x)}: {estimate(best, 4)}."
        result.append(text)
    return result


def _line(row: AtDose) -> str:
    return ", ".join(part for part in (row.variant, row.fixed) if part)


def _lines(rows: Iterable[AtDose]) -> list[str]:
    return list(dict.fromkeys(map(_line, rows)))


def _look(rows: Sequence[AtDose]) -> dict[str, Style]:
    """Return a style for each ladder, and for its numbers before training."""
    lines = _lines(rows)
    return figures.styles_of(lines) | {f"{line}, {BEFORE}": GREY for line in lines}


def _curves(
    records: Sequence[Record], rows: Sequence[AtDose], setting: Ladder, look: dict[str, Style]
) -> go.Figure:
    """Draw one panel per quantity."""
    panels: dict[str, list[Point]] = {}
    for row in rows:
        if row.since is None:
            title = f"{row.quantity} (proxy)" if row.proxy else row.quantity
            line = f"{_line(row)}, {BEFORE}" if row.untrained else _line(row)
            panels.setdefault(title, []).append(Point(row.x, row, line))
    if setting is Ladder.WIDTH and (points := _above_baseline(records, rows)):
        first, *others = panels
        panels = {first: panels[first], "loss minus the baseline": points} | {
            title: panels[title] for title in others
        }
    names = {line: BEFORE if line.endswith(BEFORE) else line for line in look}
    ranked = setting is Ladder.ENTROPY  # 0 and negative weights have no logarithm
    return along(panels, WORDS[setting].axis, look, names, ranked=ranked)


def _above_baseline(records: Sequence[Record], rows: Sequence[AtDose]) -> list[Point]:
    """Return each arm's loss minus that of the baseline of its size, with both intervals."""
    known = settings(records)
    baselines = {arm for arm, each in known.items() if each.role == "baseline"}
    at = {row.arm: (row.x, _line(row)) for row in rows}
    return [
        Point(at[row.arm][0], row, at[row.arm][1])
        for cluster in ("seed", "document")
        for row in comparisons(records, Term.DIFFERENCE, cluster=cluster)
        if row.against in baselines and row.arm in at
    ]


def _trade_off(rows: Sequence[AtDose], look: dict[str, Style]) -> list[Block]:
    """Draw the loss against each proxy, with one line for each ladder, in the order of the doses."""
    own = [row for row in rows if row.since is None and not row.untrained]
    loss = {(_line(row), row.x): row for row in own if row.quantity == "loss"}
    panels: dict[str, list[figures.Pair]] = {}
    for row in own:
        other = loss.get((_line(row), row.x))
        if row.proxy and other is not None:
            pair = figures.Pair(row, other, _line(row), f"{number(row.x)}")
            panels.setdefault(row.quantity, []).append(pair)
    return plot(
        figures.against_each_other(panels, look),
        "Loss against the proxies of readability",
        "One line for each ladder, in the order of its doses, which are written beside the points.",
    )


def _table(rows: Sequence[AtDose]) -> Table:
    own = [row for row in rows if row.since is None and not row.untrained]
    others = {
        (_line(row), row.x, row.quantity, row.untrained): row
        for row in rows
        if row.untrained or row.since is not None
    }
    lines = []
    for row in own:
        key = _line(row), row.x, row.quantity
        texts = [
            estimate(each) if (each := others.get((*key, untrained))) else ""
            for untrained in (False, True)
        ]
        name = f"{row.statistic} of {row.quantity}" if row.statistic == "median" else row.quantity
        proxy = " (proxy)" if row.proxy else ""
        lines.append(
            [key[0], number(row.x), name + proxy, estimate(row), *texts, str(row.n), row.unit]
        )
    heads = [
        "arms", "dose", "number", "mean [95%, new seeds]", "minus that at the reference dose", BEFORE, "seeds",
        "unit",
    ]  # fmt: skip
    return Table(heads, lines)
