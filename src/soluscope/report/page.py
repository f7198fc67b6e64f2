"""Rows as one HTML page that needs nothing else: no network, no other file.

Whatever comes from data goes through `html.escape`. The same rows give the same bytes.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from soluscope import plugins
from soluscope.probes import Figure, Probe, Quantity
from soluscope.report import (
    controls,
    evidence,
    figures,
    meaning,
    pretrained,
    tokens,
    tuning,
    words,
)
from soluscope.report.figures import QUARTILE, Style
from soluscope.report.findings import by_stream, comparisons, estimate, of_size, sizes, tuned
from soluscope.report.markup import (
    DRAW,
    HEAD,
    STYLE,
    badge,
    bullets,
    fold,
    paragraph,
    table,
)
from soluscope.results import LEFT_OUT, ONE_NUMBER, Row

PROBES = "soluscope.probes"
NOT_PROBES = {
    "comparison",
    "loss",
    "training",
    tokens.PROBE,
    pretrained.PROBE,
    controls.CONTROLS,
    controls.FALSE_POSITIVES,
}
N_SENTENCES = 10
"""Of the headline, in view; with many arms it would push all else off the first page."""
NOT_COUNTED = (
    "False positives: not counted for this study (python eval/run.py --false-positives DIR)."
)
STEPS = {
    "solu - solu_gain": "an output scale, one number for all tokens",
    "solu_gain - solu_frozen_ln": "centring and LayerNorm's affine parameters",
    "solu_frozen_ln - solu_ln_det": "a scale of each token's own, forward only",
    "solu_ln_det - solu_ln": "the gradient through that scale",
    "solu_frozen_ln - solu_ln": "a scale of each token's own, with its gradient",
}


def render(rows: list[Row]) -> str:
    """The whole page for a study's rows."""
    study = ", ".join(sorted({row.study for row in rows}))
    title = f"soluscope: {study}"
    page = _Page(rows)
    parts = [
        HEAD.format(title=html.escape(title), style=STYLE + tokens.style(), plotly=get_plotlyjs()),
        "<header>",
        f"<h1>What LayerNorm does in SoLU models: {html.escape(study)}</h1>",
        _found(rows),
    ]
    sections: list[tuple[str, str]] = [
        ("Pretrained", pretrained.section(page.rows)),
        ("Hypotheses and evidence", evidence.section(page.rows)),
        ("Tuning", tuning.section(rows, page.look, page.figure)),
        ("Loss", page.loss()),
        ("Paired differences", page.differences()),
        ("Phi_dyn and its terms", page.terms()),
        ("Dose: kappa", tuning.dose(page.rows, page.look, page.figure)),
        ("Probes against the static twin", page.confirmed()),
        ("Training", page.training()),
        ("Token view", tokens.view(page.rows)),
    ]
    names = {row.probe for row in page.rows} - NOT_PROBES
    sections += [page.probe(name) for name in sorted(names, key=controls.by_section)]
    sections.append(("Where this comes from", _provenance(rows)))
    kept = [(heading, body) for heading, body in sections if body]
    links = (_link(i, heading) for i, (heading, _) in enumerate(kept, start=1))
    parts += [f"<nav>{' '.join(links)}</nav>", "</header>", "<main>"]
    for i, (heading, body) in enumerate(kept, start=1):
        parts.append(f'<section id="s{i}"><h2>{html.escape(heading)}</h2>\n{body}\n</section>')
    return "\n".join([*parts, "</main>", f"<script>{DRAW}</script>", "</body>", "</html>", ""])


def _link(place: int, heading: str) -> str:
    style = ' class="fail"' if heading.endswith(_FAILED) else ""
    return f'<a href="#s{place}"{style}>{html.escape(heading)}</a>'


_FAILED = " (control failed)"
"""What the heading of a probe says that failed its gate, here and in the navigation."""


def _found(rows: list[Row]) -> str:
    """The headline sentences: verdicts large, what they rest on below, many of them folded away."""
    first, *others = words.headline(rows)
    body = bullets(others[:N_SENTENCES])
    if rest := others[N_SENTENCES:]:
        body += fold(f"{len(rest)} more", bullets(rest))
    return f'<div class="found">{paragraph(first, style="first")}{body}</div>'


class _Page:
    """Sections that share one look for each arm and one count of figures.

    All but the tuning are about arms at their chosen rates.
    """

    def __init__(self, rows: list[Row]) -> None:
        self.tried = rows
        self.rows = tuned(rows)
        self.sizes = sizes(self.rows)
        self.look: Mapping[str, Style] = figures.styles(self.rows)
        self.doses = figures.doses(self.rows)
        self.gates = [row for row in rows if row.probe in NOT_PROBES]
        self.n_figures = 0

    def figure(self, figure: go.Figure, caption: str = "", below: str = "") -> str:
        """A figure in a box that scrolls where the screen is narrower; nothing if it is empty.

        It is drawn when it comes near the window; `below` is said between caption and figure.
        """
        if not figure.data:
            return ""
        self.n_figures += 1
        figure.update_layout(title=None)
        heading = f"<h3>{html.escape(caption)}</h3>\n" if caption else ""
        heading += paragraph(below, style="soft") if below else ""
        size = f"min-width:{figures.min_width(figure)}px;height:{figure.layout.height}px"
        return (
            f'{heading}<div class="box"><div class="plot" id="figure-{self.n_figures}" '
            f'style="{size}"></div>'
            f'<script type="application/json">{figure.to_json()}</script></div>\n'
        )

    def loss(self) -> str:
        means = comparisons(self.rows, "loss")
        runs = [row for row in self.rows if row.probe == "loss" and row.run]
        if not means and not runs:
            return ""
        body = paragraph(
            "Nats a token on the report split, targets that are BOS left out. One dot a training "
            "seed; its bar is the 95% interval for other documents, which moves all arms "
            "together. To compare arms, read the paired differences, where the documents' share "
            "cancels."
        )
        body += self.figure(figures.losses(self.rows, self.look))
        lines = [
            [
                row.arm,
                str(row.n),
                estimate(row, decimals=4),
                [f"s{r.seed}: {estimate(r, decimals=4)}" for r in runs if r.arm == row.arm],
            ]
            for row in means
        ]
        heads = [
            "arm",
            "seeds",
            "mean [95%, new seeds on these documents]",
            "seed: loss [95%, other documents]",
        ]
        return body + table(heads, lines)

    def differences(self) -> str:
        rows = comparisons(self.rows, "difference")
        if not rows:
            return ""
        return (
            paragraph(
                "Loss of an arm minus that of a reference, nats a token; below 0 the arm is "
                "better. Pairs share the seed: initial values, batches and documents. Thick bar: "
                "these trained models on other documents. Thin bar: new seeds and new documents, "
                "which a claim about a variant needs; where it runs out of the frame, the table "
                "has its ends. An open mark has no interval."
            )
            + "".join(
                self.figure(figures.differences(mine, self.look), size)
                for size, mine in self.sizes.items()
            )
            + self._contrasts(rows, lambda row: f"{row.arm} {row.group}")
        )

    def terms(self) -> str:
        shown = ("gain of LN", "static - LN", "Phi_dyn")
        rows = [
            row
            for row in self.rows
            if row.probe == "comparison"
            and row.cluster == "seed"
            and (row.quantity in shown or row.quantity.startswith("telescoping"))
        ]
        if not rows:
            return ""

        def label(row: Row) -> str:
            step = row.quantity.removeprefix("telescoping: ")
            meaning = f" ({STEPS[step]})" if step in STEPS else ""
            return f"{row.arm}: {step}{meaning}"

        return (
            paragraph(
                "Gain of LN: loss of plain SoLU minus loss of SoLU with LayerNorm. Phi_dyn: the "
                "share of it that the best static arm (one gain for all tokens, retrained) does "
                "not reach. 0: no scale of each token's own is needed; 1: all of the gain takes "
                "it; below 0: static is better. The steps from plain SoLU to LayerNorm add one "
                "thing each, and sum to the gain of LN. Bars as above."
            )
            + self.figure(figures.terms(self.rows, self.look))
            + self._contrasts(rows, label)
            + tuning.common_rate(self.tried, self.look, self.figure)
        )

    def confirmed(self) -> str:
        """The confirmatory tests: a probe's number less the static twin's, by seed."""
        rows = [
            row
            for row in self.rows
            if row.probe == "comparison" and ": " in row.quantity and row.group.startswith("minus ")
        ]
        if not rows:
            return ""
        said = paragraph(
            "What these probes found in an arm less what they found in the arm that differs from it "
            "in having one gain for all tokens, at the same seeds; mean over their streams. All "
            "of them are corrected together for their number; what else the page holds is exploratory."
        )
        lines = [
            [
                f"{row.arm} {row.group}: {row.quantity}, {row.unit}",
                estimate(row), str(row.n), row.note,
            ]
            for row in rows
        ]  # fmt: skip
        return said + table(["", "difference [95%, new seeds]", "seeds", "note"], lines)

    def _contrasts(self, rows: Sequence[Row], label: Callable[[Row], str]) -> str:
        """A table of comparison rows, each with both of its intervals."""
        lines: list[list[str | list[str]]] = []
        for row in rows:
            fixed = comparisons(self.rows, row.quantity, row.arm, row.group, cluster="document")
            decimals = 2 if row.unit == "share" else 4
            lines.append(
                [
                    label(row),
                    estimate(row, decimals),
                    estimate(fixed[0], decimals) if fixed else "",
                    str(row.n),
                    row.note,
                ]
            )
        heads = [
            "",
            "estimate [95%, new seeds and documents]",
            "[95%, these models, other documents]",
            "seeds",
            "note",
        ]
        return table(heads, lines)

    def training(self) -> str:
        rows = [row for row in self.rows if row.probe == "training" and row.x is not None]
        body = ""
        names = sorted({row.quantity for row in rows}, key=lambda name: (name != "loss", name))
        for name in names:
            log_y = name != "r"
            spec = Figure(name, (name,), kind="curve", x_title="tokens seen", log_y=log_y)
            body += self.figure(figures.draw(rows, spec, self.look), caption=name)
        if not body:
            return ""
        return paragraph("One thin line a run, against the number of tokens it has seen.") + body

    def probe(self, name: str) -> tuple[str, str]:
        """A probe's heading and section; plain where the folder no longer has the probe."""
        rows = [row for row in self.rows if row.probe == name and row.quantity != LEFT_OUT]
        wrong = controls.failures(self.gates, name)
        body = self._standing(name, wrong) + self._left_out(name)
        if name not in plugins.names(PROBES):
            note = (
                f"There is no file for {name!r} in probes/ any more; its rows are shown as they "
                "are."
            )
            heading = name + _FAILED * bool(wrong)
            return heading, body + paragraph(note) + _probe_tables(rows, {})
        one: Probe = plugins.pick(PROBES, name)
        quantities = one.quantities | one.estimates
        body = f"<p><strong>{html.escape(one.question)}</strong></p>\n{body}"
        first, *others = [self._drawn(rows, spec) for spec in one.figures] or [""]
        body += first + fold("More figures", "".join(others)) + _probe_tables(rows, quantities)
        passed = controls.gate(self.gates, name) == "passed"
        said = meaning.sentences(one, rows) if passed else []
        if said:
            body += paragraph("These trained models, BOS left out.", "What this result means.")
            body += bullets(said)
        body += paragraph(one.reading, "How to read it.")
        body += f"<p><strong>Formula.</strong> <code>{html.escape(one.formula)}</code></p>\n"
        body += paragraph(one.pitfalls, "Pitfalls.")
        rates = controls.false_positives(self.gates, name)
        if rates:
            body += paragraph("; ".join(map(controls.rate, rates)) + ".", "False positives.")
        else:
            body += paragraph(NOT_COUNTED, style="soft")
        if one.source:
            body += paragraph(f"Source: {one.source}", style="soft")
        return f"{one.section} {one.name}".strip() + _FAILED * bool(wrong), body

    def _standing(self, name: str, wrong: Sequence[str]) -> str:
        """A badge for each control, the numbers behind them, and a warning where one failed."""
        found = controls.gates(self.gates, name)
        if not found:
            return f"<div>{badge('none', 'no control run', 'nothing says that it can be believed')}</div>\n"
        badges = "".join(
            badge(
                "fail" if control in wrong else "pass",
                f"{controls.sign(rows)} {control} {'FAIL' if control in wrong else 'pass'}",
                " | ".join(map(controls.line, rows)),
            )
            for control, rows in found.items()
        )
        lines = [
            [control, row.statistic, f"{estimate(row)} {row.unit}", row.note]
            for control, rows in found.items()
            for row in rows
        ]
        asked = table(["control", "number", "found", "note"], lines, n_text=2)
        warning = ""
        if wrong:
            noun = "control" if len(wrong) == 1 else "controls"
            warning = paragraph(
                f"This probe failed its {noun} {', '.join(wrong)}: do not cite its numbers.",
                style="warn",
            )
        return f"<div>{badges}</div>\n{warning}{fold('What the controls gave', asked)}"

    def _left_out(self, name: str) -> str:
        """The runs that a probe leaves out, and why."""
        why: dict[str, list[str]] = {}
        for row in self.rows:
            if row.probe == name and row.quantity == LEFT_OUT:
                why.setdefault(row.note, []).append(row.run or row.arm or "all runs")
        said = (f"Left out: {', '.join(sorted(runs))} ({note})." for note, runs in why.items())
        return "".join(paragraph(text, style="soft") for text in said)

    def _drawn(self, rows: Sequence[Row], spec: Figure) -> str:
        """A figure of a probe, and the same against the dose where a variant has several."""
        dots = spec.kind == "dots"
        drawn = self.figure(
            figures.draw(rows, spec, self.look), spec.title, self.doses.caption() if dots else ""
        )
        if not (drawn and dots):
            return drawn
        for size, its in self.sizes.items():
            arms = {row.arm for row in its}
            mine = [row for row in rows if row.arm in arms]
            against = figures.against_dose(mine, spec, self.look, figures.doses(its))
            drawn += self.figure(against, of_size(f"{spec.title}, against the dose", size))
        return drawn


# ---------------------------------------------------------------- tables


def _probe_tables(rows: Sequence[Row], quantities: Mapping[str, Quantity]) -> str:
    """A probe's numbers behind a click: away from BOS; then by stream, position and split."""
    points = [row for row in rows if row.x is None]
    order = {name: i for i, name in enumerate(quantities)}
    last = len(order)
    points.sort(
        key=lambda r: (order.get(r.quantity, last), r.quantity, r.statistic, r.group, r.positions)
    )
    first = min(map(by_stream, points), default=None)
    main: list[Row] = []
    rest: list[Row] = []
    for row in points:
        split = QUARTILE.fullmatch(row.group) or row.positions != "not BOS"
        (rest if split or by_stream(row) != first else main).append(row)
    body = ""
    if main:
        stream = main[0].stream
        caption = f"{stream} text, BOS left out" if stream else "BOS left out"
        body += fold(
            f"Table: {caption}; one line a seed, [95% interval]", _by_arm(main, quantities)
        )
    if rest:
        body += fold("Table: other streams, positions and splits", _by_arm(rest, {}))
    return body


def _by_arm(rows: Sequence[Row], meanings: Mapping[str, Quantity]) -> str:
    """One line a number, one column an arm, one line a seed inside a cell."""
    arms = sorted({row.arm for row in rows})
    keys = ("stream", "positions", "group")
    shown = [key for key in keys if len({getattr(row, key) for row in rows}) > 1]
    lines: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in rows:
        key = (row.quantity, row.statistic, *(getattr(row, name) for name in shown), row.unit)
        lines.setdefault(key, {}).setdefault(row.arm, []).append(row)
    cells: list[list[str | list[str]]] = []
    for (quantity, statistic, *rest), by_arm in lines.items():
        *places, unit = rest
        what = [
            ", ".join(
                part
                for part in (f"{statistic} of {quantity}" if statistic else quantity, unit)
                if part
            )
        ]
        if quantity in meanings:
            what.append(meanings[quantity].meaning)
            if meanings[quantity].more_smeared_when != "neither":
                what.append(f"more smeared when {meanings[quantity].more_smeared_when}")
        notes = {row.note for found in by_arm.values() for row in found} - {"", ONE_NUMBER}
        what += sorted(notes)
        numbers = [
            [estimate(row) for row in sorted(by_arm.get(arm, []), key=lambda r: r.seed or 0)]
            for arm in arms
        ]
        cells.append([what, *places, *numbers])
    return table(["quantity", *shown, *arms], cells, n_text=1 + len(shown))


def _provenance(rows: list[Row]) -> str:
    """Which runs, configurations and code the numbers come from."""
    runs = {row.run: row for row in rows if row.run}
    commits = ", ".join(sorted({row.commit for row in rows if row.commit})) or "unknown"
    studies = ", ".join(sorted({row.study for row in rows}))
    text = (
        f"Study {studies}, {len(runs)} runs, {len(rows):,} rows of results.jsonl; measured by "
        f"commit {commits}."
    )
    lines = [
        [row.run, row.arm, row.variant, "" if row.seed is None else str(row.seed), row.config]
        for _, row in sorted(runs.items())
    ]
    return paragraph(text) + table(["run", "arm", "variant", "seed", "config"], lines)
