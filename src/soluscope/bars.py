"""Progress of many runs: on a terminal one live bar per run at work, and a total with the time left.

Without a terminal, or without rich, one line is printed when a run begins and one when it ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from soluscope.terminal import console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

WIDE = 80
"""Columns of a terminal that shows the whole line. A narrower one shows the name, the share and the text."""

Say = Callable[[str], None]


class Bars:
    """The bars of the runs at work and of all runs together, or lines in their place."""

    def __init__(
        self,
        weights: Mapping[str, float],
        begun: Mapping[str, float],
        say: Say,
        live: Progress | None,
    ) -> None:
        self._weights, self._say, self._live = weights, say, live
        self._shares = {name: begun.get(name, 0.0) for name in weights}
        self._ended: set[str] = set()
        self._bars: dict[str, TaskID] = {}
        if live:
            self._total = live.add_task("total", total=sum(weights.values()), **self._of_all())

    def begin(self, name: str, line: str) -> None:
        """Begin a run: show its bar, or print the line."""
        if self._live is None:
            self._say(line)
        else:
            self._bars[name] = self._live.add_task(name, total=1.0, text="")

    def update(self, name: str, done: float, of: float, text: str = "") -> None:
        """Show that `done` of the run's `of` steps are done, and a text such as its loss."""
        if self._live is None or name not in self._bars:
            return
        self._shares[name] = min(1.0, done / of) if of else 0.0
        self._live.update(self._bars[name], completed=self._shares[name], text=text)
        self._live.update(self._total, **self._of_all())

    def end(self, name: str, line: str) -> None:
        """End a run: remove its bar, or print the line, if it is not empty."""
        self._shares[name] = 1.0
        self._ended.add(name)
        if self._live is None:
            if line:
                self._say(line)
            return
        if name in self._bars:
            self._live.remove_task(self._bars.pop(name))
        self._live.update(self._total, **self._of_all())

    def _of_all(self) -> dict[str, Any]:
        done = sum(weight * self._shares[name] for name, weight in self._weights.items())
        text = f"{len(self._ended)} of {len(self._weights)} runs"
        return {"completed": done, "text": text}


@contextmanager
def bars(
    weights: Mapping[str, float], say: Say, begun: Mapping[str, float] | None = None
) -> Iterator[Bars]:
    """Show the progress of runs on stderr until the block ends.

    Args:
        weights: the work of each run, by its name, in any unit.
        say: function called with each line, if stderr is not a terminal.
        begun: the share of its work that a run has done already.
    """
    live = _live() if weights and sys.stderr.isatty() else None
    if live is None:
        yield Bars(weights, begun or {}, say, None)
        return
    with live:
        yield Bars(weights, begun or {}, say, live)


def _live() -> Progress | None:
    try:
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.table import Column
    except ModuleNotFoundError:
        return None
    terminal = console(stderr=True)
    if not terminal.is_terminal:
        return None
    share, text = TaskProgressColumn(), TextColumn("{task.fields[text]}")
    wide = (
        TextColumn("{task.description:<20}"),
        BarColumn(bar_width=24),
        share,
        text,
        TimeRemainingColumn(),
    )
    narrow = (TextColumn("{task.description}", table_column=Column(overflow="fold")), share, text)
    # The time left is estimated over five minutes, because the runs' first minutes are slower.
    return Progress(
        *(wide if terminal.width >= WIDE else narrow),
        console=terminal, transient=True, speed_estimate_period=300,
    )  # fmt: skip
