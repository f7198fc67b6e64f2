"""The plan of a sweep, registered before any run at a reported seed, and its comparison with a later launch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from soluscope.config import EvalConfig, determining
from soluscope.launching.sweep import Sweep
from soluscope.results import MARGIN, SIGNIFICANT, Term
from soluscope.runs import registration
from soluscope.runs.folder import Run

ESTIMANDS = (
    Term.BENEFIT,
    Term.STATIC,
    Term.SHARE,
    Term.STEP,
    Term.CONTRAST,
    Term.SENSITIVITY,
    Term.SENSITIVITY_STEP,
    Term.SENSITIVITY_PART,
)
"""The terms of the comparison that answer the study's questions (protocol.md section 4)."""
CORRECTION = "Holm, over the arms with a per-token norm; and over the contrasts between tokens of all these arms"
NOT_PLANNED = ("jobs", "device", "prepared", "out", "wandb", "wait")
"""Settings of an evaluation without effect on its numbers."""


def plan_of(sweep: Sweep, evaluation: EvalConfig) -> dict[str, Any]:
    """Return the plan of a sweep: its estimands, runs, settings and rules."""
    settings = [determining(config) for config in sweep.configs]
    shared = {
        key: value
        for key, value in settings[0].items()
        if key != "seed" and all(each.get(key) == value for each in settings)
    }
    return {
        "sweep": sweep.name,
        "estimands": [str(term) for term in ESTIMANDS],
        "arms": list(dict.fromkeys(config.arm for config in sweep.configs)),
        "search": None if sweep.search is None else asdict(sweep.search),
        "select_seeds": list(sweep.select_seeds),
        "seeds": sorted({config.seed for config in sweep.configs}),
        "splits": {"chosen on": "select", "reported on": "report"},
        "thresholds": {"margin, nats per token": MARGIN, "level": SIGNIFICANT, "correction": CORRECTION},
        "settings": shared,
        "evaluation": {k: v for k, v in asdict(evaluation).items() if k not in NOT_PLANNED},
        "predictions": list(sweep.predictions),
    }  # fmt: skip


def begun(sweep: Sweep) -> list[str]:
    """Return the study's runs at reported seeds, which must not exist when the plan is registered."""
    seeds = {config.seed for config in sweep.configs}
    found = [Run(path.parent) for path in sorted(sweep.study_dir.glob("*/config.yaml"))]
    return [run.dir.name for run in found if run.config.seed in seeds]


def departures(
    registered: registration.Registration, sweep: Sweep, evaluation: EvalConfig
) -> list[str]:
    """Return the differences between a registered plan and a launch."""
    return registration.differences(registered.plan, plan_of(sweep, evaluation))
