"""A figure of titled panels in the making, as plotly's JSON.

plotly checks every change of a figure that it holds, which takes milliseconds. A sheet is checked once, when it
becomes a figure.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import plotly.graph_objects as go

Key = tuple[str, ...]
"""Key of a panel: quantity, group, stream, in that order."""
Trace = dict[str, Any]
"""A trace as plotly's JSON."""
INK, GRID = "#222222", "#e4e4e4"
N_COLUMNS = 3
TITLE_LETTERS = 36
"""Letters in a line of a panel's title; three panels beside each other have room for it."""
TOP = 36
"""Pixels above the first row of panels, for their titles."""
LEGEND = 34
"""Pixels above the titles for one row of the legend; plotly makes more room where the legend needs it."""
DOTTED = {"color": INK, "width": 1, "dash": "dot"}
"""A line that marks a value."""


class Sheet:
    """A figure with titled panels, up to `N_COLUMNS` side by side. They are numbered from 0, row by row."""

    def __init__(
        self,
        panels: Collection[Key],
        row_height: int,
        shared_x: bool = False,
        curves: bool = False,
        gap: int = 84,
    ) -> None:
        """Place the panels.

        Args:
            panels: the key of each panel. A panel's title has the parts in which the keys differ.
            row_height: height of a panel in pixels.
            shared_x: True if all panels share the range of their horizontal axes.
            curves: True for a legend above the panels and more room between them.
            gap: height in pixels between two rows of panels, for the labels of the upper row and the titles of
                the lower row.
        """
        n_columns = min(N_COLUMNS, len(panels))
        n_rows = -(-len(panels) // n_columns)
        top, inner = TOP + LEGEND * curves, n_rows * row_height + (n_rows - 1) * gap
        across, down = 0.09 if curves else 0.04, gap / inner
        width, height = (1 - across * (n_columns - 1)) / n_columns, row_height / inner
        self.traces: list[Trace] = []
        self.layout: dict[str, Any] = {
            "template": _template(nticks_x=5 if n_columns == 1 else 4),
            "height": top + inner + gap - TOP,
            "autosize": True,
            "margin": {"l": 60, "r": 16, "t": top, "b": gap - TOP},
            "legend": {"orientation": "h", "y": 1 + TOP / inner, "yanchor": "bottom", "x": 0},
            "annotations": [],
            "shapes": [],
        }
        for index, title in enumerate(_titles(panels)):
            left = index % n_columns * (width + across)
            upper = 1 - index // n_columns * (height + down)
            self.x(index, anchor=_name("y", index), domain=[left, min(1.0, left + width)])
            self.y(index, anchor=_name("x", index), domain=[max(0.0, upper - height), upper])
            if shared_x and index:
                self.x(index, matches="x")
            if title:
                self.layout["annotations"].append(
                    {
                        "text": title, "font": {"size": 13}, "showarrow": False,
                        "x": left + width / 2, "xref": "paper", "xanchor": "center",
                        "y": upper, "yref": "paper", "yanchor": "bottom",
                    }
                )  # fmt: skip

    def x(self, index: int, /, **settings: object) -> None:
        """Change the horizontal axis of a panel; `title` is its text."""
        self._change("x", index, settings)

    def y(self, index: int, /, **settings: object) -> None:
        """Change the vertical axis of a panel; `title` is its text."""
        self._change("y", index, settings)

    def add(self, trace: Trace | None, index: int) -> None:
        """Add a trace to a panel; None adds nothing."""
        if trace is not None:
            self.traces.append(trace | {"xaxis": _name("x", index), "yaxis": _name("y", index)})

    def mark(self, value: float, index: int, upright: bool) -> None:
        """Draw a dotted line through a panel at a value of its upright axis, or else of its horizontal axis."""
        along, across = ("y", "x") if upright else ("x", "y")
        self.layout["shapes"].append(
            {
                "type": "line", "line": DOTTED,
                f"{along}0": value, f"{along}1": value, f"{along}ref": _name(along, index),
                f"{across}0": 0, f"{across}1": 1, f"{across}ref": f"{_name(across, index)} domain",
            }
        )  # fmt: skip

    def figure(self, title: str = "") -> go.Figure:
        """Return the figure that notebooks display."""
        named = {"title": {"text": title}} if title else {}
        return go.Figure({"data": self.traces, "layout": self.layout | named})

    def _change(self, letter: str, index: int, settings: Mapping[str, object]) -> None:
        axis = self.layout.setdefault(_name(f"{letter}axis", index), {})
        axis |= {
            key: {"text": value} if key == "title" else value for key, value in settings.items()
        }


def _name(axis: str, index: int) -> str:
    """Return plotly's name of a panel's axis."""
    return f"{axis}{index + 1}" if index else axis


def _titles(panels: Collection[Key]) -> list[str]:
    """Return each panel's title: the parts of its key in which the panels differ, in lines."""
    several = [len(set(parts)) > 1 for parts in zip(*panels, strict=True)]
    titles = []
    for key in panels:
        named = [part for part, differs in zip(key, several, strict=True) if part and differs]
        named = named or [key[2] or key[0]]
        lines = [line for part in named for line in textwrap.wrap(part, TITLE_LETTERS)]
        titles.append("<br>".join(map(html.escape, lines)))
    return titles


@cache
def _template(nticks_x: int) -> go.layout.Template:
    """Return the style of all axes; setting it on each axis of a large figure would take longer than drawing it."""
    axis = {
        "exponentformat": "e",
        "gridcolor": GRID,
        "linecolor": INK,
        "zeroline": False,
        "automargin": True,
        "title": {"font": {"size": 12}, "standoff": 6},
    }
    return go.layout.Template(
        layout={
            "xaxis": axis | {"nticks": nticks_x, "tickangle": 0},
            "yaxis": axis | {"nticks": 6},
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "dragmode": False,  # so that a finger on a phone scrolls the page
            "hovermode": "closest",
        }
    )
