"""The tuning curves: loss against learning rate and gain, Phi_dyn against kappa and a common rate.

If one arm has a wrong learning rate or gain, the conclusion may be reversed. So the page shows the curves
from which these settings were chosen as well as the results at the chosen settings.

Source: protocol.md sections 4 and 10.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from soluscope.report import words
from soluscope.report.blocks import Block, Paragraph, Table, fold, plot
from soluscope.report.figures import Point, Style, along, ramp
from soluscope.report.findings import (
    at_one_rate,
    by_kappa,
    choices,
    comparisons,
    engagement,
    estimate,
    listed,
    of_size,
    settings,
    sizes,
    titles,
)
from soluscope.results import ChoicePoint, Comparison, Record, Term, of_kind


def blocks(records: list[Record], look: Mapping[str, Style]) -> list[Block]:
    """Return the curves from which rates and gains were chosen; empty if nothing was chosen."""
    made = choices(records)
    if not made:
        return []
    warnings = [*words.edges(records), *words.untuned(records), *words.unchosen(records)]
    result: list[Block] = [Paragraph(text, style="warn") for text in warnings]
    result.append(
        Paragraph(
            "Loss on the select split against the tried settings. The select split is used for choosing, and for "
            "the curves of the tab Training; no comparison is made on its documents. A ring marks the setting with "
            "the least mean loss; the best arm of each curve is compared on this page. A learning rate is chosen "
            "among the rates that have all seeds of their curve (the table lists the other rates too); if no rate "
            "has all seeds, all rates are compared over their common seeds. A gain (the constant gain of a static "
            "arm) is chosen over the seeds common to all gains. Without common seeds no setting is chosen. Bars "
            "are for new seeds on these documents; an arrow marks a bar that continues. An optimum is reliable "
            "only inside its grid, and of two points one is always at an edge."
        )
    )
    result += _one_rate(records)
    for size, of_one in sizes(records).items():
        curves = of_kind(of_one, ChoicePoint)
        on_lr = [point for point in curves if point.setting == "lr" and point.eligible]
        on_surfaces = _with_several_scales(on_lr)
        rates: dict[str, list[Point]] = {}
        for point in on_lr:
            if point.chosen_arm not in on_surfaces:
                rates.setdefault(point.variant, []).append(_chosen_on(point))
        drawn = along(rates, "learning rate", look, titles(of_one), one_scale=True)
        result += plot(drawn, of_size("Loss against the learning rate", size))
        result += _surfaces([p for p in on_lr if p.chosen_arm in on_surfaces], size)
        gained = [point for point in curves if point.setting == "gain"]
        gains = {_rates(of_one, [point.arm for point in gained]): list(map(_chosen_on, gained))}
        lines = {point.chosen_arm: point.variant for point in gained}
        drawn = along(gains, "gain", look, lines)
        result += plot(drawn, of_size("Loss against the gain", size))
    tried = [
        [
            point.arm,
            f"{point.setting} {point.x:.4g}",
            estimate(point, decimals=4),
            str(point.n),
            point.note,
        ]
        for choice in made
        for point in (*choice.points, *choice.without)
    ]
    heads = ["arm", "setting", "loss on select [95%, new seeds]", "seeds", "note"]
    return [*result, *fold("Table: all tried settings", [Table(heads, tried)])]


def _with_several_scales(points: Iterable[ChoicePoint]) -> set[str]:
    """Return the chosen arms whose rate was tuned together with the scale of the MLP's output."""
    scales: dict[str, set[float]] = {}
    for point in points:
        scales.setdefault(point.chosen_arm, set()).add(point.out_scale)
    return {arm for arm, found in scales.items() if len(found) > 1}


def _surfaces(points: Sequence[ChoicePoint], size: str) -> list[Block]:
    """Draw each arm's losses against the rate, with one line for each scale of the MLP's output."""
    scales = sorted({point.out_scale for point in points})
    line_of = {scale: f"alpha {scale:.3g}" for scale in scales}
    panels: dict[str, list[Point]] = {}
    for point in points:
        at = Point(point.x, point, line_of[point.out_scale], ringed=point.arm == point.chosen_arm)
        panels.setdefault(point.chosen_arm, []).append(at)
    drawn = along(
        panels, "learning rate", ramp([*line_of.values()]), {v: v for v in line_of.values()}, one_scale=True
    )  # fmt: skip
    return plot(
        drawn,
        of_size("Loss against the learning rate and the scale of the MLP's output", size),
        "One panel for each arm, named by its best point, and one line for each scale alpha in alpha post W_out.",
    )


def _chosen_on(point: ChoicePoint) -> Point:
    """Return a point of a curve from which a setting was chosen; the line has the chosen arm's name."""
    return Point(point.x, point, point.chosen_arm, ringed=point.arm == point.chosen_arm)


def common_rate(records: list[Record], look: Mapping[str, Style]) -> list[Block]:
    """Return Phi_dyn and its terms with all arms at one rate, against that rate; empty without a shared rate."""
    result: list[Block] = []
    for size, of_one in sizes(records).items():
        panels: dict[str, list[Point]] = {}
        for term in (Term.BENEFIT, Term.STATIC, Term.SHARE):
            panels[term] = [
                Point(each.lr, each, each.tuned_arm, ringed=each.arm == each.tuned_arm)
                for each in of_kind(of_one, Comparison)
                if each.term is term and each.lr is not None and each.value is not None
            ]
        result += plot(
            along(panels, "learning rate", look, titles(of_one)),
            of_size("With all arms at one learning rate", size),
            "Exploratory, not the headline: a rate that is wrong for one of the arms changes the differences. "
            "A ring marks the rate at which the arm with LayerNorm is compared above. Phi_dyn has no point "
            "where it is undefined.",
        )
    return result


def dose(records: list[Record], look: Mapping[str, Style]) -> list[Block]:
    """Return the effects of LayerNorm at each kappa; empty without several kappas."""
    result: list[Block] = []
    for size, of_one in sizes(records).items():
        of_variants = by_kappa(of_one)
        panels: dict[str, list[Point]] = {
            name: [] for name in (Term.LOSS, Term.STATIC, Term.SHARE, "median r")
        }
        lines: dict[str, Style] = {}
        legend: dict[str, str] = {}
        undefined: list[str] = []
        for variant, kappas in of_variants.items():
            for term in (Term.LOSS, Term.STATIC, Term.SHARE):
                panels[term] += [
                    Point(kappas[each.arm], each, variant)
                    for each in _defined(of_one, term)
                    if each.arm in kappas
                ]
            panels["median r"] += [
                Point(kappa, row, f"{variant}, seed {row.seed}")
                for arm, kappa in kappas.items()
                for row in engagement(of_one, arm, "not BOS")
            ]
            seeds = {point.line for point in panels["median r"]}
            names = [variant, *sorted(seeds - lines.keys())]
            lines |= dict.fromkeys(names, look[next(iter(kappas))])
            legend |= dict.fromkeys(names, variant)
            without = {row.arm for row in comparisons(of_one, Term.SHARE) if row.value is None}
            undefined += [f"{kappa:.3g}" for arm, kappa in kappas.items() if arm in without]
        drawn = along(panels, "kappa", lines, legend)
        at = ", ".join(undefined)
        remark = (
            f"Phi_dyn is undefined at kappa {at}; the reasons are in the tab Answer."
            if undefined
            else ""
        )
        result += plot(drawn, of_size("Against kappa", size), remark)
    if not result:
        return []
    lead = Paragraph(
        "kappa = eps d_mlp^2 measures how strongly LayerNorm's epsilon suppresses the per-token scale. At a "
        "kappa near 0 the norm is a true LayerNorm. At a large kappa it has one gain for all tokens: it is a "
        "static arm itself, so it does not show the effects of a true LayerNorm. The best static arm is the "
        "same at every kappa. Thin bars are for new seeds and documents, thick bars for these models on other "
        "documents; r has one line per seed."
    )
    return [lead, *_one_rate(records), *result]


def _one_rate(records: list[Record]) -> list[Block]:
    """List the arms trained at one untuned rate only; the headline lists only their variants if there are many."""
    arms = at_one_rate(records)
    text = f"Trained at one untuned rate only: {listed(arms)}."
    return [Paragraph(text, style="soft")] * bool(arms)


def _rates(records: list[Record], arms: Sequence[str]) -> str:
    """Return a text on the learning rates at which the arms of a gain curve were compared."""
    untuned = set(at_one_rate(records)) & set(arms)
    if not untuned:
        return "each at its best rate"
    if len(untuned) < len(set(arms)):
        return "each at the best of its rates, some at their only one"
    known = settings(records)
    rates = {known[arm].values["lr"] for arm in untuned if "lr" in known[arm].values}
    if len(rates) == 1:
        return f"all at the rate {rates.pop():.3g}, untuned"
    return "each at its only rate"


def _defined(records: Iterable[Record], term: Term) -> list[Comparison]:
    """Return a term's comparisons that have a value, with both intervals; a loss has only that for new seeds."""
    clusters = ("seed",) if term is Term.LOSS else ("seed", "document")
    both = (comparisons(records, term, cluster=cluster) for cluster in clusters)
    return [each for of_cluster in both for each in of_cluster if each.value is not None]
