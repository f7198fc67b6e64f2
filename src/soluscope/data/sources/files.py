"""Local files of text, given by globs: .txt, .jsonl, .json, .csv and .parquet, also compressed."""

from __future__ import annotations

import bz2
import codecs
import csv
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from omegaconf import MISSING

from soluscope.data.sources import Document, Skip, Source, keys_of, text_at, warn
from soluscope.errors import UserError
from soluscope.reading import FilePath

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Params:
    paths: list[FilePath] = MISSING
    """Globs of .txt, .jsonl, .json, .csv, .tsv and .parquet files; ** matches folders of any depth. Files other
    than .parquet may be compressed: .gz, .bz2, .xz or .zst. Required with data=files."""
    text_field: str = "text"
    """Key of the text in a .jsonl line or .json record, or its column in a .csv or .parquet file. A dot leads
    into a nested record, as in meta.text."""
    separator: str | None = None
    """Text between two documents of a .txt file; \\n is a line end of any kind and \\t a tab. null: each file
    is one document."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise UserError("corpus.paths is empty: give globs, as in 'corpus.paths=[texts/*.txt]'")
        if self.separator == "":
            raise UserError("corpus.separator is empty: give the text between documents, or null")
        if self.separator is not None:
            written = re.sub(r"\\([nrt])(?![A-Za-z])", _escaped, self.separator)
            object.__setattr__(self, "separator", written)


def _escaped(match: re.Match[str]) -> str:
    return {"n": "\n", "r": "\r", "t": "\t"}[match[1]]


def documents(params: Params, skip: Skip = warn, /) -> Iterator[Document]:
    """Yield one document per .txt file (or per part, with a separator), per .jsonl line, and per .json record,
    .csv row or .parquet row.

    A text file that is not UTF-8 or cannot be decompressed is skipped entirely, and so is a .parquet file that
    cannot be opened. If only a line or a row has no text, only that line or row is skipped.

    Raises:
        UserError: if a glob matches no file, a file has another ending, the first record or the columns of a
            file lack `text_field`, or the separator is in none of the .txt files.
    """
    read_txt = found_separator = False
    for path in _files(params):
        kind, _ = _endings(path)
        if kind != ".parquet" and not _is_text(path, skip):
            continue
        try:
            for number, document in enumerate(_READERS[kind](path, params, skip), start=1):
                yield document
                read_txt |= kind == ".txt"
                found_separator |= kind == ".txt" and number > 1
        except OSError as error:
            skip(str(path), error.strerror or "cannot be read")
    if params.separator is not None and read_txt and not found_separator:
        raise UserError(
            f"corpus.separator={params.separator!r} is in none of the .txt files: correct it, or set "
            "corpus.separator=null to read each file as one document"
        )


def fingerprint(params: Params) -> Any:
    return [
        (str(path), status.st_size, status.st_mtime_ns)
        for path in _files(params)
        for status in [path.stat()]
    ]


def more(params: Params) -> str:
    if params.separator is None and any(_endings(path)[0] == ".txt" for path in _files(params)):
        return (
            "set corpus.separator to the text between the documents of a .txt file, as in "
            r"corpus.separator=$'\n\n', or add files to corpus.paths"
        )
    return "add files to corpus.paths"


def _files(params: Params) -> list[Path]:
    """Return the files that the globs match, sorted and without duplicates.

    Raises:
        UserError: if a glob matches no file, or a file has an ending that cannot be read.
    """
    paths: set[Path] = set()
    for pattern in params.paths:
        matches = {path for path in _matching(Path(pattern)) if path.is_file()}
        if not matches:
            advice = "correct the glob"
            if Path(pattern).is_dir():
                advice = f"it is a folder; give a glob, as in {pattern}/**/*.txt"
            raise UserError(
                f"corpus.paths: {pattern!r} matches no file, relative to {Path.cwd()}: {advice}"
            )
        paths |= matches
    for path in paths:
        kind, packing = _endings(path)
        if kind not in _READERS or (kind == ".parquet" and packing):
            raise UserError(
                f"corpus.paths: {path} ends in {kind + packing!r}; only {', '.join(_READERS)} can be read, "
                f"and all but .parquet also with {', '.join(_OPENERS)}"
            )
    return sorted(paths)


def _matching(pattern: Path) -> list[Path]:
    """Return the paths that a glob matches. The part that exists is not read as a glob, as in texts[1]/*.txt."""
    there = next((each for each in (pattern, *pattern.parents) if os.path.exists(each)), Path())
    if there == pattern:
        return [pattern]
    rest = str(pattern.relative_to(there))
    return [there / match for match in glob.glob(rest, root_dir=there, recursive=True)]


def _endings(path: Path) -> tuple[str, str]:
    """Return the endings of a file's format and compression, such as `.jsonl` and `.zst`; empty without one."""
    name = path.name.lower()
    packing = next((ending for ending in _OPENERS if name.endswith(ending)), "")
    return Path(name.removesuffix(packing)).suffix, packing


def _open_zst(path: Path, mode: str) -> BinaryIO:
    import pyarrow  # Python has no zstd before 3.14

    return cast(BinaryIO, pyarrow.input_stream(str(path), compression="zstd"))


_OPENERS: dict[str, Callable[[Path, Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}


def _open(path: Path) -> BinaryIO:
    """Open a file to read its decompressed bytes."""
    file: BinaryIO = _OPENERS.get(_endings(path)[1], open)(path, "rb")
    return file


def _open_text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline=newline)


def _is_text(path: Path, skip: Skip) -> bool:
    """Return whether a whole file is UTF-8, else skip it; this is checked first, so that no part of a bad
    file is used."""
    decoder = codecs.getincrementaldecoder("utf8")()
    try:
        with _open(path) as file:
            while chunk := file.read(_CHUNK_BYTES):
                decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        skip(str(path), "not UTF-8")
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        why = getattr(error, "strerror", None)  # errors of a decompressor have none
        skip(str(path), why or f"cannot be decompressed ({error})")
    else:
        return True
    return False


def _read_txt(path: Path, params: Params, skip: Skip) -> Iterator[Document]:
    if params.separator is None:
        with _open(path) as file:
            yield Document(str(path), file.read().decode("utf-8-sig"))
    else:
        for number, part in enumerate(_split(path, params.separator), start=1):
            yield Document(f"{path}:{number}", part)


def _split(path: Path, separator: str) -> Iterator[str]:
    """Yield the parts of a file between separators, with only one part and one chunk in memory.

    A line end of the separator matches a line end of any kind, also in files from Windows.
    """
    line_end = r"(?>\r\n|\n|\r)"  # atomic, so that \r\n is never two line ends
    pattern = re.compile(line_end.join(map(re.escape, re.split(line_end, separator))))
    longest = 2 * len(separator)
    kept: list[str] = []  # the unfinished part without its last characters
    end = ""  # these characters, which may belong to a separator
    with _open_text(path, newline="") as file:
        while chunk := file.read(_CHUNK_BYTES):
            while chunk.endswith("\r") and (more := file.read(1)):
                chunk += more  # a chunk must not end within \r\n
            *whole, last = pattern.split(end + chunk)
            for part in whole:
                yield "".join([*kept, part])
                kept = []
            kept.append(last[:-longest])
            end = last[-longest:]
    yield "".join([*kept, end])


def _read_jsonl(path: Path, params: Params, skip: Skip) -> Iterator[Document]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            name = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = _parse(line)
            except ValueError as error:
                skip(name, f"not JSON ({error})")
                continue
            yield from _of_record(record, name, number == 1, path, params, skip)


def _read_json(path: Path, params: Params, skip: Skip) -> Iterator[Document]:
    """Yield the elements of an array, which is in memory as a whole, or the text of one object.

    A file that begins with an object on one line is read as .jsonl, because many data sets ship so.
    """
    with _open_text(path) as file:
        first = next((line.strip() for line in file if line.strip()), "")
    if first[:1] + first[-1:] in ("", "{}"):
        yield from _read_jsonl(path, params, skip)
        return
    with _open_text(path) as file:
        try:
            value = _parse(file.read())
        except ValueError as error:
            skip(str(path), f"not JSON ({error})")
            return
    if not isinstance(value, list):
        yield from _of_record(value, str(path), True, path, params, skip)
        return
    for number, record in enumerate(value, start=1):
        yield from _of_record(record, f"{path}:{number}", number == 1, path, params, skip)


def _parse(text: str) -> Any:
    """Return a JSON value.

    Raises:
        ValueError: if the text is not JSON, or nested so deeply that Python cannot read it.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _of_record(
    record: Any, name: str, first: bool, path: Path, params: Params, skip: Skip
) -> Iterator[Document]:
    """Yield the text of a record, or skip the record.

    Raises:
        UserError: if the first record of a file has no such key.
    """
    text = None
    try:
        text = text_at(record, params.text_field)
    except KeyError:
        if first:
            raise _no_such_field(params, path, keys_of(record)) from None
    if text is None:
        skip(name, f"no UTF-8 text at {params.text_field!r}")
    else:
        yield Document(name, text)


def _read_csv(path: Path, params: Params, skip: Skip) -> Iterator[Document]:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts of more than 131,072 characters
    dialect = "excel-tab" if _endings(path)[0] == ".tsv" else "excel"
    columns: list[str] | None = None
    with _open_text(path, newline="") as file:
        rows = csv.reader(file, dialect, strict=True)
        for number in itertools.count():
            name = f"{path}:{number}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                skip(name, f"not CSV ({error})")
                continue
            if row is None:
                return
            if columns is None:
                columns = row
                if params.text_field not in columns:
                    raise _no_such_field(params, path, columns)
            elif row:
                record = dict(zip(columns, row, strict=False))
                yield from _of_record(record, name, False, path, params, skip)


def _read_parquet(path: Path, params: Params, skip: Skip) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        skip(str(path), f"not parquet ({str(error).splitlines()[0]})")
        return
    with file:
        columns = [file.schema.column(i).path for i in range(len(file.schema))]
        if params.text_field not in [*columns, *file.schema_arrow.names]:
            raise _no_such_field(params, path, columns)
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=[params.text_field]):
            [column] = batch.schema.names
            for value in batch.column(0):
                number += 1
                try:
                    record = {column: value.as_py()}
                except UnicodeDecodeError:
                    record = {}
                name = f"{path}:{number}"
                yield from _of_record(record, name, False, path, params, skip)


def _no_such_field(params: Params, path: Path, there: list[str]) -> UserError:
    return UserError(
        f"corpus.text_field={params.text_field!r} is not in {path}; it has: {', '.join(there)}"
    )


_READERS: dict[str, Callable[[Path, Params, Skip], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}

SOURCE = Source(params=Params, documents=documents, fingerprint=fingerprint, more=more)
