"""The arms of a sweep with `tune:`: each arm at the points of its surface that are tried at the select seeds.

A point is an arm with a value for each axis, and its name contains these values. A design fixes some axes, such as
the scale of the MLP's output, and the search goes over the others. Two designs may share points.

Source: protocol.md section 4, "Surfaces".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import msgspec

from soluscope.config import Config, check, short_name
from soluscope.errors import UserError
from soluscope.launching.surface import Axis, Place, next_places

Value = float | str


@dataclass(frozen=True)
class SearchAxis:
    """An axis as the sweep file describes it; `surface.Axis` explains the numbers."""

    start: list[float]
    least: float
    most: float
    coarse: float = 4.0
    fine: float = 2.0
    arms: list[str] = field(default_factory=list)
    """Arms with this axis, named as in results.jsonl: solu_frozen_ln-kappa4e-5. Empty: every arm that has the
    setting."""

    def of(self, key: str) -> Axis:
        numbers = {each.name: getattr(self, each.name) for each in fields(self)}
        del numbers["arms"]
        return Axis(key, **(numbers | {"start": tuple(self.start)}))


@dataclass(frozen=True)
class Line:
    """Values of one setting at which every arm is trained at the reported seeds, beside its best point."""

    key: str
    values: list[float]
    at: dict[str, Value] = field(default_factory=dict)
    """Values of other axes on the line. An axis that is not named keeps the arm's own value."""


@dataclass(frozen=True)
class Search:
    """The key `tune` of a sweep file."""

    axes: dict[str, SearchAxis]
    """By dotted key, such as train.lr."""
    designs: list[dict[str, Value]] = field(default_factory=lambda: [{}])
    """Values that are fixed in each design. {}: every axis is searched."""
    line: Line | None = None

    def axes_of(self, arm: Config, design: Mapping[str, Value]) -> list[Axis]:
        """Return the axes that are searched for an arm in a design."""
        return [
            axis.of(key)
            for key, axis in self.axes.items()
            if key not in design and (not axis.arms or arm.arm in axis.arms) and _has(arm, key)
        ]

    def tried(self, arm: Config, losses: Mapping[str, float]) -> tuple[list[Config], list[Config]]:
        """Return the points of an arm that have a loss, and the points to train next.

        Args:
            arm: the arm at one seed.
            losses: loss by the name of the arm at a point.
        """
        known, new = dict[str, Config](), dict[str, Config]()
        for design in self.designs:
            axes = self.axes_of(arm, design)
            found: dict[Place, float] = {}
            while places := next_places(axes, found):
                points = {place: self.point(arm, design, axes, place) for place in places}
                waiting = [point for point in points.values() if point.arm not in losses]
                new |= {point.arm: point for point in waiting}
                found |= {
                    place: losses[point.arm]
                    for place, point in points.items()
                    if point.arm in losses
                }
                known |= {point.arm: point for point in points.values() if point.arm in losses}
                if waiting:
                    break
        return [*known.values()], [*new.values()]

    def point(
        self, arm: Config, design: Mapping[str, Value], axes: Sequence[Axis], place: Place
    ) -> Config:
        """Return an arm at one point of a design."""
        values = {**design, **dict(zip((axis.key for axis in axes), place, strict=True))}
        return self.at(arm, values)

    def on_line(self, arm: Config) -> list[Config]:
        """Return an arm at each point of the line."""
        if self.line is None:
            return []
        arm = replace(arm, probes=False)
        return [self.at(arm, self.line.at | {self.line.key: value}) for value in self.line.values]

    def at(self, arm: Config, values: Mapping[str, Value]) -> Config:
        """Return an arm with these values, which its tag names in the order of the axes."""
        changes: dict[str, Any] = {}
        names = []
        for key in self.axes:
            if key not in values or not _has(arm, key):
                continue
            section, _, name = key.partition(".")
            changes[section] = replace(
                changes.get(section, getattr(arm, section)), **{name: values[key]}
            )
            shown = values[key]
            names.append(short_name(key, shown if isinstance(shown, str) else f"{shown:g}"))
        return replace(arm, tag="-".join(filter(None, [arm.tag, *names])), **changes)


def read_search(path: Path, content: Any) -> Search:
    """Return the search that the key `tune` of a sweep file describes.

    Raises:
        UserError: if a key is missing or unknown, or a value has the wrong type or contradicts another one.
    """
    try:
        search = msgspec.convert(content, Search, strict=False)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: tune: {error}") from error
    search = replace(search, designs=[*map(_numbers, search.designs)])
    if search.line is not None:
        search = replace(search, line=replace(search.line, at=_numbers(search.line.at)))
    check(bool(search.axes), f"{path}: tune: it has no axes: give at least one, as train.lr")
    named = [key for design in search.designs for key in design]
    if search.line is not None:
        named += [*search.line.at, search.line.key]
    for key in [*search.axes, *named]:
        check(
            key in search.axes and key.count(".") == 1,
            f"{path}: tune: {key} is not among the axes {', '.join(search.axes)}: add it to axes",
        )
    for key, axis in search.axes.items():
        axis.of(key)
    return search


def _numbers(values: Mapping[str, Value]) -> dict[str, Value]:
    """Return the values with numbers that the file has as text."""
    result: dict[str, Value] = {}
    for key, value in values.items():
        try:
            result[key] = float(value)
        except ValueError:
            result[key] = value
    return result


def every(arms: Iterable[Config]) -> Iterator[Config]:
    """Yield each configuration once, as it comes first; two designs may share a point."""
    seen = set()
    for arm in arms:
        if arm.run_name not in seen:
            seen.add(arm.run_name)
            yield arm


def _has(arm: Config, key: str) -> bool:
    section, _, name = key.partition(".")
    return hasattr(getattr(arm, section, None), name)
