"""Who runs a sweep's jobs: one file an engine, each defining an ENGINE.

An engine decides where and when a job runs and nothing else: what a job is, whether it is done and what
would resume it is in its run folder alone (jobs.py), so that a sweep begun on one engine goes on on another.
Nothing heavy is imported before `check` is called, so that `--help` can list every engine's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from soluscope.config import Config
from soluscope.launching.sweep import Sweep


class After(Protocol):
    """What follows the last job: probes and report. Can be pickled; called once, with no arguments."""

    def __call__(self) -> None:
        """Raises UserError, naming them, if jobs have failed or are not finished."""


@dataclass(frozen=True)
class Engine:
    """What a file in this folder defines."""

    params: type
    """A frozen dataclass of the engine's own keys, checked in __post_init__: `<engine>.*`."""
    check: Callable[[Any, Sweep], None]
    """Of the parameters and the sweep: raises UserError where no job could run (a missing extra, a server
    that does not answer), before any job starts and anything is written."""
    run: Callable[[Sweep, Sequence[Config], Any, After], None]
    """Runs the jobs that are given, of a sweep, and sees to it that `after` is called when all have ended.

    Each job goes through `jobs.execute`, which keeps a failure in the job's run folder: one that fails does
    not stop the others. May return before the jobs have ended where a scheduler holds them; it then says
    how to follow them.
    """
