"""The curves that decide: loss against learning rate and gain, Phi_dyn against kappa and a common rate.

At a learning rate or a gain that is wrong for one of the arms the answer may be the opposite, so the page
shows the curves on which they were chosen beside what was found at the chosen ones.

Source: science.md sections 4 and 10.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from soluscope.report import words
from soluscope.report.blocks import Block, Paragraph, Table, fold, plot
from soluscope.report.figures import Point, Style, along
from soluscope.report.findings import (
    at_one_rate,
    by_kappa,
    choices,
    comparisons,
    engagement,
    estimate,
    of_size,
    settings,
    sizes,
    titles,
)
from soluscope.results import ChoicePoint, Comparison, Record, Term, of_kind


def blocks(records: list[Record], look: Mapping[str, Style]) -> list[Block]:
    """The curves on which rates and gains were chosen; nothing where nothing was chosen."""
    made = choices(records)
    if not made:
        return []
    warnings = [*words.edges(records), *words.unchosen(records)]
    result: list[Block] = [Paragraph(text, style="warn") for text in warnings]
    result.append(
        Paragraph(
            "Loss on the select split, whose documents nothing is reported on, against what was tried. What "
            "has the least mean is compared in the rest of this page, and has a ring: of rates, among those "
            "with all seeds of their line (the table has the others), or over the seeds that all have; of "
            "gains, over the seeds that all have. What shares no seed is not chosen from. Bars are for new "
            "seeds on these documents, and the frame may cut them. An optimum counts only inside its grid, "
            "and two points are none."
        )
    )
    result += _one_rate(records)
    for size, of_one in sizes(records).items():
        curves = of_kind(of_one, ChoicePoint)
        rates: dict[str, list[Point]] = {}
        for point in curves:
            if point.setting == "lr" and point.eligible:
                rates.setdefault(point.variant, []).append(_chosen_on(point))
        drawn = along(rates, "learning rate", look, titles(of_one), one_scale=True)
        result += plot(drawn, of_size("Loss against the learning rate", size))
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
    return [*result, *fold("Table: all that was tried", [Table(heads, tried)])]


def _chosen_on(point: ChoicePoint) -> Point:
    """A point of a curve on which a setting was chosen; lines are called after the chosen arm."""
    return Point(point.x, point, point.chosen_arm, ringed=point.arm == point.chosen_arm)


def common_rate(records: list[Record], look: Mapping[str, Style]) -> list[Block]:
    """Phi_dyn and its terms with all arms at one rate, against that rate; nothing where none is shared."""
    result: list[Block] = []
    for size, of_one in sizes(records).items():
        panels: dict[str, list[Point]] = {}
        for term in (Term.GAIN, Term.STATIC, Term.SHARE):
            panels[term] = [
                Point(each.lr, each, each.tuned_arm, ringed=each.arm == each.tuned_arm)
                for each in of_kind(of_one, Comparison)
                if each.term is term and each.lr is not None and each.value is not None
            ]
        result += plot(
            along(panels, "learning rate", look, titles(of_one)),
            of_size("With all arms at one learning rate", size),
            "Not the headline: at a rate that is wrong for one of them, arms differ by their rates. A ring "
            "marks the rate at which LN is compared above. Where Phi_dyn is undefined it has no point.",
        )
    return result


def dose(records: list[Record], look: Mapping[str, Style]) -> list[Block]:
    """What LayerNorm does at each kappa; nothing where there are not several."""
    result: list[Block] = []
    for size, of_one in sizes(records).items():
        of_variants = by_kappa(of_one)
        panels: dict[str, list[Point]] = {
            name: [] for name in (Term.LOSS, Term.STATIC, Term.SHARE, "median r")
        }
        lines: dict[str, Style] = {}
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
            without = {row.arm for row in comparisons(of_one, Term.SHARE) if row.value is None}
            undefined += [f"{kappa:.3g}" for arm, kappa in kappas.items() if arm in without]
        drawn = along(panels, "kappa", lines, {line: line for line in lines})
        at = ", ".join(undefined)
        remark = f"Phi_dyn is undefined at kappa {at}: see above." if undefined else ""
        result += plot(drawn, of_size("Against kappa", size), remark)
    if not result:
        return []
    lead = Paragraph(
        "kappa = eps d_mlp^2 is how much of each token's own scale LayerNorm's epsilon drowns. Near 0 it is "
        "a true LayerNorm; where it is large it has one gain for all tokens and is a static arm itself, "
        "whatever a true one could do. The best static arm is the same at every kappa. Thin bars are for "
        "new seeds and documents, thick ones for these models on other documents; r has one line a seed."
    )
    return [lead, *_one_rate(records), *result]


def _one_rate(records: list[Record]) -> list[Block]:
    """Every arm of which one rate was tried; the headline may name their variants alone."""
    arms = at_one_rate(records)
    return [Paragraph(f"Trained at one rate only: {', '.join(arms)}.", style="soft")] * bool(arms)


def _rates(records: list[Record], arms: Sequence[str]) -> str:
    """At which rates the arms of a curve of gains were compared, in words."""
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
    """A term's comparisons that have a value; of a loss those for new seeds, else with either interval."""
    clusters = ("seed",) if term is Term.LOSS else ("seed", "document")
    both = (comparisons(records, term, cluster=cluster) for cluster in clusters)
    return [each for of_cluster in both for each in of_cluster if each.value is not None]
