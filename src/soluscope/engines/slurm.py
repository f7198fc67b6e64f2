"""The SLURM engine: one array of jobs, and after the array a last job without GPUs that compares and reports.

The launcher returns as soon as the jobs are in the queue. A job near its time limit saves its checkpoint and
returns to the queue, and so does a job that loses its node. After a job was cancelled, the same command
finishes it.

The work of the jobs travels as JSON in the script that sbatch copies, and jobs.json in the study's folder slurm/
keeps their ids. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from soluscope import plugins
from soluscope.config import check as require
from soluscope.engines import After, Engine
from soluscope.errors import UserError
from soluscope.files import read_json, write_text
from soluscope.launching import jobs
from soluscope.launching.launch import after_from_json
from soluscope.launching.sweep import Sweep
from soluscope.terminal import say

SIGNAL_BEFORE_S = 90
"""Seconds before the time limit at which a job receives the signal to save and stop."""
NEAR_LIMIT = "USR2"
"""Name of that signal."""
ANSWER_WITHIN_S = 30
"""Seconds within which a command of SLURM must answer."""
AFTER = "after"
"""Name of the last job, which compares and reports. Other jobs have their run's name: it ends in a seed or tag."""
IDS = "jobs.json"
"""File with SLURM's id of each job, by the job's name."""


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
    """Refuse the sweep if SLURM or the partition is missing, or the jobs need different resources.

    Raises:
        UserError: naming the setting to change.
    """
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


def run(sweep: Sweep, todo: Sequence[jobs.Task], params: Params, after: After) -> None:
    """Submit the jobs that are not in the queue already, and a job that calls `after` when they have ended.

    Raises:
        UserError: if sbatch refuses the jobs; the message contains sbatch's message.
    """
    folder = sweep.study_dir / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    queued = _queued(folder)
    new = [_placed(task, params) for task in todo if task.config.run_name not in queued]
    if new:
        train = new[0].config.train
        array = f"--array=0-{len(new) - 1}%{params.max_running or len(sweep.configs)}"
        # One process per GPU, as Lightning requires under SLURM.
        sizes = [f"--nodes={train.nodes}", f"--ntasks-per-node={train.devices}"]
        work = [json.dumps({"task": task.to_json()}) for task in new]
        job_id = _submit(folder, params, work, [array, *sizes])
        queued |= {task.config.run_name: f"{job_id}_{index}" for index, task in enumerate(new)}
        _keep(folder, queued)
    if new or AFTER not in queued:
        arrays = sorted({ids.partition("_")[0] for name, ids in queued.items() if name != AFTER})
        sizes = ["--nodes=1", "--ntasks-per-node=1"]
        if arrays:
            sizes.append(f"--dependency=afterany:{':'.join(arrays)}")
        last = [json.dumps({AFTER: after.to_json()})]
        queued[AFTER] = _submit(folder, replace(params, gpus=0), last, sizes)
        _keep(folder, queued)
    say(
        f"jobs submitted: {len(new)}, in the queue: {len(queued) - 1}; job {queued[AFTER]} then {after.does}. "
        f"The jobs' output is in {folder}",
        f"To see their states: soluscope sweep --status {sweep.study_dir}",
    )


# --- in the queue ---------------------------------------------------------------------------------


def _submit(folder: Path, params: Params, work: Sequence[str], options: Sequence[str]) -> str:
    """Submit one script, and return SLURM's id of it. Each line of `work` is the work of one job of an array.

    Raises:
        UserError: if sbatch refuses the script or does not answer in time.
    """
    given = {
        "job-name": f"soluscope-{folder.parent.name}",
        "partition": params.partition,
        "account": params.account,
        "time": params.minutes,
        "cpus-per-task": params.cpus,
        "gpus-per-node": params.gpus or None,
        "signal": f"{NEAR_LIMIT}@{SIGNAL_BEFORE_S}",
        "output": folder.resolve() / ("%A_%a.out" if len(work) > 1 else "%j.out"),
        "open-mode": "append",
        **params.options,
    }
    # Some clusters do not requeue by default.
    words = ["sbatch", "--parsable", "--requeue", *options]
    words += [
        f"--{key.replace('_', '-')}={value}" for key, value in given.items() if value is not None
    ]
    # Since SLURM 22.05, srun does not inherit --cpus-per-task. If one process fails, all must end.
    srun = ["srun", f"--cpus-per-task={params.cpus}", "--kill-on-bad-exit", "--unbuffered"]
    command = [*srun, sys.executable, "-u", "-m", __name__, str(params.requeues)]
    script = ["#!/bin/bash", *params.setup, f"{shlex.join(command)} <<'END'", *work, "END", ""]
    return _ask(*words, script="\n".join(script)).partition(";")[0].strip()


def _keep(folder: Path, queued: dict[str, str]) -> None:
    write_text(folder / IDS, json.dumps(queued, indent=1) + "\n")


def _queued(folder: Path) -> dict[str, str]:
    """Return SLURM's ids of this study's waiting and running jobs, by name.

    The names come from jobs.json, and only ids in SLURM's queue count. A job that is submitted twice does no harm:
    the second one waits for the first and then finds the run done. So a broken jobs.json counts as empty.
    """
    try:
        kept = read_json(folder / IDS, dict[str, str], "")
    except UserError:
        return {}
    states = "--states=PENDING,RUNNING,SUSPENDED"
    ids = set(_ask("squeue", "--me", "--noheader", "--array", "--format=%i", states).split())
    return {name: job_id for name, job_id in kept.items() if job_id in ids}


def _placed(task: jobs.Task, params: Params) -> jobs.Task:
    """Return the task with its configuration for this engine.

    Without slurm.gpus, its device is the CPU, because the node may show GPUs that the job was not given.
    """
    train = task.config.train
    device = train.device if params.gpus else "cpu"
    placed = replace(train, threads=train.threads or params.cpus, device=device)
    return replace(task, config=replace(task.config, train=placed))


def _ask(*words: str, script: str | None = None) -> str:
    """Return the output of a SLURM command, which reads `script` on stdin.

    Raises:
        UserError: if the command fails or does not answer in time.
    """
    try:
        answer = subprocess.run(
            words, capture_output=True, text=True, check=True, timeout=ANSWER_WITHIN_S, input=script
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"SLURM does not answer: {words[0]} took more than {ANSWER_WITHIN_S} s; try again later, or choose "
            "another engine="
        ) from error
    except subprocess.CalledProcessError as error:
        message = (error.stderr.strip().splitlines() or ["no message"])[-1]
        if script is None:
            raise UserError(f"SLURM does not answer: {message}") from error
        raise UserError(
            f"SLURM refused the jobs: {message}; change the slurm.* settings"
        ) from error
    return answer.stdout


# --- on the node ----------------------------------------------------------------------------------


def work_of(line: str) -> Callable[[], object]:
    """Return the work that a line of a script describes: a task, or the work after the last job."""
    described = json.loads(line)
    if AFTER in described:
        return after_from_json(described[AFTER])
    return partial(jobs.execute, jobs.Task.from_json(described["task"]))


def main(requeues: int) -> None:
    """Call the work of this job, which is described in the line of stdin with the job's number in its array.

    Near the time limit, SLURM's signal requests a stop: the step ends, the checkpoint is saved in the run folder,
    and the job returns to the queue, at most `requeues` times.
    """
    lines = sys.stdin.read().splitlines()
    work = work_of(lines[int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))])
    near_limit = getattr(signal, f"SIG{NEAR_LIMIT}")
    outside = signal.getsignal(signal.SIGTERM)
    is_first = os.environ.get("SLURM_PROCID", "0") == "0"  # it stops the other processes
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        if asked:
            return
        asked = True
        if signal.getsignal(signal.SIGTERM) is outside:  # training has not set its handler here
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGTERM)

    signal.signal(near_limit, ask if is_first else signal.SIG_IGN)
    try:
        work()
    except KeyboardInterrupt:
        if not asked:
            raise
        _requeue(requeues)
    except UserError as error:
        say(f"error: {error}")
        sys.exit(1)


def _requeue(requeues: int) -> None:
    """Return this job to the queue, unless it has returned as often as it may."""
    begun, job_id = int(os.environ.get("SLURM_RESTART_COUNT", 0)), os.environ["SLURM_JOB_ID"]
    if begun >= requeues:
        say(
            f"job {job_id} has returned to the queue {begun} times: raise slurm.requeues or slurm.minutes"
        )
        sys.exit(1)
    say(f"job {job_id} returns to the queue at its time limit")
    _ask("scontrol", "requeue", job_id)


ENGINE = Engine(params=Params, check=check, run=run)

if __name__ == "__main__":
    main(int(sys.argv[1]))
