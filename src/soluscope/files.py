"""Files that are whole or absent, and hashes that are the same everywhere."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from soluscope.errors import UserError

def write_text(path: Path, text: str) -> None:
    """Write `text` beside `path`, then rename it there: a reader sees the old file or the new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free it or choose another runs_dir") from error


def digest(value: Any) -> str:
    """Short hash of what JSON can hold, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
