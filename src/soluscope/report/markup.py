"""Pieces of HTML: the page's head, tables, badges, what folds away. All text is escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Literal

Mark = Literal["pass", "fail", "open", "none"]
SIGNS: dict[Mark, str] = {"pass": "\u2713", "fail": "\u2717", "open": "?", "none": "\u2013"}
"""Beside the colour, so that no one needs to see it."""

# The browser itself refuses every request, whatever a library might try.
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline';
 style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>{style}</style>
<script>{plotly}</script>
</head>
<body>
"""

STYLE = """
:root { --ink: #222; --soft: #5b5b5b; --line: #dcdcdc; --tint: #f6f7f8; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 72rem; color: var(--ink);
  background: #fff; font: 17px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 3rem 0 .6rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .3rem; }
p, ul { max-width: 50rem; margin: .5rem 0; }
ul { padding-left: 1.2rem; }
p, li, td, th, h1, h2, h3, a, summary { overflow-wrap: anywhere; }
li { margin: .35rem 0; }
nav { font-size: .92rem; margin-top: 1.2rem; }
nav a { margin-right: 1rem; display: inline-block; }
a { color: #0a58a5; }
a.fail { color: #9c2f00; }
code { font-size: .92em; white-space: pre-wrap; }
.found { background: var(--tint); border-left: 4px solid #0072B2; padding: .7rem 1.1rem;
  max-width: 54rem; }
.found .first { font-size: 1.15rem; font-weight: 600; line-height: 1.4; }
.warn { background: #fdeee6; border-left: 4px solid #D55E00; padding: .5rem 1.1rem; max-width: 54rem;
  font-weight: 600; }
.soft { color: var(--soft); font-size: .92rem; }
.badge { display: inline-block; margin: .15rem .4rem .15rem 0; padding: .05rem .5rem;
  border: 1px solid; border-radius: .3rem; font-size: .85rem; }
.pass { color: #00573f; } .badge.pass { background: #e6f5f0; }
.fail { color: #9c2f00; } .badge.fail { background: #fdeee6; font-weight: 600; }
.open, .none { color: var(--soft); } .badge.open, .badge.none { background: var(--tint); }
.box { overflow-x: auto; max-width: 100%; margin: .6rem 0; }
.tall { max-height: 75vh; overflow-y: auto; }
table { border-collapse: collapse; font-size: .88rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0;
  border-bottom: 1px solid var(--line); }
th { background: #fff; position: sticky; top: 0; font-weight: 600; }
td.number { white-space: nowrap; }
td.text { min-width: 13rem; max-width: 28rem; }
td.text, th { overflow-wrap: break-word; }
td:first-child, th:first-child { position: sticky; left: 0; background: #fff; }
th:first-child { z-index: 1; }
td div + div { margin-top: .3rem; } td .soft { font-size: inherit; }
td.wide { min-width: 23rem; } td.verdict { min-width: 10rem; }
summary { cursor: pointer; margin: .6rem 0; }
.tokens input { position: absolute; opacity: 0; }
.tokens label { display: inline-block; margin: .3rem .4rem .3rem 0; padding: .15rem .7rem;
  border: 1px solid var(--soft); border-radius: .3rem; cursor: pointer; font-size: .92rem; }
.tokens input:focus-visible + label { outline: 3px solid #56B4E9; }
.tokens input:checked + label { background: var(--ink); color: #fff; }
.words { white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0; max-width: 60rem;
  font: .92rem/1.75 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; }
.words span { unicode-bidi: isolate; border-radius: 2px; padding: .1rem 0;
  box-shadow: 1px 0 0 #fff; }
.words span:hover, .words span:focus { outline: 2px solid var(--ink); outline-offset: 0; }
.words span:focus::after { content: attr(title); position: fixed; left: 0; right: 0; bottom: 0;
  z-index: 9; padding: .5rem 1rem; background: var(--ink); color: #fff; white-space: normal;
  font: .92rem/1.4 system-ui, sans-serif; }
.scale { display: none; font-size: .88rem; flex-wrap: wrap; gap: .2rem .6rem; align-items: center; }
.scale i { width: 9rem; height: .8rem; border: 1px solid var(--line); }
@media (max-width: 600px) { td.text:first-child { min-width: 7.5rem; max-width: 9rem; }
  td.wide { min-width: 15rem; }
  body { font-size: 16px; padding: 1rem .9rem 3rem; }
  h1 { font-size: 1.4rem; } .found, .warn { padding: .5rem .8rem; } }
@media print { .tall { max-height: none; } }
"""

# Figures near the window come first, the others in view one at a time, so that a page of a hundred opens
# as fast as one of three; what is folded away waits until it is opened, since it has no width before.
DRAW = """
(() => {
  const waiting = new Set(document.querySelectorAll(".plot"));
  const draw = box => {
    if (!waiting.delete(box)) return;
    const figure = JSON.parse(box.nextElementSibling.textContent);
    Plotly.newPlot(box, figure.data, figure.layout,
      {responsive: true, displaylogo: false, displayModeBar: false});
  };
  const watch = new IntersectionObserver(found => found.forEach(({isIntersecting, target}) => {
    if (isIntersecting) draw(target);
  }), {rootMargin: "400px"});
  waiting.forEach(box => watch.observe(box));
  const next = () => {
    const box = [...waiting].find(box => box.offsetParent);
    if (box) { draw(box); setTimeout(next, 20); }
  };
  setTimeout(next, 200);
})();
"""


def paragraph(text: str, lead: str = "", style: str = "") -> str:
    """A paragraph, with its first words strong and of a class."""
    strong = f"<strong>{html.escape(lead)}</strong> " if lead else ""
    named = f' class="{style}"' if style else ""
    return f"<p{named}>{strong}{html.escape(text)}</p>\n"


def bullets(items: Iterable[str]) -> str:
    return "<ul>" + "\n".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>\n"


def fold(summary: str, body: str, opened: bool = False) -> str:
    """`body` behind a click; nothing where there is nothing to hide."""
    if not body:
        return ""
    state = " open" if opened else ""
    return f"<details{state}><summary>{html.escape(summary)}</summary>\n{body}</details>\n"


def badge(mark: Mark, label: str, hover: str) -> str:
    """A label with a sign and a colour; what is behind it shows under the pointer."""
    said = f"{SIGNS[mark]} {html.escape(label)}"
    return f'<span class="badge {mark}" title="{html.escape(hover)}">{said}</span>'


def marked(mark: Mark, text: str) -> str:
    """A line inside a cell, in the mark's colour and after its sign."""
    return f'<div class="{mark}">{SIGNS[mark]} {html.escape(text)}</div>'


def table(
    heads: Sequence[str], lines: Iterable[Sequence[str | Sequence[str]]], n_text: int = 1
) -> str:
    """A table that scrolls inside its own box; a cell is a text, or several one below the other."""
    body = []
    for line in lines:
        cells = []
        for i, cell in enumerate(line):
            texts = [cell] if isinstance(cell, str) else cell
            wraps = i < n_text or heads[i] == "note"
            inner = "<br>".join(html.escape(text) for text in texts)
            cells.append(f'<td class="{"text" if wraps else "number"}">{inner}</td>')
        body.append("".join(cells))
    return table_of_cells(heads, body)


def table_of_cells(heads: Sequence[str], rows: Sequence[str]) -> str:
    """The same from rows that are `<td>` elements already."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    tall = " tall" if len(rows) > 20 else ""
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    made = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    return f'<div class="box{tall}">{made}</div>\n'
