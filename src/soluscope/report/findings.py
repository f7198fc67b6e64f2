"""Rows found by what they are of, and their numbers as they are printed everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from soluscope.results import ONE_NUMBER, Row

NORMED, TWIN = "solu_ln", "solu_frozen_ln"
"""The variants that the report is about: LayerNorm, and the same with one gain for all tokens."""

ENGAGED, IDLE = 0.5, 0.05
"""Median r above which a mid norm counts as active, and below which as a static gain."""
NO_COST = 0.001
"""Nats: an edit that changes the loss by less changes nothing (science.md section 7, P4)."""

Side = Literal["zero", "above", "below", "open"]

CHOSEN_ON = {"select loss by lr": "lr", "select loss by gain": "gain"}
"""Quantities of the points of the curves on which a setting was chosen, and the setting."""


GRID_FROM = 3
"""Points from which a curve has an inside: of two, one end is always the best."""


@dataclass(frozen=True)
class Choice:
    """A setting that was chosen on the select split, and what it was chosen from."""

    setting: str
    """`lr` or `gain`."""
    points: tuple[Row, ...]
    """Losses on the select split, the setting in `x`, from the lowest setting up."""
    chosen: Row
    """The one of the points with the least loss."""
    without: tuple[Row, ...] = ()
    """What lacks seeds that the points have, and was not chosen from."""

    @property
    def is_grid(self) -> bool:
        """Whether there is an inside for an optimum to lie in."""
        return len({row.x for row in self.points}) >= GRID_FROM

    @property
    def edge(self) -> str:
        """`lower` or `upper` where the optimum is an end of the grid, and may lie beyond; else empty."""
        if not self.is_grid:
            return ""
        if self.chosen.x == self.points[0].x:
            return "lower"
        return "upper" if self.chosen.x == self.points[-1].x else ""

    @property
    def grid(self) -> str:
        """The settings tried, in words."""
        return ", ".join(f"{row.x:.3g}" for row in self.points)


def choices(rows: Iterable[Row]) -> list[Choice]:
    """Each choice that a study's comparison made, rates before gains."""
    curves: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.probe == "comparison" and row.quantity in CHOSEN_ON:
            curves.setdefault((row.quantity, row.group), []).append(row)
    made = []
    for (quantity, chosen), found in curves.items():
        found.sort(key=lambda row: row.x or 0.0)
        at = next(row for row in found if row.arm == chosen)
        points = tuple(row for row in found if row.n == at.n)
        without = tuple(row for row in found if row.n != at.n)
        made.append(Choice(CHOSEN_ON[quantity], points, at, without))
    return sorted(made, key=lambda one: one.setting, reverse=True)


def passed_over(rows: Iterable[Row]) -> set[str]:
    """Arms that are compared with none, since another rate was better."""
    return {
        row.arm
        for one in choices(rows)
        for row in (*one.points, *one.without)
        if one.setting == "lr" and row is not one.chosen
    }


def tuned(rows: Sequence[Row]) -> list[Row]:
    """All but the rows of arms whose rate was not chosen."""
    without = passed_over(rows)
    return [row for row in rows if row.arm not in without]


def settings(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """What each arm was trained with, by name: `lr`, `kappa`, `gain`, `d_mlp`, …"""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.probe == "comparison" and row.quantity == "setting" and row.value is not None:
            found.setdefault(row.arm, {})[row.group] = row.value
    return found


def sizes(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each size's arms, by what tells the size from the others, the smallest first."""
    size_of = {
        row.arm: row.note for row in rows if row.probe == "comparison" and row.quantity == "setting"
    }
    found: dict[str, list[Row]] = {size: [] for size in dict.fromkeys(size_of.values())}
    for row in rows:
        if row.arm:
            found.setdefault(size_of.get(row.arm, ""), []).append(row)
    return found


def of_size(caption: str, size: str) -> str:
    """A caption, and the size where there are several."""
    return f"{caption}: {size}" if size else caption


def titles(rows: Sequence[Row]) -> dict[str, str]:
    """A short name for each arm whose rate was chosen: its variant, and its kappa or gain if it has several.

    The arm's own name where this would name two arms.
    """
    of = settings(rows)
    variants = {row.arm: row.variant for row in tuned(rows) if row.arm in of}
    made = {}
    for arm, variant in variants.items():
        alike = [of[other] for other, its in variants.items() if its == variant]
        told = [
            f"{name} {of[arm][name]:.3g}"
            for name in ("kappa", "gain")
            if name in of[arm] and len({one.get(name) for one in alike}) > 1
        ]
        made[arm] = ", ".join([variant, *told])
    made = dict(sorted(made.items(), key=lambda item: _by_setting(variants[item[0]], of[item[0]])))
    several = [title for title in made.values() if list(made.values()).count(title) > 1]
    return {arm: arm if title in several else title for arm, title in made.items()}


def _by_setting(variant: str, of: Mapping[str, float]) -> tuple[str, float, float]:
    return variant, of.get("kappa", 0.0), of.get("gain", 0.0)


def by_kappa(rows: Sequence[Row]) -> Mapping[str, float]:
    """Kappa of each arm with LayerNorm, from the lowest up, where there are several; else empty."""
    of = settings(rows)
    found = {arm: of[arm]["kappa"] for arm in arms_of(rows, NORMED) if "kappa" in of.get(arm, {})}
    if len(set(found.values())) < 2:
        return {}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def at_one_rate(rows: Sequence[Row]) -> list[str]:
    """Arms of which no other rate was tried, in studies that compare rates, gains or kappas; else none."""
    made = choices(rows)
    if not made and not any(by_kappa(mine) for mine in sizes(rows).values()):
        return []
    tried = {row.arm for one in made if one.setting == "lr" for row in (*one.points, *one.without)}
    return sorted(settings(rows).keys() - tried)


def comparisons(
    rows: Iterable[Row],
    quantity: str,
    arm: str | None = None,
    group: str | None = None,
    cluster: str = "seed",
) -> list[Row]:
    """Comparison rows of a quantity; by default those with the interval for new seeds."""
    return [
        row
        for row in rows
        if row.probe == "comparison"
        and row.quantity == quantity
        and row.cluster == cluster
        and (arm is None or row.arm == arm)
        and (group is None or row.group == group)
    ]


def arms_of(rows: Iterable[Row], variant: str) -> list[str]:
    return sorted({row.arm for row in rows if row.variant == variant and row.arm})


def seeds_of(rows: Iterable[Row], arm: str) -> int:
    return len({row.seed for row in rows if row.arm == arm and row.seed is not None})


def by_stream(row: Row) -> tuple[bool, str]:
    """Sorts natural text first, then the other streams by name."""
    return row.stream != "natural", row.stream


def measured(
    rows: Iterable[Row],
    probe: str,
    quantity: str,
    arm: str,
    statistic: str = "mean",
    group: str = "",
    stream: str = "natural",
    positions: str = "not BOS",
    x: float | None = None,
) -> list[Row]:
    """A probe's number for an arm, by seed; estimates have no statistic and match any."""
    found = [
        row
        for row in rows
        if row.probe == probe
        and (row.quantity, row.group, row.arm) == (quantity, group, arm)
        and (row.stream, row.positions) == (stream, positions)
        and row.statistic in (statistic, "")
        and row.x == x
        and row.value is not None
    ]
    return sorted(found, key=lambda row: row.seed or 0)


def engagement(rows: Iterable[Row], arm: str, positions: str) -> list[Row]:
    """An arm's median r on natural text, one row a seed."""
    return measured(rows, "engagement", "r", arm, statistic="median", positions=positions)


def number(value: float | None, decimals: int | None = None) -> str:
    """`decimals` places, or three significant digits; "undefined" for None."""
    if value is None:
        return "undefined"
    if decimals is not None:
        return f"{value:.{decimals}f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.4g}"


def signed(value: float) -> str:
    """Four places and a sign; what rounds to 0 is +0.0000."""
    return f"{round(value, 4) + 0.0:+.4f}"


def estimate(row: Row, decimals: int | None = None) -> str:
    """`value [low, high]`, `value (no interval)`, `value (constant)`, or `undefined`."""
    value = number(row.value, decimals)
    if row.value is None:
        return value
    if row.low is None or row.high is None:
        return f"{value} ({'constant' if row.note == ONE_NUMBER else 'no interval'})"
    return f"{value} [{number(row.low, decimals)}, {number(row.high, decimals)}]"


def span(values: Iterable[float | None], decimals: int | None = None) -> str:
    """`low to high` of what the seeds gave, or the one number they all gave."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = number(min(known), decimals), number(max(known), decimals)
    return low if low == high else f"{low} to {high}"


def seeds(n: int) -> str:
    return "1 seed" if n == 1 else f"{n} seeds"


def envelope(rows: Sequence[Row]) -> tuple[float, float] | None:
    """From the lowest to the highest end of the rows' intervals; None if one has no interval.

    A number that is the same at every token is its own interval; no other is without its ends.
    """
    ends = [
        (row.value, row.value) if row.note == ONE_NUMBER else (row.low, row.high) for row in rows
    ]
    lows = [low for low, _ in ends if low is not None]
    highs = [high for _, high in ends if high is not None]
    if not rows or len(lows) < len(rows) or len(highs) < len(rows):
        return None
    return min(lows), max(highs)


def side_of_zero(rows: Sequence[Row], margin: float) -> Side:
    """Where all of the rows' intervals lie, taken together: see `side`."""
    return side(envelope(rows), margin)


def side(ends: tuple[float, float] | None, margin: float) -> Side:
    """Which side of 0 an interval settles, where closer to 0 than `margin` is as good as 0.

    Wholly inside the margin: zero; wholly beyond one of its ends: above or below. What reaches over an
    end is open, also where it leaves out 0, and so is what has no interval.
    """
    if ends is None:
        return "open"
    low, high = ends
    if -margin < low and high < margin:
        return "zero"
    if low > margin:
        return "above"
    return "below" if high < -margin else "open"
