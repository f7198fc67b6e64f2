"""The report as one HTML page that needs nothing else: no network, no other file.

The templates escape whatever comes from data. The same records give the same bytes.
"""

from __future__ import annotations

from functools import cache
from itertools import count

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from plotly.offline import get_plotlyjs

from soluscope.report import sections, words
from soluscope.report.blocks import MARKS, Block, Bullets, Paragraph, fold
from soluscope.report.figures import min_width
from soluscope.report.tokens import QUANTITIES
from soluscope.results import Record

N_SENTENCES = 10
"""Of the headline, in view; with many arms it would push all else off the first page."""


def render(records: list[Record]) -> str:
    """Return the whole page for a study's records."""
    return _template().render(
        study=", ".join(sorted({record.study for record in records})),
        headline=_headline(records),
        sections=sections.build(records),
        figure_number=count(1).__next__,
        min_width=min_width,
        plotly=get_plotlyjs(),
        marks=MARKS,
        token_quantities=QUANTITIES,
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("soluscope.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.j2")


def _headline(records: list[Record]) -> list[Block]:
    """The headline's sentences: verdicts large, what they rest on below, many of them folded away."""
    first, *others = words.headline(records)
    hidden = others[N_SENTENCES:]
    return [
        Paragraph(first, style="first"),
        Bullets(others[:N_SENTENCES]),
        *(fold(f"{len(hidden)} more", [Bullets(hidden)]) if hidden else []),
    ]
