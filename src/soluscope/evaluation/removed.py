"""Stored results of removals: one table and one file of records for each step, in the run's folder removal/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from soluscope.evaluation.stored import read_stored
from soluscope.removal.numbers import in_order, of_arm
from soluscope.results import Record, RemovalOfArm, Removed
from soluscope.runs.folder import Run
from soluscope.runs.weights import commit

FOLDER = "removal"
UNTRAINED = "untrained"
"""Name of the files with the first step in the run's own initialisation."""


def tables_in(folder: Path) -> dict[str, pd.DataFrame]:
    """Return the stored tables of the trained model by the names of their results, in the order of the steps."""
    names = [path.stem for path in folder.glob("*.jsonl") if path.stem != UNTRAINED]
    return {name: pd.read_parquet(folder / f"{name}.parquet") for name in in_order(names)}


def of_study(runs: Sequence[Run]) -> list[Record]:
    """Return the stored records of each run, and the means over the seeds of each arm.

    Raises:
        UserError: if a stored file is not as it was written.
    """
    records: list[Record] = []
    arms: dict[str, list[Run]] = {}
    for run in runs:
        names = [path.stem for path in sorted((run.dir / FOLDER).glob("*.jsonl"))]
        for name in names:
            records += read_stored(run.dir / FOLDER, name, run.dir.parent)
        if names:
            arms.setdefault(run.facts.arm, []).append(run)
    for arm, members in arms.items():
        base = RemovalOfArm(
            study=members[0].facts.study, arm=arm, variant=members[0].facts.variant, commit=commit(),
            value=None, unit="nats / token", step=Removed.FROZEN,
        )  # fmt: skip
        records += of_arm([tables_in(run.dir / FOLDER) for run in members], base)
    return records
