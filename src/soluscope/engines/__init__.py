"""Engines, which run a sweep's jobs: each file in this folder defines one ENGINE.

An engine decides only where and when a job runs. The job's configuration, state and checkpoint are in its
run folder (jobs.py), so that a sweep can begin on one engine and continue on another. No slow package is
imported before `check` is called, so that `--help` can list every engine's keys at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from soluscope.launching.jobs import Task
from soluscope.launching.sweep import Sweep


class After(Protocol):
    """The work after the last job, such as the report: a function, called once without arguments."""

    does: ClassVar[str]
    """The work in words, after "then": `compares and reports`."""

    def to_json(self) -> str:
        """Return the work as one line of JSON, which `launch.after_from_json` reads on another machine."""

    def __call__(self) -> None:
        """Probe and report the study, or start its second stage.

        Raises:
            UserError: if jobs have failed or are not finished; the message names them.
        """


@dataclass(frozen=True)
class Engine:
    """The object that each file in this folder defines."""

    params: type
    """Frozen dataclass of the engine's own keys (`<engine>.*`), checked in its __post_init__."""
    check: Callable[[Any, Sweep], None]
    """Function of the parameters and the sweep that raises UserError if the jobs cannot run, for example without
    a required package or server. It is called before any job starts and before anything is written."""
    run: Callable[[Sweep, Sequence[Task], Any, After], None]
    """Function that runs the given tasks of a sweep, and arranges that `after` is called when all have ended.

    Each task is done by `jobs.execute`, which stores a failure in the job's run folder, so that a failed job
    does not stop the other jobs. With a scheduler, the function may return before the jobs have ended; it then
    prints how to follow them.
    """
    at_once: Callable[[Any, Sweep], int] | None = None
    """Function that returns how many jobs run at once on this machine. None: the jobs run elsewhere."""
