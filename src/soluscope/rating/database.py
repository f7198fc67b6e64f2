"""The plan and the ratings in one SQLite file, which several processes may use at once.

A rating is confirmed once its transaction is on the disk (write-ahead log, synchronous=FULL): neither a killed
process nor a power failure loses it afterwards. A rating that was taken back stays in the file, marked as undone.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from soluscope.errors import Stopped, UserError
from soluscope.files import from_json, name_problem, reason
from soluscope.rating.plan import Item, Kind, Plan
from soluscope.rating.settings import PlanConfig
from soluscope.rating.shown import Snippet, Source

NAME = "ratings.sqlite"
APPLICATION = 0x50_6C_52_31
"""Number in the file's header by which SQLite files of this kind are recognised."""
VERSION = 1
WAIT_S = 30
"""Seconds to wait for another process that writes."""
LONGEST = 500
"""Most characters of a hypothesis."""
SCHEMA = """
CREATE TABLE fact (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE item (
  id INTEGER PRIMARY KEY, kind TEXT NOT NULL, mode TEXT NOT NULL, stage TEXT NOT NULL, arm TEXT NOT NULL,
  run TEXT NOT NULL, neuron INTEGER, rule TEXT NOT NULL, repeats INTEGER REFERENCES item (id), shown TEXT NOT NULL
) STRICT;
CREATE TABLE rating (
  id INTEGER PRIMARY KEY AUTOINCREMENT, rater TEXT NOT NULL, item INTEGER NOT NULL REFERENCES item (id),
  interpretable INTEGER NOT NULL CHECK (interpretable IN (0, 1)), hypothesis TEXT NOT NULL, seconds REAL NOT NULL,
  at TEXT NOT NULL, undone INTEGER NOT NULL DEFAULT 0 CHECK (undone IN (0, 1))
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
        """Write a new file with a plan. If another process creates it at the same time, the first one counts.

        Raises:
            NotSaved: if the file cannot be written.
        """
        facts = {
            "version": str(VERSION), "study": source.study, "identity": source.identity,
            "plan": json.dumps(config.of_plan(), sort_keys=True), "silent": json.dumps(plan.silent),
        }  # fmt: skip
        with self._writing() as connection:
            if connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION:
                return
            for statement in SCHEMA.split(";"):
                connection.execute(statement)
            connection.executemany("INSERT INTO fact VALUES (?, ?)", facts.items())
            connection.executemany(
                "INSERT INTO item VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (_as_row(number, each) for number, each in enumerate(plan.items)),
            )
            connection.execute(f"PRAGMA application_id = {APPLICATION}")

    def check(self, source: Source, config: PlanConfig | None) -> None:
        """Refuse a file that is broken, belongs to another study, or has another plan.

        Args:
            config: the requested plan; None: any.

        Raises:
            UserError: with the reason.
        """
        found = self.facts()
        other = f"move {self.path} away to draw a new plan"
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
        """Return the facts of the file by name: version, study, identity, plan, silent.

        Raises:
            UserError: if the file is not a complete database of ratings.
        """
        with self._reading() as connection:
            if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
                raise UserError(f"{self.path} is not a file of ratings: move it away")
            broken = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if broken != "ok":
                raise UserError(
                    f"{self.path} is broken ({reason(ValueError(broken))}): restore a copy of it"
                )
            found = dict(connection.execute("SELECT name, value FROM fact"))
        if found.get("version") != str(VERSION):
            raise UserError(
                f"{self.path} was written by another version ({found.get('version')}, this one reads {VERSION}): "
                "use the version that wrote it"
            )
        return found

    def plan(self) -> dict[str, Any]:
        """Return the settings with which the plan was drawn."""
        return from_json(self.facts()["plan"].encode(), dict[str, Any])

    def silent(self) -> dict[str, int]:
        """Return the number of drawn neurons without enough examples, by arm."""
        return from_json(self.facts()["silent"].encode(), dict[str, int])

    def items(self) -> list[Item]:
        """Return the items by their numbers, without their examples, which `shown` returns."""
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT kind, mode, stage, arm, run, neuron, rule, repeats FROM item ORDER BY id"
            ).fetchall()
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
        row = (rater, item, int(interpretable), hypothesis[:LONGEST], seconds, _now())
        with self._writing() as connection:
            found = connection.execute(
                "INSERT INTO rating (rater, item, interpretable, hypothesis, seconds, at) VALUES "
                "(?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                row,
            )
            return found.rowcount == 1

    def undo(self, rater: str) -> tuple[bool, str] | None:
        """Take back a person's last rating, and return its answer and hypothesis; None without a rating.

        Raises:
            NotSaved: if it cannot be written.
        """
        with self._writing() as connection:
            row = connection.execute(
                "SELECT id, interpretable, hypothesis FROM rating WHERE rater = ? AND undone = 0 ORDER BY id DESC",
                (rater,),
            ).fetchone()
            if row is None:
                return None
            connection.execute("UPDATE rating SET undone = 1 WHERE id = ?", (row[0],))
            return bool(row[1]), str(row[2])

    def ratings(self) -> list[Rating]:
        """Return all ratings that were not taken back, in the order in which they were made."""
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT rater, item, interpretable, hypothesis, seconds, kind, mode, stage, arm, run, neuron, "
                "repeats FROM rating JOIN item ON item.id = rating.item WHERE undone = 0 ORDER BY rating.id"
            ).fetchall()
        return [
            Rating(rater, item, bool(yes), text, seconds, Kind(kind), *rest)
            for rater, item, yes, text, seconds, kind, *rest in rows
        ]

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        if not self.path.is_file():
            raise UserError(f"no ratings at {self.path}: make some with 'soluscope rate'")
        try:
            connection = self._open()
            try:
                yield connection
            finally:
                connection.close()
        except (sqlite3.Error, ValueError) as error:
            raise UserError(f"cannot read {self.path}: {reason(error)}") from error

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
        except (sqlite3.Error, OSError) as error:
            raise NotSaved(
                f"cannot write {self.path} ({reason(error)}): free disk space or make the folder writable"
            ) from error

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=WAIT_S, isolation_level=None)
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        return connection


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


def _word(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
