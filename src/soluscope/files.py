"""Files that are whole or absent, and hashes that are the same everywhere."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soluscope.errors import Stopped


def write_text(path: Path, text: str) -> None:
    """Write `text` beside `path`, then rename it there: a reader sees the old file or the new one.

    Raises:
        UserError: if the folder cannot be written or the disk is full; the old file is untouched.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """The same for bytes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_bytes(content)
    except OSError as error:
        raise Stopped(
            f"cannot write {path}: {error.strerror}; free it or choose another place"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed onto it at the end, removed if anything fails."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def digest(value: Any) -> str:
    """Short hash of what JSON can hold, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
