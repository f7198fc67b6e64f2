"""Rows as one HTML page that needs nothing else: no network, no other file.

Whatever comes from data goes through `html.escape`. The same rows give the same bytes.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from soluscope import plugins
from soluscope.probes import Figure, Probe, Quantity
from soluscope.report import figures, words
from soluscope.report.figures import Style
from soluscope.results import Row

PROBES = "soluscope.probes"
NOT_PROBES = ("comparison", "loss", "training")
CONFIG = {"responsive": True, "displaylogo": False, "displayModeBar": False}
STEPS = {
    "solu - solu_gain": "an output scale, one number for all tokens",
    "solu_gain - solu_frozen_ln": "centring and LayerNorm's affine parameters",
    "solu_frozen_ln - solu_ln_det": "a scale of each token's own, forward only",
    "solu_ln_det - solu_ln": "the gradient through that scale",
    "solu_frozen_ln - solu_ln": "a scale of each token's own, with its gradient",
}

# The browser itself refuses every request, whatever a library might try.
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline';
 style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>
:root {{ --ink: #222; --soft: #5b5b5b; --line: #dcdcdc; --tint: #f6f7f8; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 72rem; color: var(--ink);
  background: #fff; font: 17px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }}
h1 {{ font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 1rem; }}
h2 {{ font-size: 1.35rem; line-height: 1.25; margin: 3rem 0 .6rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }}
h3 {{ font-size: 1.02rem; margin: 1.6rem 0 .3rem; }}
p, ul {{ max-width: 50rem; margin: .5rem 0; }}
p, li, td, th, h1, h2 {{ overflow-wrap: break-word; }}
li {{ margin: .35rem 0; }}
nav {{ font-size: .92rem; margin-top: 1.2rem; }}
nav a {{ margin-right: 1rem; white-space: nowrap; }}
a {{ color: #0a58a5; }}
.found {{ background: var(--tint); border-left: 4px solid #0072B2; padding: .7rem 1.1rem;
  max-width: 54rem; }}
.found .first {{ font-size: 1.15rem; font-weight: 600; line-height: 1.4; }}
.soft {{ color: var(--soft); font-size: .92rem; }}
.box {{ overflow-x: auto; max-width: 100%; margin: .6rem 0; }}
.tall {{ max-height: 75vh; overflow-y: auto; }}
table {{ border-collapse: collapse; font-size: .88rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0;
  border-bottom: 1px solid var(--line); }}
th {{ background: #fff; position: sticky; top: 0; font-weight: 600; }}
td.number {{ white-space: nowrap; }}
td.text {{ min-width: 13rem; max-width: 28rem; }}
td:first-child, th:first-child {{ position: sticky; left: 0; background: #fff; }}
th:first-child {{ z-index: 1; }}
summary {{ cursor: pointer; margin: .6rem 0; }}
@media (max-width: 600px) {{ td.text:first-child {{ min-width: 7.5rem; max-width: 9rem; }}
  body {{ font-size: 16px; padding: 1rem .9rem 3rem; }}
  h1 {{ font-size: 1.4rem; }} .found {{ padding: .5rem .8rem; }} }}
@media print {{ .tall {{ max-height: none; }} }}
</style>
<script>{plotly}</script>
</head>
<body>
"""


def render(rows: list[Row]) -> str:
    """The whole page for a study's rows."""
    study = ", ".join(sorted({row.study for row in rows}))
    title = f"soluscope: {study}"
    page = _Page(rows)
    parts = [
        HEAD.format(title=html.escape(title), plotly=get_plotlyjs()),
        "<header>",
        f"<h1>What LayerNorm does in SoLU models: {html.escape(study)}</h1>",
        _found(rows),
    ]
    sections: list[tuple[str, str]] = [
        ("Loss", page.loss()),
        ("Paired differences", page.differences()),
        ("Phi_dyn and its terms", page.terms()),
        ("Training", page.training()),
    ]
    sections += [page.probe(name) for name in sorted({row.probe for row in rows} - set(NOT_PROBES))]
    sections.append(("Where this comes from", _provenance(rows)))
    kept = [(heading, body) for heading, body in sections if body]
    links = (
        f'<a href="#s{i}">{html.escape(heading)}</a>'
        for i, (heading, _) in enumerate(kept, start=1)
    )
    parts += [f"<nav>{' '.join(links)}</nav>", "</header>", "<main>"]
    for i, (heading, body) in enumerate(kept, start=1):
        parts.append(f'<section id="s{i}"><h2>{html.escape(heading)}</h2>\n{body}\n</section>')
    return "\n".join([*parts, "</main>", "</body>", "</html>", ""])


def _found(rows: list[Row]) -> str:
    """The headline sentences: verdicts large, what they rest on below."""
    first, *others = words.headline(rows)
    items = "".join(f"<li>{html.escape(sentence)}</li>\n" for sentence in others)
    return f'<div class="found"><p class="first">{html.escape(first)}</p>\n<ul>{items}</ul></div>'


class _Page:
    """Sections that share one look for each arm and one count of figures."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.look: Mapping[str, Style] = figures.styles(rows)
        self.n_figures = 0

    def figure(self, figure: go.Figure, caption: str = "") -> str:
        """A figure in a box that scrolls where the screen is narrower; nothing if it is empty."""
        if not figure.data:
            return ""
        self.n_figures += 1
        figure.update_layout(title=None)
        drawn = figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=f"figure-{self.n_figures}",
            config=CONFIG,
            default_height=f"{figure.layout.height}px",
        )
        heading = f"<h3>{html.escape(caption)}</h3>\n" if caption else ""
        width = figures.min_width(figure)
        return f'{heading}<div class="box"><div style="min-width:{width}px">{drawn}</div></div>\n'

    def loss(self) -> str:
        means = words.comparisons(self.rows, "loss")
        runs = [row for row in self.rows if row.probe == "loss" and row.run]
        if not means and not runs:
            return ""
        body = _text(
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
                words.estimate(row, decimals=4),
                [f"s{r.seed}: {words.estimate(r, decimals=4)}" for r in runs if r.arm == row.arm],
            ]
            for row in means
        ]
        heads = [
            "arm",
            "seeds",
            "mean [95%, new seeds on these documents]",
            "seed: loss [95%, other documents]",
        ]
        return body + _table(heads, lines)

    def differences(self) -> str:
        rows = words.comparisons(self.rows, "difference")
        if not rows:
            return ""
        return (
            _text(
                "Loss of an arm minus that of a reference, nats a token; below 0 the arm is "
                "better. Pairs share the seed: initial values, batches and documents. Thick bar: "
                "these trained models on other documents. Thin bar: new seeds and new documents, "
                "which a claim about a variant needs; where it runs out of the frame, the table "
                "has its ends. An open mark has no interval."
            )
            + self.figure(figures.differences(self.rows, self.look))
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
            _text(
                "Gain of LN: loss of plain SoLU minus loss of SoLU with LayerNorm. Phi_dyn: the "
                "share of it that the best static arm (one gain for all tokens, retrained) does "
                "not reach. 0: no scale of each token's own is needed; 1: all of the gain takes "
                "it; below 0: static is better. The steps from plain SoLU to LayerNorm add one "
                "thing each, and sum to the gain of LN. Bars as above."
            )
            + self.figure(figures.terms(self.rows, self.look))
            + self._contrasts(rows, label)
        )

    def _contrasts(self, rows: Sequence[Row], label: Callable[[Row], str]) -> str:
        """A table of comparison rows, each with both of its intervals."""
        lines: list[list[str | list[str]]] = []
        for row in rows:
            fixed = words.comparisons(
                self.rows, row.quantity, row.arm, row.group, cluster="document"
            )
            decimals = 2 if row.unit == "share" else 4
            lines.append(
                [
                    label(row),
                    words.estimate(row, decimals),
                    words.estimate(fixed[0], decimals) if fixed else "",
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
        return _table(heads, lines)

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
        return _text("One thin line a run, against the number of tokens it has seen.") + body

    def probe(self, name: str) -> tuple[str, str]:
        """A probe's heading and section; plain where the folder no longer has the probe."""
        rows = [row for row in self.rows if row.probe == name]
        if name not in plugins.names(PROBES):
            note = (
                f"There is no file for {name!r} in probes/ any more; its rows are shown as they "
                "are."
            )
            return name, _text(note) + _probe_tables(rows, {})
        one: Probe = plugins.pick(PROBES, name)
        body = f"<p><strong>{html.escape(one.question)}</strong></p>\n"
        for spec in one.figures:
            body += self.figure(figures.draw(rows, spec, self.look), caption=spec.title)
        body += f"<p><strong>How to read it.</strong> {html.escape(one.reading)}</p>\n"
        body += f"<p><strong>Pitfalls.</strong> {html.escape(one.pitfalls)}</p>\n"
        body += _probe_tables(rows, one.quantities | one.string_quantities)
        if one.source:
            body += f'<p class="soft">Source: {html.escape(one.source)}</p>\n'
        return f"{one.section} {one.name}".strip(), body


# ---------------------------------------------------------------- tables


def _probe_tables(rows: list[Row], quantities: Mapping[str, Quantity]) -> str:
    """A probe's numbers: away from BOS in view, by stream, position and split behind a click."""
    points = [row for row in rows if row.x is None]
    if not points:
        return ""
    order = {name: i for i, name in enumerate(quantities)}
    last = len(order)
    points.sort(
        key=lambda r: (order.get(r.quantity, last), r.quantity, r.statistic, r.group, r.positions)
    )
    first = min(points, key=words.by_stream).stream
    main = [
        row
        for row in points
        if row.stream == first and row.group == "" and row.positions == "not BOS"
    ]
    body = ""
    if main:
        caption = f"{first} text, BOS left out" if first else "BOS left out"
        body += f'<p class="soft">{html.escape(caption)}; one line a seed, [95% interval].</p>\n'
        body += _by_arm(main, quantities)
    rest = [row for row in points if row not in main] if len(points) > len(main) else []
    if rest:
        table = _by_arm(rest, {})
        body += (
            f"<details><summary>Other streams, positions and splits</summary>\n{table}</details>\n"
        )
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
        what = [f"{statistic} of {quantity}, {unit}"]
        if quantity in meanings:
            what.append(meanings[quantity].meaning)
            if meanings[quantity].more_smeared_when != "neither":
                what.append(f"more smeared when {meanings[quantity].more_smeared_when}")
        numbers = [
            [words.estimate(row) for row in sorted(by_arm.get(arm, []), key=lambda r: r.seed or 0)]
            for arm in arms
        ]
        cells.append([what, *places, *numbers])
    return _table(["quantity", *shown, *arms], cells, n_text=1 + len(shown))


def _table(
    heads: Sequence[str], lines: Iterable[Sequence[str | Sequence[str]]], n_text: int = 1
) -> str:
    """A table that scrolls inside its own box; a cell is a text, or several one below the other."""
    body = []
    for line in lines:
        cells = []
        for i, cell in enumerate(line):
            texts = [cell] if isinstance(cell, str) else cell
            inner = "<br>".join(html.escape(text) for text in texts)
            wraps = i < n_text or heads[i] == "note"
            cells.append(f'<td class="{"text" if wraps else "number"}">{inner}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    tall = " tall" if len(body) > 20 else ""
    rows = "\n".join(body)
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>"
    return f'<div class="box{tall}">{table}</div>\n'


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
    return _text(text) + _table(["run", "arm", "variant", "seed", "config"], lines)


def _text(text: str) -> str:
    return f"<p>{html.escape(text)}</p>\n"
