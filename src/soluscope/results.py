"""The records of results.jsonl: one line each, told apart by `kind`, and the report's only input.

A record is a number with its interval and all that says where it came from, or a fact that the
numbers need: an arm's settings, what a probe leaves out, a probe's own words. Verdicts are
enumerated; `note` is prose for people and is never parsed.
"""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from soluscope.errors import UserError
from soluscope.files import write_text

MARGIN = 0.005
"""Nats a token: a smaller difference of losses does not matter, and a gain of LN must be above it.

Source: science.md section 4."""

Direction = Literal["higher", "lower", "neither"]
R = TypeVar("R", bound="Record")


class Verdict(StrEnum):
    """What a comparison settles."""

    EQUIVALENT = "equivalent"
    """Closer to 0 than `MARGIN`, by two one-sided tests."""
    DIFFERENT = "different"
    """Farther from 0 than `MARGIN`."""
    INCONCLUSIVE = "inconclusive"
    UNDEFINED = "undefined"
    """A ratio whose denominator is not above `MARGIN`."""


class Term(StrEnum):
    """What a comparison is of."""

    LOSS = "loss"
    """Mean loss of an arm over its seeds."""
    DIFFERENCE = "difference"
    """Loss of `arm` minus loss of `against`."""
    GAIN = "gain of LN"
    """Loss of the plain arm `against` minus loss of `arm`, which has a per-token norm."""
    STATIC = "static - LN"
    """Loss of the best static arm `against` minus loss of `arm`."""
    SHARE = "Phi_dyn"
    """`STATIC` as a share of `GAIN`."""
    STEP = "step"
    """One step of the telescoping sum from the plain arm to `arm`."""
    PROBE = "probe"
    """A probe's number in `arm` minus its number in the static twin `against`."""


class Grid(StrEnum):
    """Where on its grid the chosen setting lies."""

    INSIDE = "inside the grid"
    LOWER_EDGE = "at the lower edge of the grid"
    UPPER_EDGE = "at the upper edge of the grid"
    TOO_FEW = "too few for a grid"
    """Of two points, one end is always the best."""


# --- a probe's words ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantity:
    """A column that a probe measures, or an estimate that it makes."""

    unit: str
    meaning: str
    """One line a reader needs to read the number."""
    statistics: tuple[str, ...] = ("mean",)
    """How tokens become one number: `mean`, `median`, `q05`, `q95`, `sd`, `share above 0.5`."""
    curve: bool = False
    """Summarise at each position on its own (x = tokens after BOS), pooled over strings."""
    split_by: tuple[str, ...] = ()
    """Other columns of the probe by whose quartiles the tokens are also summarised."""
    more_smeared_when: Direction = "neither"


@dataclass(frozen=True)
class Gate:
    """What a probe must find on a model whose answer is known, or it is not believed elsewhere.

    A positive control has `above` or `below`: the 95% interval lies wholly beyond it, and within 5%
    of `truth` where there is one. A negative control has `within`: two one-sided tests place the
    estimate closer than that to `around`.

    Source: science.md section 7, "Control pass rule".
    """

    control: str
    """Name of a file in controls/."""
    quantity: str
    above: float | None = None
    below: float | None = None
    within: float | None = None
    around: float = 0.0
    truth: float | None = None
    """The analytic value, derived in the control's docstring."""
    statistic: str = "mean"
    positions: str = "not BOS"
    group: str = ""
    x: float | None = None
    stream: str = "natural"
    """Which of the control's streams."""


@dataclass(frozen=True)
class Figure:
    """What to draw from the rows of a probe; the drawing is the report's.

    `kind="dots"`: one dot and interval for each arm and seed, quantities or groups as panels.
    `kind="curve"`: value against row.x, one thin line a seed, one panel a stream.
    """

    title: str
    quantities: tuple[str, ...]
    kind: Literal["dots", "curve"] = "dots"
    statistic: str = "mean"
    streams: tuple[str, ...] = ()
    """Streams to draw, each its own panel; empty: all that the rows have."""
    positions: str = "not BOS"
    group: str = ""
    """The split to draw (`gain` draws the groups `gain Q1` … `gain Q4`); empty: unsplit rows."""
    log_y: bool = False
    log_x: bool = False
    relative: bool = False
    """Divide each run's curve by its own last value, so that shapes are seen where sizes differ."""
    x_title: str = "tokens after BOS"


# --- records --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Record:
    """What all records have."""

    kind: ClassVar[str]

    study: str
    arm: str = ""
    """A run's name without its seed: a model that is trained several times, once per seed."""
    variant: str = ""
    note: str = ""
    """What a reader must know to read the record; shown with it."""
    commit: str = ""
    """Of the code that measured."""
    config: str = ""
    """Hash of the run's configuration."""


@dataclass(frozen=True, kw_only=True)
class Number(Record):
    """A number with its interval."""

    value: float | None
    """The estimate. None: undefined, and `note` says why."""
    unit: str
    low: float | None = None
    high: float | None = None
    """Bounds of the 95% interval. None: no interval can be given."""
    n: int = 0
    """How many values went in: tokens, or strings; for comparisons, seeds."""
    n_clusters: int = 0
    """How many independent units they fall into, resampled for the interval."""
    cluster: str = ""
    """The unit that is resampled: `document`, `string`, `seed`."""


@dataclass(frozen=True, kw_only=True)
class OfRun:
    """What records about one model have."""

    run: str
    """Run folder's name, such as `solu_ln-s0`."""
    seed: int | None = None
    pretrained: bool = False
    """Of a model that others have trained: it is compared with none."""


@dataclass(frozen=True, kw_only=True)
class Measurement(OfRun, Number):
    """A summary of what a probe measured on one model: a mean, a quantile, a point of a curve."""

    kind: ClassVar[str] = "measurement"

    probe: str
    """Name of a file in probes/, or `loss`, `training`, `pretrained`."""
    quantity: str
    """What was measured: `r`, `gain`, `loss`, …"""
    statistic: str = "mean"
    """How tokens became one number: `mean`, `median`, `q05`, `share above 0.5`, …; empty: an estimate."""
    stream: str = ""
    """Text it was measured on: `natural`, `prose`, `code`, `repeated`, `random`; or `select`."""
    positions: str = "not BOS"
    """`all`, `BOS`, `not BOS`, `1`, `2-15`, `>=16`."""
    group: str = ""
    """Which line of a figure, or which split of the tokens, where `quantity` alone does not say."""
    x: float | None = None
    """Place on the figure's horizontal axis, for a point of a curve."""
    constant: bool = False
    """The same value at every token: an interval of width 0."""


@dataclass(frozen=True, kw_only=True)
class LeftOut(OfRun, Record):
    """A probe that has no numbers for a run, or on a stream; `note` says why."""

    kind: ClassVar[str] = "left out"

    probe: str
    stream: str = ""
    """Empty: on no stream."""


@dataclass(frozen=True, kw_only=True)
class TokenValue(OfRun, Record):
    """One value at one token of the text that the report shows."""

    kind: ClassVar[str] = "token"

    quantity: str
    value: float | None
    unit: str
    place: int
    """Position in the text; 0 is BOS."""
    text: str
    """The token's text."""
    stream: str


@dataclass(frozen=True, kw_only=True)
class Comparison(Number):
    """What differs between arms, with the interval for new seeds or for new documents (`cluster`)."""

    kind: ClassVar[str] = "comparison"

    term: Term
    against: str = ""
    """The arm it is compared with; empty for a `LOSS`. Of a `STEP`: the arm from which it leads."""
    verdict: Verdict | None = None
    choice: str = ""
    """How the arm that stands for the plain or the static arms was chosen, in words; not in `note`
    too. Of a `STEP`: how the arm that stands for the variant to which it leads was chosen."""
    p: float | None = None
    """Two-sided p of "no difference", where it was tested."""
    p_adj: float | None = None
    """The same after Holm's correction within its family."""
    size: str = ""
    """Which of the study's sizes, in words, here and not in `note`; empty where there is one."""
    lr: float | None = None
    """The rate common to all arms, of a comparison that is made at one; None: each at its best."""
    tuned_arm: str = ""
    """With `lr`: the arm at its best rate whose curve this is a point of."""
    step: tuple[str, ...] = ()
    """Of a `STEP`: the variants from and to which it leads."""
    adds: str = ""
    """Of a `STEP`: what it adds, in words."""
    probe: str = ""
    quantity: str = ""
    """Of a `PROBE`: the probe and what is tested of it."""


@dataclass(frozen=True, kw_only=True)
class ChoicePoint(Number):
    """Loss on the select split at one setting of a curve on which a setting was chosen."""

    kind: ClassVar[str] = "choice"

    setting: Literal["lr", "gain"]
    x: float
    """The setting at this point."""
    chosen_arm: str
    """The arm with the least loss on the curve: one curve has one."""
    eligible: bool = True
    """False: it lacks seeds that the others have, and was not chosen from."""
    grid: Grid | None = None
    """Of the chosen point: where on its grid it lies."""
    size: str = ""


@dataclass(frozen=True, kw_only=True)
class NoChoice(Record):
    """Arms of which the best would be wanted, and that share no seed; `note` says so."""

    kind: ClassVar[str] = "no choice"

    arms: tuple[str, ...]
    size: str = ""


@dataclass(frozen=True)
class Step:
    """A variant and what it adds to the one before it in its chain."""

    variant: str
    adds: str = ""


@dataclass(frozen=True, kw_only=True)
class Setting(Record):
    """An arm's settings and its part in the comparison, so that readers need not take names apart."""

    kind: ClassVar[str] = "setting"

    values: dict[str, float]
    """`lr`, `kappa`, `gain`, `d_mlp`, …: those that the arm has."""
    role: str
    """`baseline`, `plain`, `static` or `per_token`."""
    chain: tuple[Step, ...] = ()
    """From the root of the variant's chain to the variant itself."""
    twin: str = ""
    """The variant that is the same with one gain for all tokens."""
    size: str = ""
    n: int = 0
    """Seeds."""


@dataclass(frozen=True, kw_only=True)
class GateResult(Number):
    """What a probe found on a model whose answer is known."""

    kind: ClassVar[str] = "gate"

    probe: str
    control: str
    section: str
    """Of the control: `C3`."""
    passed: bool
    sign: Literal["positive", "negative"]
    """Whether the probe must find something there, or nothing."""
    measured: str
    """Which number of the probe, in words: `r (median), 0.9`."""
    asked: str
    """What it had to be, in words; why there is no interval is in `note`."""
    stream: str = ""
    positions: str = "not BOS"


@dataclass(frozen=True, kw_only=True)
class FalsePositives(Number):
    """How often a probe's test says "a difference" where there is none."""

    kind: ClassVar[str] = "false positives"

    probe: str
    tested: str
    source: str
    """`untrained models` or `shuffled labels`."""
    passed: bool | None
    """Whether the nominal rate lies inside the interval; None where the test is not defined."""


@dataclass(frozen=True, kw_only=True)
class ProbeWords(Record):
    """What a probe says of itself, stored with its numbers: a study is shown with these words."""

    kind: ClassVar[str] = "probe"

    probe: str
    """Name of its file."""
    name: str
    section: str
    """`P4`."""
    question: str
    formula: str
    reading: str
    pitfalls: str
    source: str
    tested: str
    quantities: dict[str, Quantity]
    """Columns and estimates."""
    figures: tuple[Figure, ...] = ()
    gates: tuple[Gate, ...] = ()


KINDS: dict[str, type[Record]] = {
    each.kind: each
    for each in (
        Measurement, LeftOut, TokenValue, Comparison, ChoicePoint, NoChoice, Setting, GateResult,
        FalsePositives, ProbeWords,
    )
}  # fmt: skip


def of_kind(records: Iterable[Record], kind: type[R]) -> list[R]:
    """Return the records of one type, in their order."""
    return [record for record in records if isinstance(record, kind)]


# --- files ----------------------------------------------------------------------------------------


def line(record: Record) -> str:
    """Return a record as one line of JSON; equal records have equal lines."""
    return json.dumps({"kind": record.kind} | _finite(asdict(record)))


def write(path: Path, records: Iterable[Record]) -> None:
    """Write `records` to `path`, wholly or not at all."""
    write_text(path, "".join(f"{line(each)}\n" for each in records))


def read(path: Path, study: Path | None = None) -> list[Record]:
    """Read the records of `path`. A line that cannot be read is skipped with a warning on stderr.

    Args:
        path: a file of records.
        study: folder whose evaluation makes the file again; the file's own if not given.

    Raises:
        UserError: if there is no such file, no line of it can be read, or another version wrote it.
    """
    again = f"make it again with 'python eval/run.py {study or path.parent}'"
    if not path.is_file():
        raise UserError(f"no results at {path}: {again}")
    records = []
    for number, written in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            values = json.loads(written)
            if not isinstance(values, dict):
                raise ValueError("not an object")
        except ValueError as error:
            _warn(path, number, error)
            continue
        kind = values.pop("kind", None)
        if kind not in KINDS:
            raise UserError(
                f"{path} was written by another version (line {number} has kind {kind!r}, known are "
                f"{', '.join(KINDS)}): {again}"
            )
        try:
            records.append(_decode(KINDS[kind], values))
        except (ValueError, TypeError, KeyError) as error:
            _warn(path, number, error)
    if not records:
        raise UserError(f"{path} holds no records: {again}")
    return records


def _warn(path: Path, number: int, error: Exception) -> None:
    print(f"warning: {path} line {number} is no record and is skipped ({error})", file=sys.stderr)


def _finite(value: Any) -> Any:
    """Replace nan and inf, which JSON has not, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return value


def _decode(kind: Any, values: dict[str, Any]) -> Any:
    """Return the dataclass `kind` from what JSON gave; keys that it does not have are left out."""
    convert = _converters(kind)
    return kind(**{name: convert[name](values[name]) for name in convert if name in values})


@cache
def _converters(kind: Any) -> dict[str, Callable[[Any], Any]]:
    hints = get_type_hints(kind)
    return {each.name: _converter(hints[each.name]) for each in fields(kind)}


def _converter(hint: Any) -> Callable[[Any], Any]:
    """Return the function from a JSON value to the annotated type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        inner = _converter(next(arg for arg in args if arg is not type(None)))
        return lambda value: None if value is None else inner(value)
    if origin is tuple:
        item = _converter(args[0])
        return lambda value: tuple(map(item, value))
    if origin is dict:
        item = _converter(args[1])
        return lambda value: {key: item(each) for key, each in value.items()}
    if is_dataclass(hint):
        kind: Any = hint
        return lambda value: _decode(kind, value)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return hint
    return lambda value: value
