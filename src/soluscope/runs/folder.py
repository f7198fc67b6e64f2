"""The state of a run, read from its folder alone: done, at work, failed, or what would resume it.

Reads without torch, so that a status is answered at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soluscope.errors import UserError
from soluscope.files import write_text

LOCK_PATIENCE_S = 1.0
"""A question about the lock holds it for an instant; who wants it asks again for this long."""


class Busy(UserError):
    """Another process is at work in the folder."""


def last_checkpoint(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "last.ckpt"


def is_done(run_dir: Path) -> bool:
    """Whether the run has ended and all that it leaves behind is there, whole.

    A folder that was copied half-way may have its done.json and not the weights that it speaks of.
    """
    try:
        done = json.loads((run_dir / "done.json").read_text(encoding="utf8"))
        n_bytes = (run_dir / "model.safetensors").stat().st_size
        wanted = done.get("weights_bytes", n_bytes)
    except (OSError, ValueError, AttributeError):  # not there, cut, or no object
        return False
    return (run_dir / "model.json").is_file() and n_bytes == wanted


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold the folder for this process. The kernel lets go when the process ends, however it ends."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"cannot write {run_dir}: {error.strerror}; choose another runs_dir"
        ) from error
    with file:
        until = time.monotonic() + LOCK_PATIENCE_S
        while not _lock_now(file, fcntl.LOCK_EX):
            if time.monotonic() > until:
                raise Busy(
                    f"another process is at work in {run_dir}: wait for it, or set tag= or study="
                )
            time.sleep(0.05)
        yield


def at_work(run_dir: Path) -> bool:
    """Whether a process holds the folder now. Makes nothing."""
    try:
        file = (run_dir / ".lock").open()
    except OSError:
        return False
    with file:
        return not _lock_now(file, fcntl.LOCK_SH)


def _lock_now(file: Any, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def record_failure(run_dir: Path, error: BaseException) -> None:
    """Keep why a run failed: failed.json. A full disk does not hide the error itself."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    said = lines[-1] if isinstance(error, UserError) else f"{type(error).__name__}: {lines[-1]}"
    with contextlib.suppress(UserError, OSError):
        write_text(run_dir / "failed.json", json.dumps({"error": said}) + "\n")


def failure(run_dir: Path) -> str | None:
    """The last line of the error that ended the run's last try, if one did."""
    try:
        said = json.loads((run_dir / "failed.json").read_text(encoding="utf8"))["error"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(said)


def forget_failure(run_dir: Path) -> None:
    """A new try begins."""
    with contextlib.suppress(OSError):
        (run_dir / "failed.json").unlink(missing_ok=True)


def last_row(run_dir: Path) -> dict[str, Any]:
    """The last whole row of metrics.jsonl, empty if there is none."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = file.read().decode("utf8", "replace").split("\n")[:-1]
        row = json.loads(lines[-1])
    except (OSError, ValueError, IndexError):
        return {}
    return row if isinstance(row, dict) else {}
