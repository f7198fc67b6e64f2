"""The plan and the ratings in one SQLite file, which several processes may use at once.

A rating is confirmed once its transaction is on the disk (write-ahead log, synchronous=FULL): neither a killed
process nor a power failure loses it afterwards. A rating that was taken back stays in the file, marked as undone.

SQLite recognises a damaged structure, but not a changed value. So the file has a checksum of the plan, and one of
each rating.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from soluscope.errors import Stopped, UserError
from soluscope.files import check_names, digest, from_json, name_problem, reason, replacing
from soluscope.rating.plan import Item, Kind, Plan
from soluscope.rating.settings import PlanConfig
from soluscope.rating.shown import Snippet, Source

NAME = "ratings.sqlite"
APPLICATION = 0x50_6C_52_31
"""Number in the file's header by which SQLite files of this kind are recognised."""
VERSION = 2
WAIT_S = 30
"""Seconds to wait for another process that writes."""
LONGEST = 500
"""Most characters of a hypothesis."""
BESIDE = ("-wal", "-shm", "-journal")
"""Ends of the names of SQLite's own files beside the database."""
SCHEMA = """
CREATE TABLE fact (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE item (
  id INTEGER PRIMARY KEY, kind TEXT NOT NULL, mode TEXT NOT NULL, stage TEXT NOT NULL, arm TEXT NOT NULL,
  run TEXT NOT NULL, neuron INTEGER, rule TEXT NOT NULL, repeats INTEGER REFERENCES item (id), shown TEXT NOT NULL
) STRICT;
CREATE TABLE rating (
  id INTEGER PRIMARY KEY AUTOINCREMENT, rater TEXT NOT NULL, item INTEGER NOT NULL REFERENCES item (id),
  interpretable INTEGER NOT NULL CHECK (interpretable IN (0, 1)), hypothesis TEXT NOT NULL, seconds REAL NOT NULL,
  at TEXT NOT NULL, undone INTEGER NOT NULL CHECK (undone IN (0, 1)), checksum TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX one_rating ON rating (rater, item) WHERE undone = 0;
"""


@dataclass(frozen=True)
class Rating:
    """One person's answer to one item, with the facts of the item that the person did not see."""

    rater: str
    item: int
    interpretable: bool
    hypothesis: str
    seconds: float
    kind: Kind
    mode: str
    stage: str
    arm: str
    run: str
    neuron: int | None
    repeats: int | None


class NotSaved(Stopped):
    """A rating that could not be written, for example because the disk is full."""


class Database:
    """The ratings of one study."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: sqlite3.Connection | None = None

    def hold(self) -> None:
        """Keep the file open for as long as this object exists.

        When the last connection closes, SQLite moves the write-ahead log into the file and waits for the disk. A
        server holds the file, so that this does not happen at each request.
        """
        with self._reading():
            self._held = self._open()

    def create(self, source: Source, config: PlanConfig, plan: Plan) -> None:
        """Write a new file with a plan; a process that is killed meanwhile leaves no file.

        Raises:
            NotSaved: if the file cannot be written.
        """
        facts = {
            "version": str(VERSION), "study": source.study, "identity": source.identity,
            "plan": json.dumps(config.of_plan(), sort_keys=True), "silent": json.dumps(plan.silent),
        }  # fmt: skip
        try:
            with replacing(self.path) as beside, Database(beside)._writing() as connection:
                for statement in SCHEMA.split(";"):
                    connection.execute(statement)
                connection.executemany(
                    "INSERT INTO item VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (_as_row(number, each) for number, each in enumerate(plan.items)),
                )
                facts["checksum"] = _of_plan(connection, facts)
                connection.executemany("INSERT INTO fact VALUES (?, ?)", facts.items())
                connection.execute(f"PRAGMA application_id = {APPLICATION}")
        except OSError as error:
            raise self._not_saved(error) from error

    def check(self, source: Source, config: PlanConfig | None) -> None:
        """Refuse a file that is broken, belongs to another study, or has another plan.

        Args:
            config: the requested plan; None: any.

        Raises:
            UserError: with the reason.
        """
        found = self.facts()
        self.ratings()
        other = f"move the folder {self.path.parent} away to draw a new plan"
        if found.get("study") != source.study:
            raise UserError(
                f"{self.path} holds ratings of the study {found.get('study', '')!r}, wanted {source.study!r}: "
                f"{other}"
            )
        if found.get("identity") != source.identity:
            raise UserError(
                f"{self.path} was drawn from other examples than the study holds now: restore them, or "
                f"{other}"
            )
        if config is None:
            return
        drawn, wanted = self.plan(), config.of_plan()
        for name, value in wanted.items():
            if drawn.get(name) != value:
                raise UserError(
                    f"the plan in {self.path} was drawn with {name}={_word(drawn.get(name))}, but the command "
                    f"asks for {name}={_word(value)}: omit the setting, or {other}"
                )

    def facts(self) -> dict[str, str]:
        """Return the facts of the file by name: version, study, identity, plan, silent, checksum.

        Raises:
            UserError: if the file is not a complete database of ratings, or its plan is not as it was written.
        """
        with self._reading() as connection:
            if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
                raise UserError(f"{self.path} is not a file of ratings: move it away")
            found = dict(connection.execute("SELECT name, value FROM fact"))
            if found.get("version") != str(VERSION):
                raise UserError(
                    f"{self.path} was written by another version ({found.get('version')}, this one reads "
                    f"{VERSION}): use the version that wrote it"
                )
            if connection.execute(TABLES).fetchall() != _tables():
                raise ValueError("its tables are not as they were made")
            broken = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if broken != "ok":
                raise ValueError(broken)
            if found.get("checksum") != _of_plan(connection, found):
                raise ValueError("its plan is not as it was written")
        return found

    def plan(self) -> dict[str, Any]:
        """Return the settings with which the plan was drawn."""
        with self._sound():
            found = from_json(self.facts()["plan"].encode(), dict[str, Any])
            msgspec.convert(found, PlanConfig)
            return found

    def silent(self) -> dict[str, int]:
        """Return the number of drawn neurons without enough examples, by arm."""
        with self._sound():
            return from_json(self.facts()["silent"].encode(), dict[str, int])

    def items(self) -> list[Item]:
        """Return the items by their numbers, without their examples, which `shown` returns."""
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT kind, mode, stage, arm, run, neuron, rule, repeats FROM item ORDER BY id"
            ).fetchall()
            for _, _, _, arm, run, *_ in rows:
                check_names(*filter(None, (arm, run)))  # a planted neuron has neither
            return [
                Item(Kind(kind), mode, stage, (), arm, run, neuron, rule, repeats)
                for kind, mode, stage, arm, run, neuron, rule, repeats in rows
            ]

    def shown(self, item: int) -> tuple[Snippet, ...]:
        """Return the examples of an item as they are shown."""
        with self._reading() as connection:
            row = connection.execute(
                "SELECT coalesce(other.shown, item.shown) FROM item LEFT JOIN item AS other ON other.id = "
                "item.repeats WHERE item.id = ?",
                (item,),
            ).fetchone()
            return from_json(row[0].encode(), tuple[Snippet, ...])

    def rated(self, rater: str) -> list[int]:
        """Return the items that a person has rated, in the order of the ratings."""
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT item FROM rating WHERE rater = ? AND undone = 0 ORDER BY id", (rater,)
            ).fetchall()
        return [row[0] for row in rows]

    def raters(self) -> dict[str, int]:
        """Return the number of ratings of each person, by name."""
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT rater, count(*) FROM rating WHERE undone = 0 GROUP BY rater ORDER BY rater"
            ).fetchall()
        return dict(rows)

    def rate(
        self, rater: str, item: int, interpretable: bool, hypothesis: str, seconds: float
    ) -> bool:
        """Store a rating; at return it is on the disk. Return False if the person has rated the item already.

        Raises:
            NotSaved: if it cannot be written.
        """
        row = (rater, item, int(interpretable), hypothesis[:LONGEST], seconds, _now(), 0)
        with self._writing() as connection:
            rated = "SELECT 1 FROM rating WHERE rater = ? AND item = ? AND undone = 0"
            if connection.execute(rated, (rater, item)).fetchone():
                return (
                    False  # an ignored insertion would take a number, as if a rating were missing
                )
            connection.execute(
                "INSERT INTO rating (rater, item, interpretable, hypothesis, seconds, at, undone, checksum) VALUES "
                "(?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, digest(row)),
            )
            return True

    def undo(self, rater: str) -> tuple[bool, str] | None:
        """Take back a person's last rating, and return its answer and hypothesis; None without a rating.

        Raises:
            NotSaved: if it cannot be written.
        """
        with self._writing() as connection:
            found = connection.execute(
                "SELECT id, rater, item, interpretable, hypothesis, seconds, at FROM rating WHERE rater = ? AND "
                "undone = 0 ORDER BY id DESC",
                (rater,),
            ).fetchone()
            if found is None:
                return None
            number, *row = found
            connection.execute(
                "UPDATE rating SET undone = 1, checksum = ? WHERE id = ?",
                (digest([*row, 1]), number),
            )
            return bool(row[2]), str(row[3])

    def ratings(self) -> list[Rating]:
        """Return all ratings that were not taken back, in the order in which they were made.

        Raises:
            UserError: if a rating is missing or is not as it was written.
        """
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT rating.id, rater, item, interpretable, hypothesis, seconds, at, undone, checksum, kind, "
                "mode, stage, arm, run, neuron, repeats FROM rating LEFT JOIN item ON item.id = rating.item "
                "ORDER BY rating.id"
            ).fetchall()
            last = connection.execute("SELECT max(seq) FROM sqlite_sequence").fetchone()[0] or 0
            if [number for number, *_ in rows] != [*range(1, last + 1)]:
                raise ValueError(f"{last - len(rows)} of {last} ratings are missing")
            return [found for row in rows if (found := _as_rating(*row)) is not None]

    @contextmanager
    def _sound(self) -> Iterator[None]:
        """Turn the errors of a broken file into one line with the reason and a remedy.

        Raises:
            UserError: with the reason.
        """
        try:
            yield
        except (sqlite3.Error, ValueError, KeyError, RecursionError) as error:
            raise UserError(
                f"{self.path} is broken ({reason(error)}): restore a copy of it, or read what is left of its "
                f"ratings with 'sqlite3 {self.path.name} .recover'"
            ) from error

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        if not self.path.exists():
            raise UserError(f"no ratings at {self.path}: make some with 'soluscope rate'")
        with self._sound(), closing(self._open()) as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection in a transaction, which is on the disk when the block has ended."""
        try:
            connection = self._open()
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
            finally:
                connection.close()  # without COMMIT, this takes back the transaction
        except sqlite3.Error as error:
            raise self._not_saved(error) from error

    def _not_saved(self, error: sqlite3.Error | OSError) -> NotSaved:
        return NotSaved(
            f"cannot write {self.path} ({reason(error)}): free disk space or make the folder writable"
        )

    def _open(self) -> sqlite3.Connection:
        check_files(self.path)
        connection = sqlite3.connect(self.path, timeout=WAIT_S, isolation_level=None)
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        # Each rating moves into the file at once, so a copy of the file alone has all ratings.
        connection.execute("PRAGMA wal_autocheckpoint = 1")
        return connection


def check_files(path: Path) -> None:
    """Refuse a database that is not a file, or with another file beside it that SQLite would take for its own.

    Raises:
        UserError: naming the file.
    """
    for each in (path, *(path.with_name(path.name + end) for end in BESIDE)):
        if each.exists() and not each.is_file():
            raise UserError(f"{each} is not a file: move it away, or restore a copy of the folder")
    journal = path.with_name(f"{path.name}-journal")
    if journal.exists():  # it may name other files, which SQLite would delete
        raise UserError(f"{journal} does not belong to {path.name}: move it away")
    log = path.with_name(f"{path.name}-wal")
    if not path.exists() and log.exists() and log.stat().st_size:
        raise UserError(
            f"no file {path}, but {log.name} beside it may have ratings: restore {path.name}, or move the folder "
            "away"
        )


def name_of(text: str) -> str:
    """Return a person's name for the ratings.

    Raises:
        UserError: if it is empty, too long, or has other characters than letters, digits and _ . + -
    """
    name = re.sub(r"\s+", "_", text.strip())
    problem = "is empty" if not name else name_problem(name)
    if problem or len(name) > 40:
        raise UserError(
            f"the name {text[:40]!r} is not possible: use up to 40 letters, digits and _ . + -"
        )
    return name


def _as_row(number: int, item: Item) -> tuple[Any, ...]:
    examples = [] if item.repeats is not None else [asdict(each) for each in item.shown]
    shown = None if item.repeats is not None else json.dumps(examples)
    return (
        number, item.kind.value, item.mode, item.stage, item.arm, item.run, item.neuron, item.rule,
        item.repeats, shown or "[]",
    )  # fmt: skip


TABLES = "SELECT name, sql FROM sqlite_schema ORDER BY name"


@cache
def _tables() -> list[tuple[str, str | None]]:
    """Return the names and the definitions of all tables and indices of a file, and of nothing else."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(SCHEMA)
        return connection.execute(TABLES).fetchall()


def _of_plan(connection: sqlite3.Connection, facts: dict[str, str]) -> str:
    """Return the checksum of a file's items and of its facts."""
    result = sha256()
    for row in connection.execute("SELECT * FROM item ORDER BY id"):
        result.update(f"{json.dumps(row)}\n".encode())
    known = {name: value for name, value in facts.items() if name != "checksum"}
    result.update(json.dumps(known, sort_keys=True).encode())
    return result.hexdigest()


def _as_rating(number: int, *columns: Any) -> Rating | None:
    """Return a row as a rating; a rating that was taken back gives None.

    Raises:
        ValueError: if the row is not as it was written, or cannot be a rating.
    """
    row: Sequence[Any]
    (*row, checksum), (kind, mode, stage, arm, run, neuron, repeats) = columns[:8], columns[8:]
    rater, item, interpretable, hypothesis, seconds, _, undone = row
    if digest(row) != checksum:
        raise ValueError(f"rating {number} is not as it was written")
    if kind is None or not math.isfinite(seconds):
        raise ValueError(f"rating {number} is of no item, or took no time")
    check_names(*filter(None, (rater, arm, run)))
    if undone:
        return None
    return Rating(
        rater, item, bool(interpretable), hypothesis, seconds, Kind(kind), mode, stage, arm, run, neuron, repeats
    )  # fmt: skip


def _word(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
