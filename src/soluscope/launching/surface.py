"""The points of a surface of losses that are trained to find its least loss, from a coarse grid to a fine one.

The axes are settings on a logarithmic scale, such as the learning rate and the scale of the MLP's output. The
search first trains every point of a coarse grid. From the best point so far it then tries both neighbours on each
axis, first at the coarse distance and then at the fine one. So a grid whose best point lies at its edge grows
beyond that edge, and at the end the best point has a worse one on either side, unless an axis ends there.

The next points depend only on the losses of the points that are there. An interrupted search therefore continues
where it stopped.

Source: protocol.md section 4, "Surfaces"; Hooke and Jeeves 1961, "Direct search", for pattern search.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from soluscope.config import check

Place = tuple[float, ...]
"""A value for each axis."""
DIGITS = 6
"""Significant digits of a value, so that two ways to the same point give the same number."""


@dataclass(frozen=True)
class Axis:
    """A setting that is searched for its best value."""

    key: str
    """Dotted key of the setting, as in train.lr."""
    start: tuple[float, ...]
    """Values of the coarse grid, ascending."""
    least: float
    """The search tries no value below this one."""
    most: float
    """The search tries no value above this one."""
    coarse: float = 4.0
    """Factor between neighbours at the coarse distance."""
    fine: float = 2.0
    """Factor between neighbours at the fine distance."""

    def __post_init__(self) -> None:
        check(
            0 < self.least <= self.start[0] and self.start[-1] <= self.most,
            f"tune: {self.key} has start values outside {self.least:g} to {self.most:g}: change least or most",
        )
        check(
            list(self.start) == sorted(set(self.start)),
            f"tune: {self.key} has the start values {list(self.start)}, which must be ascending",
        )
        check(
            1 < self.fine <= self.coarse,
            f"tune: {self.key} has fine={self.fine:g} and coarse={self.coarse:g}, but 1 < fine <= coarse is needed",
        )

    def neighbours(self, value: float, factor: float) -> list[float]:
        """Return the values at one distance below and above, without those beyond the ends of the axis."""
        beside = (rounded(value / factor), rounded(value * factor))
        return [each for each in beside if self.least <= each <= self.most]


def rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def next_places(axes: Sequence[Axis], losses: Mapping[Place, float]) -> list[Place]:
    """Return the points to train next. The list is empty once the search has ended.

    Args:
        axes: the settings that are searched.
        losses: loss of each point that is trained; points outside the grid count too. A loss may be infinite.
    """
    grid = itertools.product(*([rounded(value) for value in axis.start] for axis in axes))
    missing = [place for place in grid if place not in losses]
    if missing:
        return missing
    best = min(losses, key=lambda place: (losses[place], place))
    for distance in ("coarse", "fine"):
        around = _around(best, axes, [getattr(axis, distance) for axis in axes])
        if missing := [place for place in around if place not in losses]:
            return missing
    return []


def _around(place: Place, axes: Sequence[Axis], factors: Iterable[float]) -> list[Place]:
    """Return the points that differ from `place` in one value, by that axis's factor."""
    return [
        (*place[:i], value, *place[i + 1 :])
        for i, (axis, factor) in enumerate(zip(axes, factors, strict=True))
        for value in axis.neighbours(place[i], factor)
    ]
