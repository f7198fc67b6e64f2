"""Sweeps launched as a user launches them, and who is at work on their runs: for tests that kill things."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from conftest import HANGS_AFTER_S, ROOT

LAUNCH = ROOT / "sweeps" / "launch.py"

SMALL = (
    "size=tiny", "corpus.max_mb=1", "train.threads=1", "train.precision=fp32", "train.device=cpu", "wandb=off"
)  # fmt: skip
"""Words of a job that takes a second or so for 300 steps, and gives the same bits wherever it runs."""


def sweep_file(folder: Path, **parameters: Sequence[object]) -> Path:
    """A sweep over `parameters` (`train__lr` is train.lr), in `folder`."""
    lines = [
        f"  {key.replace('__', '.')}: {{values: {list(v)!r}}}" for key, v in parameters.items()
    ]
    path = folder / "small.yaml"
    path.write_text("\n".join(["method: grid", "parameters:", *lines]) + "\n")
    return path


def words_for(runs_dir: Path, *words: str) -> list[str]:
    """`words` for small jobs in `runs_dir`, their tokens beside them."""
    return [*SMALL, f"runs_dir={runs_dir}", f"tokens.cache_dir={runs_dir / '.tokens'}", *words]


@contextmanager
def started(*words: str | Path, said: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`python words` in a session of its own; all that it prints goes to the file `said`.

    What is left of it at the end is killed.
    """
    search_path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    with said.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            env={**os.environ, "PYTHONPATH": search_path},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        for pid in session(process.pid):
            _kill(pid)
        process.wait()


def at_work(study_dir: Path) -> dict[str, int]:
    """Which process holds each run of a study: {run: pid}. From the system, not from what it says of itself."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            for descriptor in (process / "fd").iterdir():
                target = Path(os.readlink(descriptor))
                if target.name == ".lock" and target.parents[1] == study_dir:
                    found[target.parent.name] = int(process.name)
    return found


def parent(pid: int) -> int:
    """The process that started another."""
    return int(_status(pid)[1])


def until(happens: Callable[[], object], what: str, seconds: float = HANGS_AFTER_S) -> None:
    """Wait until something happens; fail where it does not."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


def session(leader: int) -> list[int]:
    """The processes of the session that one began: itself, and all that was started by those in it."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if _status(pid)[3:4] == [str(leader)]]


def _status(pid: int) -> list[str]:
    """state, parent, group, session, ... of a process; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
