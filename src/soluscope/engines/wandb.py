"""wandb hands out the jobs: a sweep is registered with its server, and agents run it, here or anywhere.

An agent asks for the next point of the grid and starts `python train/run.py key=value ...` with it. An agent
stops by itself after three jobs that fail in its first minute.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from soluscope.config import Config, read_yaml
from soluscope.config import check as require
from soluscope.engines import After, Engine
from soluscope.errors import UserError
from soluscope.launching.sweep import Sweep
from soluscope.training.processes import torchrun
from soluscope.wandb_client import PROJECT, one_line, package, sign_in

_WORDS = "${args_no_hyphens}"
"""What wandb puts a job's `key=value` words in the place of."""
_PYTHON = "${interpreter}"
"""What wandb puts `python` in the place of."""


@dataclass(frozen=True)
class Params:
    project: str | None = None
    """Where the sweep and its runs go. null: WANDB_PROJECT, or soluscope."""
    entity: str | None = None
    """The user or team of the project. null: WANDB_ENTITY, or the key's own."""


def check(params: Params, sweep: Sweep) -> None:
    """An agent can run the file's command, its runs go to the server, and the server accepts the key."""
    file = _read(sweep.path)
    if not isinstance(file.get("program"), str) or _WORDS not in (file.get("command") or ()):
        raise UserError(
            f"{sweep.path} is no wandb sweep: wanted 'program: train/run.py' and "
            f'\'command: ["${{env}}", "${{interpreter}}", "${{program}}", "{_WORDS}"]\''
        )
    devices = {config.train.devices for config in sweep.configs}
    require(
        devices == {1} or (len(devices) == 1 and _PYTHON in file["command"]),
        f"engine=wandb gives all jobs one command, with torchrun after {_PYTHON}: wanted one train.devices "
        f"and {_PYTHON} in the command of {sweep.path}",
    )
    require(
        all(config.train.nodes == 1 for config in sweep.configs),
        "train.nodes above 1 with engine=wandb: an agent runs a job on its own machine; choose engine=slurm",
    )
    for config in sweep.configs:
        if config.wandb not in (None, "online"):
            raise UserError(
                f"wandb={config.wandb} with engine=wandb: agents report to the server; leave wandb= out"
            )
    if os.environ.get("WANDB_MODE", "online") != "online":
        raise UserError(
            f"WANDB_MODE={os.environ['WANDB_MODE']} with engine=wandb: agents report to the server; unset it"
        )
    sign_in("engine=wandb", "choose another engine=")


def run(sweep: Sweep, todo: Sequence[Config], params: Any, after: After) -> None:
    """Register the grid and say how agents are started.

    The whole grid: wandb's has no holes. A job that is done ends at once.
    """
    if not todo:
        after()
        return
    wandb = package()
    try:
        api = wandb.Api()
        entity = params.entity or api.settings["entity"] or api.default_entity
        project = params.project or os.environ.get("WANDB_PROJECT") or PROJECT
        name = wandb.sweep(described(sweep), entity=entity, project=project)
    except Exception as error:  # as above
        raise UserError(f"wandb: {one_line(error)}; set wandb.project= or wandb.entity=") from error
    # `after` is not called: nobody here learns when the last agent, on whatever machine, has ended.
    print(
        f"Start agents, as many as you like, each in a clone that shares {sweep.study_dir}:\n"
        f"    wandb agent {entity}/{project}/{name}\n"
        "After the last one has ended:\n"
        f"    python eval/run.py {sweep.study_dir}\n"
        f"    python eval/report.py {sweep.study_dir}\n"
        "This command once more does these two as well, or registers again if jobs are not done."
    )


def described(sweep: Sweep) -> dict[str, Any]:
    """The sweep for wandb: the file, with the words in it and the study for its name.

    Keys stay dotted: of nested parameters an agent would get `train={'lr': 0.001}`.
    """
    fixed = dict(word.split("=", 1) for word in sweep.words)
    parameters: dict[str, Any] = {
        key: {"value": _plain(values[0])}
        if len(values) == 1
        else {"values": [_plain(value) for value in values]}
        for key, values in sweep.parameters.items()
    }
    parameters |= {key: {"value": _number(text)} for key, text in fixed.items()}
    file = _read(sweep.path)
    if sweep.configs[0].train.devices > 1:
        at = file["command"].index(_PYTHON) + 1
        file["command"][at:at] = torchrun(sweep.configs[0].train)
    return file | {"name": sweep.configs[0].study, "parameters": parameters}


def _plain(value: Any) -> int | float | str:
    """What an agent writes as the same word as our own launcher; a number where it can be one, for wandb's axes.

    An agent writes None as `None`, which no key takes.
    """
    if value is None:
        return "null"
    return value if isinstance(value, int | float) and math.isfinite(value) else str(value)


def _number(text: str) -> int | float | str:
    """The number that is written so, or else the text."""
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if str(number) == text and math.isfinite(number):
            return number
    return text


def _read(path: Path) -> dict[str, Any]:
    file: Any = OmegaConf.to_container(read_yaml(path))
    return file  # type: ignore[no-any-return]


ENGINE = Engine(params=Params, check=check, run=run)
