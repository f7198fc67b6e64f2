"""Helpers that launch sweeps as a user does and find the processes at work; for tests that kill processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from conftest import HANGS_AFTER_S, ROOT

from soluscope.runs.folder import HOLDER

LAUNCH = ROOT / "sweeps" / "launch.py"

SMALL = (
    "size=tiny", "corpus.max_mb=1", "train.threads=1", "train.precision=fp32", "train.device=cpu", "wandb=off"
)  # fmt: skip
"""Words of a job that takes about a second for 300 steps and gives the same bits in any process."""


def sweep_file(folder: Path, **parameters: Sequence[object]) -> Path:
    """Write a sweep over `parameters` (`train__lr` is train.lr) into `folder`, and return its path."""
    lines = [
        f"  {key.replace('__', '.')}: {{values: {list(v)!r}}}" for key, v in parameters.items()
    ]
    path = folder / "small.yaml"
    path.write_text("\n".join(["method: grid", "parameters:", *lines]) + "\n")
    return path


def words_for(runs_dir: Path, *words: str) -> list[str]:
    """Return the words of small jobs in `runs_dir`, with their tokens beside them, and then `words`."""
    return [*SMALL, f"runs_dir={runs_dir}", f"tokens.cache_dir={runs_dir / '.tokens'}", *words]


@contextmanager
def started(*words: str | Path, said: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start `python words` in a new session, with its output appended to the file `said`.

    Processes of the session that still run at the end of the block are killed.
    """
    search_path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    with said.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            env={**os.environ, "PYTHONPATH": search_path},
            stdout=output,
            stderr=output,
            start_new_session=True,
            # A shell starts background jobs with Ctrl-C ignored, and a child inherits that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        yield process
    finally:
        for pid in session(process.pid):
            _kill(pid)
        process.wait()


def at_work(study_dir: Path) -> dict[str, int]:
    """Return the process that works on each run of a study, {run: pid}.

    A run's holder file names it. A process that only tests the lock holds it for an instant and writes no such
    file, and the file of a killed process names one that no longer has the lock open.
    """
    pids = {}
    for path in study_dir.glob(f"[!.]*/{HOLDER}"):  # .sweep is held by the launcher
        with suppress(OSError, ValueError):  # it has ended, or the file is just being written
            pid = json.loads(path.read_bytes())["pid"]
            descriptors = Path(f"/proc/{pid}/fd").iterdir()
            if any(
                os.readlink(each) == str(path.parent.resolve() / ".lock") for each in descriptors
            ):
                pids[path.parent.name] = pid
    return pids


def parent(pid: int) -> int:
    """Return the id of the process that started `pid`."""
    return int(_status(pid)[1])


def until(happens: Callable[[], object], what: str, seconds: float = HANGS_AFTER_S) -> None:
    """Wait until something happens; fail if it does not happen in time."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


def session(leader: int) -> list[int]:
    """Return the ids of all processes in the session of `leader`, the leader included."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if _status(pid)[3:4] == [str(leader)]]


def _status(pid: int) -> list[str]:
    """Return the state, parent, group, session, ... of a process; empty if it does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
