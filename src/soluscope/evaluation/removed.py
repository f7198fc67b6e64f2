"""Stored results of removals: one table and one file of records for each step, in two folders of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from soluscope.errors import UserError
from soluscope.evaluation.stored import names_in, read_stored
from soluscope.files import reason
from soluscope.removal.numbers import in_order, of_arm
from soluscope.results import Record, RemovalOfArm, Removed
from soluscope.runs.folder import Run
from soluscope.runs.weights import commit

FOLDERS = {"mid": "removal", "all": "removal-all"}
"""Folder of the results in a run's folder, for each value of the setting `norms` of `soluscope remove`."""
UNTRAINED = "untrained"
"""Name of the files with the first step in the run's own initialisation."""


def remedy(folder: Path) -> str:
    """Return the end of an error's line about a file of a run's folder: the command that makes it again."""
    norms = next(norms for norms, name in FOLDERS.items() if name == folder.name)
    return f"create it with 'soluscope remove {folder.parent} norms={norms}', or delete it"


def _ordered(folder: Path) -> list[str]:
    """Return the names of the stored results of the trained model, in the order of the steps.

    Raises:
        UserError: if a file has the name of no result.
    """
    try:
        return in_order(name for name in names_in(folder) if name != UNTRAINED)
    except ValueError as error:
        raise UserError(f"{folder}: {error}; delete the file") from error


def tables_in(folder: Path, names: Sequence[str] | None = None) -> dict[str, pd.DataFrame]:
    """Return the stored tables of the trained model by the names of their results, in the order of the steps.

    Args:
        folder: a run's folder of removals.
        names: names of results; by default the names of all stored results.

    Raises:
        UserError: if a table is broken, or is of other tokens than the first one.
    """
    found: dict[str, pd.DataFrame] = {}
    for name in _ordered(folder) if names is None else names:
        path = folder / f"{name}.parquet"
        try:
            table = pd.read_parquet(path)
            documents, losses = table["document"], table.drop(columns="document")
            if documents.dtype != np.int64 or not (losses.dtypes == np.float64).all():
                raise ValueError("its columns have other types")
            if (
                not len(table)
                or not np.isfinite(losses.to_numpy()).all()
                or "one gain" not in losses
            ):
                raise ValueError("its losses are missing or not finite")
            if not all(documents.equals(each["document"]) for each in found.values()):
                raise ValueError("its tokens are not those of the earlier steps")
        except Exception as error:  # pyarrow's own errors, and a table with other columns
            raise UserError(f"{path} is broken ({reason(error)}): {remedy(folder)}") from error
        found[name] = table
    return found


def of_study(runs: Sequence[Run]) -> list[Record]:
    """Return the stored records of each run, and the means over the seeds of each arm.

    Raises:
        UserError: if a stored file is not as it was written.
    """
    records: list[Record] = []
    arms: dict[str, list[Run]] = {}
    for run in runs:
        stored = [
            (run.dir / folder, name)
            for folder in FOLDERS.values()
            for name in names_in(run.dir / folder)
        ]
        for place in FOLDERS.values():
            _ordered(run.dir / place)  # refuses a file with another name
        for folder, name in stored:
            records += read_stored(folder, name, remedy(folder))
        if stored:
            arms.setdefault(run.facts.arm, []).append(run)
    for arm, members in arms.items():
        base = RemovalOfArm(
            study=members[0].facts.study, arm=arm, variant=members[0].facts.variant, commit=commit(),
            value=None, unit="nats / token", step=Removed.FROZEN,
        )  # fmt: skip
        for place in FOLDERS.values():
            of_place = [run.dir / place for run in members if (run.dir / place).is_dir()]
            records += of_arm([tables_in(each) for each in of_place], base)
    return records
