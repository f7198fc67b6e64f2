"""Training of one model by several processes: their launcher, and the error if one of them is lost.

torchrun or srun starts the processes, and Lightning connects them. A sweep starts torchrun itself
(launching/jobs.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from soluscope.config import Config, TrainConfig
from soluscope.errors import Stopped, UserError


def launcher() -> Literal["torchrun", "srun"] | None:
    """Return the name of the launcher that started this process; None means that the user started it alone."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    return "srun" if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 else None


def torchrun(train: TrainConfig) -> list[str]:
    """Return the words to put between `python` and a script to train one model with several processes here."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={train.devices}"]


def cluster_environment(train: TrainConfig) -> Any:
    """Return Lightning's ClusterEnvironment for the launcher that started this process.

    Raises:
        UserError: if the number of started processes differs from train.devices times train.nodes.
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
                f"machine: start the run with 'torchrun {_sizes(train)}'"
            )
    if train.n_processes == 1:
        return LightningEnvironment()  # Lightning itself would count a SLURM allocation's tasks
    if name == "torchrun":
        return elastic
    if name == "srun":
        n_tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])
        if n_tasks != train.n_processes or "SLURM_NTASKS_PER_NODE" not in os.environ:
            raise UserError(
                f"{asked}, but srun started {n_tasks} processes: start the run with "
                f"'srun --kill-on-bad-exit --nodes={train.nodes} --ntasks-per-node={train.devices}'"
            )
        return SLURMEnvironment(auto_requeue=False)  # a run resumes from its own checkpoint
    raise UserError(
        f"{asked} needs {train.n_processes} processes, but this process was started alone: "
        f"start the run with 'torchrun {_sizes(train)} train/run.py ...' or with srun"
    )


def _sizes(train: TrainConfig) -> str:
    if train.nodes == 1:
        return f"--standalone --nproc-per-node={train.devices}"
    return (
        f"--nnodes={train.nodes} --nproc-per-node={train.devices} --node-rank=... --master-addr=..."
    )


def is_lost(error: BaseException) -> bool:
    """Return whether an error means only that the connection to another process was lost."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


@contextmanager
def one_line_if_lost(config: Config) -> Iterator[None]:
    """Raise Stopped instead of the error that follows a lost connection to another process."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise Stopped(
            f"one of the {config.train.n_processes} processes of {config.run_name} ended or did not "
            "start: its own message gives the reason; the same command resumes from the last checkpoint"
        ) from error


@contextmanager
def first_process_first(trainer: Any) -> Iterator[None]:
    """Let the first process run the block before all other processes, because they read files that it writes."""
    if not trainer.is_global_zero:
        trainer.strategy.barrier()
    yield
    if trainer.is_global_zero:
        trainer.strategy.barrier()
