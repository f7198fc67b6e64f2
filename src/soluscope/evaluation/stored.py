"""Stored results of runs: from which inputs and by which code they were made, and which are current."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from soluscope import plugins, results
from soluscope.bars import Say
from soluscope.config import EvalConfig
from soluscope.data import streams
from soluscope.data.cache import study_facts
from soluscope.errors import UserError
from soluscope.evaluation.pretrained_run import ORIGIN
from soluscope.evaluation.token_losses import INTEGERS, NUMBERS
from soluscope.files import (
    check_folder,
    checksum,
    digest,
    read_json,
    reason,
    remove_folder,
    replacing,
    write_text,
)
from soluscope.results import DYNAMICS, Record
from soluscope.runs.folder import Run
from soluscope.runs.weights import code_hash

PACKAGE = "soluscope.probes"
MADE_WITH = "made_with.json"
SUMS = "SHA256SUMS"
"""File with the checksums of a folder's results, as `sha256sum -c` reads them."""
ENDS = (".jsonl", ".parquet", "-neurons.parquet")
"""Ends of the names of a result's files, after the name of its probe."""
NO_EFFECT = ("probes", "prepared", "device", "jobs", "out", "wait", "wandb")
"""Settings of an evaluation that do not change its results."""
COMPUTES = (
    "comparison/", "constant_norm.py", "data/", "evaluation/", "hooked/", "model.py", "norms.py", "probes/",
    "results.py", "text.py", "variants/",
)  # fmt: skip
"""Folders and modules of the package that compute the stored results of a run or define their form. A
probe's own file affects only the results of that probe."""


@contextmanager
def current(folder: Path, shared: str, say: Say) -> Iterator[Path]:
    """Yield a folder for results that holds only current results; at the end it is, or replaces, `folder`.

    Results that were made from other inputs or by other code stay in `folder` until the block has ended without
    an error. Until then, the new results lie beside it, where the next call continues.

    Args:
        folder: folder of files named after probes.
        shared: hash of the inputs and code of all results; a probe's own file affects only its own results.
        say: function called with a line about the results that are not current.
    """
    now = made_now(shared)
    old, new = folder.with_name(f".{folder.name}.old"), folder.with_name(f".{folder.name}.new")
    if old.is_dir() and not folder.is_dir():  # a killed process was exchanging the two
        old.rename(folder)
    remove_folder(old)
    before = made_with(folder)
    if before in (None, now):
        write_text(folder / MADE_WITH, json.dumps(now) + "\n")
        remove_folder(new)
        yield folder
        return
    stale = {Path(path).stem for path in probe_files() if before.get(path, now[path]) != now[path]}
    if not before:
        say(f"{folder / MADE_WITH} is missing or broken: all results are recomputed")
    elif before.get("shared") != shared:
        say("inputs or code have changed since last time: all results are recomputed")
    for name in sorted(stale) if before.get("shared") == shared else ():
        say(f"{name} has changed and is recomputed")
    if made_with(new) != now:
        remove_folder(new)
        new.mkdir()
        for path in folder.iterdir() if before.get("shared") == shared else ():
            if path.is_file() and _probe_of(path) not in stale and path.name != MADE_WITH:
                shutil.copy2(path, new)
        write_text(new / MADE_WITH, json.dumps(now) + "\n")
    yield new
    folder.rename(old)
    new.rename(folder)
    remove_folder(old)


def made_now(shared: str) -> dict[str, str]:
    """Return the hashes of results that are made now: of their inputs and shared code, and of each probe's file."""
    return {"shared": shared} | {path: code_hash(path) for path in probe_files()}


def made_with(folder: Path) -> dict[str, str] | None:
    """Return the hashes of the inputs and code of a folder's results, or None for a folder without results.

    Results without readable hashes are not current.
    """
    try:
        return read_json(folder / MADE_WITH, dict[str, str], "its results are recomputed")
    except UserError:
        return {} if any(folder.glob("*.jsonl")) else None


def _probe_of(path: Path) -> str:
    """Return the name of the probe whose results a file holds."""
    name = path.stem.removeprefix("controls-").removeprefix("false-positives-")
    return name.removesuffix("-neurons")


def probe_files() -> tuple[str, ...]:
    return tuple(f"probes/{name}.py" for name in plugins.names(PACKAGE))


def rests_on(run: Run, config: EvalConfig) -> str:
    """Return a hash of the inputs and code of all summaries of a run, without the probes' own files."""
    settings = {k: v for k, v in asdict(config).items() if k not in NO_EFFECT}
    made_from = "done.json"
    if (run.dir / ORIGIN).is_file():
        made_from = "model.json"
        settings["tokens"] = study_facts(run.dir.parent)["key"]
    trained = digest((run.dir / made_from).read_text(encoding="utf8", errors="replace"))
    prompts = [streams.prompts(name) for name in streams.PROMPTS]
    code = code_hash(*COMPUTES, but=probe_files())
    return digest([settings, trained, prompts, code])


def store(folder: Path, name: str, records: Iterable[Record]) -> None:
    """Write the records of the result `name` to `folder`, and the checksums of all its files."""
    results.write(folder / f"{name}.jsonl", records)
    sums = _sums(folder) | {file: checksum(folder / file) for file in _files(folder, name)}
    write_text(folder / SUMS, "".join(f"{sums[file]}  {file}\n" for file in sorted(sums)))


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table to `path` at once, whatever is in its place.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        with replacing(path) as beside:
            table.to_parquet(beside, index=False)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free disk space") from error


def read_stored(folder: Path, name: str, remedy: str) -> list[Record]:
    """Return the records that `store` has written to `folder`, in the folder of the study or of a run of it.

    Args:
        folder: the folder, with the checksums of its files.
        name: name of the result.
        remedy: the end of an error's line, which says how to make the result again.

    Raises:
        UserError: if a file of this result is missing, or is not as it was written.
    """
    records = results.read(folder / f"{name}.jsonl", remedy, whole=True)
    check_sums(folder, name, remedy)
    return records


def probing(study: Path) -> str:
    """Return the end of an error's line about a result that a probe of the study makes again."""
    return f"create it with 'soluscope probe {study}'"


def check_sums(folder: Path, name: str, remedy: str) -> None:
    """Refuse a result whose files have other checksums than in `SUMS`, or are not listed there.

    Raises:
        UserError: naming the file.
    """
    sums, files = _sums(folder), _files(folder, name)
    for file in (f"{name}{end}" for end in ENDS):
        if sums.get(file) != (checksum(folder / file) if file in files else None):
            raise UserError(f"{folder / file} is not as it was written: {remedy}")


def _sums(folder: Path) -> dict[str, str]:
    """Return the checksum of each file in the folder's list of checksums."""
    path = folder / SUMS
    text = path.read_text(encoding="utf8", errors="replace") if path.is_file() else ""
    parts = [line.partition("  ") for line in text.splitlines()]
    return {file: of_file for of_file, _, file in parts}


def names_in(folder: Path) -> list[str]:
    """Return the names of the results that are in a folder or in its list of checksums.

    Raises:
        UserError: if something else is in the folder's place.
    """
    check_folder(folder)
    listed = {path.name for path in folder.glob("*.jsonl")} | _sums(folder).keys()
    return sorted(name.removesuffix(".jsonl") for name in listed if name.endswith(".jsonl"))


def _files(folder: Path, name: str) -> list[str]:
    return [f"{name}{end}" for end in ENDS if (folder / f"{name}{end}").is_file()]


def is_measured(folder: Path, run: Run, name: str, remedy: str, say: Say) -> bool:
    """Return whether a run's results `name` are in `folder` as they were written.

    Args:
        folder: a folder of results of the run.
        run: the run.
        name: name of the results.
        remedy: the end of an error's line, which says how to make the results again.
        say: function called with the reason why results that are there are not used.
    """
    if not (folder / f"{name}.jsonl").is_file():
        return False
    try:
        check_sums(folder, name, remedy)
        if name == "loss" and not (run.dir / ORIGIN).is_file():
            read_losses(folder, run)
    except UserError as error:
        say(f"{name} is recomputed: {error}")
        return False
    return True


def read_token_losses(folder: Path, run: Run) -> pd.DataFrame | None:
    """Return a run's losses by token, as `token_losses` made them, or None without them.

    Raises:
        UserError: if the file is broken.
    """
    path = folder / "tokens.parquet"
    if not path.is_file():
        return None
    try:
        table = pd.read_parquet(path)
        integers, numbers = table[[*INTEGERS]].to_numpy(), table[[*NUMBERS]].to_numpy()
        if not np.issubdtype(integers.dtype, np.integer) or numbers.dtype != np.float32:
            raise ValueError("its columns have other types")
        if not len(table) or not np.isfinite(numbers).all() or not (table["k_eff"] > 0).all():
            raise ValueError("its numbers are not finite")
    except Exception as error:  # pyarrow's own errors, and a table with other columns
        raise UserError(
            f"{path} is broken ({reason(error)}): compute it again with 'soluscope probe {run.dir}'"
        ) from error
    return table


def read_dynamics(folder: Path, run: Run) -> pd.DataFrame | None:
    """Return a run's losses by step and document, as `dynamics` made them, or None without them.

    Raises:
        UserError: if the file is broken.
    """
    path = folder / f"{DYNAMICS}.parquet"
    if not path.is_file():
        return None
    try:
        table = pd.read_parquet(path)
        numbers = table[["tokens", "document", "loss_sum", "n_tokens"]].to_numpy(float)
        if not len(table) or not np.isfinite(numbers).all() or not (table["n_tokens"] > 0).all():
            raise ValueError("its numbers are not finite, or of no tokens")
    except Exception as error:  # pyarrow's own errors, and a table with other columns or types
        raise UserError(
            f"{path} is broken ({reason(error)}): compute it again with 'soluscope probe {run.dir}'"
        ) from error
    return table


def read_losses(folder: Path, run: Run) -> pd.DataFrame:
    """Return a trained run's losses by document, as `_loss` has saved them in `folder`.

    Raises:
        UserError: if the file is missing or broken, or belongs to another run.
    """
    path, facts = folder / "loss.parquet", run.facts
    about = {
        "run": facts.run, "arm": facts.arm, "variant": facts.variant, "seed": facts.seed,
        "config": facts.config,
    }  # fmt: skip
    try:
        if not path.is_file():
            raise ValueError("no such file")
        table = pd.read_parquet(path)
        numbers = table[["loss_sum", "n_tokens"]].to_numpy(float)
        if not np.isfinite(numbers).all() or not (table["n_tokens"] > 0).all():
            raise ValueError("its losses are not finite, or of no tokens")
        if set(table["split"]) != {"select", "report"}:
            raise ValueError("it does not hold the splits select and report")
        if not all(isinstance(document, str) for document in table["document"]):
            raise ValueError("its documents are not named")
        for name, value in about.items():
            if not (table[name] == value).all():
                raise ValueError(f"its {name} is not {value}")
    except Exception as error:  # pyarrow's own errors, and a table with other columns or types
        raise UserError(
            f"{path} is broken ({reason(error)}): compute it again with 'soluscope probe {run.dir}'"
        ) from error
    return table
