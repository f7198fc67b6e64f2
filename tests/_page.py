"""The figures of a page, as the page's script finds them."""

from __future__ import annotations

import json
import re

import plotly.graph_objects as go

from soluscope.report.packing import SHOWN, unpacked

Points = set[tuple[float, float]]


def packed_in(page: str, part: str) -> str:
    """Return the text of a compressed part of a page: `figures`, one on each line, or `library`."""
    (content,) = re.findall(rf'<script type="text/plain" id="packed-{part}">([^<]*)</script>', page)
    return "\n".join(map(unpacked, content.split())) if content else ""


def figures_in(page: str, part: str | None = None) -> list[go.Figure]:
    """Return the figures in a part of a page, by default in all of it, as a browser would draw them."""
    texts = packed_in(page, "figures").split("\n")
    numbers = re.findall(r'class="plot" id="figure-(\d+)"', page if part is None else part)
    return [go.Figure(json.loads(texts[int(number) - 1])) for number in numbers]


def as_shown(points: Points) -> set[tuple[str, str]]:
    """Return points as a figure shows them under the pointer; the page rounds coordinates no further."""
    return {(f"{x:{SHOWN}}", f"{y:{SHOWN}}") for x, y in points}
