"""The text and the software behind a study's trained runs, for the report's methods paragraph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from soluscope.config import Config
from soluscope.data.cache import SPLITS, Counts
from soluscope.errors import UserError
from soluscope.files import Whole, read_json
from soluscope.results import Provenance
from soluscope.runs.claims import apart
from soluscope.runs.weights import Facts, commit

OPTIMIZER = (
    "batch_size", "beta1", "beta2", "weight_decay", "clip", "lr_rest", "warmup_steps", "schedule", "final_lr_share",
)  # fmt: skip
"""Settings below `train.` that the methods paragraph needs beside the learning rates."""


@dataclass(frozen=True)
class _Data:
    """The facts of data.json that a reader of a paper needs."""

    source: str
    tokenizer_hash: str
    d_vocab: Whole
    splits: dict[str, Counts]
    dropped_duplicates: Whole
    dropped_overlapping: dict[str, Whole]


def of_study(
    study_dir: Path, models: Sequence[Facts], runs: Sequence[Config] = ()
) -> list[Provenance]:
    """Return one record about the text, the training and the software of a study's trained models.

    The list is empty if data.json lacks a fact, or describes other tokens than those of the models.
    """
    try:
        data = read_json(study_dir / "data.json", _Data, "")
    except UserError:
        return []
    if {each.tokenizer_hash for each in models} != {data.tokenizer_hash}:
        return []
    known = {split: data.splits[split] for split in SPLITS if split in data.splits}
    packages = sorted({name for each in models for name in each.versions})
    overlapping = data.dropped_overlapping
    differing = apart(runs)
    return [
        Provenance(
            study=study_dir.name,
            commit=commit(),
            source=data.source,
            documents={split: each["n_documents"] for split, each in known.items()},
            tokens={split: each["n_tokens"] for split, each in known.items()},
            d_vocab=data.d_vocab,
            n_copies=data.dropped_duplicates,
            n_overlapping={split: overlapping[split] for split in SPLITS if split in overlapping},
            versions={
                name: ", ".join(_different(each.versions.get(name, "") for each in models))
                for name in packages
            },
            commits=tuple(_different(each.commit for each in models)),
            training={
                name: getattr(runs[0].train, name)
                for name in OPTIMIZER
                if len({getattr(each.train, name) for each in runs}) == 1
            },
            apart=differing.claimed,
            unclaimed=differing.unclaimed,
        )
    ]


def _different(texts: Iterable[str]) -> list[str]:
    return sorted(set(texts) - {""})
