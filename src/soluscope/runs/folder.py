"""A run's folder as one object: its configuration, its facts, and its state.

config.yaml            the resolved configuration, which is enough to repeat the run
checkpoints/last.ckpt  Lightning's checkpoint, for resuming
model.safetensors      final weights under TransformerLens's names
model.json             facts about the model (`Facts`)
snapshots/             weights at earlier steps, STEP.safetensors; done.json has their checksums
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
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Required, TypedDict

from filelock import Timeout

from soluscope.config import Config, differences, read_config, to_yaml
from soluscope.errors import Diverged, UserError
from soluscope.files import (
    Whole,
    check_links,
    file_lock,
    from_json,
    read_json,
    reason,
    remove_litter,
    write_text,
)
from soluscope.terminal import say

if TYPE_CHECKING:
    from soluscope.model import LanguageModel
    from soluscope.runs.weights import Facts

DIVERGED = "diverged"
"""Kind of a failure in failed.json: the loss diverged, so another try would end in the same way."""
MOST_DIGITS = 12
"""Digits of a step from which a name in done.json is none."""
LOCK_PATIENCE_S = 1.0
"""Seconds for which `lock` tries, because a process that only tests the lock holds it for an instant."""
HOLDER = ".held_by.json"
"""File beside the lock with the process that holds it."""
ASK_PATIENCE_S = 0.05
"""Seconds for which `Run.at_work` tries, because another process may test the lock at the same moment."""


OF_STUDY = (
    "sweep.json", "preregistration.json", "tokenizer.json", "data.json", "tokens", "results.jsonl", "report.html",
    "neurons", "rating", "slurm", ".controls", ".controls.new", ".controls.old", ".data.lock", ".lock", ".sweep",
)  # fmt: skip
"""Names of a study's own files and folders, beside its runs."""
OF_RUN = (
    "checkpoints", "snapshots", "probes", ".probes.new", "removal", ".removal.new", "removal-all",
    ".removal-all.new", "neurons", "tokenizer",
)  # fmt: skip
"""Names of a run's own folders."""
FOUND_NEURONS = tuple(Path("neurons") / part / "found.jsonl" for part in ("trained", "untrained"))
"""Files in a run's folder with the neurons that the report shows, and how readable those of the run and of its
initialisation are."""
MetricsRow = dict[str, int | float]
"""Row of metrics.jsonl: `step`, `tokens`, `loss`, and other numbers of that step."""


class Done(TypedDict, total=False):
    """Content of done.json; files of older versions lack the checksum and the size of the weights."""

    select_loss: Required[float]
    report_loss: Required[float]
    steps: Whole
    tokens: Whole
    seconds: float
    epochs: float
    weights_bytes: Whole
    weights_sha256: str
    snapshots: dict[str, str]
    """Checksum of each snapshot's weights, by its step."""


@dataclass(frozen=True)
class Holder:
    """Content of the file `HOLDER`: a process that holds a folder."""

    pid: Whole
    host: str
    since: str


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
            UserError: if the run does not exist, is not finished, has a broken model.json, or has one that
                contradicts its config.yaml.
        """
        from soluscope.runs.weights import check_facts, load_facts

        facts = load_facts(self.dir)
        if self.config_file.is_file():  # a pretrained model has none
            check_facts(self.dir, self.config, facts)
        return facts

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

    def snapshot(self, step: int) -> Path:
        """Return the path of the weights after `step` steps of training."""
        return self.dir / "snapshots" / f"{step}.safetensors"

    def snapshots(self) -> dict[int, str]:
        """Return the checksums of a finished run's snapshots by their steps, in order.

        Names in done.json that are no steps before the last one are left out.
        """
        done = self.done()
        kept = {} if done is None else done.get("snapshots", {})
        steps = sorted(int(name) for name in kept if name.isdecimal() and len(name) < MOST_DIGITS)
        return {
            step: kept[str(step)]
            for step in steps
            if str(step) in kept and 0 < step < self.facts.steps
        }

    def load_model(self, step: int | None = None) -> LanguageModel:
        """Return the trained model of a finished run, or the model after `step` steps of its training.

        Raises:
            UserError: if there is no finished run, no snapshot of that step, the weights are truncated, or their
                shapes do not fit the run's configuration.
        """
        from soluscope.runs.weights import load_weights

        facts = self.facts  # first, because its error explains that there is no finished run
        if step is not None and step != facts.steps:
            kept = self.snapshots()
            if step not in kept:
                steps = ", ".join(map(str, [*kept, facts.steps]))
                raise UserError(
                    f"{self.dir} has no weights of step {step}: set step= to one of its steps ({steps}), or "
                    "train with train.snapshots="
                )
            return load_weights(self.snapshot(step), self.dir, self.config, facts, kept[step])
        done = self.done()
        sha256 = done and done.get("weights_sha256")
        return load_weights(self.weights, self.dir, self.config, facts, sha256)

    def done(self) -> Done | None:
        """Return the content of done.json if the run is finished and all its files are complete, else None."""
        try:
            return self.check_done()
        except UserError:
            return None

    def check_done(self) -> Done:
        """Return the content of done.json of a finished run whose files are complete.

        A folder that was copied incompletely may have done.json without the weights that belong to it.

        Raises:
            UserError: if the run is not finished, or one of its files is missing, truncated or broken.
        """
        remedy = "copy the run's folder again, or give its training command again"
        content = read_json(self.dir / "done.json", Done, remedy)
        for path in (self.weights, self.dir / "model.json"):
            if not path.is_file():
                raise UserError(f"no file {path}: {remedy}")
        n_bytes = self.weights.stat().st_size
        wanted = content.get("weights_bytes", n_bytes)
        if n_bytes != wanted:
            raise UserError(f"{self.weights} has {n_bytes} bytes instead of {wanted}: {remedy}")
        return content

    def is_done(self) -> bool:
        """Return whether the run is finished and all its files are complete."""
        return self.done() is not None

    def at_work(self) -> bool:
        """Return whether a process holds the folder now, without creating a file."""
        path = self.dir / ".lock"
        if not path.is_file():
            return False
        try:
            with file_lock(path).acquire(timeout=ASK_PATIENCE_S, poll_interval=0.01):
                return False
        except Timeout:
            return True
        except (OSError, UserError):  # this user may only read the folder; or the lock is a link
            return False

    def check_links(self) -> None:
        """Refuse a run with a link that leads out of its study; see `files.check_links`.

        Raises:
            UserError: naming the link.
        """
        check_study_links(self.dir.parent, self)

    @contextmanager
    def lock(self, patience_s: float = LOCK_PATIENCE_S) -> Iterator[None]:
        """Hold the folder for this process, and remove the temporary files that killed processes left in it.

        Args:
            patience_s: seconds to try for, while another process holds the folder.

        Raises:
            Busy: if another process holds the folder; the message names the process.
            UserError: if the folder cannot be written, or has a link that leads out of its study.
        """
        self.check_links()
        with lock(self.dir, patience_s=patience_s):
            remove_litter(self.dir, *(self.dir / name for name in OF_RUN), name="*")
            yield

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
            content = {"error": reason} | (
                {"kind": DIVERGED} if isinstance(error, Diverged) else {}
            )
            write_text(self.dir / "failed.json", json.dumps(content) + "\n")

    def failure(self) -> str | None:
        """Return the last line of the error that ended the run's last try, or None without such an error."""
        return self._failed("error")

    def has_diverged(self) -> bool:
        """Return whether the run's last try ended because its loss diverged."""
        return self._failed("kind") == DIVERGED

    def _failed(self, key: str) -> str | None:
        try:
            return read_json(self.dir / "failed.json", dict[str, str], "")[key]
        except (UserError, KeyError):
            return None

    def forget_failure(self) -> None:
        """Delete failed.json, because a new try begins."""
        with contextlib.suppress(OSError):
            (self.dir / "failed.json").unlink(missing_ok=True)

    def last_row(self) -> MetricsRow:
        """Return the last complete row of metrics.jsonl; empty if it cannot be read."""
        try:
            if not self.metrics.is_file():
                return {}
            with self.metrics.open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - 4096))
                lines = file.read().split(b"\n")[:-1]
            return _metrics_row(lines[-1])
        except (OSError, ValueError, IndexError):
            return {}

    def rows(self) -> list[MetricsRow]:
        """Return the rows of metrics.jsonl. A row that cannot be read is skipped with a warning on stderr.

        A line that a killed process has left unfinished is skipped without a warning.
        """
        if not self.metrics.is_file():
            return []
        rows = []
        for number, line in enumerate(self.metrics.read_bytes().split(b"\n")[:-1], start=1):
            try:
                rows.append(_metrics_row(line))
            except ValueError as error:
                say(f"warning: {self.metrics} line {number} is skipped ({reason(error)})")
        return rows


def _metrics_row(line: bytes) -> MetricsRow:
    """Return a row of metrics.jsonl.

    Raises:
        ValueError: if the line is not an object of numbers with a step, tokens and a loss.
    """
    row = from_json(line, dict[str, Whole | float])
    missing = {"step", "tokens", "loss"} - row.keys()
    if missing or not isinstance(row["step"], int):
        raise ValueError(f"no {' and '.join(sorted(missing or {'whole step'}))}")
    return row


def check_study_links(study_dir: Path, *runs: Run) -> None:
    """Refuse a study whose own files, or whose `runs`, contain a link that leads out of it.

    Raises:
        UserError: naming the link.
    """
    for path in (*(study_dir / name for name in OF_STUDY), *(run.dir for run in runs)):
        if path.is_symlink() or path.exists():
            check_links(path, study_dir)


@contextmanager
def lock(
    folder: Path,
    wait: bool = False,
    knob: str = "set tag= or study=",
    patience_s: float = LOCK_PATIENCE_S,
) -> Iterator[None]:
    """Hold `folder` for this process. If the process is killed, the kernel releases the lock.

    Args:
        folder: the folder, which is created if it does not exist. The caller has checked its links.
        wait: True to wait while another process holds the folder.
        knob: advice for a user who cannot wait.
        patience_s: seconds to try for, before this process waits or gives up.

    Raises:
        Busy: if another process holds the folder; the message names the process.
        UserError: if the folder cannot be written, or its lock is a link.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = _acquired(folder, wait, knob, patience_s)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror}; set runs_dir to another folder"
        ) from error
    with held:
        try:
            write_text(folder / HOLDER, json.dumps(asdict(_this_process())) + "\n")
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / HOLDER).unlink(missing_ok=True)


def _acquired(
    folder: Path, wait: bool, knob: str, patience_s: float
) -> contextlib.AbstractContextManager[Any]:
    file = file_lock(folder / ".lock")
    try:
        return file.acquire(timeout=patience_s)
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
        known = read_json(folder / HOLDER, Holder, "")
    except UserError:
        return ""
    return f" (process {known.pid} on {known.host[:100]} since {known.since[:30]})"


def _this_process() -> Holder:
    now = datetime.now().astimezone()
    return Holder(
        pid=os.getpid(),
        host=socket.gethostname(),
        since=now.isoformat(sep=" ", timespec="seconds"),
    )
