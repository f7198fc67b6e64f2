"""The report as data: sections of paragraphs, tables, figures and what folds away.

Sections are built once from the records. page.py writes them as HTML; the dashboard takes their figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go

MARKS = {"pass": "\u2713", "fail": "\u2717", "open": "?", "none": "\u2013"}
"""Styles that stand for a verdict, and the signs shown beside their colours, which not everyone sees."""


class Block:
    """A part of a section, drawn by the template's macro of the same name."""

    @property
    def kind(self) -> str:
        """Name of the macro."""
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Paragraph(Block):
    """A paragraph; its first words may be strong, and the rest code."""

    text: str
    lead: str = ""
    style: str = ""
    """Class in the style sheet: `soft`, `warn`."""
    code: bool = False


@dataclass(frozen=True)
class Bullets(Block):
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Line:
    """A line inside a cell, in a style of its own."""

    text: str
    style: str
    """Class in the style sheet; one of `MARKS` has its sign before the text."""


Cell = str | Sequence[str | Line]
"""Of a table: one line, or several one below the other."""


@dataclass(frozen=True)
class Table(Block):
    """A table that scrolls inside its own box."""

    heads: Sequence[str]
    lines: Sequence[Sequence[Cell]]
    n_text: int = 1
    """How many columns hold text that wraps; those headed `note` do too."""
    styles: Sequence[str] = ()
    """Class of each column in the style sheet, in place of `n_text`."""


@dataclass(frozen=True)
class Plot(Block):
    """A figure, the heading above it, and a remark between the two."""

    figure: go.Figure
    caption: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Fold(Block):
    """Blocks behind a click."""

    summary: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Badge:
    """A label with a mark; `hover` shows under the pointer."""

    mark: str
    label: str
    hover: str


@dataclass(frozen=True)
class Badges(Block):
    """Badges on one line."""

    badges: Sequence[Badge]


@dataclass(frozen=True)
class Scale:
    """The key to the colours of one quantity."""

    name: str
    """Of its style."""
    text: str
    """Name, unit and low end; or the whole of it where the quantity is constant and has no colours."""
    high: str = ""
    gradient: Sequence[str] = ()
    """Colours from the low end to the high one."""


@dataclass(frozen=True)
class Token:
    """A token's text, its numbers in words, and its colour by the name of each quantity's style."""

    text: str
    hover: str
    colours: dict[str, str]


@dataclass(frozen=True)
class TokenText:
    """A text as one arm's first seed sees it."""

    summary: str
    opened: bool
    scales: Sequence[Scale]
    tokens: Sequence[Token]


@dataclass(frozen=True)
class Tokens(Block):
    """Texts coloured by one quantity at a time, which the reader chooses."""

    quantities: dict[str, str]
    """By the name of their style."""
    texts: Sequence[TokenText]


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    name: str
    """`loss`, `tuning`, or a probe's name."""
    heading: str
    blocks: Sequence[Block]
    failed: bool = False
    """Of a probe that failed a control: the navigation shows it."""

    @property
    def plots(self) -> list[Plot]:
        """All figures, those that are folded away included."""
        return list(_plots(self.blocks))


def fold(summary: str, blocks: Sequence[Block]) -> list[Block]:
    """Return the blocks behind a click; nothing where there is nothing to hide."""
    return [Fold(summary, blocks)] if blocks else []


def plot(figure: go.Figure, caption: str = "", remark: str = "") -> list[Block]:
    """Return the figure, whose title is the caption above it; nothing if it is empty."""
    return [Plot(figure.update_layout(title=None), caption, remark)] if figure.data else []


def _plots(blocks: Iterable[Block]) -> Iterator[Plot]:
    for block in blocks:
        if isinstance(block, Plot):
            yield block
        elif isinstance(block, Fold):
            yield from _plots(block.blocks)
