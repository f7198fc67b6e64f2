"""Jobs: a job is one run of a sweep. This module trains and probes it, and reads its state from its run folder."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from soluscope import terminal
from soluscope.config import Config, EvalConfig, from_json, to_json, to_yaml
from soluscope.errors import Stopped, UserError
from soluscope.files import Whole, check_names, read_json, reason, write_text
from soluscope.runs.folder import Busy, Run, check_study_links, holder
from soluscope.terminal import say
from soluscope.text import plural
from soluscope.training.processes import launcher, torchrun
from soluscope.training.progress import WIDE
from soluscope.workers import stop_requests

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from soluscope.evaluation.one_run import Step

State = Literal["done", "running", "failed", "resume", "waiting"]
_URGENT: tuple[State, ...] = ("running", "failed", "resume", "waiting", "done")

POLL_S = 0.5
"""Seconds between two checks of a run folder in which another process is at work."""


@dataclass(frozen=True)
class Job:
    """Data of a job that a status needs before the run folder exists; stored in the study's sweep.json."""

    id: str
    """Hash of the requested configuration: train.precision=auto stays auto."""
    run: str
    """Name of the run folder in the study's folder."""
    steps: Whole
    tokens_a_step: Whole


@dataclass(frozen=True)
class Task:
    """Work of a job: the training of a run, and then its evaluation."""

    config: Config
    evaluation: EvalConfig | None = None
    """Settings of the evaluation. None: the run is only trained."""

    def to_json(self) -> str:
        """Return the task as one line of JSON, which `from_json` reads in another process."""
        evaluation = None if self.evaluation is None else asdict(self.evaluation)
        return json.dumps({"config": to_json(self.config), "evaluation": evaluation})

    @classmethod
    def from_json(cls, line: str) -> Task:
        """Return the task that `to_json` has described."""
        values = json.loads(line)
        settings = values["evaluation"]
        return cls(
            from_json(values["config"]), None if settings is None else EvalConfig(**settings)
        )


@dataclass(frozen=True)
class JobList:
    """Content of sweep.json."""

    sweep: str
    """Name of the sweep that was launched last."""
    jobs: list[Job]
    """Jobs of this sweep and of earlier sweeps in the study."""


@dataclass(frozen=True)
class Standing:
    """State and progress of a job, read only from its run folder."""

    state: State
    """`resume`: interrupted, with a checkpoint. `waiting`: begins at step 0."""
    step: int
    loss: float | None
    """Loss in nats per token: of the last logged step, or on the report split if the run is done."""
    seconds_left: float | None
    """Remaining seconds of a running job, estimated from its last speed."""
    error: str | None
    """Last line of the error of a failed job."""


# --- running a job --------------------------------------------------------------------------------


def execute(task: Task, progress: Any = None, step: Step = lambda done, of, name: None) -> bool:
    """Train one job until it is finished, and evaluate its run on the device of its training.

    If another process is at work on the job, wait for that process first. A failure is printed as one line on
    stderr. It is not raised, so that the other jobs of a sweep continue. A failure of the training is stored in the
    run folder; after a failure of the evaluation, the evaluation of the study tries again.

    Args:
        task: the job's work.
        progress: as for `training.run.train`.
        step: function called before each result of the evaluation.

    Returns:
        True if the run is done.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is saved.
    """
    config, run = task.config, Run(task.config.run_dir)
    alone = launcher() is None and config.train.n_processes > 1 and config.train.nodes == 1
    try:
        if alone:
            _wait_while_at_work(run)
            _train_under_torchrun(config)
        else:
            _train_when_free(config, run, progress)
    except Stopped as error:
        say(f"{config.run_name} stopped: {error}")
    except Exception as error:  # other jobs of the sweep may still succeed
        if run.failure() is None:  # the error occurred before the training began
            run.record_failure(error)
        say(f"{config.run_name} failed: {run.failure() or error}")
    done = run.is_done()
    if done and task.evaluation is not None:
        _evaluate(run, config, task.evaluation, step)
    return done


def _evaluate(run: Run, config: Config, evaluation: EvalConfig, step: Step) -> None:
    from soluscope.evaluation.one_run import evaluate_run

    if evaluation.device == "auto" and config.train.device == "cpu":
        evaluation = replace(evaluation, device="cpu")
    try:
        evaluate_run(run, evaluation, say, step)
    except Exception as error:  # other jobs of the sweep may still succeed
        say(f"{run.dir.name} is not probed yet: {reason(error)}")


def _train_when_free(config: Config, run: Run, progress: Any) -> None:
    from soluscope.training.run import train

    while True:
        try:
            train(config, progress)
            return
        except Busy:
            _wait_while_at_work(run)


def _wait_while_at_work(run: Run) -> None:
    if run.at_work():
        say(f"{run.dir.name}: waiting, because another process is at work on it{holder(run.dir)}")
        while run.at_work():
            time.sleep(POLL_S)


def _train_under_torchrun(config: Config) -> None:
    """Train one job with several processes on this machine: `python -m soluscope.launching` under torchrun.

    Each process calls `execute`. After SIGTERM or Ctrl-C, torchrun stops the processes, which first save a
    checkpoint.

    Raises:
        KeyboardInterrupt: after SIGTERM or Ctrl-C, once the processes have ended.
    """
    with stop_requests() as asked_to_stop, tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "config.yaml"
        write_text(saved, to_yaml(config))
        command = [sys.executable, *torchrun(config.train), "-m", "soluscope.launching"]
        processes = subprocess.Popen(
            [*command, str(saved)],
            env={"OMP_NUM_THREADS": "1"} | os.environ,  # torchrun would set it with a warning
            start_new_session=True,  # only this process receives a terminal's Ctrl-C
        )
        while processes.poll() is None:
            if asked_to_stop.is_set():
                processes.terminate()
                processes.wait()
            time.sleep(POLL_S)
    if asked_to_stop.is_set():
        raise KeyboardInterrupt
    run = Run(config.run_dir)
    if run.failure() is None and not run.is_done():
        raise Stopped(
            f"its processes ended with exit status {processes.returncode}; see their messages above"
        )


# --- the states of jobs ---------------------------------------------------------------------------


def job_of(config: Config) -> Job:
    """Return the job of a configuration."""
    return Job(config.hash, config.run_name, config.train.steps,
               config.train.batch_size * config.model.ctx)  # fmt: skip


def standing(study_dir: Path, job: Job) -> Standing:
    """Return the present state and progress of a job, without creating a file."""
    run = Run(study_dir / job.run)
    row = run.last_row()
    step, loss = int(row.get("step", 0)), row.get("loss")
    done = run.done()
    if done is not None:
        return Standing("done", job.steps, done.get("report_loss"), None, None)
    if run.at_work():
        speed = row.get("tokens_per_s")
        left = (job.steps - step) * job.tokens_a_step / speed if speed else None
        return Standing("running", step, loss, left, None)
    error = run.failure()
    if error is not None:
        return Standing("failed", step, loss, None, error)
    state: State = "resume" if run.checkpoint.is_file() else "waiting"
    return Standing(state, step, loss, None, None)


def write_list(study_dir: Path, sweep: str, jobs: Sequence[Job]) -> None:
    """Write a sweep's jobs to the study's sweep.json, and keep the jobs that earlier launches listed there.

    The caller holds the study for its launch.
    """
    listed = {job.run: job for job in [*read_list(study_dir)[1], *jobs]}
    record = JobList(sweep, [*listed.values()])
    write_text(study_dir / "sweep.json", json.dumps(asdict(record), indent=1) + "\n")


def read_list(study_dir: Path) -> tuple[str | None, list[Job]]:
    """Return the name of a study's sweep and its jobs, or None and [] if no sweep created the study.

    Raises:
        UserError: if sweep.json cannot be read.
    """
    path = study_dir / "sweep.json"
    if not path.is_file():
        return None, []
    remedy = "delete it and launch the sweep again"
    record = read_json(path, JobList, remedy)
    try:
        check_names(*(job.run for job in record.jobs))
    except ValueError as error:
        raise UserError(f"{path} is broken ({error}): {remedy}") from error
    return record.sweep, record.jobs


def listed(study_dir: Path) -> list[Job]:
    """Return the jobs of a study's sweep, and those of runs that were trained separately in the study.

    Raises:
        UserError: if the study does not exist or has no jobs.
    """
    if not study_dir.is_dir():
        raise UserError(f"no folder {study_dir}: name the folder of a study, as in runs/first")
    jobs = read_list(study_dir)[1]
    known = {job.run for job in jobs}
    for path in sorted(study_dir.glob("*/config.yaml")):
        run = Run(path.parent)
        if run.dir.name not in known:
            try:
                jobs.append(job_of(run.config))
            except UserError:  # a truncated config.yaml must not hide the other runs
                jobs.append(Job("", run.dir.name, 0, 0))
    check_study_links(study_dir, *(Run(study_dir / job.run) for job in jobs))
    if not jobs:
        raise UserError(f"no runs in {study_dir}: launch a sweep into it, or name another study")
    return jobs


def table(study_dir: Path, jobs: Sequence[Job], most: int | None = None) -> Table:
    """Return a table for the terminal with one line per job, at most `most` lines.

    If there are more jobs, running and failed jobs come first.
    """
    from rich.text import Text

    standings = [standing(study_dir, job) for job in jobs]
    states = [each.state for each in standings]
    lines = sorted(zip(jobs, standings, strict=True), key=lambda line: _URGENT.index(line[1].state))
    if most is None or len(lines) <= most:
        lines = list(zip(jobs, standings, strict=True))
    result = new_table(f"{study_dir}: {counted(states)}", "run", "state")
    for heading in ("step", "loss", "time left"):
        result.add_column(heading, justify="right", no_wrap=True)
    result.add_column("error", overflow="fold")
    for job, now in lines[:most]:
        cells = (
            job.run,
            now.state,
            f"{now.step}/{job.steps}",
            "" if now.loss is None else f"{now.loss:.4f}",
            "" if now.seconds_left is None else _duration(now.seconds_left),
            now.error or "",
        )
        result.add_row(*(Text(terminal.shown(cell)) for cell in cells))
    if len(lines) > len(result.rows):
        result.caption = f"and {len(lines) - len(result.rows)} more, counted above"
    return result


def new_table(title: str, *headings: str) -> Table:
    """Return an empty table with its first columns."""
    from rich.table import Table

    result = Table(title=title, title_justify="left", title_style="bold")
    for heading in headings:
        result.add_column(heading, overflow="fold", min_width=6)
    return result


def fitted(table: Table, width: int) -> Table:
    """Return a table that fits a terminal of `width` columns; a narrow one gets the main columns only."""
    if width < WIDE:
        main = ("run", "state", "loss", "error")
        table.columns = [column for column in table.columns if column.header in main]
    return table


def console() -> Console:
    """Return a console for stdout; in a file or a pipe, its width is enough for the names of runs."""
    return terminal.console(width=None if sys.stdout.isatty() else 120)


def counted(states: Sequence[State]) -> str:
    """Return counts such as `4 jobs: 1 done, 3 waiting`."""
    kinds: tuple[State, ...] = ("done", "running", "resume", "waiting", "failed")
    parts = [f"{states.count(kind)} {kind}" for kind in kinds if kind in states]
    return f"{len(states)} {plural(len(states), 'job')}: {', '.join(parts)}"


@contextmanager
def live(study_dir: Path, jobs: Sequence[Job]) -> Iterator[Callable[[], None]]:
    """Yield a function that shows the jobs' present states on stderr.

    On a terminal, each call updates a table. Otherwise, each call prints one line per changed state. stdout is
    left for the results of the command.
    """
    from rich.live import Live

    screen = terminal.console(stderr=True)
    if screen.is_terminal:

        def drawn() -> Table:
            rows = max(1, screen.height - 7)
            return fitted(table(study_dir, jobs, most=rows), screen.width)

        with Live(drawn(), console=screen, auto_refresh=False) as shown:
            yield lambda: shown.update(drawn(), refresh=True)
        return
    before: dict[str, State] = {}

    def tell() -> None:
        for job in jobs:
            now = standing(study_dir, job)
            if before.get(job.run) != now.state:
                loss = "" if now.loss is None else f", loss {now.loss:.4f}"
                say(f"{job.run}: {now.error or now.state + loss}")
            before[job.run] = now.state

    yield tell


def follow(study_dir: Path) -> None:
    """Show the states of a study's jobs: on a terminal, live until all jobs have ended; otherwise, once."""
    jobs = listed(study_dir)
    if not sys.stdout.isatty():
        console().print(table(study_dir, jobs))
        return
    with live(study_dir, jobs) as show:
        while True:
            show()
            if all(standing(study_dir, job).state in {"done", "failed"} for job in jobs):
                return
            time.sleep(2)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
