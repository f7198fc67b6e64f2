"""Reading and replacing of files, temporary names, names of folders, links that lead out, and checksums.

A file that others may have written is read by `read_json`, which checks it against a type. A file or folder is
written under a temporary name and then renamed, so that a reader sees the old one or the whole new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from filelock import FileLock

from soluscope.errors import Stopped, UserError

T = TypeVar("T")
Whole = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""Type of a whole number in a file; JSON itself has no largest number."""

MOST_BYTES = 240
"""Longest name of a folder. Most file systems allow 255 bytes, and copies need some for a suffix."""
MARK = ".study"
"""File in a folder of links, such as one that out= made: the path of the study to which its links lead."""
_TEMPORARY = re.compile(
    r"\.(.*)\.([0-9a-f]{8})-(\d{1,10})-[0-9a-f]{8}\.part(?:-wal|-shm)?", re.DOTALL
)
"""A temporary name: the final name, the place and the process that gave it (see `_place`), and a random part. The
ends are those of SQLite's own files."""
_EARLIER_TEMPORARY = re.compile(r"\.(.*)\.(?:\d+|partial)", re.DOTALL)
"""A temporary name as earlier versions gave it. Only a folder that is locked is searched for it."""
_ABANDONED_AFTER_S = 24 * 3600
"""Age of a temporary file of another machine from which it is taken for litter."""
_FOREIGN = {"wandb"}
"""Folders of a run in which another program keeps its own links."""


# --- reading --------------------------------------------------------------------------------------


def read_json(path: Path, kind: type[T], remedy: str) -> T:
    """Return the content of a JSON file as `kind`: a dataclass, or a type such as dict[str, Any].

    Keys that a dataclass lacks are ignored, because a later version may have written them.

    Args:
        path: the file.
        kind: the wanted type; numbers, texts and lists are never converted into each other.
        remedy: the end of the error's line, which says how to make the file again.

    Raises:
        UserError: if there is no such file, or it does not contain a `kind`.
    """
    if not path.is_file():  # a pipe would never end
        raise UserError(f"no file {path}: {remedy}")
    try:
        return from_json(path.read_bytes(), kind)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is broken ({reason(error)}): {remedy}") from error


def from_json(content: bytes, kind: type[T]) -> T:
    """Return JSON as a value of the type `kind`, such as a dataclass. Other keys than its fields are ignored.

    Raises:
        ValueError: if the content is not JSON, or a value has another type; the message is one line.
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, shortened."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip() or type(error).__name__).splitlines()[0][:120]


def check_links(path: Path, root: Path) -> None:
    """Refuse a file or folder that contains, or is, a link that leads out of `root`.

    Folders are searched three levels deep, as deep as a run's folder is written. In a folder of links, whose file
    `MARK` names a study, a link may lead to its own place in that study.

    Raises:
        UserError: naming the link.
    """
    real = Path(os.path.realpath(root))
    try:
        found = [*_with_content(path, depth=3)]
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    for each in found:
        if not each.is_symlink():
            continue
        target = Path(os.path.realpath(each))
        if not target.is_relative_to(real) and target != _own_place(each, root):
            raise UserError(
                f"{each} is a link that leads out of {root}: put a copy of the file or folder in its place"
            )


def check_folder(path: Path) -> None:
    """Refuse a file, a pipe or a dangling link in the place of a folder; no folder at all is accepted.

    Raises:
        UserError: naming it.
    """
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{path} is not a folder: move it away")


def _with_content(path: Path, depth: int) -> Iterator[Path]:
    """Yield `path` and, if it is a folder, its content down to `depth` levels."""
    yield path
    if depth and path.is_dir() and not path.is_symlink() and path.name not in _FOREIGN:
        content: list[Path] = []
        with suppress(FileNotFoundError):  # another process has just removed the folder
            content = sorted(path.iterdir())
        for each in content:
            yield from _with_content(each, depth - 1)


def _own_place(link: Path, root: Path) -> Path | None:
    """Return the place that a link of a folder of links may lead to; None in any other folder."""
    mark = root / MARK
    if mark.is_symlink() or not mark.is_file():
        return None
    study = Path(mark.read_text(encoding="utf8", errors="replace").strip())
    return Path(os.path.realpath(study)) / link.relative_to(root)


# --- writing --------------------------------------------------------------------------------------


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
    remove_litter(path.parent)
    beside = _temporary(path)
    try:
        yield beside
        _sync(beside)
        os.replace(beside, path)
    finally:
        _remove(beside)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder beside `path`. At the end it is renamed to `path`; after an error it is removed.

    Its files and the folder itself are on the disk before the folder gets its name.
    """
    remove_litter(path.parent)
    beside = _temporary(path)
    try:
        beside.mkdir()
        yield beside
        for each in (*beside.iterdir(), beside):
            _sync(each)
        os.replace(beside, path)
        _sync(path.parent)
    finally:
        _remove(beside)


def remove_litter(*folders: Path, name: str | None = None) -> None:
    """Remove temporary files and folders that killed processes have left directly in `folders`.

    Only those are removed whose process has ended on this machine, or that are a day old.

    Args:
        folders: folders, which need not exist.
        name: a file or folder that only the caller may write now, because the caller holds its lock; all of
            its temporary ones are litter. `*` stands for everything in the folders.
    """
    for folder in folders:
        for each in folder.glob(".*"):
            named = _TEMPORARY.fullmatch(each.name)
            earlier = None if name is None else _EARLIER_TEMPORARY.fullmatch(each.name)
            own = named or earlier
            with suppress(OSError):  # another process removes it too, or this user may only read
                if (own and name in ("*", own[1])) or (
                    named and _is_abandoned(each, named[2], int(named[3]))
                ):
                    _remove(each)


def _temporary(path: Path) -> Path:
    """Return a name beside `path` that no other process uses, on any machine that shares the folder."""
    return path.with_name(f".{path.name}.{_place()}-{os.getpid()}-{secrets.token_hex(4)}.part")


@cache
def _place() -> str:
    """Return a hash of the machine, its last start and its container: there, a process number is unique."""
    known = [platform.node()]
    with suppress(OSError):  # these files exist on Linux only
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf8"))
        known.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:8]


def _is_abandoned(path: Path, place: str, pid: int) -> bool:
    if place == _place() and os.name == "posix":
        try:
            os.kill(pid, 0)  # signal 0 only asks whether the process exists
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False
    return time.time() - path.lstat().st_mtime > _ABANDONED_AFTER_S


def remove_folder(path: Path) -> None:
    """Remove a folder and its content. Anything else in its place stays: `shutil.rmtree` would wait at a pipe."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        remove_folder(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk; a folder only where the system can do so."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # Windows
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_lock(path: Path) -> FileLock:
    """Return the lock whose file is `path`.

    Raises:
        UserError: if the file is a link.
    """
    if path.is_symlink():
        raise UserError(f"{path} is a link, but a lock must be a file: delete the link")
    return FileLock(path)


# --- names ----------------------------------------------------------------------------------------


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


# --- hashes ---------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """Return a short hash of a JSON value, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def checksum(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


Stamp = tuple[int, int, int, int]


def stamp(path: Path) -> Stamp:
    """Return the numbers of a file that change when it is written, moved in place or copied."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


_checked: dict[tuple[str, Stamp], str] = {}


def has_checksum(path: Path, wanted: str) -> bool:
    """Return whether a file has the sha256 `wanted`. It is computed once, until the file changes."""
    key = (os.path.realpath(path), stamp(path))
    if key not in _checked:
        _checked[key] = checksum(path)
    return _checked[key] == wanted
