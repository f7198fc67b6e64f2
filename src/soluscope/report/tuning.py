"""The curves that decide: loss against learning rate and gain, Phi_dyn against kappa and a common rate.

At a learning rate or a gain that is wrong for one of the arms the answer may be the opposite, so the page
shows the curves on which they were chosen beside what was found at the chosen ones.

Source: science.md sections 4 and 10.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from soluscope.report import words
from soluscope.report.figures import Style, along
from soluscope.report.findings import (
    NORMED,
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
from soluscope.report.markup import fold, paragraph, table
from soluscope.results import Row

Draw = Callable[..., str]
"""From a plotly figure, its caption and what is said below that, to HTML; nothing for an empty figure."""


def section(rows: list[Row], look: Mapping[str, Style], draw: Draw) -> str:
    """The curves on which rates and gains were chosen; nothing where nothing was chosen."""
    made = choices(rows)
    if not made:
        return ""
    warnings = [*words.edges(rows), *words.unchosen(rows)]
    body = "".join(paragraph(said, style="warn") for said in warnings)
    body += paragraph(
        "Loss on the select split, whose documents nothing is reported on, against what was tried. What "
        "has the least mean is compared in the rest of this page, and has a ring: of rates, among those "
        "with all seeds of their line (the table has the others), or over the seeds that all have; of "
        "gains, over the seeds that all have. What shares no seed is not chosen from. Bars are for new "
        "seeds on these documents, and the frame may cut them. An optimum counts only inside its grid, and "
        "two points are none."
    )
    body += _one_rate(rows)
    without = {row.arm for one in made for row in one.without}
    for size, its in sizes(rows).items():
        curves = [row for row in comparisons(its, "select loss by lr") if row.arm not in without]
        rates = _panels(curves, lambda row: row.variant)
        drawn = along(rates, "learning rate", look, titles(its), ringed=True, one_scale=True)
        body += draw(drawn, of_size("Loss against the learning rate", size))
        gained = comparisons(its, "select loss by gain")
        gains = {_rates(its, [row.arm for row in gained]): gained} if gained else {}
        lines = {row.group: row.variant for found in gains.values() for row in found}
        drawn = along(gains, "gain", look, lines, ringed=True)
        body += draw(drawn, of_size("Loss against the gain", size))
    tried = [
        [row.arm, f"{one.setting} {row.x:.4g}", estimate(row, decimals=4), str(row.n), row.note]
        for one in made
        for row in (*one.points, *one.without)
    ]
    heads = ["arm", "setting", "loss on select [95%, new seeds]", "seeds", "note"]
    return body + fold("Table: all that was tried", table(heads, tried))


def common_rate(rows: list[Row], look: Mapping[str, Style], draw: Draw) -> str:
    """Phi_dyn and its terms with all arms at one rate, against that rate; nothing where none is shared."""
    body = ""
    for size, its in sizes(rows).items():
        found = {
            name: _defined(its, f"{name} at a common rate")
            for name in ("gain of LN", "static - LN", "Phi_dyn")
        }
        body += draw(
            along(found, "learning rate", look, titles(its), ringed=True),
            of_size("With all arms at one learning rate", size),
            "Not the headline: at a rate that is wrong for one of them, arms differ by their rates. A ring "
            "marks the rate at which LN is compared above. Where Phi_dyn is undefined it has no point.",
        )
    return body


def dose(rows: list[Row], look: Mapping[str, Style], draw: Draw) -> str:
    """What LayerNorm does at each kappa; nothing where there are not several."""
    body = ""
    for size, its in sizes(rows).items():
        kappas = by_kappa(its)
        if not kappas:
            continue
        found = {"loss": comparisons(its, "loss")}
        found |= {name: _defined(its, name) for name in ("static - LN", "Phi_dyn")}
        panels = {
            name: [
                replace(row, x=kappas[row.arm], group=NORMED) for row in mine if row.arm in kappas
            ]
            for name, mine in found.items()
        }
        panels["median r"] = [
            replace(row, x=kappa, group=f"{NORMED}, seed {row.seed}")
            for arm, kappa in kappas.items()
            for row in engagement(its, arm, "not BOS")
        ]
        lines = [NORMED, *sorted({row.group for row in panels["median r"]})]
        style = look[next(iter(kappas))]
        drawn = along(panels, "kappa", dict.fromkeys(lines, style), {line: line for line in lines})
        undefined = {row.arm for row in comparisons(its, "Phi_dyn") if row.value is None}
        at = [f"{kappa:.3g}" for arm, kappa in kappas.items() if arm in undefined]
        said = f"Phi_dyn is undefined at kappa {', '.join(at)}: see above." if at else ""
        body += draw(drawn, of_size("Against kappa", size), said)
    if not body:
        return ""
    body = _one_rate(rows) + body
    return (
        paragraph(
            "kappa = eps d_mlp^2 is how much of each token's own scale LayerNorm's epsilon drowns. Near 0 it is "
            "a true LayerNorm; where it is large it has one gain for all tokens and is a static arm itself, "
            "whatever a true one could do. The best static arm is the same at every kappa. Thin bars are for "
            "new seeds and documents, thick ones for these models on other documents; r has one line a seed."
        )
        + body
    )


def _one_rate(rows: list[Row]) -> str:
    """Every arm of which one rate was tried; the headline may name their variants alone."""
    once = at_one_rate(rows)
    return paragraph(f"Trained at one rate only: {', '.join(once)}.", style="soft") if once else ""


def _rates(rows: list[Row], arms: Sequence[str]) -> str:
    """At which rates the arms of a curve of gains were compared, in words."""
    once = set(at_one_rate(rows)) & set(arms)
    if not once:
        return "each at its best rate"
    if len(once) < len(set(arms)):
        return "each at the best of its rates, some at their only one"
    of = settings(rows)
    rates = {of[arm]["lr"] for arm in once if "lr" in of[arm]}
    return (
        f"all at the rate {rates.pop():.3g}, untuned"
        if len(rates) == 1
        else "each at its only rate"
    )


def _panels(rows: Iterable[Row], title: Callable[[Row], str]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(title(row), []).append(row)
    return found


def _defined(rows: Sequence[Row], quantity: str) -> list[Row]:
    """A comparison's rows that have a value, with either interval."""
    both = (comparisons(rows, quantity, cluster=cluster) for cluster in ("seed", "document"))
    return [row for found in both for row in found if row.value is not None]
