"""The inline engine: one job after another in this process. It needs no further package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from soluscope.config import Config
from soluscope.config import check as require
from soluscope.engines import After, Engine
from soluscope.launching import jobs
from soluscope.launching.sweep import Sweep
from soluscope.memory import check_training


@dataclass(frozen=True)
class Params:
    """The empty parameters of this engine, which has no keys."""


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


def run(sweep: Sweep, todo: Sequence[Config], params: Any, after: After) -> None:
    for config in todo:
        jobs.execute(config)
    after()


ENGINE = Engine(params=Params, check=check, run=run)
