"""The report as data: sections of paragraphs, tables, figures and folded blocks.

Sections are built once from the records. page.py renders them as HTML; the dashboard uses their figures.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go

MARKS = {"pass": "\u2713", "fail": "\u2717", "open": "?", "none": "\u2013"}
"""Styles of verdicts, and the sign shown with each colour for readers who cannot distinguish the colours."""


N_VALUES = 20
"""Largest number of values in the text alternative of a figure."""
TABS = {
    "answer": "Answer", "training": "Training", "tuning": "Tuning", "dose": "Dose and size", "probes": "Probes",
    "tokens": "Tokens", "neurons": "Neurons", "methods": "Methods and controls", "data": "Data and provenance",
}  # fmt: skip
"""Labels of the page's tabs, in their order; a tab without sections is left out."""


class Block:
    """A part of a section, rendered by the template macro of the same name."""

    @property
    def kind(self) -> str:
        """Return the name of the block's macro."""
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Paragraph(Block):
    """A paragraph of text."""

    text: str
    lead: str = ""
    """First words, in bold."""
    style: str = ""
    """Class in the style sheet: `soft`, `warn`, `first`."""
    code: bool = False
    """True if the text is shown as code."""


@dataclass(frozen=True)
class Source(Block):
    """A text to copy, as it was written; one click selects all of it."""

    text: str


@dataclass(frozen=True)
class Link(Block):
    """A link to another page of the study."""

    text: str
    path: str
    """Relative to the report's folder."""


@dataclass(frozen=True)
class Bullets(Block):
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Line:
    """A line inside a table cell, with its own style."""

    text: str
    style: str
    """Class in the style sheet. For a class in `MARKS`, the sign is shown before the text."""
    words: str = ""
    """Words for a short `text`: for screen readers, for the pointer, and for the saved table."""


Cell = str | Sequence[str | Line]
"""A table cell: one line, or several lines below each other."""


@dataclass(frozen=True)
class Table(Block):
    """A table that scrolls inside its own box."""

    heads: Sequence[str | Line]
    lines: Sequence[Sequence[Cell]]
    n_text: int = 1
    """Number of leading columns whose text wraps; it also wraps in columns with the heading `note`."""
    styles: Sequence[str] = ()
    """Class of each column in the style sheet; replaces `n_text` if given."""
    style: str = ""
    """Class of the table in the style sheet."""


@dataclass(frozen=True)
class Plot(Block):
    """A figure with a heading above it and a remark between heading and figure."""

    figure: go.Figure
    caption: str = ""
    remark: str = ""

    @property
    def alternative(self) -> str:
        """Return the figure as text, for readers who cannot see it: panels, axes, lines, and a few numbers."""
        layout = self.figure.layout
        panels = [each.text for each in layout.annotations if each.text]
        axes = [axis.title.text for axis in self.figure.select_xaxes()]
        axes += [axis.title.text for axis in self.figure.select_yaxes()]
        names = [trace.name for trace in self.figure.data if trace.name]
        points = [text for trace in self.figure.data for text in trace.text or ()]
        parts = {
            "panels": panels,
            "axes": axes,
            "lines": names,
            "values": points[:N_VALUES],
        }
        texts = [
            f"{name}: {'; '.join(dict.fromkeys(text for text in of_part if text))}"
            for name, of_part in parts.items()
            if any(of_part)
        ]
        more = len(points) - N_VALUES
        texts += [f"and {more} more values, in the tables"] if more > 0 else []
        plain = f"Figure {self.caption}. {'. '.join(texts)}."
        return html.unescape(plain.replace("<br>", " "))


@dataclass(frozen=True)
class Fold(Block):
    """Blocks that are hidden until the reader opens them."""

    summary: str
    blocks: Sequence[Block]
    style: str = ""
    """Class in the style sheet."""
    packed: bool = False
    """True if the page contains the blocks compressed, so that they can be opened only with its script."""


@dataclass(frozen=True)
class Tile:
    """A fact: its name, its number in large type, and lines of small type below."""

    label: str
    value: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Tiles(Block):
    """Facts beside each other."""

    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Badge:
    """A label with a mark, and a text that is shown while the pointer is on it."""

    mark: str
    label: str
    hover: str


@dataclass(frozen=True)
class Badges(Block):
    """Badges on one line."""

    badges: Sequence[Badge]


@dataclass(frozen=True)
class Scale:
    """The colour scale of one quantity."""

    name: str
    """Name of the quantity's style."""
    text: str
    """Name, unit and lowest value; the whole text if the quantity is constant and has no colours."""
    high: str = ""
    """Highest value, with the colours before it."""


@dataclass(frozen=True)
class Token:
    """A token's text, its numbers as text, and its colours by the name of each quantity's style."""

    text: str
    hover: str
    colours: dict[str, str]


@dataclass(frozen=True)
class TokenText:
    """A text coloured by the values of one arm's first seed."""

    summary: str
    opened: bool
    scales: Sequence[Scale]
    tokens: Sequence[Token]


@dataclass(frozen=True)
class Tokens(Block):
    """Texts coloured by one quantity at a time; the reader chooses the quantity."""

    quantities: dict[str, str]
    """Labels of the quantities, by the name of their style."""
    texts: Sequence[TokenText]


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it."""

    name: str
    """`loss`, `tuning`, or a probe's name."""
    heading: str
    blocks: Sequence[Block]
    tab: str = "answer"
    """Key of the section's tab in `TABS`."""
    failed: bool = False
    """True for a probe that failed a control; the navigation marks its link."""

    @property
    def plots(self) -> list[Plot]:
        """List all figures of the section, folded ones included."""
        return [block for block in flat(self.blocks) if isinstance(block, Plot)]


def fold(summary: str, blocks: Sequence[Block]) -> list[Block]:
    """Hide the blocks behind a click; return an empty list if there are no blocks."""
    return [Fold(summary, blocks)] if blocks else []


def plot(figure: go.Figure, caption: str = "", remark: str = "") -> list[Block]:
    """Return the figure with the caption in place of its title; return an empty list if it has no traces."""
    return [Plot(figure.update_layout(title=None), caption, remark)] if figure.data else []


def flat(blocks: Iterable[Block]) -> Iterator[Block]:
    """Yield the blocks, and after each fold the blocks in it."""
    for block in blocks:
        yield block
        if isinstance(block, Fold):
            yield from flat(block.blocks)
