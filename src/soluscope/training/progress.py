"""The progress bar of a run; it is shown only if rich is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from soluscope.terminal import console

if TYPE_CHECKING:
    from rich.progress import Progress


WIDE = 80
"""Columns of a terminal that shows the whole line. A narrower one shows the name, the steps and the loss."""


class NoProgress:
    """A stand-in for rich's Progress, for when rich is not installed or no bar is shown."""

    def add_task(self, *words: Any, **fields: Any) -> Any: ...

    def update(self, *words: Any, **fields: Any) -> None: ...


@contextmanager
def progress_bars() -> Iterator[Progress | NoProgress]:
    """Show one line per run on stderr: its name, bar, steps, loss, tokens per second and time left."""
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column
    except ModuleNotFoundError:
        yield NoProgress()
        return
    terminal = console(stderr=True)
    steps = (TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[loss]}"))
    wide = (TextColumn("{task.description:<20}"), BarColumn(bar_width=24), *steps,
            TextColumn("{task.fields[speed]}"), TimeRemainingColumn())  # fmt: skip
    narrow = (TextColumn("{task.description}", table_column=Column(overflow="fold")), *steps)
    with Progress(*(wide if terminal.width >= WIDE else narrow), console=terminal) as progress:
        yield progress
