"""Data sets of the Hugging Face hub, streamed or downloaded; several data sets are mixed by weight."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from soluscope.data.sources import Document, Skip, Source, keys_of, text_at, warn
from soluscope.errors import UserError
from soluscope.reading import FilePath


@dataclass(frozen=True)
class HubSet:
    path: FilePath = MISSING
    """Name on the hub (`allenai/c4`), or a local folder of the same layout."""
    name: str | None = None
    """Name of the data set's configuration (`en`), if the data set has several."""
    revision: str | None = None
    """Branch, tag or commit. null: the main branch, which may change from day to day."""
    split: str = "train"
    """Name of the data set's split to read."""
    text_field: str = "text"
    """Column of the text. A dot leads into a nested column, as in meta.text."""
    weight: float = 1.0
    """Share of the mix in bytes, relative to the other sets' weights."""

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise UserError(f"corpus.sets: weight={self.weight} of {self.path} must be above 0")


@dataclass(frozen=True)
class Params:
    sets: list[HubSet] = MISSING
    """Data sets to mix: path, name, revision, split, text_field and weight of each."""
    streaming: bool = True
    """true: read over the network while the tokens are prepared. false: download everything first."""
    max_mb: float | None = 1000.0
    """Maximum number of megabytes of text from all sets. null: no limit, allowed only without streaming.

    The corpus ends earlier if a set has no more rows, so that the mix keeps its weights.
    """

    def __post_init__(self) -> None:
        if not self.sets:
            raise UserError("corpus.sets is empty: give data sets, as in 'corpus.sets=[{path: …}]'")
        if self.streaming and self.max_mb is None:
            raise UserError(
                "corpus.max_mb is null, but streaming needs a limit: set it, as in corpus.max_mb=1000"
            )
        if self.max_mb is not None and self.max_mb <= 0:
            raise UserError(f"corpus.max_mb={self.max_mb} must be above 0")


def documents(params: Params, skip: Skip = warn, /) -> Iterator[Document]:
    """Yield the rows of the sets. The next row always comes from the set furthest behind its weight in bytes.

    Raises:
        UserError: if a set does not exist, lacks the split or the column, or cannot be read, for example
            without a network; the message names the set.
    """
    n_bytes = [0] * len(params.sets)
    streams = [_rows(hub_set, params.streaming, skip) for hub_set in params.sets]
    while params.max_mb is None or sum(n_bytes) < params.max_mb * 1e6:
        behind = min(range(len(n_bytes)), key=lambda i: n_bytes[i] / params.sets[i].weight)
        document = next(streams[behind], None)
        if document is None:
            others = [other.path for i, other in enumerate(params.sets) if i != behind]
            if others:
                skip(
                    f"the rest of {', '.join(others)}",
                    f"{params.sets[behind].path} ended after {n_bytes[behind] / 1e6:.1f} MB, "
                    "and the mix keeps its weights",
                )
            return
        n_bytes[behind] += len(document.text.encode("utf8", "surrogatepass"))
        yield document


def fingerprint(params: Params) -> Any:
    """Return the parameters, and for local folders also the path, size and time of their files."""
    return [
        (
            asdict(hub_set),
            [_status(p) for p in sorted(Path(hub_set.path).rglob("*")) if p.is_file()],
        )
        for hub_set in params.sets
    ]


def _status(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


def _rows(hub_set: HubSet, streaming: bool, skip: Skip) -> Iterator[Document]:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(
            hub_set.path,
            hub_set.name,
            split=hub_set.split,
            revision=hub_set.revision,
            streaming=streaming,
        )
        for number, row in enumerate(rows):
            name, text = f"{hub_set.path}:{hub_set.split}:{number}", None
            try:
                text = text_at(row, hub_set.text_field)
            except KeyError:
                if number == 0:
                    raise UserError(
                        f"corpus.sets: no text_field={hub_set.text_field!r} in {hub_set.path}; "
                        f"it has: {', '.join(keys_of(row))}"
                    ) from None
            if text is None:
                skip(name, f"no text at {hub_set.text_field!r}")
            else:
                yield Document(name, text)
    except UserError:
        raise
    except Exception as error:  # the client, its file systems and its HTTP library raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"corpus.sets: cannot read {hub_set.path} "
            f"(name={hub_set.name}, split={hub_set.split}, revision={hub_set.revision}): {reason}"
        ) from error


def more(params: Params) -> str:
    return "raise corpus.max_mb, or add sets to corpus.sets"


SOURCE = Source(params=Params, documents=documents, fingerprint=fingerprint, more=more)
