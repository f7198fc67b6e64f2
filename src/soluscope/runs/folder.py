"""A run's folder as one object: its configuration, its facts, and its state.

config.yaml            the resolved configuration, which is enough to repeat the run
checkpoints/last.ckpt  Lightning's checkpoint, for resuming
model.safetensors      final weights under TransformerLens's names
model.json             facts about the model (`Facts`)
metrics.jsonl          loss by step and tokens
done.json              written last; without this file the run is not finished
failed.json            the reason why the last try failed, deleted when the next try begins

The state is read without torch, so that a status is shown at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from soluscope import plugins
from soluscope.config import Config, differences, read_config, to_yaml
from soluscope.errors import UserError
from soluscope.files import write_text
from soluscope.terminal import say

if TYPE_CHECKING:
    from soluscope.model import LanguageModel
    from soluscope.runs.weights import Facts
    from soluscope.variants import Variant

LOCK_PATIENCE_S = 1.0
"""Seconds for which `lock` tries, because a process that only tests the lock holds it for an instant."""
HOLDER = ".held_by.json"
"""File beside the lock with the process that holds it."""
ASK_PATIENCE_S = 0.05
"""Seconds for which `Run.at_work` tries, because another process may test the lock at the same moment."""


class Busy(UserError):
    """The error that another process is at work in the folder."""


@dataclass(frozen=True)
class Run:
    """A run's folder.

    The configuration and the facts are read once, at their first use. The state changes while a process
    is at work in the folder, so it is read at every call.
    """

    dir: Path

    @cached_property
    def config(self) -> Config:
        """Return the configuration that was saved with the run.

        Raises:
            UserError: if config.yaml is missing or broken.
        """
        return read_config(self.config_file)

    @cached_property
    def facts(self) -> Facts:
        """Return the facts of a finished run.

        Raises:
            UserError: if the run does not exist, is not finished, or has a broken model.json.
        """
        from soluscope.runs.weights import load_facts

        return load_facts(self.dir)

    @property
    def variant(self) -> Variant:
        """Return the variant that the run's configuration names."""
        variant: Variant = plugins.pick("soluscope.variants", self.config.variant)
        return variant

    @property
    def config_file(self) -> Path:
        return self.dir / "config.yaml"

    @property
    def checkpoint(self) -> Path:
        """Return the path of the last checkpoint, from which an interrupted run resumes."""
        return self.dir / "checkpoints" / "last.ckpt"

    @property
    def weights(self) -> Path:
        """Return the path of the final weights of a finished run."""
        return self.dir / "model.safetensors"

    @property
    def metrics(self) -> Path:
        return self.dir / "metrics.jsonl"

    @property
    def tokenizer(self) -> Path:
        """Return the path of the tokenizer of the run's study."""
        return self.dir.parent / "tokenizer.json"

    def load_model(self) -> LanguageModel:
        """Return the trained model of a finished run.

        Raises:
            UserError: if there is no finished run, the weights are truncated, or their shapes do not fit
                the run's configuration.
        """
        from soluscope.runs.weights import load_weights

        facts = self.facts  # first, because its error explains that there is no finished run
        return load_weights(self.dir, self.config, facts)

    def done(self) -> dict[str, Any] | None:
        """Return the content of done.json if the run is finished and all its files are complete, else None.

        A folder that was copied incompletely may have done.json without the weights that belong to it.
        """
        try:
            content = json.loads((self.dir / "done.json").read_text(encoding="utf8"))
            n_bytes = self.weights.stat().st_size
            complete = content.get("weights_bytes", n_bytes) == n_bytes
        except (OSError, ValueError, AttributeError):  # missing, cut, or not an object
            return None
        return content if complete and (self.dir / "model.json").is_file() else None

    def is_done(self) -> bool:
        """Return whether the run is finished and all its files are complete."""
        return self.done() is not None

    def at_work(self) -> bool:
        """Return whether a process holds the folder now, without creating a file."""
        path = self.dir / ".lock"
        if not path.is_file():
            return False
        try:
            with FileLock(path).acquire(timeout=ASK_PATIENCE_S, poll_interval=0.01):
                return False
        except Timeout:
            return True
        except OSError:  # this user may only read the folder
            return False

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Hold the folder for this process; see `lock`."""
        return lock(self.dir)

    def claim(self, config: Config) -> Literal["done", "resume", "start"]:
        """Create the folder for `config`, or check that the existing folder has this configuration.

        Returns:
            The remaining work: `start` or `resume` training, or none (`done`).

        Raises:
            UserError: if the folder has a different configuration or cannot be written.
        """
        if self.is_done():
            state: Literal["done", "resume", "start"] = "done"
        else:
            state = "resume" if self.checkpoint.is_file() else "start"
        if state == "start":  # config.yaml left by a run that never started may be overwritten
            write_text(self.config_file, to_yaml(config))
        else:
            self._check_same(config)
        if state != "done":
            # An incomplete copy of a finished run has this file without the weights.
            (self.dir / "done.json").unlink(missing_ok=True)
            self.forget_failure()
        return state

    def _check_same(self, config: Config) -> None:
        if not self.config_file.is_file():
            raise UserError(
                f"{self.config_file} is missing: delete {self.dir} to train the run from step 0"
            )
        differing = differences(self.config, config)
        if differing:
            raise UserError(
                f"{self.dir} has a different configuration ({differing[0]}"
                + (f" and {len(differing) - 1} more keys" if len(differing) > 1 else "")
                + "): set tag= or study= to train this configuration in another folder"
                + (
                    f"; with train.init_from={self.dir} it starts with these weights"
                    if self.is_done()
                    else ""
                )
            )

    def record_failure(self, error: BaseException) -> None:
        """Write the reason of the failure to failed.json; if the disk is full, do nothing."""
        lines = str(error).strip().splitlines() or [type(error).__name__]
        last = lines[-1]
        reason = last if isinstance(error, UserError) else f"{type(error).__name__}: {last}"
        with contextlib.suppress(UserError, OSError):
            write_text(self.dir / "failed.json", json.dumps({"error": reason}) + "\n")

    def failure(self) -> str | None:
        """Return the last line of the error that ended the run's last try, or None without such an error."""
        try:
            reason = json.loads((self.dir / "failed.json").read_text(encoding="utf8"))["error"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return str(reason)

    def forget_failure(self) -> None:
        """Delete failed.json, because a new try begins."""
        with contextlib.suppress(OSError):
            (self.dir / "failed.json").unlink(missing_ok=True)

    def last_row(self) -> dict[str, Any]:
        """Return the last complete row of metrics.jsonl; empty if the file has no complete row."""
        try:
            with self.metrics.open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - 4096))
                lines = file.read().decode("utf8", "replace").split("\n")[:-1]
            row = json.loads(lines[-1])
        except (OSError, ValueError, IndexError):
            return {}
        return row if isinstance(row, dict) else {}


@contextmanager
def lock(
    folder: Path,
    wait: bool = False,
    knob: str = "set tag= or study=",
) -> Iterator[None]:
    """Hold `folder` for this process. If the process is killed, the kernel releases the lock.

    Args:
        folder: the folder, which is created if it does not exist.
        wait: True to wait while another process holds the folder.
        knob: advice for a user who cannot wait.

    Raises:
        Busy: if another process holds the folder; the message names the process.
        UserError: if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = _acquired(folder, wait, knob)
        write_text(folder / HOLDER, json.dumps(_this_process()) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror}; set runs_dir to another folder"
        ) from error
    with held:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / HOLDER).unlink(missing_ok=True)


def _acquired(folder: Path, wait: bool, knob: str) -> contextlib.AbstractContextManager[Any]:
    file = FileLock(folder / ".lock")
    try:
        return file.acquire(timeout=LOCK_PATIENCE_S)
    except Timeout as error:
        if not wait:
            raise Busy(
                f"another process is at work in {folder}{holder(folder)}: wait until it ends, or {knob}"
            ) from error
    say(f"waiting, because another process is at work in {folder}{holder(folder)}")
    return file.acquire()


def holder(folder: Path) -> str:
    """Return the process that holds a folder, with a space before it, or nothing if it is unknown."""
    try:
        known = json.loads((folder / HOLDER).read_text(encoding="utf8"))
        return f" (process {int(known['pid'])} on {str(known['host'])[:100]} since {str(known['since'])[:30]})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def _this_process() -> dict[str, Any]:
    now = datetime.now().astimezone()
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": now.isoformat(sep=" ", timespec="seconds"),
    }
