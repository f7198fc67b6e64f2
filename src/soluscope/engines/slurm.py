"""The SLURM engine: one array of jobs, and after the array a last job that probes and reports.

The launcher returns as soon as the jobs are in the queue. A job near its time limit saves its checkpoint and
returns to the queue, and so does a job that loses its node. After a job was cancelled, the same command
finishes it.
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
"""Seconds before the time limit at which a job receives the signal to save and stop."""
ANSWER_WITHIN_S = 30
"""Seconds within which a command of SLURM must answer."""
AFTER = "after"
"""Name of the last job, which probes and reports. Other jobs have their run's name, which ends in a seed or tag."""


@dataclass(frozen=True)
class Params:
    partition: str | None = None
    """Partition of the jobs. null: the cluster's default partition."""
    account: str | None = None
    """Account that is charged for the jobs. null: your default account."""
    minutes: int = 240
    """Time limit of a job in minutes. 90 seconds before the limit, the job saves a checkpoint and returns to
    the queue."""
    requeues: int = 20
    """How often a job may return to the queue at its time limit."""
    max_running: int | None = None
    """Maximum number of jobs that run at once. null: as many as the cluster has room for."""
    cpus: int = 4
    """Cores of each process. Also its train.threads, if train.threads is null."""
    gpus: int = 0
    """GPUs on each node of a job, one per process: 0 or train.devices. 0: jobs run with train.device=cpu."""
    options: dict[str, str] = field(default_factory=dict)
    """Further options of sbatch, as in slurm.options.mem=32G slurm.options.qos=high."""
    setup: list[str] = field(default_factory=list)
    """Shell commands to run before Python starts, as in 'slurm.setup=[module load cuda]'."""

    def __post_init__(self) -> None:
        least = {"minutes": 5, "requeues": 0, "max_running": 1, "cpus": 1, "gpus": 0}
        for name, low in least.items():
            value = getattr(self, name)
            require(value is None or value >= low, f"slurm.{name}={value} must be {low} or more")


def check(params: Params, sweep: Sweep) -> None:
    """Refuse the sweep if submitit, SLURM or the partition is missing, or the jobs need different resources.

    Raises:
        UserError: naming the setting to change.
    """
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise UserError(
            "engine=slurm needs submitit: run \"pip install -c constraints.txt -e '.[slurm]'\" in the clone"
        ) from error
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError(
            "engine=slurm needs sbatch and srun on the PATH: launch from a node of the cluster, or "
            "choose another engine="
        )
    partitions = sorted(set(_ask("sinfo", "--noheader", "--format=%R").split()))
    if params.partition is not None:
        plugins.check_name("partition", params.partition, partitions)
    shapes = {(config.train.devices, config.train.nodes) for config in sweep.configs}
    require(
        len(shapes) == 1,
        "engine=slurm gives all jobs of a sweep the same resources: use one value of train.devices and one of "
        "train.nodes",
    )
    ((devices, _),) = shapes
    require(
        params.gpus > 0 or all(config.train.device != "cuda" for config in sweep.configs),
        f"train.device=cuda needs GPUs, but slurm.gpus=0: set slurm.gpus={devices}",
    )
    require(
        params.gpus in (0, devices),
        f"slurm.gpus={params.gpus} does not fit train.devices={devices}: set slurm.gpus={devices} or 0",
    )


def run(sweep: Sweep, todo: Sequence[Config], params: Params, after: After) -> None:
    """Submit the jobs that are not in the queue already, and a job that calls `after` when they have ended.

    Raises:
        UserError: if sbatch refuses the jobs; the message contains sbatch's message.
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
        f"jobs submitted: {len(new)}, in the queue: {len(queued) - 1}; job {queued[AFTER]} then probes and "
        f"reports. The jobs' output is in {folder}\n"
        f"To see their states: soluscope sweep --status {sweep.study_dir}"
    )


@dataclass(frozen=True)
class Work:
    """The work of a SLURM job. submitit pickles the object and calls it on the node.

    Near the time limit, submitit alone would stop in the middle of a step, without a usable checkpoint. Here
    the signal only requests a stop: the step ends, the checkpoint is saved in the run folder, and then submitit
    puts the job back into the queue.
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
            if signal.getsignal(signal.SIGTERM) is outside:  # training has not set its handler here
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGTERM)

        if environment.global_rank == 0:  # the first process stops the other processes
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
        """Return this work unchanged for resubmission, because the run folder contains the checkpoint."""
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
        ntasks_per_node=train.devices,  # one process per GPU, as Lightning requires under SLURM
        cpus_per_task=params.cpus,
        gpus_per_node=params.gpus or None,
        array_parallelism=params.max_running or len(sweep.configs),
        signal_delay_s=SIGNAL_BEFORE_S,
        stderr_to_stdout=True,
        setup=params.setup,
        srun_args=_srun_args(params),
        # Some clusters do not requeue by default.
        additional_parameters={"requeue": True, **params.options},
    )
    return executor


def _srun_args(params: Params) -> list[str]:
    # Since SLURM 22.05, srun does not inherit --cpus-per-task from sbatch. If one process fails, all must end.
    return [f"--cpus-per-task={params.cpus}", "--kill-on-bad-exit"]


def _placed(config: Config, params: Params) -> Config:
    """Return the job's configuration for this engine.

    Without slurm.gpus, its device is the CPU, because the node may show GPUs that the job was not given.
    """
    device = config.train.device if params.gpus else "cpu"
    threads = config.train.threads or params.cpus
    return replace(config, train=replace(config.train, threads=threads, device=device))


def _queued(folder: Path) -> dict[str, str]:
    """Return SLURM's ids of this study's waiting and running jobs, by the name of their work.

    The ids come from SLURM's queue, and the names from the files that submitit keeps for each job. A job that
    is submitted twice does no harm: the second one waits for the first and then finds the run done.
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
    """Return the output of a SLURM command.

    Raises:
        UserError: if the command fails or does not answer in time.
    """
    try:
        answer = subprocess.run(
            words, capture_output=True, text=True, check=True, timeout=ANSWER_WITHIN_S
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"SLURM does not answer: {words[0]} took more than {ANSWER_WITHIN_S} s; try again later, or choose "
            "another engine="
        ) from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"SLURM does not answer: {_last_line(error.stderr)}") from error
    return answer.stdout


def _submit(submit: Callable[[], Any]) -> Any:
    from submitit.core.utils import FailedJobError

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit also prints sbatch's message
            return submit()
    except FailedJobError as error:
        raise UserError(
            f"SLURM refused the jobs: {_last_line(str(error))}; change the slurm.* settings"
        ) from error


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


ENGINE = Engine(params=Params, check=check, run=run)
