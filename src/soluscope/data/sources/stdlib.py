"""Python's standard library: code with English docstrings, present on every machine with Python."""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soluscope.data.sources import Document, Skip, Source, warn
from soluscope.errors import UserError

# Installed packages differ between machines, and tests contain deliberately broken and repeated text.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Params:
    max_mb: float | None = None
    """Maximum number of megabytes to read; files are read in the order of their paths. null: no limit."""

    def __post_init__(self) -> None:
        if self.max_mb is not None and self.max_mb <= 0:
            raise UserError(f"corpus.max_mb={self.max_mb} must be above 0, or null for all")


def documents(params: Params, skip: Skip = warn, /) -> Iterator[Document]:
    """Yield one document per file, named by its path below the library's folder."""
    for name, _ in _files(params):
        try:
            yield Document(name, (_root() / name).read_text(encoding="utf8"))
        except UnicodeDecodeError:
            skip(name, "not UTF-8")
        except OSError as error:
            skip(name, error.strerror or "cannot be read")


def fingerprint(params: Params) -> Any:
    return {"python": platform.python_version(), "files": _files(params)}


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _files(params: Params) -> list[tuple[str, int]]:
    """Return (path below the library's folder, size in bytes) of the files to read, sorted by path."""
    root = _root()
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - _LEFT_OUT
        below = Path(folder).relative_to(root)
        names += [(below / file).as_posix() for file in files if file.endswith(".py")]
    selected = []
    n_bytes = 0
    for name in sorted(names):
        size = (root / name).stat().st_size
        n_bytes += size
        if params.max_mb is not None and n_bytes > params.max_mb * 1e6:
            break
        selected.append((name, size))
    return selected


def more(params: Params) -> str:
    return "choose another data=" if params.max_mb is None else "raise corpus.max_mb"


SOURCE = Source(params=Params, documents=documents, fingerprint=fingerprint, more=more)
