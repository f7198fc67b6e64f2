"""The report as one self-contained HTML page: it needs no network and no other file.

The templates escape all text that comes from data. The same records give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from itertools import count

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from soluscope.report import sections, tokens, words
from soluscope.report.blocks import MARKS, Block, Bullets, Paragraph, flat, fold
from soluscope.report.figures import min_width
from soluscope.results import Record

N_SENTENCES = 10
"""Number of the headline's sentences in view; more would push the rest of the page off the first screen."""
TERMS = {
    "The norm.": (
        "SoLU is the activation x softmax(x), and mid is its output in the MLP. The mid norm is a LayerNorm on "
        "mid: at each token it multiplies the centred activations by the gain g = 1 / sqrt(variance + eps). "
        "Smearing is the hypothesis that features are spread thinly over many neurons, and that this per-token "
        "gain amplifies them. r = variance / (variance + eps) is near 0 if eps holds the gain near one value "
        "for all tokens, and 1 in a true LayerNorm. kappa = eps d_mlp^2 is the strength of eps, comparable "
        "between sizes. BOS is the token at the beginning of each text."
    ),
    "The comparison.": (
        "An arm is one configuration, trained at one or more seeds; runs of one seed share their initial values "
        "and batches. Plain SoLU has no mid norm; a static arm has one gain for all tokens. The benefit of LN "
        "is the loss of plain SoLU minus the loss of the arm with LayerNorm. Phi_dyn is the share of this "
        "benefit that the best static arm does not reach, and so needs a per-token gain."
    ),
}
"""Explanations of the headline's terms, by the heading of their paragraph; shown above the headline."""


def render(records: list[Record]) -> str:
    """Render the whole page for a study's records."""
    parts = sections.build(records)
    blocks = flat(block for section in parts for block in section.blocks)
    template = _environment().get_template
    return template("page.html.j2").render(
        study=", ".join(sorted({record.study for record in records})),
        headline=_headline(records),
        sections=parts,
        figure_number=count(1).__next__,
        min_width=min_width,
        plotly=get_plotlyjs(),
        map_styles=sorted(set(re.findall(r'getElementById\("([0-9a-f]{64})"\)', get_plotlyjs()))),
        draw=template("draw.js").render(),
        style=template("style.css").render() + tokens.style(blocks),
        hashes=_hashes,
        colour_class=tokens.colour_class,
        marks=MARKS,
    )


def _hashes(*contents: str) -> str:
    """Return the sources of a content security policy that allow elements with exactly these contents."""
    sums = (base64.b64encode(hashlib.sha256(each.encode()).digest()) for each in contents)
    return " ".join(f"'sha256-{each.decode()}'" for each in sums)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("soluscope.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _headline(records: list[Record]) -> list[Block]:
    """Return the headline: the terms, the first verdict in large type, and the other sentences below it."""
    first, *others = words.headline(records)
    hidden = others[N_SENTENCES:]
    return [
        *(Paragraph(text, lead, style="soft") for lead, text in TERMS.items()),
        Paragraph(first, style="first"),
        Bullets(others[:N_SENTENCES]),
        *(fold(f"{len(hidden)} more", [Bullets(hidden)]) if hidden else []),
    ]
