"""The first screen: the answer in a sentence, one figure, three facts, and how sure the answer is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from soluscope.report import controls, figures, pretrained, verdicts, words
from soluscope.report.blocks import (
    Block,
    Bullets,
    Fold,
    Paragraph,
    Table,
    Tile,
    Tiles,
    fold,
    plot,
)
from soluscope.report.figures import Style
from soluscope.report.findings import (
    comparisons,
    engagement,
    estimate,
    gain_varies,
    measured,
    normed,
    number_key,
    seeds,
    settings,
    sizes,
    span,
    twins,
)
from soluscope.results import Comparison, Measurement, Part, Record, Term, Untrained, of_kind

N_ARMS = 9
"""Largest number of arms in the figure; with more arms, it shows the chain and the baselines only."""
GLANCE = {
    "sd of log g": ("engagement", "log gain", "sd", 4),
    "freezing the gain costs, nats": ("scale_freeze", "frozen at geometric mean", "mean", 4),
    "the same with ln_final's scale frozen": (
        "scale_freeze", "frozen at geometric mean, final norm frozen", "mean", 4,
    ),
    "|mlp_out| / |resid_mid|": ("scale_freeze", "|mlp_out| / |resid_mid|", "median", 1),
}  # fmt: skip
"""Lines of the table at a glance: a probe, its quantity, the statistic, and the decimals shown."""
N_LINES = 3
"""Largest number of arms that a tile lists."""


def blocks(
    all_records: list[Record], compared: list[Record], look: Mapping[str, Style]
) -> list[Block]:
    """Return the first screen.

    Args:
        all_records: the study's records.
        compared: the records of the arms that are compared.
        look: a style for each arm.
    """
    return [
        *_warnings(words.warnings(all_records)),
        Paragraph(" ".join(words.first_answer(all_records)), style="first"),
        *_beside(all_records),
        *_figure(compared, look),
        *_tiles(all_records, compared),
        Paragraph("; ".join(words.certainty(all_records)) + ".", "How sure is this?", "soft"),
        *([Paragraph(left, style="soft")] if (left := words.not_shown(all_records)) else []),
        *_further(all_records),
    ]


def _beside(records: Sequence[Record]) -> list[Block]:
    """Return the verdicts on the best static arm, which stand between the answer and its figure."""
    sentences = verdicts.static(pretrained.trained(records))
    return [Paragraph(" ".join(sentences), style="soft")] if sentences else []


def _further(records: Sequence[Record]) -> list[Block]:
    """Return the rest of the answer, with the verdicts at each fixed scale of the MLP's output folded."""
    trained = pretrained.trained(records)
    sentences, fixed = verdicts.details(trained), verdicts.at_fixed_scales(trained)
    shown: list[Block] = [Paragraph(" ".join(sentences), style="soft")] if sentences else []
    return [
        *shown,
        *fold("With the scale of the MLP's output fixed", [Bullets(fixed)] if fixed else []),
    ]


def _warnings(texts: Sequence[str]) -> list[Block]:
    """Return the warnings folded to one line, so that the answer and its figure stay on the first screen.

    The style sheet cuts the first warning to one line until the reader opens it; the others follow below it.
    """
    if not texts:
        return []
    first, *others = texts
    summary = f"{len(texts)} warnings: {first}" if others else first
    return [Fold(summary, [Bullets(others)] if others else [], "warn brief")]


def _figure(records: Sequence[Record], look: Mapping[str, Style]) -> list[Block]:
    """Draw the loss of each arm relative to plain SoLU; of several sizes, the largest is drawn."""
    of_size = sizes(records)
    for size, of_one in reversed(of_size.items()):
        known = settings(of_one)
        plain = {arm for arm, setting in known.items() if setting.role == "plain"}
        rows = [
            row
            for cluster in ("seed", "document")
            for row in comparisons(of_one, Term.DIFFERENCE, cluster=cluster)
            if row.against in plain
        ]
        if not rows:
            continue
        chains = _chains(of_one)
        arms = [arm for arm in look if arm in {row.arm for row in rows}]
        shown = [
            arm
            for arm in arms
            if len(arms) <= N_ARMS
            or known[arm].role in ("baseline", "per_token")
            or any(arm in chain for chain in chains)
        ]
        left_out = len(arms) - len(shown)
        drawn = figures.relative([row for row in rows if row.arm in shown], shown, chains, look)
        remark = (
            "Left of 0 is better. Thick bar: 95% interval for these models; thin bar: for new seeds too (arrow: it "
            "continues). Dotted: steps from SoLU to LayerNorm. kappa = eps d_mlp^2: near 0, LayerNorm's gain "
            "follows each token; at 41.9, as in SoLU-1L, eps holds it nearly constant. "
            "Static gain: one for all tokens."
        )
        if len({setting.values.get("mlp_out_scale") for setting in known.values()}) > 1:
            remark += " alpha: a constant factor of the MLP's output."
        remark += f" The section Paired differences has {left_out} more arms." if left_out else ""
        caption = f"Loss minus the loss of {rows[0].against}"
        caption += f" ({size})" if len(of_size) > 1 else ""
        return plot(drawn, caption, remark)
    return []


def _chains(records: Sequence[Record]) -> list[list[str]]:
    """Return, for each arm with a per-token norm, the arms of its chain, from plain SoLU to the arm itself."""
    by_arm: dict[str, list[str]] = {}
    for step in comparisons(records, Term.STEP):
        by_arm.setdefault(step.arm, []).append(step.against)
    return [[*chain, arm] for arm, chain in by_arm.items()]


def _tiles(all_records: list[Record], records: list[Record]) -> list[Block]:
    """Return the facts: the benefit of LN, its share that static arms miss, the gain's variation, and the rates."""
    arms = [*pretrained.arms(records), *normed(records)]
    if not arms:
        return []
    benefits, shares = (
        [row for arm in arms for row in comparisons(records, term, arm)]
        for term in (Term.BENEFIT, Term.SHARE)
    )
    return [
        Tiles(
            [
                _compared("Benefit of LayerNorm", benefits, " nats", 4),
                _compared("Share of it that no static gain reached (Phi_dyn)", shares, "", 2),
                _gain(all_records, records, arms),
                *_rates(all_records),
            ]
        )
    ]


def _rates(records: Sequence[Record]) -> list[Tile]:
    """Return the tile on the dependence on the learning rate; none without a line of rates."""
    rows = [row for row in comparisons(records, Term.SENSITIVITY_PART) if row.part is Part.ALL]
    if not rows:
        return []
    label = "Robustness: loss above that at the best rate, averaged over the rates, in plain SoLU minus in LN"
    return [_compared(label, rows, " nats", 4)]


def glance(all_records: list[Record], records: list[Record]) -> list[Block]:
    """Return a table with a column for each arm with a per-token norm: its gain, and the cost of doing without it.

    The numbers of the untrained models follow in parentheses. Probes that are not validated are left out.
    """
    arms = normed(records)
    untrained = {number_key(each): each for each in of_kind(all_records, Untrained)}
    lines = []
    for name, (probe, quantity, statistic, decimals) in GLANCE.items():
        if controls.standing(all_records, probe) == "passed":
            rows = [measured(records, probe, quantity, arm, statistic) for arm in arms]
            lines.append([name, *(_with_untrained(untrained, each, decimals) for each in rows)])
    if not lines:
        return []
    retrained = [
        [
            estimate(row, 4)
            for row in comparisons(records, Term.DIFFERENCE, against=arm)
            if row.arm in twins(records, arm)
        ]
        for arm in arms
    ]
    costs = ["; ".join(each) or "not trained" for each in retrained]
    lines.append(["training with one gain instead costs, nats [95%, new seeds]", *costs])
    lead = (
        "g is the gain of LayerNorm. In parentheses: the same model before training. |mlp_out| / |resid_mid| is "
        "the length of the MLP's output over that of the stream before it. Where the output is several times as "
        "long, ln_final (the model's last LayerNorm) rescales each token, so freezing the gain costs little in any "
        "case."
    )
    return [Paragraph(lead, style="soft"), Table(["", *arms], lines, n_text=1)]


def _with_untrained(
    untrained: Mapping[tuple[object, ...], Untrained],
    rows: Sequence[Measurement],
    decimals: int | None,
) -> str:
    """Return the numbers of an arm's runs, and in parentheses those of their initialisations."""
    if not rows:
        return "not measured"
    before = [untrained[key].value for row in rows if (key := number_key(row)) in untrained]
    after = span((row.value for row in rows), decimals)
    return after + (f" ({span(before, decimals)})" if before else "")


def _compared(label: str, rows: Sequence[Comparison], unit: str, decimals: int) -> Tile:
    if not rows:
        return Tile(label, "not measured", ["an arm that it needs is missing"])
    known = [f"{row.value:.{decimals}f}" for row in rows if row.value is not None]
    value = " and ".join(known[:2]) + ", ..." * (len(known) > 2)
    named = len(rows) > 1
    lines = [f"{row.arm}: {estimate(row, decimals)}" for row in rows] if named else []
    if not named:
        lines = [estimate(rows[0], decimals) if value else rows[0].note]
    return Tile(
        label,
        f"{value}{unit}" if value else "undefined",
        [*_first(lines), f"95% for new seeds and documents, {seeds(min(row.n for row in rows))}"],
    )


def _gain(all_records: list[Record], records: Sequence[Record], arms: Sequence[str]) -> Tile:
    """Return the tile on r and the spread of log g; without numbers if the probe is not validated."""
    label = "Does the gain vary? Median r (0: one gain for all tokens, 1: a true LayerNorm), and the sd of log g"
    standing = controls.standing(all_records, "engagement")
    if standing != "passed":
        why = "failed a control" if standing == "failed" else "has not been validated on controls"
        return Tile(label, "not reported", [f"the probe engagement {why}"])
    r = {arm: span(row.value for row in engagement(records, arm, "not BOS")) for arm in arms}
    spread = {
        arm: span(row.value for row in measured(records, "engagement", "log gain", arm, "sd"))
        for arm in arms
    }
    known = [arm for arm in arms if r[arm]]
    if not known:
        return Tile(label, "not measured", [])
    if len(known) == 1:
        verdict = pretrained.VERDICTS[gain_varies(records, known[0])]
        value = f"r {r[known[0]]}; sd {spread[known[0]] or 'not measured'}"
        return Tile(label, value, [verdict])
    verdicts = {arm: gain_varies(records, arm) for arm in known}
    lines = [
        f"{arm}: {'not settled' if verdicts[arm] == 'open' else verdicts[arm]} (r {r[arm]}, sd {spread[arm]})"
        for arm in known
    ]
    return Tile(
        label,
        " and ".join(f"r {r[arm]}" for arm in known[:2]) + ", ..." * (len(known) > 2),
        _first(lines),
    )


def _first(lines: Sequence[str]) -> list[str]:
    """Return the first lines, and the number of further ones."""
    left = len(lines) - N_LINES
    return [*lines[:N_LINES], *([f"and {left} more below"] if left > 0 else [])]
