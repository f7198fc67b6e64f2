"""Atomic writing of files, and hashes that are the same on every machine."""

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
