"""The baseline's loss against the number of weights, and each arm's effective size.

An arm's multiplier is the number m such that a baseline with m times as many weights has the arm's loss. The arm's
loss is the curve's at its own size plus its difference from the baseline of that size, paired by seed. So a
baseline has the multiplier 1, and most noise of seeds and documents cancels.

Source: Elhage et al. 2022, section 5 and Figure 1; protocol.md section 5, "Effective size". The interval is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import stdtrit

from soluscope.comparison import stats
from soluscope.comparison.stats import MIN_CLUSTERS, Floats, effective_number
from soluscope.results import Bound, Curve, Multiplier, ScalingCurve

FEWEST = 4
"""Least number of sizes for a power law, which has three parameters."""
EXPONENTS = (0.01, 5.0)
"""Range of the exponent. At 0.01 the curve is a straight line against the logarithm of the weights."""
N_PLACES = 401
"""Number of sizes between the smallest and the largest baseline at which the arm's loss is compared."""
STEP = 1e-4
"""Change of a loss, in nats, from which the curve's dependence on it is computed."""


@dataclass(frozen=True)
class OfSize:
    """The losses of one size: sums over the documents' tokens by seed, [document], nats."""

    size: str
    n_weights: int
    counts: Floats
    """Number of target tokens, [document]."""
    baseline: str
    """Name of the baseline arm."""
    variants: Mapping[str, str]
    """Variant of each arm."""
    losses: Mapping[str, Mapping[int, Floats]]
    """Losses of each arm, the baseline included."""


@dataclass(frozen=True)
class PowerLaw:
    """The curve floor + scale (n / centre)^-exponent."""

    floor: float
    scale: float
    exponent: float
    centre: float

    def __call__(self, n_weights: Floats) -> Floats:
        return self.floor + self.scale * (n_weights / self.centre) ** -self.exponent


def fit(n_weights: Floats, losses: Floats) -> PowerLaw | None:
    """Fit a power law with a floor by least squares, or return None for a loss that does not fall with size.

    Args:
        n_weights: number of weights of each size, [size].
        losses: mean loss of the baseline at each size, nats per token, [size].
    """
    curve = _closest(n_weights, losses)
    return curve if curve.scale > 0 else None


def _closest(n_weights: Floats, losses: Floats) -> PowerLaw:
    """Return the curve with the least squares; its scale is below 0 if the loss rises with size.

    For a given exponent, floor and scale are linear least squares, so only the exponent is searched.
    """
    centre = float(np.exp(np.log(n_weights).mean()))

    def at(exponent: float) -> tuple[float, PowerLaw]:
        powers = (n_weights / centre) ** -exponent
        off = powers - powers.mean()
        scale = float(off @ losses / (off @ off))
        curve = PowerLaw(float(losses.mean() - scale * powers.mean()), scale, exponent, centre)
        return float(((curve(n_weights) - losses) ** 2).sum()), curve

    grid = np.linspace(math.log(EXPONENTS[0]), math.log(EXPONENTS[1]), 41)
    best = int(np.argmin([at(math.exp(place))[0] for place in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = minimize_scalar(
        lambda place: at(math.exp(place))[0],
        bounds=bounds,
        method="bounded",
        options={"xatol": 1e-9},
    )
    return at(math.exp(float(found.x)))[1]


def scaling(sizes: Sequence[OfSize], about: Mapping[str, Any]) -> list[ScalingCurve | Multiplier]:
    """Compute the baseline's curve over several sizes, and the multiplier of each arm at each size.

    Args:
        sizes: the sizes of one shape, measured on the same documents.
        about: fields that all records share: `study` and `commit`.

    Returns:
        With `FEWEST` sizes or more, the power law and multipliers by it; and with two sizes or more, multipliers by
        straight lines between the sizes. The curve's `note` says why there is no power law. Nothing with one size.
    """
    sizes = sorted(sizes, key=lambda each: each.n_weights)
    if len({each.n_weights for each in sizes}) < 2:
        return []
    seeds = sorted(set.intersection(*(set(each.losses[each.baseline]) for each in sizes)))
    curve = ScalingCurve(
        **about, arms=tuple(each.baseline for each in sizes), n=len(seeds),
        n_weights=tuple(each.n_weights for each in sizes),
    )  # fmt: skip
    if not seeds:
        return [replace(curve, note="the sizes share no seed")]
    n_weights = np.array([each.n_weights for each in sizes], dtype=np.float64)
    losses = np.array([_mean(each, each.baseline, seeds) for each in sizes])
    curve = replace(curve, losses=tuple(losses.tolist()))
    law = fit(n_weights, losses) if len(sizes) >= FEWEST else None
    curves = {Curve.LOCAL: _straight(n_weights)}
    if law is None:
        why = (
            f"a power law needs {FEWEST} sizes, and there are {len(sizes)}"
            if len(sizes) < FEWEST
            else "the baseline's loss does not fall with size as a power law does"
        )
        curve = replace(curve, note=why)
    else:
        curve = _with_law(curve, law, n_weights, losses)
        curves = {Curve.POWER_LAW: _power_law(n_weights), **curves}
    lines = {kind: line(losses) for kind, line in curves.items()}
    return [
        curve,
        *(
            found
            for kind, line in lines.items()
            for of in sizes
            for arm in of.losses
            if arm != of.baseline
            for found in _multiplier(kind, line, sizes, of, arm, about)
        ),
    ]


def _with_law(
    curve: ScalingCurve, law: PowerLaw, n_weights: Floats, losses: Floats
) -> ScalingCurve:
    note = ""
    if law.exponent < EXPONENTS[0] * 1.01:
        note = "the floor is not determined: the curve is a straight line against the logarithm of the weights"
    return replace(
        curve, floor=law.floor, scale=law.scale, exponent=law.exponent, centre=law.centre,
        misfit=float(np.abs(law(n_weights) - losses).max()), note=note,
    )  # fmt: skip


@dataclass(frozen=True)
class _Line:
    """A curve at many sizes, and its dependence on the baseline's losses."""

    places: Floats
    """Numbers of weights, [place]."""
    values: Floats
    """Losses, [place]."""
    slopes: Floats
    """Change of each loss per change of the baseline's loss at each size, [place size]."""


def _places(n_weights: Floats) -> Floats:
    """Return numbers of weights from the smallest to the largest baseline, with all baselines among them."""
    spread = np.geomspace(n_weights[0], n_weights[-1], N_PLACES)
    return np.unique(np.concatenate([spread[1:-1], n_weights]))


def _straight(n_weights: Floats) -> Callable[[Floats], _Line]:
    places = _places(n_weights)
    units = np.eye(len(n_weights))
    slopes = np.stack(
        [np.interp(np.log(places), np.log(n_weights), unit) for unit in units], axis=1
    )
    return lambda losses: _Line(places, slopes @ losses, slopes)


def _power_law(n_weights: Floats) -> Callable[[Floats], _Line]:
    """Return a function from losses to the fitted curve. Its slopes are central differences of fits."""
    places = _places(n_weights)

    def line(losses: Floats) -> _Line:
        def curve(moved: Floats) -> Floats:
            return _closest(n_weights, moved)(places)

        moves = STEP * np.eye(len(losses))
        slopes = [(curve(losses + move) - curve(losses - move)) / (2 * STEP) for move in moves]
        return _Line(places, curve(losses), np.stack(slopes, axis=1))

    return line


def _multiplier(
    kind: Curve,
    line: _Line,
    sizes: Sequence[OfSize],
    of: OfSize,
    arm: str,
    about: Mapping[str, Any],
) -> Iterator[Multiplier]:
    """Yield an arm's multiplier: the value at which curve and arm agree, and the values that are not excluded.

    At each size n' between the smallest and the largest baseline, the arm's loss minus the curve's at n' is a
    linear function of the baselines' losses and of the arm's difference from its baseline. Its variance is that of
    `stats.seeds_and_documents`. The interval contains the n' at which it is closer to 0 than t standard errors, as
    in Fieller's theorem. So the errors of the curve and of the arm both count.
    """
    shared = set(of.losses[arm])
    shared = shared.intersection(*(set(each.losses[each.baseline]) for each in sizes))
    seeds = sorted(shared)
    if not seeds:
        return
    means, covariance = _components(sizes, of, arm, seeds)
    at_own = int(np.searchsorted(line.places, of.n_weights))
    # Below 0 the arm is better than a baseline of that size.
    linear = np.concatenate(
        [line.slopes[at_own] - line.slopes, np.ones((len(line.places), 1))], axis=1
    )
    distance = line.values[at_own] + means[-1] - line.values
    ratios = line.places / of.n_weights
    value, bound = _root(ratios, distance)
    row = Multiplier(
        **about, arm=arm, against=of.baseline, variant=of.variants[arm], curve=kind, size=of.size,
        n_weights=of.n_weights, value=value, bound=bound, unit="times", n=len(seeds),
        n_clusters=len(seeds), cluster="seed",
    )  # fmt: skip
    if len(seeds) < 2 or effective_number(of.counts) < MIN_CLUSTERS:
        yield row
        return
    errors = np.sqrt(np.einsum("pi,ij,pj->p", linear, covariance, linear))
    inside = np.abs(distance) <= stdtrit(len(seeds) - 1, 0.975) * errors
    held = ratios[inside] if inside.any() else np.array([value])
    yield replace(
        row, low=min(float(held[0]), value), high=max(float(held[-1]), value),
        low_is_bound=bool(inside[0]) or bound is Bound.AT_MOST,
        high_is_bound=bool(inside[-1]) or bound is Bound.AT_LEAST,
    )  # fmt: skip


def _root(ratios: Floats, distance: Floats) -> tuple[float, Bound]:
    """Return the ratio at which the distance is 0, of several the nearest to 1, or else the end of the curve."""
    crosses = np.flatnonzero(np.sign(distance[:-1]) * np.sign(distance[1:]) <= 0)
    if len(crosses):
        x, y = np.log(ratios), distance
        gaps = np.diff(y)[crosses]
        share = np.where(gaps == 0, 0.0, -y[crosses] / np.where(gaps == 0, 1.0, gaps))
        roots = x[crosses] + share * np.diff(x)[crosses]
        return float(np.exp(roots[np.abs(roots).argmin()])), Bound.NONE
    if distance[0] > 0:
        return float(ratios[0]), Bound.AT_MOST
    return float(ratios[-1]), Bound.AT_LEAST


def _components(
    sizes: Sequence[OfSize], of: OfSize, arm: str, seeds: Sequence[int]
) -> tuple[Floats, Floats]:
    """Return the means of the baselines' losses and of the arm's difference, and the covariance of the means."""
    sums = [
        np.stack([each.losses[each.baseline][seed] for seed in seeds]) for each in sizes
    ]  # [seed document]
    own = np.stack([of.losses[arm][s] - of.losses[of.baseline][s] for s in seeds])
    per_seed, covariance = stats.seed_means([*sums, own], of.counts)
    return per_seed.mean(axis=1), covariance


def _mean(of: OfSize, arm: str, seeds: Sequence[int]) -> float:
    return float(np.mean([of.losses[arm][seed].sum() for seed in seeds]) / of.counts.sum())
