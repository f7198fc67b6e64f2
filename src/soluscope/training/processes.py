"""Several processes that train one model: which launcher has started them, and what a lost one means.

torchrun or srun starts them, Lightning connects them. A sweep starts torchrun (launching/jobs.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from soluscope.config import Config, TrainConfig
from soluscope.errors import Stopped, UserError


def launcher() -> Literal["torchrun", "srun"] | None:
    """Return which launcher has started this process, None if it was started alone."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    return "srun" if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 else None


def torchrun(train: TrainConfig) -> list[str]:
    """Return the words between `python` and a script that train one model on this machine."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={train.devices}"]


def cluster_environment(train: TrainConfig) -> Any:
    """Return Lightning's ClusterEnvironment of the launcher that has started this process.

    Raises:
        UserError: if train.devices and train.nodes ask for another number of processes than were started.
    """
    from lightning.pytorch.plugins.environments import (
        LightningEnvironment,
        SLURMEnvironment,
        TorchElasticEnvironment,
    )

    asked = f"train.devices={train.devices}"
    if train.nodes > 1:
        asked += f" times train.nodes={train.nodes}"
    name = launcher()
    if name == "torchrun":
        elastic = TorchElasticEnvironment()
        n_here = int(os.environ.get("LOCAL_WORLD_SIZE", train.devices))
        if (elastic.world_size(), n_here) != (train.n_processes, train.devices):
            raise UserError(
                f"{asked}, but torchrun started {elastic.world_size()} processes, {n_here} of them on this "
                f"machine: wanted torchrun {_sizes(train)}"
            )
    if train.n_processes == 1:  # named, or Lightning would count all tasks of a SLURM allocation
        return LightningEnvironment()
    if name == "torchrun":
        return elastic
    if name == "srun":
        n_tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])
        if n_tasks != train.n_processes or "SLURM_NTASKS_PER_NODE" not in os.environ:
            raise UserError(
                f"{asked}, but srun started {n_tasks} processes: wanted "
                f"srun --kill-on-bad-exit --nodes={train.nodes} --ntasks-per-node={train.devices}"
            )
        return SLURMEnvironment(auto_requeue=False)  # a run resumes from its own checkpoint
    raise UserError(
        f"{asked} wants {train.n_processes} processes, and this one was started alone: "
        f"'torchrun {_sizes(train)} train/run.py ...' starts them, or srun"
    )


def _sizes(train: TrainConfig) -> str:
    if train.nodes == 1:
        return f"--standalone --nproc-per-node={train.devices}"
    return (
        f"--nnodes={train.nodes} --nproc-per-node={train.devices} --node-rank=... --master-addr=..."
    )


def is_lost(error: BaseException) -> bool:
    """Return whether an error only says that the connection to another process has ended."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


@contextmanager
def one_line_if_lost(config: Config) -> Iterator[None]:
    """Raise Stopped in place of the error that a lost connection to another process gives."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise Stopped(
            f"another of the {config.train.n_processes} processes of {config.run_name} has ended, or did "
            "not start: its own message says why; the same command goes on from the last checkpoint"
        ) from error


@contextmanager
def first_process_first(trainer: Any) -> Iterator[None]:
    """Hold the other processes back until the first one has run the block: it makes what they read."""
    if not trainer.is_global_zero:
        trainer.strategy.barrier()
    yield
    if trainer.is_global_zero:
        trainer.strategy.barrier()
