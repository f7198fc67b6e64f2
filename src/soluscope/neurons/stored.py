"""The stored neurons of a run, read without a model and without torch.

    neurons = stored.read("runs/first/solu_ln-s0")           # or part="untrained"
    neurons.about.n_neurons, neurons.stages                  # ("pre", "mid", "post")
    for example in neurons.top(42, "post"):                  # at most 20, one of each document, the largest first
        example.tokens[example.peak], example.activations["post"][example.peak]
    neurons.of_range(42, "mid", 3)                           # at most 5, a random sample of the range's tokens

The files of a part, all in runs/STUDY/RUN/neurons/PART/:

    examples.parquet    one line per example; look.py describes the columns
    neurons.parquet     one line per neuron: `describe.statistics`, and a histogram of each stage
    rules.parquet       one line per neuron and side: `describe.best_rules`
    logits.parquet      one line per neuron, side and rank: the tokens that the neuron raises and lowers most
    vocabulary.json     the text of each token, with escapes for characters that cannot be seen
    documents.json      the name of each document
    found.jsonl         the neurons that the report shows, as records
    about.json          `About`
    SHA256SUMS          checksums of these files, written last
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from soluscope.errors import UserError
from soluscope.files import (
    Whole,
    check_folder,
    check_links,
    check_names,
    checksum,
    has_checksum,
    read_json,
    reason,
)
from soluscope.neurons.checking import check_columns, check_values
from soluscope.neurons.schema import FOLDER, N_RANGES, PARTS, STAGES, SUMS, TOP, Part, Stage

TABLES = ("examples", "neurons", "rules", "logits")
CONTENT = (
    *(f"{name}.parquet" for name in TABLES), "vocabulary.json", "documents.json", "about.json", "found.jsonl",
)  # fmt: skip


@dataclass(frozen=True)
class About:
    """Content of about.json."""

    study: str
    run: str
    arm: str
    variant: str
    seed: Whole
    part: str
    """`trained`, or `untrained`: the run's initialisation."""
    has_mid_norm: bool
    """False: mid and post are the same activations."""
    n_neurons: Whole
    n_tokens: Whole
    """Number of tokens that were read, without BOS."""
    n_documents: Whole
    text: str
    """The text's source and split."""
    gain: float
    """Geometric mean of the mid norm's gain; the static surrogate of `D` has this gain."""
    made_with: str
    """Hash of the model, the text, the settings and the code."""


@dataclass(frozen=True)
class Example:
    """A token at which a neuron was looked at, and the text around it.

    The text ends at the document's and the row's bounds. Characters that cannot be seen are written as escapes; the
    text is data and must be escaped wherever it is shown.
    """

    neuron: int
    stage: Stage
    """Stage by whose activation the example was chosen."""
    range: int | None
    """Range of that activation, 0 (lowest) to 9; None for a top example."""
    rank: int
    """Place among the top examples, or in the random order of the range, from 0."""
    document: str
    half: int
    """Half of the documents: rules are chosen on half 0 and measured on half 1."""
    row: int
    pos: int
    tokens: tuple[str, ...]
    """The token and up to 20 tokens on either side."""
    peak: int
    """Index of the token in `tokens`."""
    activations: dict[Stage, tuple[float, ...]]
    """The neuron's activation at each of `tokens`, by stage."""
    effect: float
    """Change of the token's loss in nats when the neuron's hook_post is set to 0; nan without a next token."""
    D: float
    """The effect minus the same effect in the model with one gain for all tokens."""
    k_eff: float
    """Effective number of neurons that share the token's code."""
    gain: float
    engagement: float

    @property
    def activation(self) -> float:
        """Return the activation at the token, at the stage by which it was chosen."""
        return self.activations[self.stage][self.peak]


class Neurons:
    """The stored neurons of a run's model or of its initialisation."""

    stages = STAGES

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: About = self._json("about.json", About)
        with self._sound("about.json"):
            about = self.about
            check_names(about.study, about.run, about.arm, about.variant)
            n_lines = pq.read_metadata(folder / "neurons.parquet").num_rows
            if about.n_neurons != n_lines:
                raise ValueError(
                    f"n_neurons={about.n_neurons}, but neurons.parquet has {n_lines} lines"
                )

    @cached_property
    def vocabulary(self) -> list[str]:
        """Return the text of each token."""
        texts: list[str] = self._json("vocabulary.json", list[str])
        return texts

    @cached_property
    def documents(self) -> list[str]:
        """Return the name of each document."""
        names: list[str] = self._json("documents.json", list[str])
        return names

    @cached_property
    def statistics(self) -> pd.DataFrame:
        """Return one line per neuron; see `describe.statistics`."""
        return self._table("neurons")

    @cached_property
    def rules(self) -> pd.DataFrame:
        """Return one line per neuron and side; see `describe.best_rules`."""
        return self._table("rules")

    @cached_property
    def logits(self) -> pd.DataFrame:
        """Return the tokens that each neuron raises and lowers most: neuron, side, rank, token, logit."""
        return self._table("logits")

    def examples(self, neuron: int) -> list[Example]:
        """Return all examples of a neuron, ordered by stage, then top examples before the ranges, then rank.

        Raises:
            UserError: if there is no such neuron, or the file is broken.
        """
        if not 0 <= neuron < self.about.n_neurons:
            raise UserError(
                f"neuron={neuron} is not a whole number from 0 to {self.about.n_neurons - 1}: set neuron= to one"
            )
        table = self._table("examples", [("neuron", "==", neuron)])
        return [self._example(row) for row in table.to_dict("records")]

    def top(self, neuron: int, stage: Stage) -> list[Example]:
        """Return the neuron's largest activations at a stage, at most one of each document, the largest first."""
        return [
            each for each in self.examples(neuron) if each.stage == stage and each.range is None
        ]

    def of_range(self, neuron: int, stage: Stage, number: int) -> list[Example]:
        """Return the sample of a range, 0 (lowest) to 9, in random order; fewer if the range has fewer tokens."""
        if not 0 <= number < N_RANGES:
            raise UserError(f"range {number} is not a whole number from 0 to {N_RANGES - 1}")
        return [
            each for each in self.examples(neuron) if each.stage == stage and each.range == number
        ]

    def windows(self, neuron: int) -> list[list[int]]:
        """Return the tokens of each example of a neuron, in the order of `examples`."""
        return [
            tokens.tolist()
            for tokens in self._table("examples", [("neuron", "==", neuron)])["tokens"]
        ]

    def groups(self) -> Iterator[pd.DataFrame]:
        """Yield examples.parquet in groups of whole neurons, for a reader of all examples."""
        with self._sound("examples.parquet") as path:
            file = pq.ParquetFile(path)
            check_columns("examples", file.schema_arrow)
            last = -1
            for number in range(file.num_row_groups):
                table = file.read_row_group(number).to_pandas()
                check_values("examples", table, self._bounds, whole=False)
                if len(table) and table["neuron"].iloc[0] <= last:
                    raise ValueError("a neuron is in two groups")
                last = last if table.empty else table["neuron"].iloc[-1]
                yield table

    def _example(self, row: dict[Any, Any]) -> Example:
        number = int(row["range"])
        return Example(
            neuron=int(row["neuron"]), stage=STAGES[STAGES.index(row["stage"])],
            range=None if number == TOP else number, rank=int(row["rank"]),
            document=self.documents[int(row["document"])], half=int(row["half"]),
            row=int(row["row"]), pos=int(row["pos"]),
            tokens=tuple(self.vocabulary[token] for token in row["tokens"]), peak=int(row["peak"]),
            activations={stage: tuple(map(float, row[stage])) for stage in STAGES},
            **{name: float(row[name]) for name in ("effect", "D", "k_eff", "gain", "engagement")},
        )  # fmt: skip

    def _table(self, name: str, filters: list[tuple[str, str, int]] | None = None) -> pd.DataFrame:
        with self._sound(f"{name}.parquet") as path:
            content = pq.read_table(path, filters=filters)
            check_columns(name, content.schema)
            table: pd.DataFrame = content.to_pandas()
            check_values(name, table, self._bounds, whole=filters is None)
            return table

    @property
    def _bounds(self) -> dict[str, int]:
        return {
            "neuron": self.about.n_neurons, "token": len(self.vocabulary), "document": len(self.documents),
        }  # fmt: skip

    def _json(self, name: str, kind: Any) -> Any:
        return read_json(self.folder / name, kind, _remedy(self.folder))

    @contextmanager
    def _sound(self, name: str) -> Iterator[Path]:
        """Yield the path of a file; an error of its content becomes one line that names it.

        Raises:
            UserError: with the reason.
        """
        path = self.folder / name
        try:
            yield path
        except UserError:
            raise
        except Exception as error:  # pyarrow has its own errors
            raise UserError(
                f"{path} is broken ({reason(error)}): delete {self.folder} and {_remedy(self.folder)}"
            ) from error


def read(run_dir: str | Path, part: Part = "trained") -> Neurons:
    """Return the stored neurons of a run.

    Raises:
        UserError: if they are missing, incomplete, or not as they were written.
    """
    folder = place(run_dir, part)
    check_links(Path(run_dir), Path(run_dir).parent)  # each folder on the way may be a link
    if not is_complete(folder):
        what = "is not as it was written" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {what}: {_remedy(folder)}")
    return Neurons(folder)


def parts_of(run_dir: str | Path) -> list[Part]:
    """Return the parts of a run whose neurons are stored, perhaps incompletely.

    Raises:
        UserError: if something else is in the place of a folder.
    """
    for folder in (Path(run_dir) / FOLDER, *(place(run_dir, part) for part in PARTS)):
        check_folder(folder)
    return [part for part in PARTS if place(run_dir, part).is_dir()]


def place(run_dir: str | Path, part: Part) -> Path:
    """Return the folder of a part."""
    return Path(run_dir) / FOLDER / part


def is_complete(folder: Path) -> bool:
    """Return whether all files of a part are there as they were written."""
    if not all((folder / name).is_file() for name in (SUMS, *CONTENT)):  # a pipe would never end
        return False
    try:
        lines = (folder / SUMS).read_text(encoding="utf8").splitlines()
        sums = dict(line.split("  ", 1)[::-1] for line in lines)
        return set(sums) == set(CONTENT) and all(
            has_checksum(folder / name, wanted) for name, wanted in sums.items()
        )
    except (OSError, ValueError):
        return False


def sums_of(folder: Path) -> str:
    """Return the content of `SUMS` for a folder's files."""
    return "".join(f"{checksum(folder / name)}  {name}\n" for name in CONTENT)


def _remedy(folder: Path) -> str:
    return f"compute it with 'soluscope neurons {folder.parent.parent}'"
