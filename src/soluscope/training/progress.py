"""The progress bar of a run; it is shown only if rich is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress


class NoProgress:
    """A stand-in for rich's Progress, for when rich is not installed or no bar is shown."""

    def add_task(self, *words: Any, **fields: Any) -> Any: ...

    def update(self, *words: Any, **fields: Any) -> None: ...


@contextmanager
def progress_bars() -> Iterator[Progress | NoProgress]:
    """Show one line per run on stderr: its name, bar, steps, loss, tokens per second and time left."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        yield NoProgress()
        return
    with Progress(
        TextColumn("{task.description:<20}"), BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"), TimeRemainingColumn(),
        # In a notebook, as in a file: one line per finished run, since bars would need ipywidgets.
        console=Console(stderr=True, force_jupyter=False, force_terminal=sys.stderr.isatty()),
    ) as progress:  # fmt: skip
        yield progress
