"""The wandb engine: registers a sweep with wandb's server, which distributes the jobs to agents on any machine.

An agent requests the next point of the grid and starts `soluscope train key=value ...` with its values.
An agent stops if three jobs fail in its first minute.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from soluscope.config import check as require
from soluscope.config import flatten
from soluscope.engines import After, Engine
from soluscope.errors import UserError
from soluscope.launching.jobs import Task
from soluscope.launching.sweep import Sweep
from soluscope.reading import as_word, read_yaml
from soluscope.runs.folder import Run
from soluscope.terminal import answer
from soluscope.training.processes import torchrun
from soluscope.wandb_client import PROJECT, one_line, package, sign_in

_WORDS = "${args_no_hyphens}"
"""Placeholder in a sweep's command that wandb replaces by a job's `key=value` words."""
_PYTHON = "${interpreter}"
"""Placeholder in a sweep's command that wandb replaces by `python`."""


@dataclass(frozen=True)
class Params:
    project: str | None = None
    """Project of the sweep and its runs. null: WANDB_PROJECT, or soluscope."""
    entity: str | None = None
    """User or team of the project. null: WANDB_ENTITY, or the default of the key's user."""


def check(params: Params, sweep: Sweep) -> None:
    """Refuse a sweep that agents cannot run or report to the server.

    Raises:
        UserError: if the file's command does not suit agents, a run would be kept offline, or the server
            refuses the key.
    """
    file = read_yaml(sweep.path)
    if not isinstance(file.get("program"), str) or _WORDS not in (file.get("command") or ()):
        raise UserError(
            f"{sweep.path} is not a wandb sweep: it needs 'program: train/run.py' and "
            f'\'command: ["${{env}}", "${{interpreter}}", "${{program}}", "{_WORDS}"]\''
        )
    devices = {config.train.devices for config in sweep.configs}
    require(
        devices == {1} or (len(devices) == 1 and _PYTHON in file["command"]),
        f"engine=wandb gives all jobs one command, with torchrun after {_PYTHON}: use one value of "
        f"train.devices, and put {_PYTHON} into the command of {sweep.path}",
    )
    require(
        all(config.train.nodes == 1 for config in sweep.configs),
        "train.nodes is above 1, but with engine=wandb each job runs on one machine: choose engine=slurm",
    )
    require(
        not sweep.select_seeds,
        "select_seeds= trains some arms only, but engine=wandb registers a whole grid: choose another engine=, or "
        "set select_seeds=[]",
    )
    for config in sweep.configs:
        if config.wandb not in (None, "online"):
            raise UserError(
                f"wandb={config.wandb}, but with engine=wandb the runs report to the server: remove wandb="
            )
    sign_in("engine=wandb", "choose another engine=")


def run(sweep: Sweep, todo: Sequence[Task], params: Any, after: After) -> None:
    """Register the grid, and print how to start agents.

    The whole grid is registered, because a grid of wandb cannot leave points out. A finished job ends at once.
    Agents only train; if all runs are trained, `after` evaluates them.

    Raises:
        UserError: if the server refuses the sweep.
    """
    if all(Run(task.config.run_dir).is_done() for task in todo):
        after()
        return
    wandb = package()
    try:
        api = wandb.Api()
        entity = params.entity or api.settings["entity"] or api.default_entity
        project = params.project or os.environ.get("WANDB_PROJECT") or PROJECT
        name = wandb.sweep(described(sweep), entity=entity, project=project)
    except Exception as error:  # wandb raises many kinds
        raise UserError(f"wandb: {one_line(error)}; set wandb.project= or wandb.entity=") from error
    # `after` is not called, because this process cannot know when the last agent on any machine has ended.
    answer(
        f"Start any number of agents, each in a clone that shares {sweep.study_dir}:",
        f"    wandb agent {entity}/{project}/{name}",
        "After the last agent has ended:",
        f"    soluscope probe {sweep.study_dir}",
        f"    soluscope report {sweep.study_dir}",
        "Instead of these two commands, you can run the present command again. If jobs are not done, it registers "
        "the sweep again.",
    )


def described(sweep: Sweep) -> dict[str, Any]:
    """Return the sweep for wandb: the file's content with the command's words, named after the study.

    Keys stay dotted, because with nested parameters an agent would pass `train={'lr': 0.001}`.
    """
    first = dict(flatten(asdict(sweep.configs[0])))

    def plain(key: str, text: str) -> int | float | str:
        return _number(text, is_numeric=isinstance(first.get(key), int | float))

    parameters: dict[str, Any] = {
        key: {"value": plain(key, as_word(values[0]))}
        if len(values) == 1
        else {"values": [plain(key, as_word(value)) for value in values]}
        for key, values in sweep.parameters.items()
    }
    fixed = dict(word.split("=", 1) for word in sweep.words)
    parameters |= {key: {"value": plain(key, text)} for key, text in fixed.items()}
    file = read_yaml(sweep.path)
    if sweep.configs[0].train.devices > 1:
        after_python = file["command"].index(_PYTHON) + 1
        file["command"][after_python:after_python] = torchrun(sweep.configs[0].train)
    return file | {"name": sweep.configs[0].study, "parameters": parameters}


def _number(text: str, is_numeric: bool) -> int | float | str:
    """Return `text` as a number, which wandb's plots need for an axis, or else `text`.

    An agent writes the number into the command in its standard form. For a key that may hold text, only a
    `text` in this form is a number.
    """
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if math.isfinite(number) and (is_numeric or str(number) == text):
            return number
    return text


ENGINE = Engine(params=Params, check=check, run=run)
