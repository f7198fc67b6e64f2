"""SLURM holds the jobs: one array, and a last job after it that probes and reports.

The launcher returns as soon as they are in the queue. A job that comes near its time limit saves its
checkpoint and goes back into the queue; one whose node is lost goes back, too; one that was cancelled is
finished by giving the same command again.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from soluscope import plugins
from soluscope.config import Config
from soluscope.config import check as require
from soluscope.engines import After, Engine
from soluscope.errors import UserError
from soluscope.launching import jobs
from soluscope.launching.sweep import Sweep

SIGNAL_BEFORE_S = 90
"""Seconds before its time limit at which a job is told to save and stop."""
ANSWER_WITHIN_S = 30
"""Seconds that SLURM has to answer a question."""
AFTER = "after"
"""What follows the last job, among works that have their run's name; those end in a seed or a tag."""


@dataclass(frozen=True)
class Params:
    partition: str | None = None
    """Where the jobs go. null: the cluster's default partition."""
    account: str | None = None
    """Who they are charged to. null: your default account."""
    minutes: int = 240
    """Time limit of one job; 90 seconds before, it saves and goes back into the queue."""
    requeues: int = 20
    """How often one job may do so."""
    max_running: int | None = None
    """Jobs that run at once, at most. null: as many as the cluster has room for."""
    cpus: int = 4
    """Cores of each process, and its CPU threads where train.threads is null."""
    gpus: int = 0
    """GPUs on each node of a job; one for each of its train.devices. 0: train.device=cpu."""
    options: dict[str, str] = field(default_factory=dict)
    """Further options of sbatch, as in slurm.options.mem=32G slurm.options.qos=high."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before Python starts, as in 'slurm.setup=[module load cuda]'."""

    def __post_init__(self) -> None:
        least = {"minutes": 5, "requeues": 0, "max_running": 1, "cpus": 1, "gpus": 0}
        for name, low in least.items():
            value = getattr(self, name)
            require(value is None or value >= low, f"slurm.{name}={value} must be {low} or more")


def check(params: Params, sweep: Sweep) -> None:
    """submitit is installed, SLURM answers and has the partition, and all jobs are of one shape."""
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise UserError(
            "engine=slurm wants submitit: pip install -c constraints.txt -e '.[slurm]' in the clone"
        ) from error
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError(
            "engine=slurm finds no sbatch and srun on the PATH: launch from a node of the cluster, or "
            "choose another engine="
        )
    partitions = sorted(set(_ask("sinfo", "--noheader", "--format=%R").split()))
    if params.partition is not None:
        plugins.check_name("partition", params.partition, partitions)
    shapes = {(config.train.devices, config.train.nodes) for config in sweep.configs}
    require(
        len(shapes) == 1,
        "engine=slurm gives all jobs of a sweep one shape: wanted one train.devices and one train.nodes",
    )
    ((devices, _),) = shapes
    require(
        params.gpus > 0 or all(config.train.device != "cuda" for config in sweep.configs),
        f"train.device=cuda with slurm.gpus=0: set slurm.gpus={devices}",
    )
    require(
        params.gpus in (0, devices),
        f"slurm.gpus={params.gpus} for train.devices={devices}: wanted one GPU a device, or 0",
    )


def run(sweep: Sweep, todo: Sequence[Config], params: Params, after: After) -> None:
    """Submits what is not in the queue already, and `after` to follow it.

    Raises:
        UserError: if sbatch refuses, with its words.
    """
    folder = sweep.study_dir / "slurm"
    queued = _queued(folder)
    new = [
        Work(config.run_name, partial(jobs.execute, _placed(config, params)))
        for config in todo
        if config.run_name not in queued
    ]
    executor = _executor(folder, params, sweep)
    if new:
        submitted = _submit(partial(executor.submit_array, new))
        queued |= {work.name: job.job_id for work, job in zip(new, submitted, strict=True)}
    if new or AFTER not in queued:
        arrays = sorted({ids.partition("_")[0] for name, ids in queued.items() if name != AFTER})
        executor.update_parameters(
            nodes=1,
            ntasks_per_node=1,
            srun_args=_srun_args(params),
            dependency="afterany:" + ":".join(arrays) if arrays else None,
        )
        work = Work(AFTER, after)
        queued[AFTER] = _submit(partial(executor.submit, work)).job_id
    jobs.say(
        f"jobs submitted: {len(new)}, in the queue: {len(queued) - 1}; then the probes and the report, as job "
        f"{queued[AFTER]}. What they print is in {folder}\n"
        f"where they stand: python sweeps/launch.py --status {sweep.study_dir}"
    )


@dataclass(frozen=True)
class Work:
    """What a job of SLURM's does. submitit pickles it, and calls it on the node.

    Near the time limit submitit would leave in the middle of a step, and the checkpoint would be of half a
    step. Here the signal only asks: the step ends, the run folder gets its checkpoint, and then
    submitit puts the job back into the queue.
    """

    name: str
    call: Callable[[], object]

    def __call__(self) -> None:
        from submitit import JobEnvironment

        environment = JobEnvironment()
        near_limit = getattr(signal, f"SIG{environment.USR_SIG}")
        requeue: Any = signal.getsignal(near_limit)
        outside = signal.getsignal(signal.SIGTERM)
        asked = False

        def ask(*_: object) -> None:
            nonlocal asked
            if asked:
                return
            asked = True
            if signal.getsignal(signal.SIGTERM) is outside:  # no training in this process
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGTERM)

        if environment.global_rank == 0:  # it stops the others
            signal.signal(near_limit, ask)
        try:
            self.call()
        except KeyboardInterrupt:
            if not asked:
                raise
            requeue(near_limit, None)
        except UserError as error:
            sys.exit(f"error: {error}")

    def checkpoint(self) -> Any:
        """What submitit submits again: the same, since where to go on is in the run folder."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _executor(folder: Path, params: Params, sweep: Sweep) -> Any:
    from submitit import SlurmExecutor

    train = sweep.configs[0].train
    executor = SlurmExecutor(folder, max_num_timeout=params.requeues)
    executor.update_parameters(
        job_name=f"soluscope-{sweep.study_dir.name}",
        partition=params.partition,
        account=params.account,
        time=params.minutes,
        nodes=train.nodes,
        ntasks_per_node=train.devices,  # one process a GPU, as Lightning wants it under SLURM
        cpus_per_task=params.cpus,
        gpus_per_node=params.gpus or None,
        array_parallelism=params.max_running or len(sweep.configs),
        signal_delay_s=SIGNAL_BEFORE_S,
        stderr_to_stdout=True,
        setup=params.setup,
        srun_args=_srun_args(params),
        additional_parameters={
            "requeue": True,
            **params.options,
        },  # some clusters do not by default
    )
    return executor


def _srun_args(params: Params) -> list[str]:
    # Since 22.05 srun does not take the CPUs from sbatch. A process that has failed ends the others.
    return [f"--cpus-per-task={params.cpus}", "--kill-on-bad-exit"]


def _placed(config: Config, params: Params) -> Config:
    """The job as it will run. One that was given no GPU takes none, where the node does not hide them."""
    device = config.train.device if params.gpus else "cpu"
    threads = config.train.threads or params.cpus
    return replace(config, train=replace(config.train, threads=threads, device=device))


def _queued(folder: Path) -> dict[str, str]:
    """SLURM's job ids of this study's jobs that wait or run, by the name of their work.

    Source: SLURM's queue; which job is which, from what submitit keeps of each. A job that is submitted twice
    does no harm: it waits for the first, and finds the run done.
    """
    from submitit.helpers import DelayedSubmission

    states = "--states=PENDING,RUNNING,SUSPENDED"
    job_ids = {}
    for job_id in _ask("squeue", "--me", "--noheader", "--array", "--format=%i", states).split():
        kept = folder / f"{job_id}_submitted.pkl"
        if kept.is_file():
            job_ids[DelayedSubmission.load(kept).function.name] = job_id
    return job_ids


def _ask(*words: str) -> str:
    """What a command of SLURM's answers.

    Raises:
        UserError: if it does not.
    """
    try:
        answer = subprocess.run(
            words, capture_output=True, text=True, check=True, timeout=ANSWER_WITHIN_S
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"SLURM does not answer: {words[0]} took over {ANSWER_WITHIN_S} s"
        ) from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"SLURM does not answer: {_last_line(error.stderr)}") from error
    return answer.stdout


def _submit(submit: Callable[[], Any]) -> Any:
    from submitit.core.utils import FailedJobError

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints sbatch's words, too
            return submit()
    except FailedJobError as error:
        raise UserError(
            f"SLURM refused the jobs: {_last_line(str(error))}; set what it wants with slurm.*"
        ) from error


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it says nothing"])[-1]


ENGINE = Engine(params=Params, check=check, run=run)
