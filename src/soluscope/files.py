"""Atomic writing of files, JSON that is checked when it is read, and the rule for names of folders."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from soluscope.errors import Stopped

T = TypeVar("T")

MOST_BYTES = 240
"""Longest name of a folder. Most file systems allow 255 bytes, and copies need some for a suffix."""


def write_text(path: Path, text: str) -> None:
    """Write `text` to a temporary file, then rename it to `path`: a reader sees the old file or the new file.

    Raises:
        Stopped: if the folder cannot be written or the disk is full; the old file is then unchanged.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` in the same way as `write_text`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_bytes(content)
    except OSError as error:
        raise Stopped(
            f"cannot write {path}: {error.strerror}; free disk space or choose another folder"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. At the end it is renamed to `path`; after an error it is removed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def digest(value: Any) -> str:
    """Return a short hash of a JSON value, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def from_json(content: bytes, kind: type[T]) -> T:
    """Return JSON as a value of the type `kind`, such as a dataclass. Other keys than its fields are ignored.

    Raises:
        ValueError: if the content is not JSON, or a value has another type; the message is one line.
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def name_problem(name: str) -> str | None:
    """Return the reason why `name` cannot be a folder's name or a part of it; None for a valid name.

    Names that come from files are shown, put into paths and written into code, so the same rule is for them.
    """
    if re.fullmatch(r"[\w.+-]+", name) is None or name in {".", ".."}:
        return "is used in a folder's name: use only letters, digits and _ . + -"
    n_bytes = len(name.encode("utf8"))
    if n_bytes > MOST_BYTES:
        return f"gives a folder a name of {n_bytes} bytes, but at most {MOST_BYTES} are possible: shorten it"
    return None


def check_names(*names: str) -> None:
    """Refuse names that were read from a file and cannot be names of folders.

    Raises:
        ValueError: naming the first such name.
    """
    for name in names:
        problem = name_problem(name)
        if problem:
            raise ValueError(f"{name[:80]!r} {problem}")
