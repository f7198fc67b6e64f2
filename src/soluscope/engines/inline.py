"""The inline engine: jobs on this machine, one after another or several at once. It needs no further package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from soluscope.bars import Bars, bars
from soluscope.config import Config
from soluscope.config import check as require
from soluscope.cores import n_cores
from soluscope.engines import After, Engine
from soluscope.errors import UserError
from soluscope.launching import jobs
from soluscope.launching.sweep import Sweep
from soluscope.memory import check_training, may_have_gpu, processes_that_fit
from soluscope.reading import for_seed
from soluscope.runs.folder import Run
from soluscope.terminal import say
from soluscope.workers import STOPPED, Work, ending, side_by_side


@dataclass(frozen=True)
class Params:
    jobs: int | None = None
    """Jobs that run at once. With more than one, each runs in its own process, with one CPU thread if train.threads
    is null; with 1, in this process. Jobs with several train.devices run one at a time. null: as many as the cores
    allow, and 1 if the jobs may use a GPU."""

    def __post_init__(self) -> None:
        require(self.jobs is None or self.jobs >= 1, f"inline.jobs={self.jobs} must be 1 or more")


def check(params: Params, sweep: Sweep) -> None:
    """Refuse jobs that need several machines or too much memory, and train.device=cuda with too few GPUs here.

    Raises:
        UserError: naming the setting to change.
    """
    trains = [config.train for config in sweep.configs]
    require(
        all(train.nodes == 1 for train in trains),
        "engine=inline cannot train with train.nodes above 1: start train/run.py under torchrun on each node, "
        "or choose engine=slurm",
    )
    for config in sweep.configs:
        check_training(config)
    wanted = max((train.devices for train in trains if train.device == "cuda"), default=0)
    if wanted:
        import torch

        n_gpus = torch.cuda.device_count()
        require(
            n_gpus >= wanted,
            f"train.device=cuda needs {wanted} GPUs, but torch finds {n_gpus} here: set train.device=cpu",
        )


def run(sweep: Sweep, todo: Sequence[jobs.Task], params: Params, after: After) -> None:
    """Run the tasks, then `after`.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once each job at work has saved a checkpoint.
    """
    n_at_once = at_once(params, sweep)
    configs = [task.config for task in todo]
    weights = {each.run_name: each.model.training_flops(each.tokens.d_vocab) * jobs.job_of(each).steps
               * jobs.job_of(each).tokens_a_step for each in configs}  # fmt: skip
    with bars(weights, say, {task.config.run_name: _share_done(task) for task in todo}) as shown:
        watched = _Watched(todo, shown)
        if n_at_once > 1:
            works = [
                Work(
                    task.config.run_name,
                    _placed(task).to_json(),
                    _begins_with(task.config, configs),
                )
                for task in todo
            ]
            side_by_side("soluscope.launching", works, n_at_once, watched)
        else:
            for task in todo:
                name = task.config.run_name
                watched.began(name)
                jobs.execute(task, watched, partial(watched.probes, name))
                watched.ended(name, None)
    after()


def at_once(params: Params, sweep: Sweep) -> int:
    """Return the number of jobs that run at once. It does not depend on which of the sweep's jobs are done."""
    trains = [config.train for config in sweep.configs]
    if any(train.devices > 1 for train in trains):
        return 1
    if params.jobs is not None:
        return params.jobs
    if may_have_gpu() and any(train.device != "cpu" for train in trains):
        return 1
    n_threads = max(train.threads or 1 for train in trains)
    fitting = min(processes_that_fit(config) for config in sweep.configs)
    return max(1, min(n_cores() // n_threads, fitting, len(sweep.configs)))


def _placed(task: jobs.Task) -> jobs.Task:
    """Return a task beside others: trained with one thread, unless its configuration sets the number."""
    train = replace(task.config.train, threads=task.config.train.threads or 1)
    return replace(task, config=replace(task.config, train=train))


def _begins_with(config: Config, others: Sequence[Config]) -> frozenset[str]:
    """Return the names of the other jobs with whose weights or gain a job begins."""
    gain = getattr(config.mid, "gain", None)
    folders = [
        config.init_dir,
        Path(for_seed(gain, config.seed)) if isinstance(gain, str) else None,
    ]
    places = {folder.resolve() for folder in folders if folder is not None}
    return frozenset(each.run_name for each in others if each.run_dir.resolve() in places)


def _share_done(task: jobs.Task) -> float:
    config = task.config
    step = jobs.standing(config.study_dir, jobs.job_of(config)).step
    return _share_trained(task) * step / config.train.steps


def _share_trained(task: jobs.Task) -> float:
    """Return the share of a task's bar that stands for its training; the rest stands for its evaluation."""
    return 1.0 if task.evaluation is None else 0.5


class _Watched:
    """The tasks at work: a `workers.Watcher`, and the progress to which `train` reports in this process."""

    def __init__(self, todo: Sequence[jobs.Task], shown: Bars) -> None:
        self.configs = {task.config.run_name: task.config for task in todo}
        self.shares = {task.config.run_name: _share_trained(task) for task in todo}
        self.numbers = {
            name: f"[{number}/{len(todo)}] {name}:" for number, name in enumerate(self.configs, 1)
        }
        self.shown = shown
        self.at_work: set[str] = set()
        self.probed: set[str] = set()
        """Tasks whose evaluation has begun."""

    def began(self, name: str) -> None:
        self.at_work.add(name)
        begun = "probing" if Run(self.configs[name].run_dir).is_done() else "training"
        self.shown.begin(name, f"{self.numbers[name]} {begun} begins")

    def said(self, name: str, text: str) -> None:
        say(text)

    def heard(self, name: str, message: dict[str, Any]) -> None:
        self.probes(name, message["done"], message["of"], message["result"])

    def ended(self, name: str, status: int | None) -> None:
        self.at_work.discard(name)
        folder = Run(self.configs[name].run_dir)
        done = folder.done()
        if status == STOPPED and not done:
            say(f"{name} stopped: {ending(status)}")
        elif status is not None and not done:
            if folder.failure() is None:
                folder.record_failure(UserError(ending(status)))
            say(f"{name} failed: {ending(status)}")
        elif status is not None:
            say(f"{name} is not probed yet: {ending(status)}")
        self.shown.end(
            name, f"{self.numbers[name]} done, loss {done['report_loss']:.4f}" if done else ""
        )

    def look(self) -> None:
        for name in self.at_work - self.probed:
            row = Run(self.configs[name].run_dir).last_row()
            if row:
                speed = row.get("tokens_per_s", 0) / 1000
                self._trained(name, row["step"], f"loss {row['loss']:.3f} {speed:.1f}k tok/s")

    def _trained(self, name: str, step: float, text: str) -> None:
        self.shown.update(name, self.shares[name] * step, self.configs[name].train.steps, text)

    def probes(self, name: str, done: int, of: int, result: str) -> None:
        """Show that `done` of the `of` results of a run's evaluation are there, and the name of the next one."""
        self.probed.add(name)
        share = self.shares[name]
        self.shown.update(name, share + (1 - share) * done / of, 1, f"probe {result}")

    # In this process, `train` reports through these two methods of rich's Progress.

    def add_task(self, name: str, **fields: Any) -> str:
        return name

    def update(self, name: str, completed: int, loss: str = "", speed: str = "") -> None:
        self._trained(name, completed, f"{loss} {speed}")


ENGINE = Engine(params=Params, check=check, run=run, at_once=at_once)
