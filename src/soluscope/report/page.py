"""The report as one self-contained HTML page: it needs no network and no other file.

The templates escape all text that comes from data. The same records give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader

from soluscope.report import answer, figures, leading, names, packing, sections, tokens, words
from soluscope.report.blocks import MARKS, TABS, Bullets, Section, flat, fold
from soluscope.report.figures import min_width
from soluscope.report.findings import at_best_rate, tuned
from soluscope.report.templates import environment, hashes
from soluscope.results import Record

LIBRARY = "plotly-basic.min.js"
"""Plotly's own bundle of lines, points and bars, from the npm package plotly.js-basic-dist-min.

A browser compiles the whole library, which plotly's Python package contains, in 1.9 s, and this bundle in .3 s.
"""
N_SENTENCES = 10
"""Number of the headline's sentences in view, in the terminal, on the dashboard, and below the first screen."""


def render(records: list[Record]) -> str:
    """Render the whole page for a study's records."""
    names_of = names.arms(records)
    records = names.named(records)
    parts = _parts(records, {name: arm for arm, name in names_of.items()})
    blocks = flat(block for section in parts for block in section.blocks)
    numbered = [(f"s{i}", section) for i, section in enumerate(parts, start=1)]
    tabs = {tab: [(key, each) for key, each in numbered if each.tab == tab] for tab in TABS}
    template = _environment().get_template
    packed: list[str] = []

    def add(figure: go.Figure) -> int:
        """Add a compressed figure for the page's script, and return the figure's number on the page."""
        packed.append(packing.packed(packing.as_text(figure)))
        return len(packed)

    return template("page.html.j2").render(
        study=", ".join(sorted({record.study for record in records})),
        tabs={tab: of_tab for tab, of_tab in tabs.items() if of_tab},
        labels=TABS,
        add=add,
        figures=packed,
        packed=packing.packed,
        min_width=min_width,
        plotly=library(),
        licence=_licence(library()),
        draw=template("draw.js").render(),
        style=template("style.css").render() + tokens.style(blocks),
        hashes=hashes,
        colour_class=tokens.colour_class,
        marks=MARKS,
    )


@cache
def library() -> str:
    """Return the text of the library that draws the page's figures."""
    return (resources.files("soluscope.report") / LIBRARY).read_text(encoding="utf8")


def _licence(text: str) -> str:
    """Return the library's name, version and licence, which stand in its first comment."""
    comment = re.match(r"\s*/\*+(.*?)\*/", text, flags=re.S)
    return " ".join(comment[1].replace("*", " ").split()) if comment else ""


@cache
def _environment() -> Environment:
    return environment(PackageLoader("soluscope.report"))


def _parts(records: list[Record], identifiers: Mapping[str, str]) -> list[Section]:
    """Return the page's sections: the first screen, the other sentences of the headline, and all other sections."""
    look = figures.styles(at_best_rate(records))
    first, others = answer.blocks(records, tuned(records), look), words.headline(records)
    hidden = others[N_SENTENCES:]
    below = [
        Bullets(others[:N_SENTENCES]),
        *fold(f"{len(hidden)} more", [Bullets(hidden)] if hidden else []),
    ]
    glance, leading_numbers = answer.glance(records, tuned(records)), leading.blocks(tuned(records))
    return [
        Section("first", "", first),
        *([Section("glance", "Each LayerNorm at a glance", glance)] if glance else []),
        *(
            [Section("leading", "Largest differences between the arms", leading_numbers)]
            if leading_numbers
            else []
        ),
        Section("findings", "Findings", below),
        *sections.build(records, identifiers),
    ]
