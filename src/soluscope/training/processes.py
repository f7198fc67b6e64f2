"""The processes that train one model together: which of them this is, how the others begin and end.

torchrun and srun start all of them. Elsewhere the first one of a node starts the node's others, with its
configuration and nothing else: Lightning's own launcher would give the caller's whole command again, with
all that this does before and after training.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soluscope.config import Config
from soluscope.errors import Stopped, UserError

STOPPING = {signal.SIGTERM, signal.SIGINT}
HELPER = """
from soluscope.training.processes import given_config
config = given_config()
from soluscope.training.run import help_to_train
help_to_train(config)
"""
"""What a process that the first one starts runs: it listens for its end before the slow import."""
GRACE_S = 5.0
"""Seconds in which a process finds out by itself that another one has ended."""


@dataclass
class Place:
    """This process among those that train one model."""

    rank: int
    """0 is the first: it alone writes and speaks."""
    environment: Any
    """Lightning's ClusterEnvironment: how the processes find each other."""
    started: bool
    """Whether the others have been started from outside, and wait for the first one's word."""
    met: bool = False
    """Whether they have been met, or waited for."""


def place(config: Config) -> Place:
    """Which process this is, from what torchrun, srun or the first process has set.

    Raises:
        UserError: if another number of processes was started than train.devices and train.nodes say, or
            several nodes cannot find each other.
    """
    from lightning.pytorch.plugins.environments import (
        LightningEnvironment,
        SLURMEnvironment,
        TorchElasticEnvironment,
    )

    train, n = config.train, config.train.n_processes
    if (
        n == 1
    ):  # named, or Lightning would take an allocation around it for one of several processes
        return Place(0, LightningEnvironment(), False)
    asked = f"train.devices={train.devices} and train.nodes={train.nodes} are {n} processes"
    if TorchElasticEnvironment.detect():
        elastic = TorchElasticEnvironment()
        if elastic.world_size() != n:
            raise UserError(
                f"{asked}, torchrun started {elastic.world_size()}: "
                f"wanted torchrun --nnodes={train.nodes} --nproc-per-node={train.devices}"
            )
        return Place(elastic.global_rank(), elastic, True)
    n_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if n_tasks > 1:
        if n_tasks != n or "SLURM_NTASKS_PER_NODE" not in os.environ:
            raise UserError(
                f"{asked}, srun started {n_tasks}: "
                f"wanted srun --nodes={train.nodes} --ntasks-per-node={train.devices}"
            )
        slurm = SLURMEnvironment(auto_requeue=False)  # a run resumes from its own checkpoint
        return Place(slurm.global_rank(), slurm, True)
    if train.nodes > 1 and not {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} <= os.environ.keys():
        raise UserError(
            f"{asked}: start them with torchrun or srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK"
        )
    own = LightningEnvironment()
    rank = own.node_rank() * train.devices + own.local_rank()
    return Place(rank, own, own.creates_processes_externally or train.nodes > 1)


@contextmanager
def others(config: Config, here: Place) -> Iterator[None]:
    """This node's other processes, where nobody else starts them. They end when the block does.

    Args:
        config: what they train.
        here: the place of this process, the first of its node.
    """
    if config.train.devices == 1 or here.environment.creates_processes_externally:
        yield
        return
    before = dict(os.environ)
    os.environ.update(
        LOCAL_RANK="0",
        NODE_RANK=str(here.environment.node_rank()),
        MASTER_ADDR=here.environment.main_address,
        MASTER_PORT=str(here.environment.main_port),
    )
    helpers = [_start(config, local_rank) for local_rank in range(1, config.train.devices)]
    over = threading.Event()
    threading.Thread(target=_watch, args=(config, here, helpers, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        for helper in helpers:
            assert helper.stdin is not None
            with suppress(OSError):
                helper.stdin.close()  # its sign to end
        for helper in helpers:
            try:
                helper.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                helper.kill()
                helper.wait()
        os.environ.clear()
        os.environ.update(before)


def _start(config: Config, local_rank: int) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).parents[2])
    helper = subprocess.Popen(
        [sys.executable, "-c", HELPER],
        stdin=subprocess.PIPE,
        env=os.environ
        | {
            "LOCAL_RANK": str(local_rank),
            "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
        },
        start_new_session=True,  # a terminal's Ctrl-C is the first one's to hear
    )
    assert helper.stdin is not None
    with suppress(BrokenPipeError):  # it has ended already: `_watch` sees to that
        pickle.dump(config, helper.stdin)
        helper.stdin.flush()
    return helper


def _watch(
    config: Config, here: Place, helpers: list[subprocess.Popen[bytes]], over: threading.Event
) -> None:
    """End this process soon after a helper has failed, since it may wait for it without end.

    Over gloo a lost connection is an error at once. Over nccl, and before all have met, it is not.
    """
    while not over.wait(0.5):
        if any(helper.poll() for helper in helpers):
            if over.wait(GRACE_S):
                return
            if here.rank == 0:
                print(f"error: {lost(config)}", file=sys.stderr, flush=True)
            os._exit(2)


def given_config() -> Config:
    """The configuration that the first process has sent to this one, which ends when the first one does."""
    try:
        config: Config = pickle.load(sys.stdin.buffer)  # from our own parent, over its pipe
    except EOFError:  # which has ended already
        sys.exit(0)
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    return config


def _end_with_the_first() -> None:
    while os.read(0, 1):
        pass
    os._exit(0)


def is_lost(error: BaseException) -> bool:
    """Whether an error says no more than that another process has gone."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def lost(config: Config) -> Stopped:
    """What the first process says of it."""
    return Stopped(
        f"another of the {config.train.n_processes} processes of {config.run_name} has ended, or did not "
        "come: its own message says why; the same command goes on from the last checkpoint"
    )


@contextmanager
def stopping_held_back() -> Iterator[None]:
    """SIGTERM and Ctrl-C wait until `Stop` listens, or the block ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Stop:
    """SIGTERM and Ctrl-C, kept until a step has ended, in all processes the same one.

    Inside a step nothing could be saved that would resume bit for bit; and Lightning's own handler talks to the
    other processes from wherever the signal finds it, which mixes up what they say to each other.
    """

    def __init__(self) -> None:
        self.heard = False

    def listen(self) -> None:
        """Take the place of Lightning's handlers; it puts back the caller's own when training ends."""
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                signal.signal(number, self._hear)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    def _hear(self, number: int, frame: Any) -> None:
        self.heard = True

    def agreed(self, trainer: Any) -> bool:
        """Whether any process was told to stop; the same answer in all of them. They all must ask."""
        if trainer.world_size == 1:
            return self.heard
        import torch

        heard = torch.tensor(float(self.heard), device=trainer.strategy.root_device)
        torch.distributed.all_reduce(heard, torch.distributed.ReduceOp.MAX)
        return bool(heard)
