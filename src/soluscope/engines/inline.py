"""One job after another in this process. Nothing to install."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from soluscope import jobs
from soluscope.config import Config
from soluscope.engines import After, Engine
from soluscope.sweep import Sweep


@dataclass(frozen=True)
class Params:
    """The machine as it is: no keys."""


def check(params: Params, sweep: Sweep) -> None:
    """Every machine can."""


def run(sweep: Sweep, todo: Sequence[Config], params: Any, after: After) -> None:
    from soluscope.training import progress_bars

    with progress_bars() as progress:
        for config in todo:
            jobs.execute(config, progress)
    after()


ENGINE = Engine(params=Params, check=check, run=run)
