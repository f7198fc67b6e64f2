"""The registration of a study: its plan, written before any run at a reported seed, with a checksum.

preregistration.json holds the plan, the time, and each later departure with its reason. The checksum is over the
plan, so that anyone can see whether it was changed after it was registered or published.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from soluscope.config import flatten
from soluscope.errors import UserError
from soluscope.files import read_json, write_text

NAME = "preregistration.json"


@dataclass(frozen=True)
class Registration:
    """Content of preregistration.json."""

    plan: dict[str, Any]
    """Estimands, arms, grids, seeds in both roles, splits, thresholds, settings and predictions, by key."""
    sha256: str
    """Checksum of the plan."""
    at: str
    """Time of the registration, UTC."""
    departures: list[str] = field(default_factory=list)
    """Differences between the plan and later launches, with their reasons."""


def register(study_dir: Path, plan: dict[str, Any]) -> Registration:
    """Write a study's registration.

    Raises:
        UserError: if the study is registered already.
    """
    path = study_dir / NAME
    if path.exists():
        raise UserError(
            f"{path} exists: a study is registered once; set study= to register another one"
        )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    made = Registration(plan, checksum_of(plan), now)
    write_text(path, json.dumps(asdict(made), indent=1) + "\n")
    return made


def read(study_dir: Path) -> Registration | None:
    """Return a study's registration. Without one, the result is None.

    Raises:
        UserError: if the file cannot be read, or its plan was changed.
    """
    path = study_dir / NAME
    if not path.exists():
        return None
    remedy = "restore the file as it was registered, or set study= for another study"
    found = read_json(path, Registration, remedy)
    if found.sha256 != checksum_of(found.plan):
        raise UserError(f"{path} was changed: its plan does not have its sha256; {remedy}")
    for key in ("seeds", "select_seeds"):
        seeds = found.plan.get(key)
        if not (isinstance(seeds, list) and all(type(each) is int for each in seeds)):
            raise UserError(f"{path} is broken: {key} is not a list of whole numbers; {remedy}")
    try:
        datetime.fromisoformat(found.at)
    except ValueError as error:
        raise UserError(f"{path} is broken: at is not a time in ISO format; {remedy}") from error
    return found


def depart(study_dir: Path, registered: Registration, departures: list[str], reason: str) -> None:
    """Add departures with their reason to a study's registration."""
    told = [f"{each} (reason: {reason})" for each in departures]
    new = [each for each in told if each not in registered.departures]
    content = asdict(replace(registered, departures=[*registered.departures, *new]))
    write_text(study_dir / NAME, json.dumps(content, indent=1) + "\n")


def checksum_of(plan: Mapping[str, Any]) -> str:
    """Return the sha256 of a plan; the order of its keys does not count."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def differences(registered: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each entry that differs between a registered plan and the present one."""
    left, right = dict(flatten(registered)), dict(flatten(now))
    return [
        f"{key}: registered {_shown(left.get(key))}, now {_shown(right.get(key))}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)
