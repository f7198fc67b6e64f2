"""One job after another in this process. Nothing to install."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from soluscope.config import Config
from soluscope.config import check as require
from soluscope.engines import After, Engine
from soluscope.launching import jobs
from soluscope.launching.sweep import Sweep


@dataclass(frozen=True)
class Params:
    """The machine as it is: no keys."""


def check(params: Params, sweep: Sweep) -> None:
    """The GPUs that are asked for by name are here, and one machine is enough."""
    trains = [config.train for config in sweep.configs]
    require(
        all(train.nodes == 1 for train in trains),
        "train.nodes above 1 with engine=inline: start train/run.py under torchrun on each node, or choose "
        "engine=slurm",
    )
    wanted = max((train.devices for train in trains if train.device == "cuda"), default=0)
    if wanted:
        import torch

        n_gpus = torch.cuda.device_count()
        require(
            n_gpus >= wanted,
            f"train.device=cuda wants {wanted} GPUs and torch sees {n_gpus} here: set train.device=cpu",
        )


def run(sweep: Sweep, todo: Sequence[Config], params: Any, after: After) -> None:
    for config in todo:
        jobs.execute(config)
    after()


ENGINE = Engine(params=Params, check=check, run=run)
