"""Rows found by what they are of, and their numbers as they are printed everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from soluscope.results import ONE_NUMBER, Row

NORMED, TWIN = "solu_ln", "solu_frozen_ln"
"""The variants that the report is about: LayerNorm, and the same with one gain for all tokens."""

ENGAGED, IDLE = 0.5, 0.05
"""Median r above which a mid norm counts as active, and below which as a static gain."""
NO_COST = 0.001
"""Nats: an edit that changes the loss by less changes nothing (science.md section 7, P4)."""

Side = Literal["zero", "above", "below", "open"]


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
