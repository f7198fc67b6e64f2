"""The text and the software of a study's runs, read from the files beside its results.jsonl.

Results name each run and the hash of its configuration. A file counts only if it belongs to exactly these runs:
otherwise the facts are left out of the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from soluscope.errors import UserError
from soluscope.files import Whole, check_links, name_problem, read_json
from soluscope.results import OfRun, Provenance, Record, of_kind

SPLITS = ("train", "select", "report")
T = TypeVar("T")


@dataclass(frozen=True)
class _Counts:
    n_documents: Whole
    n_tokens: Whole


@dataclass(frozen=True)
class _Data:
    """The facts of data.json that a reader of a paper needs."""

    source: str
    tokenizer_hash: str
    d_vocab: Whole
    splits: dict[str, _Counts]
    dropped_duplicates: Whole
    dropped_overlapping: dict[str, Whole]


@dataclass(frozen=True)
class _Model:
    """The facts of a run's model.json that a reader of a paper needs."""

    run: str
    config: str
    tokenizer_hash: str
    commit: str
    versions: dict[str, str]


def of_study(study_dir: Path, records: Sequence[Record]) -> list[Provenance]:
    """Return one record about the text and software of all trained runs in `records`.

    The list is empty if the records have such a record already, or if the files of a run are missing, broken, or
    belong to another configuration.
    """
    runs = {
        each.run: each
        for each in records
        if isinstance(each, OfRun) and isinstance(each, Record) and not each.pretrained
    }
    studies = {each.study for each in runs.values()}
    if of_kind(records, Provenance) or len(studies) != 1:
        return []
    try:
        models = [_model(study_dir, each.run, each.config) for each in runs.values()]
        data = _file(study_dir, "data.json", _Data)
    except UserError:
        return []
    if {each.tokenizer_hash for each in models} != {data.tokenizer_hash}:
        return []
    known = {split: data.splits[split] for split in SPLITS if split in data.splits}
    packages = sorted({name for each in models for name in each.versions})
    return [
        Provenance(
            study=studies.pop(),
            source=data.source,
            documents={split: each.n_documents for split, each in known.items()},
            tokens={split: each.n_tokens for split, each in known.items()},
            d_vocab=data.d_vocab,
            n_copies=data.dropped_duplicates,
            n_overlapping={
                split: n for split, n in data.dropped_overlapping.items() if split in SPLITS
            },
            versions={
                name: ", ".join(_different(each.versions.get(name, "") for each in models))
                for name in packages
            },
            commits=tuple(_different(each.commit for each in models)),
        )
    ]


def _different(texts: Iterable[str]) -> list[str]:
    return sorted(set(texts) - {""})


def _model(study_dir: Path, run: str, config: str) -> _Model:
    """Return the facts of a run.

    Raises:
        UserError: if there is no such run in the folder, or it has another configuration than the records.
    """
    if name_problem(run) or (study_dir / run).is_symlink():
        raise UserError(f"{run!r:.80} is no folder of {study_dir}")
    model = _file(study_dir, f"{run}/model.json", _Model)
    if (model.run, model.config) != (run, config):
        raise UserError(f"{study_dir / run} has another configuration than results.jsonl")
    return model


def _file(study_dir: Path, name: str, kind: type[T]) -> T:
    check_links(study_dir / name, study_dir)
    return read_json(study_dir / name, kind, "copy the study again")
