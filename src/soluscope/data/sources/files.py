"""Local .txt, .jsonl and .parquet files, given by globs."""

from __future__ import annotations

import codecs
import glob
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from soluscope.data.sources import Document, Skip, Source, warn
from soluscope.errors import UserError

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Params:
    paths: list[str] = MISSING
    """Globs of .txt, .jsonl and .parquet files; ** matches folders of any depth. Required with data=files."""
    text_field: str = "text"
    """Key of the text in a .jsonl line, or its column in a .parquet file."""
    separator: str | None = None
    """Text between two documents of a .txt file. null: each file is one document."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise UserError("corpus.paths is empty: give globs, as in 'corpus.paths=[texts/*.txt]'")
        if self.separator == "":
            raise UserError("corpus.separator is empty: give the text between documents, or null")


def documents(params: Params, skip: Skip = warn, /) -> Iterator[Document]:
    """Yield one document per .txt file (or per part, with a separator), .jsonl line or .parquet row.

    A .txt or .jsonl file that is not UTF-8 is skipped entirely, and so is a .parquet file that cannot be
    opened. If only a line or a row has no text, only that line or row is skipped.

    Raises:
        UserError: if a glob matches no file, a file has another ending, or the first line or the columns of
            a file lack `text_field`.
    """
    for path in _files(params):
        try:
            yield from _READERS[path.suffix](path, params, skip)
        except OSError as error:
            skip(str(path), error.strerror or "cannot be read")


def fingerprint(params: Params) -> Any:
    return [
        (str(path), status.st_size, status.st_mtime_ns)
        for path in _files(params)
        for status in [path.stat()]
    ]


def _files(params: Params) -> list[Path]:
    """Return the files that the globs match, sorted and without duplicates.

    Raises:
        UserError: if a glob matches no file, or a file has another ending than .txt, .jsonl or .parquet.
    """
    paths: set[Path] = set()
    for pattern in params.paths:
        expanded = glob.glob(str(Path(pattern).expanduser()), recursive=True)
        matches = {Path(match) for match in expanded if Path(match).is_file()}
        if not matches:
            raise UserError(
                f"corpus.paths: {pattern!r} matches no file, relative to {Path.cwd()}: correct the glob"
            )
        paths |= matches
    for path in paths:
        if path.suffix not in _READERS:
            raise UserError(
                f"corpus.paths: {path} ends in {path.suffix!r}; only {', '.join(_READERS)} can be read"
            )
    return sorted(paths)


def _read_txt(path: Path, params: Params, skip: Skip) -> Iterator[Document]:
    if not _is_utf8(path):
        skip(str(path), "not UTF-8")
    elif params.separator is None:
        yield Document(str(path), path.read_bytes().decode("utf-8-sig"))
    else:
        for number, part in enumerate(_split(path, params.separator), start=1):
            yield Document(f"{path}:{number}", part)


def _split(path: Path, separator: str) -> Iterator[str]:
    """Yield the parts of a file between separators, with only one part and one chunk in memory."""
    rest = ""
    with path.open(encoding="utf-8-sig", newline="") as file:
        while chunk := file.read(_CHUNK_BYTES):
            *whole, rest = (rest + chunk).split(separator)
            yield from whole
    yield rest


def _read_jsonl(path: Path, params: Params, skip: Skip) -> Iterator[Document]:
    if not _is_utf8(path):
        skip(str(path), "not UTF-8")
        return
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            name = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                skip(name, f"not JSON ({error})")
                continue
            text = record.get(params.text_field) if isinstance(record, dict) else None
            if isinstance(text, str):
                yield Document(name, text)
            elif number == 1 and isinstance(record, dict) and params.text_field not in record:
                raise _no_such_field(params, path, list(record))
            else:
                skip(name, f"no text at {params.text_field!r}")


def _read_parquet(path: Path, params: Params, skip: Skip) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        skip(str(path), f"not parquet ({str(error).splitlines()[0]})")
        return
    with file:
        if params.text_field not in file.schema_arrow.names:
            raise _no_such_field(params, path, file.schema_arrow.names)
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=[params.text_field]):
            for value in batch.column(0):
                number += 1
                try:
                    text = value.as_py()
                except UnicodeDecodeError:
                    text = None
                if isinstance(text, str):
                    yield Document(f"{path}:{number}", text)
                else:
                    skip(f"{path}:{number}", f"no UTF-8 text at {params.text_field!r}")


def _no_such_field(params: Params, path: Path, there: list[str]) -> UserError:
    return UserError(
        f"corpus.text_field={params.text_field!r} is not in {path}; it has: {', '.join(there)}"
    )


def _is_utf8(path: Path) -> bool:
    """Return whether a whole file is UTF-8; this is checked first, so that no part of a bad file is used."""
    decoder = codecs.getincrementaldecoder("utf8")()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


_READERS: dict[str, Callable[[Path, Params, Skip], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}

SOURCE = Source(params=Params, documents=documents, fingerprint=fingerprint)
