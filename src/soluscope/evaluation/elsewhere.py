"""Results outside their study: a folder of links to a study that cannot be written, in which it is evaluated."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from soluscope.errors import UserError
from soluscope.files import MARK, write_text
from soluscope.runs.folder import Run, check_study_links

WRITTEN = {
    "probes",
    "removal",
    "removal-all",
    "results.jsonl",
    "report.html",
    "wandb",
    "wandb.json",
    "failed.json",
}
"""Names of files and folders that are not linked, because evaluation writes them or does not need them."""


def linked(runs: Sequence[Run], out: Path) -> list[Run]:
    """Return the runs as folders in `out`, with links to their files and to those of their study.

    A link leads out of `out` to its own place in the study, which the file `MARK` names; nothing else may.

    Raises:
        UserError: if `out` cannot be written, or has files of another study.
    """
    study_dir = runs[0].dir.resolve().parent
    if out.resolve() == study_dir:
        return list(runs)
    try:
        _link([path for path in study_dir.iterdir() if not _is_run(path)], out)
        write_text(out / MARK, f"{study_dir}\n")
        for run in runs:
            _link(list(run.dir.resolve().iterdir()), out / run.dir.name)
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error.strerror}; set out= to another folder"
        ) from error
    found = [Run(out / run.dir.name) for run in runs]
    check_study_links(out, *found)
    return found


def check_writable(runs: Sequence[Run]) -> None:
    """Refuse runs whose folder or study this user may only read, before anything is computed.

    Raises:
        UserError: naming the folder.
    """
    for folder in (runs[0].dir.parent, *(run.dir for run in runs)):
        if not os.access(folder, os.W_OK):
            raise UserError(f"cannot write {folder}: set out= to a folder for the results")


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() or (path / "model.json").is_file()


def _link(paths: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if path.name in WRITTEN or path.name.startswith("."):
            continue
        link = folder / path.name
        if not link.exists():
            link.unlink(missing_ok=True)  # a link to a file that was moved
            link.symlink_to(path)
        elif not link.samefile(path):
            raise UserError(
                f"out={folder} has another {path.name} than {path.parent}: choose another out="
            )
