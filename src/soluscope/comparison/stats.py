"""Intervals and tests. The unit is the document within a model and the training seed across models.

The functions take arrays of numbers, never models. Every interval is a 95% interval unless `level` is
set. Every random draw is seeded, so that the same numbers give the same interval on every machine.

Source: protocol.md sections 4 and 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri, stdtrit
from scipy.stats import t as student_t

Floats = NDArray[np.float64]
Method = Literal["studentised", "bca", "percentile"]
Verdict = Literal["equivalent", "different", "inconclusive"]

MIN_CLUSTERS = 30
"""Least effective number of documents or strings for an interval. With fewer, the interval would be too narrow.

docs/intervals.md has the coverage of each statistic, by number of documents (benchmarks/coverage.py).
"""
MIN_CLUSTERS_TO_TEST = 20
"""Least number of documents for a p, which comes from Student's t and not from resampling."""
MIN_SEEDS_TO_RESAMPLE = 8
"""Least number of seeds for a bootstrap interval. With fewer, Student's t covers better: 95% against 91% at 5."""
MAX_UNDEFINED = 0.05
"""Largest share of resamples in which a number may be undefined. Above it there is no interval."""
MAX_SEEDS_TO_FLIP = 20
"""Largest number of seeds for the sign-flip test: 2^20 patterns. With more, the t interval suffices."""

ROUNDING = 4096 * float(np.finfo(np.float64).eps)
"""Rounding error of a sum, as a share of the sum of its terms' absolute values: 9.1e-13.

The error grows as the square root of the number of terms, times the machine epsilon; 4096 is the
square root of 16 million tokens. Processors add in different orders, so a number whose distance from
0 is within its rounding error is 0 on one machine and has either sign on another. This module sets
such a number to 0. A number that is small because its terms are small is not changed.
"""
N_ROUNDINGS = 16
"""Number of random perturbations of the sums from which a number's rounding error is estimated."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds of its interval, in the unit of the estimate."""

    value: float
    low: float | None
    """Lower bound. None, as `high` then is too: no interval can be given."""
    high: float | None
    n: int
    """Number of values used."""
    n_clusters: int
    """Number of independent units that the values fall into."""
    p: float | None = None
    """Two-sided p of "no difference", where it was tested."""
    n_effective: float | None = None
    """Number of units of equal size that would determine a mean as well; None where it was not computed."""


@dataclass(frozen=True)
class Fit:
    """A curve `y = a + b * f(x)` fitted by least squares."""

    form: str
    """`a + b/n` or `a + b log n`."""
    a: float
    b: float
    r2: float
    """Explained share of the variance of y; nan where y does not vary."""
    aicc: float
    """Akaike's criterion with its small-sample term. The form with the lower value describes y better."""


# ---------------------------------------------------------------- rounding


def centred(values: Floats) -> Floats:
    """Return deviations from the mean; set a deviation to 0 if it is within rounding error."""
    deviations = values - (values.mean() if len(values) else 0)
    unit = ROUNDING * np.abs(values).max(initial=0.0)
    return np.where(np.abs(deviations) <= unit, 0.0, deviations)


def order_of(values: ArrayLike) -> NDArray[np.intp]:
    """Return each value's rank among the distinct values, from 0; values equal up to rounding share a rank."""
    numbers = np.asarray(values, dtype=np.float64)
    order = np.argsort(numbers, kind="stable")
    unit = ROUNDING * np.abs(numbers).max(initial=0.0)
    ranks = np.zeros(len(numbers), dtype=np.intp)
    ranks[order[1:]] = np.cumsum(np.diff(numbers[order]) > unit)
    return ranks


def n_distinct(values: ArrayLike) -> int:
    """Return the number of distinct values; values equal up to rounding count once."""
    return int(order_of(values).max(initial=-1)) + 1


# ---------------------------------------------------------------- inside a model: documents


def bootstrap_sums(
    sums: ArrayLike,
    value: Callable[[Floats], Floats],
    n: int,
    n_draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    method: Literal["bca", "percentile"] = "bca",
    n_effective: float | None = None,
    freedom: float = 1.0,
) -> Interval:
    """Compute a number from sums over clusters, with an interval from resampling the clusters.

    `bca` corrects the percentiles for the bias of the draws and for a spread that changes with the
    number (acceleration, from leaving out one cluster at a time). Both methods widen the level to
    correct for the number of clusters, see `_z`.

    Args:
        sums: one row per cluster, [cluster part].
        value: function from sums [draw part] to the number [draw]; nan where it is not defined.
        n: number of values that the sums contain.
        n_draws: number of resamples.
        seed: seed of the resampling.
        level: level of the interval.
        method: `bca` or `percentile`.
        n_effective: effective number of clusters; by default their number.
        freedom: degrees of freedom of the draws' spread, as a share of the clusters, see `_freedom`.

    Returns:
        The number from all clusters; it is 0 if it is within its rounding error of 0 (see `_rounding`).
        There are no bounds if there are effectively fewer than `MIN_CLUSTERS` clusters, if more than
        `MAX_UNDEFINED` of the resamples leave the number undefined, or if BCa is not defined: all
        draws lie on one side of the number, or the number depends on one cluster. If all draws are
        equal up to rounding, both bounds equal the number, although the true value may differ: a
        share of 0 in n clusters may still be 3/n.

    Raises:
        ValueError: if `sums` is not a table.

    Source: Efron 1987; Efron and Tibshirani 1993, section 14.3; protocol.md section 5.
    """
    per_cluster = _table(sums)
    n_clusters = len(per_cluster)
    if n_clusters == 0:
        return Interval(float("nan"), None, None, n, 0)
    units = n_clusters if n_effective is None else n_effective
    acceleration = None
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = value(_weights(n_clusters, n_draws, seed) @ per_cluster)
        if method == "bca" and len(draws) > 1:
            acceleration = _acceleration(value(_without_each(per_cluster)))
        rounding = _rounding(value, per_cluster)
    draws = np.where(np.abs(draws) <= rounding, 0.0, draws)
    low, high = None, None
    if units >= MIN_CLUSTERS:
        low, high = _ends(draws, units * freedom, level, acceleration, rounding)
    return Interval(float(draws[0]), low, high, n, n_clusters, n_effective=units)


def bootstrap_mean(
    sums: ArrayLike,
    counts: ArrayLike,
    n_draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Compute a mean over tokens from each cluster's sum and token count, with a studentised bootstrap interval.

    The interval follows the skewness of the clusters. In simulation it covers more than BCa: 93% against 90% for 30
    documents with lognormal effects.

    Args:
        sums: one number per cluster.
        counts: number of tokens of each cluster.
        n_draws: number of resamples.
        seed: seed of the resampling.
        level: level of the interval.

    Returns:
        sum(sums) / sum(counts), with the number of tokens. `_studentised` says when there are no bounds.
    """
    per_cluster = np.stack([np.asarray(sums, np.float64), np.asarray(counts, np.float64)], axis=1)
    size = per_cluster[:, 1]
    n, units = int(size.sum()), effective_number(size)
    plain = bootstrap_sums(per_cluster, _quotient, n, n_draws, seed, level, n_effective=units)
    return _studentised(plain, per_cluster[None], n_draws, seed, level)


def _studentised(plain: Interval, sums: Floats, n_draws: int, seed: int, level: float) -> Interval:
    """Replace the bounds of a mean, or of a difference of two models' means, by those of a studentised bootstrap.

    Each resample gives a t: the change of its number, over the standard error from its own clusters and the
    linearised ratio. The bounds are the number minus the quantiles of t times the standard error. The quantiles'
    level is widened for the effective number of clusters, see `_z`.

    Args:
        plain: the mean, or the first model's minus the second's, with its BCa interval.
        sums: sum and number of tokens of each cluster, [model cluster 2] for one model or two.
        n_draws: number of resamples.
        seed: seed of the resampling.
        level: level of the interval.

    Returns:
        `plain` as it is if it has no bounds or equal ones, or if more than `MAX_UNDEFINED` of the resamples have no
        standard error, because few clusters differ.

    Source: Efron and Tibshirani 1993, section 12.5; docs/intervals.md.
    """
    if plain.low is None or plain.low == plain.high:
        return plain
    n_models, n_clusters, _ = sums.shape
    units = n_clusters if plain.n_effective is None else plain.n_effective
    total, size = sums[:, :, 0], sums[:, :, 1]
    # Centred, because the variance of a large mean would lose digits.
    off = total - total.sum(axis=1, keepdims=True) / size.sum(axis=1, keepdims=True) * size
    parts = np.concatenate([off, size]).T  # [cluster, sum or size of each model]
    weights = _weights(n_clusters, n_draws, seed)
    totals = weights @ parts
    products = (parts[:, :, None] * parts[:, None, :]).reshape(n_clusters, -1)
    moments = (weights @ products).reshape(-1, parts.shape[1], parts.shape[1])
    sign = np.array([1.0, -1.0])[:n_models]
    with np.errstate(divide="ignore", invalid="ignore"):
        per_size = 1 / totals[:, n_models:]
        mean = totals[:, :n_models] * per_size
        numbers = mean @ sign
        slope = np.concatenate([sign * per_size, -sign * mean * per_size], axis=1)
        variance = np.einsum("di,dij,dj->d", slope, moments, slope)
        error = np.sqrt(np.maximum(variance, 0) * n_clusters / (n_clusters - 1))
        t = (numbers[1:] - numbers[0]) / error[1:]
    if np.mean(~np.isfinite(t)) > MAX_UNDEFINED:
        return plain
    low_t, high_t = _quantiles(t[np.isfinite(t)], ndtr(_z(level, units)))
    low, high = plain.value - high_t * error[0], plain.value - low_t * error[0]
    return replace(plain, low=float(low), high=float(high))


def effective_number(counts: ArrayLike) -> float:
    """Return the number of clusters of equal size that would determine a mean as well: (sum c)^2 / sum c^2.

    Source: Kish 1965, "Survey sampling", section 11.7.
    """
    sizes = np.asarray(counts, dtype=np.float64)
    squares = float((sizes**2).sum())
    return float(sizes.sum()) ** 2 / squares if squares else 0.0


def cluster_bootstrap(
    values: ArrayLike,
    clusters: ArrayLike,
    statistic: str = "mean",
    n_draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    method: Method | None = None,
) -> Interval:
    """Summarise many tokens by one statistic, with an interval from resampling whole clusters.

    Tokens of a document depend on each other, so documents are drawn, not tokens. By default, means have a
    studentised interval (see `_studentised`), cut at the least and the largest value; other numbers have a BCa
    interval (see `bootstrap_sums`). Quantiles always have a percentile interval: BCa's acceleration comes from the
    jackknife, which is not consistent for quantiles (Efron and Tibshirani 1993, chapter 11, "Failure of the
    jackknife"). `_freedom` says which intervals are widened.

    Args:
        values: one number per token; nan means that the token has no value, and is left out.
        clusters: the document or string of each value (integers are fastest).
        statistic: `mean`, `median`, `q05` (any two digits), `sd` (population), `share above 0.5`.
        n_draws: number of resamples.
        seed: seed of the resampling.
        level: level of the interval.
        method: `studentised` (of a mean), `bca` or `percentile`.

    Returns:
        The statistic of all values (nan if there are none). There are no bounds with effectively fewer than
        `MIN_CLUSTERS` clusters, and in the cases that `bootstrap_sums` lists.

    Raises:
        ValueError: if the statistic is unknown, or the lengths differ.

    Source: protocol.md section 5.
    """
    numbers = np.asarray(values, dtype=np.float64)
    names = np.asarray(clusters)
    if numbers.shape != names.shape or numbers.ndim != 1:
        raise ValueError(
            f"values {numbers.shape} and clusters {names.shape} are not two lists of one length"
        )
    kept = ~np.isnan(numbers)
    numbers = numbers[kept]
    unique, owner = np.unique(names[kept], return_inverse=True)
    n_clusters = len(unique)
    q = _quantile_named(statistic)
    if q is None:
        sums, value = _sums(numbers, owner, n_clusters, statistic)
        if statistic == "mean" and n_clusters and method in (None, "studentised"):
            found = bootstrap_mean(sums[:, 0], sums[:, 1], n_draws, seed, level)
            if found.low is None or found.high is None:
                return found
            least, most = float(numbers.min()), float(numbers.max())
            return replace(found, low=max(found.low, least), high=min(found.high, most))
        units = effective_number(sums[:, -1])
        kind: Literal["bca", "percentile"] = "percentile" if method == "percentile" else "bca"
        n, freedom = len(numbers), _freedom(statistic)
        return bootstrap_sums(sums, value, n, n_draws, seed, level, kind, units, freedom)
    if n_clusters == 0:
        return Interval(float("nan"), None, None, 0, 0)
    draws = _quantile(numbers, owner, _weights(n_clusters, n_draws, seed), q)
    return _of_quantiles(draws, owner, statistic, level, len(numbers))


def _of_quantiles(
    draws: Floats, owner: NDArray[np.intp], statistic: str, level: float, n: int
) -> Interval:
    """Return the interval of a quantile, or of a difference of two, from its draws and each value's cluster."""
    sizes = np.bincount(owner)
    units = effective_number(sizes)
    low, high = None, None
    if units >= MIN_CLUSTERS:
        low, high = _ends(draws, units * _freedom(statistic), level)
    return Interval(float(draws[0]), low, high, n, len(sizes), n_effective=units)


def _freedom(statistic: str) -> float:
    """Return the degrees of freedom of the spread of a statistic's draws, as a share of the clusters.

    Few clusters determine a standard deviation or an outer quantile, so the spread of its draws is known less well
    than that of a mean. The shares are chosen in simulation (docs/intervals.md): with them, intervals of 30 to 120
    equal documents cover 93 to 97%. Without them, those of the 1st and the 99th percentile cover 85 to 90%, and
    those of a standard deviation 92 to 94%.
    """
    if statistic == "sd":
        return 0.25
    q = _quantile_named(statistic)
    share: float = 1.0 if q is None else (4 * q * (1 - q)) ** 0.65
    return share


def statistic_difference(
    left: ArrayLike,
    right: ArrayLike,
    clusters: ArrayLike,
    statistic: str = "mean",
    n_draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return a statistic of `left` minus that of `right`, two models' values at the same tokens.

    Both are resampled together. Each statistic is of the tokens at which its own model has a value.

    Args:
        left: one number per token; nan means that the token has no value.
        right: the other model's numbers, at the same tokens.
        clusters: the document or string of each token.
        statistic: as for `cluster_bootstrap`.
        n_draws: number of resamples.
        seed: seed of the resampling.
        level: level of the interval.

    Raises:
        ValueError: if the statistic is unknown.
    """
    columns = [np.asarray(values, dtype=np.float64) for values in (left, right)]
    kept = [~np.isnan(values) for values in columns]
    names = np.asarray(clusters)
    used, owner = np.unique(names[kept[0] | kept[1]], return_inverse=True)
    owners = np.zeros(len(names), dtype=np.intp)
    owners[kept[0] | kept[1]] = owner
    n, n_clusters = int(kept[0].sum()), len(used)
    if not (kept[0].any() and kept[1].any()):
        return Interval(float("nan"), None, None, n, n_clusters)
    parts = [(values[ok], owners[ok]) for values, ok in zip(columns, kept, strict=True)]
    q = _quantile_named(statistic)
    if q is None:
        (a, value), (b, _) = (_sums(*part, n_clusters, statistic) for part in parts)
        units, freedom = effective_number(np.bincount(owner)), _freedom(statistic)
        plain = difference_of_sums(a, value, b, value, n, n_draws, seed, level, units, freedom)
        if statistic != "mean":
            return plain
        return _studentised(plain, np.stack([a, b]), n_draws, seed, level)
    weights = _weights(n_clusters, n_draws, seed)
    first, second = (_quantile(*part, weights, q) for part in parts)
    return _of_quantiles(first - second, owner, statistic, level, n)


def difference_of_sums(
    left: Floats,
    left_value: Callable[[Floats], Floats],
    right: Floats,
    right_value: Callable[[Floats], Floats],
    n: int,
    n_draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    n_effective: float | None = None,
    freedom: float = 1.0,
) -> Interval:
    """Return a number of `left` minus a number of `right`, each from sums over the same clusters [cluster part]."""
    n_parts = left.shape[1]

    def value(sums: Floats) -> Floats:
        return left_value(sums[:, :n_parts]) - right_value(sums[:, n_parts:])

    both = np.concatenate([left, right], axis=1)
    return bootstrap_sums(
        both, value, n, n_draws, seed, level, n_effective=n_effective, freedom=freedom
    )


def _rounding(value: Callable[[Floats], Floats], per_cluster: Floats) -> float:
    """Return a number's rounding error, which comes from the rounding of the sums it is computed from.

    Each sum is moved up or down by ROUNDING times the sum of its terms' absolute values. The rounding
    error is the largest resulting change of the number. So a difference of two large numbers has the
    rounding error of large numbers, and a small number from small sums has a small rounding error.
    """
    moves = _moves(per_cluster.shape[1])
    total, size = per_cluster.sum(axis=0), np.abs(per_cluster).sum(axis=0)
    moved = value(np.vstack([total, total + moves * size]))
    distances = np.abs(moved[1:] - moved[0])
    return float(distances[np.isfinite(distances)].max(initial=0.0))


@lru_cache(maxsize=256)
def _moves(n_sums: int) -> Floats:
    """Return random moves of each sum by one rounding error, up or down, [move sum]."""
    return np.random.default_rng(0).choice([-ROUNDING, ROUNDING], (N_ROUNDINGS, n_sums))


def _ends(
    draws: Floats,
    n_units: float,
    level: float,
    acceleration: float | None = None,
    rounding: float = 0.0,
) -> tuple[float | None, float | None]:
    """Return the interval's bounds for `draws[0]` from the other draws; percentile if no acceleration is given.

    Draws that equal the number (up to rounding) count half as below it and half as above it, so that
    numbers with few distinct values have a bias correction too.
    """
    number, drawn = draws[0], draws[1:][np.isfinite(draws[1:])]
    if not np.isfinite(number) or len(drawn) == 0:
        return None, None
    if len(drawn) < (1 - MAX_UNDEFINED) * (len(draws) - 1):
        return None, None
    equal = np.abs(drawn - number) <= rounding + ROUNDING * abs(number)
    if equal.all():
        return float(number), float(number)
    z = _z(level, max(2.0, n_units))
    if acceleration is not None:
        below = np.mean(np.where(equal, 0.5, drawn < number))
        if below in (0, 1):
            return None, None
        bias = ndtri(below)
        stretch = 1 - acceleration * (bias + z)
        if not (stretch > 0).all():
            return None, None
        z = bias + (bias + z) / stretch
    low, high = _quantiles(drawn, ndtr(z))
    return float(low), float(high)


def _quantiles(values: Floats, shares: Floats) -> Floats:
    """Return what `np.quantile` returns, which takes five times as long for some hundred values."""
    ordered, place = np.sort(values), (len(values) - 1) * shares
    below = np.floor(place).astype(np.intp)
    low, high = ordered[below], ordered[np.minimum(below + 1, len(values) - 1)]
    share = place - below
    result: Floats = np.where(
        share < 0.5, low + (high - low) * share, high - (high - low) * (1 - share)
    )
    return result


def _z(level: float, n_units: float) -> Floats:
    """Return the normal quantiles of the two bounds, widened because few units are resampled.

    Resamples of n units have (n - 1) / n of the unbiased variance, and normal quantiles ignore that
    the variance is itself estimated. Without the widening, 95% intervals cover 92% with 20 clusters
    and 90% with 8 seeds.

    Source: Hesterberg 2015, "What teachers should know about the bootstrap", expanded percentiles.
    """
    one_side = np.sqrt(n_units / (n_units - 1)) * stdtrit(n_units - 1, (1 + level) / 2)
    return np.array([-one_side, one_side])


def _acceleration(*left_out: Floats) -> float:
    """Return the acceleration: one sixth of the skewness of the units' influences on the number.

    Args:
        left_out: the number's values with each unit left out; one array for each kind of unit that is
            resampled, such as seeds and documents.

    Source: Efron and Tibshirani 1993, equations 14.15 and, for several kinds, 15.36.
    """
    cubes = squares = 0.0
    for numbers in left_out:
        influence = (numbers.mean() - numbers) * (len(numbers) - 1) / len(numbers)
        cubes += float((influence**3).sum())
        squares += float((influence**2).sum())
    return cubes / (6 * squares**1.5) if squares else 0.0


def _table(sums: ArrayLike) -> Floats:
    per_cluster = np.asarray(sums, dtype=np.float64)
    if per_cluster.ndim != 2:
        raise ValueError(
            f"sums has shape {per_cluster.shape}; it must have one row per cluster, [cluster part]"
        )
    return per_cluster


def _without_each(per_unit: Floats) -> Floats:
    """Return, for each unit, the sums over all other units, [unit ...]."""
    left: Floats = per_unit.sum(axis=0) - per_unit
    return left


@lru_cache(maxsize=4)
def _weights(n_clusters: int, n_draws: int, seed: int) -> Floats:
    """Return how often each cluster is drawn, [draw cluster]; cached, because probes reuse the same draws.

    The first row counts each cluster once and gives the estimate itself. With fewer than
    `MIN_CLUSTERS` clusters it is the only row.
    """
    weights = np.ones((1, n_clusters))
    if n_clusters >= MIN_CLUSTERS:
        uniform = np.full(n_clusters, 1 / n_clusters)
        drawn = np.random.default_rng(seed).multinomial(n_clusters, uniform, size=n_draws)
        weights = np.concatenate([weights, drawn])
    weights.flags.writeable = False
    return weights


def _quantile_named(statistic: str) -> float | None:
    """Return the quantile that a statistic names, such as 0.05 for `q05`; None for other statistics."""
    if statistic == "median":
        return 0.5
    if len(statistic) == 3 and statistic[0] == "q" and statistic[1:].isdigit():
        return int(statistic[1:]) / 100
    return None


def _sums(
    values: Floats, owner: NDArray[np.intp], n_clusters: int, statistic: str
) -> tuple[Floats, Callable[[Floats], Floats]]:
    """Return the sums over each cluster [cluster part], and the function from them to the statistic."""
    value = _quotient
    if statistic == "mean":
        parts = [values]
    elif statistic == "sd":
        # Centred first: the difference of two large moments would lose digits.
        deviations = centred(values)
        parts, value = [deviations, deviations**2], _sd
    elif statistic.startswith("share above "):
        parts = [(values > float(statistic.removeprefix("share above "))).astype(np.float64)]
    else:
        raise ValueError(
            f"no statistic called {statistic!r}; there are: mean, median, q05, sd, share above 0.5"
        )
    columns = [np.bincount(owner, part, n_clusters) for part in (*parts, np.ones(len(values)))]
    return np.stack(columns, axis=1), value


def _quotient(sums: Floats) -> Floats:
    result: Floats = sums[:, 0] / sums[:, 1]
    return result


def _sd(sums: Floats) -> Floats:
    total, squares, count = sums.T
    result: Floats = np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0))
    return result


def _quantile(values: Floats, owner: NDArray[np.intp], weights: Floats, q: float) -> Floats:
    """Return quantiles of the values, each repeated as often as `weights` draws its cluster, [draw].

    Quantiles are linear between ranks, as numpy's. Running counts over all sorted values would cost
    n_draws * n operations. Counts at the edges of 256 bins are one small matrix product, which shows the bin
    that contains the quantile in each draw. Only the values of that bin are then counted one by one.
    """
    shape = weights.shape
    ordered, owner, edges, up_to_bin, weights = _binned(
        values.tobytes(),
        owner.astype(np.intp).tobytes(),
        weights.astype(np.float64).tobytes(),
        shape,
    )
    rank = (up_to_bin[:, -1].astype(np.float64) - 1) * q
    width = int(np.diff(edges).max())

    def around(draws: NDArray[np.intp], low: Floats, high: Floats) -> tuple[Floats, Floats]:
        """Return the values at two ranks, counted from 0, for some draws; nan for a high rank in another bin."""
        up_to = up_to_bin[draws]
        found = (up_to <= low[:, None]).sum(axis=1)
        before = np.where(found > 0, up_to[np.arange(len(draws)), found - 1], 0)
        places = edges[found][:, None] + np.arange(width)
        is_inside = places < edges[found + 1][:, None]
        of_place = weights[draws[:, None], owner[np.minimum(places, len(owner) - 1)]]
        running = before[:, None] + np.cumsum(np.where(is_inside, of_place, 0), axis=1)
        first = edges[found] + (running <= low[:, None]).sum(axis=1)
        second = edges[found] + (running <= high[:, None]).sum(axis=1)
        is_here = running[:, -1] > high
        return ordered[first], np.where(is_here, ordered[np.where(is_here, second, 0)], np.nan)

    below, above = np.floor(rank), np.ceil(rank)
    result = np.empty(len(rank))
    n_at_once = max(1, 4_000_000 // width)  # 32 MB per block
    for begin in range(0, len(rank), n_at_once):
        block = np.arange(begin, min(begin + n_at_once, len(rank)))
        lower, upper = around(block, below[block], above[block])
        elsewhere = np.isnan(upper)
        other = block[elsewhere]
        upper[elsewhere], _ = around(other, above[other], above[other])
        result[block] = lower + (rank - below)[block] * (upper - lower)
    return result


@lru_cache(maxsize=4)
def _binned(
    values: bytes, owner: bytes, weights: bytes, shape: tuple[int, int]
) -> tuple[Floats, NDArray[np.intp], NDArray[np.intp], Floats, Floats]:
    """Return what all quantiles of the same values share; cached, since statistics follow each other.

    Args:
        values: the values, as bytes, so that equal ones are found again.
        owner: each value's cluster.
        weights: how often each cluster is drawn, [draw cluster].
        shape: number of draws and of clusters.

    Returns:
        The sorted values, their clusters, the bins' edges, the counts up to each bin [draw bin], and the weights.
    """
    numbers, clusters = np.frombuffer(values), np.frombuffer(owner, np.intp)
    drawn, n_clusters = np.frombuffer(weights).reshape(shape), shape[1]
    order = np.argsort(numbers, kind="stable")
    ordered, clusters = numbers[order], clusters[order]
    n_values = len(numbers)
    largest = n_clusters * int(np.bincount(clusters).max())  # count that a draw can reach
    if largest < 2**24:  # exact in fp32, which is faster
        drawn = drawn.astype(np.float32)
    n_bins = min(n_values, 256)
    edges = np.linspace(0, n_values, n_bins + 1).astype(np.intp)
    bin_of = np.repeat(np.arange(n_bins), np.diff(edges))
    in_bin = np.bincount(clusters * n_bins + bin_of, minlength=n_clusters * n_bins)
    counts = drawn @ in_bin.reshape(n_clusters, n_bins).astype(drawn.dtype)
    return ordered, clusters, edges, np.cumsum(counts, axis=1), drawn


# ---------------------------------------------------------------- is it 0?


def mean_p(sums: ArrayLike, counts: ArrayLike) -> Floats:
    """Test whether the mean is 0 for many columns at once, such as neurons; return two-sided p.

    The statistic is Student's t: the mean over its jackknife error, leaving out one cluster at a time.

    Args:
        sums: sum of each column over each cluster's tokens, [cluster neuron].
        counts: number of tokens, [cluster]; [cluster neuron] if the columns differ in their tokens.

    Returns:
        One p per column, [neuron]; nan with fewer than `MIN_CLUSTERS_TO_TEST` clusters, and for a column that is
        0 everywhere. Correct a list of them with `benjamini_hochberg`.

    Raises:
        ValueError: if the shapes do not fit.

    Source: Miller 1974, "The jackknife: a review"; Efron and Tibshirani 1993, chapter 11; protocol.md
    section 5.
    """
    totals, tokens = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    if totals.ndim != 2 or tokens.shape not in (totals.shape, totals.shape[:1]):
        raise ValueError(
            f"sums {totals.shape} and counts {tokens.shape}: the shapes must be [cluster neuron] and [cluster]"
        )
    tokens = tokens.reshape(len(totals), -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = totals.sum(axis=0) / tokens.sum(axis=0)
        return _jackknife_p(mean, _without_each(totals) / _without_each(tokens))


def _jackknife_p(number: Floats, left_out: Floats) -> Floats:
    """Return p [...] of numbers [...], from their values with each cluster left out, [cluster ...]."""
    n = len(left_out)
    if n < MIN_CLUSTERS_TO_TEST:
        return np.full(number.shape, np.nan)
    variance = (n - 1) / n * ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0)
    p: Floats = 2 * student_t.sf(np.abs(number) / np.sqrt(variance), n - 1)
    return p


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Adjust the p-values of one family of tests by Holm's method.

    If every test with an adjusted p up to .05 is called a finding, the chance of any false finding is at
    most 5%, however the tests depend on each other.

    Args:
        p: p-value by name of the test; nan where no test was made.

    Returns:
        Adjusted p by name; nan where no test was made.

    Source: Holm 1979; protocol.md section 5.
    """
    adjusted = np.array([*p.values()], dtype=np.float64)
    order = adjusted.argsort()  # nan is last
    ranked = adjusted[order][: np.isfinite(adjusted).sum()]
    # statsmodels gives the same numbers, but collects Python's garbage at each call, which takes half a second
    stepped = np.maximum.accumulate(ranked * np.arange(len(ranked), 0, -1))
    adjusted[order[: len(ranked)]] = np.minimum(stepped, 1)
    return dict(zip(p, adjusted.tolist(), strict=True))


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """Adjust a long list of p-values by Benjamini and Hochberg's method.

    If every test with an adjusted p up to q is called a finding, the expected share of false findings is
    at most q, for tests that are independent or positively dependent.

    Args:
        p: p-values of any shape, such as [neuron]; nan where no test was made.

    Returns:
        Adjusted p of the same shape; nan where no test was made.

    Source: Benjamini and Hochberg 1995; protocol.md section 5.
    """
    from statsmodels.stats.multitest import multipletests  # 1 s to import

    adjusted = np.array(p, dtype=np.float64)
    tested = ~np.isnan(adjusted)
    if tested.any():
        adjusted[tested] = multipletests(adjusted[tested], method="fdr_bh")[1]
    return adjusted


# ---------------------------------------------------------------- across models: seeds


def paired_seeds(numbers: ArrayLike, level: float = 0.95) -> Interval:
    """Average one number per seed, with Student's t interval for new seeds and a sign-flip p.

    Args:
        numbers: one number per training seed, such as the difference of two variants' losses.
        level: level of the interval.

    Returns:
        The mean, without bounds if there is one seed. `p` is exact and two-sided, over all 2^n patterns
        of signs. It cannot be below 2^(1-n): 2 seeds never give less than .5, and .05 needs 6 seeds.
        With more than `MAX_SEEDS_TO_FLIP` seeds p is None.

    Raises:
        ValueError: if there is no seed.

    Source: protocol.md section 5.
    """
    per_seed = np.asarray(numbers, dtype=np.float64)
    n = len(per_seed)
    if n == 0:
        raise ValueError("paired_seeds: no seed given; it needs one number per seed")
    value = float(per_seed.mean())
    low, high, p = None, None, None
    if n > 1:
        half = _half_width(float(per_seed.var(ddof=1)) / n, n, level)
        low, high = value - half, value + half
    if n <= MAX_SEEDS_TO_FLIP:
        flipped = np.zeros(1)
        for number in per_seed:
            flipped = np.concatenate([flipped + number, flipped - number])
        rounding = ROUNDING * np.abs(per_seed).sum()
        p = float(np.mean(np.abs(flipped) >= abs(per_seed.sum()) - rounding))
    return Interval(value, low, high, n, n, p)


def seeds_and_documents(sums: ArrayLike, counts: ArrayLike, level: float = 0.95) -> Interval:
    """Average the difference of two variants, with an interval for new seeds on new documents.

    SE^2 = var over seeds of the per-seed mean / n_seeds + jackknife variance over documents of the
    mean over seeds; half width = t(n_seeds - 1) * SE. All seeds are measured on the same documents.
    So a document's effect on all seeds is missing from the first term and must be added. A
    document's effect on one seed alone is in both terms: the interval errs on the wide side.

    The interval is Student's t and not a bootstrap over seeds. Two seeds have only three resamples,
    whose spread is 0.7 of the standard error and which never lie outside the two seeds. Student's t
    with one degree of freedom (12.7) shows how uncertain two numbers are.

    Args:
        sums: difference of loss sums, [seed document], nats.
        counts: number of target tokens, [document], the same for every seed.
        level: level of the interval.

    Returns:
        The mean over seeds of sum / tokens; `n` seeds, `n_clusters` documents; `p` from flipping the
        signs of seeds. There are no bounds with one seed or effectively fewer than `MIN_CLUSTERS` documents.

    Source: protocol.md section 5; the sum of the two variances is ours.
    """
    per_seed, covariance = seed_means([sums], counts)
    n_seeds, n_documents = per_seed.shape[1], len(np.asarray(counts))
    over_seeds = paired_seeds(per_seed[0])
    low, high = None, None
    if n_seeds > 1 and effective_number(counts) >= MIN_CLUSTERS:
        half = _half_width(float(covariance[0, 0]), n_seeds, level)
        low, high = over_seeds.value - half, over_seeds.value + half
    return Interval(over_seeds.value, low, high, n_seeds, n_documents, over_seeds.p)


def fieller(num_sums: ArrayLike, den_sums: ArrayLike, counts: ArrayLike) -> Interval:
    """Compute the ratio of two mean differences over the same seeds and documents, by Fieller's theorem.

    The interval is the set of ratios R for which numerator - R * denominator is not separated from 0,
    with the variances of `seeds_and_documents`. So the interval is bounded exactly if the
    denominator's own interval does not contain 0.

    Args:
        num_sums: differences of loss sums of the numerator, [seed document], nats.
        den_sums: differences of loss sums of the denominator, [seed document], nats.
        counts: number of target tokens, [document].

    Returns:
        The ratio of the means over seeds. There are no bounds with one seed, with fewer than
        `MIN_CLUSTERS` documents, or if the denominator is not separated from 0.

    Source: Fieller 1954; protocol.md section 5.
    """
    per_seed, covariance = seed_means([num_sums, den_sums], counts)
    n_seeds, n_documents = per_seed.shape[1], len(np.asarray(counts))
    num, den = per_seed.mean(axis=1)
    ratio = float(num / den) if den else float("nan")
    none = Interval(ratio, None, None, n_seeds, n_documents)
    if n_seeds < 2 or effective_number(counts) < MIN_CLUSTERS:
        return none
    t2 = float(student_t.ppf(0.975, n_seeds - 1)) ** 2
    # The bounds are the roots of (num - R den)^2 = t^2 var(num - R den).
    square = den**2 - t2 * covariance[1, 1]
    half_linear = num * den - t2 * covariance[0, 1]
    constant = num**2 - t2 * covariance[0, 0]
    if square <= 0:
        return none
    spread = np.sqrt(max(half_linear**2 - square * constant, 0.0))
    low, high = (half_linear - spread) / square, (half_linear + spread) / square
    return Interval(ratio, float(low), float(high), n_seeds, n_documents)


def two_level_bootstrap_ratio(
    num_sums: ArrayLike,
    den_sums: ArrayLike,
    counts: ArrayLike,
    n_draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Compute the ratio of two mean differences, with a BCa interval from resampling seeds and documents.

    One draw of documents serves all seeds of a resample, because the seeds were measured on the same
    documents. A separate draw for each seed would average away the documents' effect that the seeds
    share, and give an interval that is too narrow.

    The acceleration is that of several samples: seeds and documents are left out in turn. The level
    is widened to correct for the number of seeds, see `_z`. If the spread comes from documents rather
    than seeds, and there are few seeds, the interval errs on the wide side, as Fieller's does.

    Args:
        num_sums: differences of loss sums of the numerator, [seed document], nats.
        den_sums: differences of loss sums of the denominator, [seed document], nats.
        counts: number of target tokens, [document].
        n_draws: number of resamples.
        seed: seed of the resampling.
        level: level of the interval.

    Returns:
        The ratio of the means over seeds. There are no bounds with fewer than `MIN_SEEDS_TO_RESAMPLE`
        seeds or `MIN_CLUSTERS` documents; use `fieller` then.

    Source: protocol.md section 5; Efron and Tibshirani 1993, sections 14.3 and 15.4.
    """
    pair = np.stack([np.asarray(num_sums, np.float64), np.asarray(den_sums, np.float64)])
    _, n_seeds, n_documents = pair.shape
    num, den = pair.sum(axis=(1, 2))
    ratio = float(num / den) if den else float("nan")
    if n_seeds < MIN_SEEDS_TO_RESAMPLE or effective_number(counts) < MIN_CLUSTERS:
        return Interval(ratio, None, None, n_seeds, n_documents)
    generator = np.random.default_rng(seed)
    seeds = generator.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=n_draws)
    documents = _weights(n_documents, n_draws, seed + 1)[1:]
    # Both means have the same documents' token counts, which cancel.
    num_draws, den_draws = np.einsum("ds,qsd->qd", seeds, pair @ documents.T)
    by_seed, by_document = pair.sum(axis=2).T, pair.sum(axis=1).T  # [unit, num and den]
    with np.errstate(divide="ignore", invalid="ignore"):
        acceleration = _acceleration(
            _quotient(_without_each(by_seed)), _quotient(_without_each(by_document))
        )
        draws = np.concatenate([[ratio], num_draws / den_draws])
    return Interval(ratio, *_ends(draws, n_seeds, level, acceleration), n_seeds, n_documents)


def expected_maximum(n: int) -> float:
    """Return the expected maximum of n independent standard normal numbers; 0 for one."""
    from scipy.integrate import quad
    from scipy.stats import norm

    area: float = quad(lambda x: x * n * norm.pdf(x) * norm.cdf(x) ** (n - 1), -12, 12)[0]
    return area


def equivalence(interval: Interval, margin: float, around: float = 0.0) -> Verdict:
    """Judge a number by two one-sided tests at 5% each, read off its 90% interval.

    Args:
        interval: interval at level .90, in the unit of `margin`.
        margin: largest difference that does not matter.
        around: reference value of the number.

    Returns:
        `equivalent` if the whole interval is closer to `around` than the margin; `different` if the
        whole interval is farther away; otherwise, and without an interval, `inconclusive`.

    Source: Schuirmann 1987; protocol.md section 5.
    """
    if interval.low is None or interval.high is None:
        return "inconclusive"
    low, high = interval.low - around, interval.high - around
    if -margin < low and high < margin:
        return "equivalent"
    if low > margin or high < -margin:
        return "different"
    return "inconclusive"


def seed_means(sums: list[ArrayLike], counts: ArrayLike) -> tuple[Floats, Floats]:
    """Return means [quantity seed], and the covariance of their averages for new seeds and documents."""
    stacked = np.stack([np.asarray(each, dtype=np.float64) for each in sums])
    tokens = np.asarray(counts, dtype=np.float64)
    if stacked.ndim != 3 or stacked.shape[2:] != tokens.shape:
        raise ValueError(
            f"sums {stacked.shape[1:]} and counts {tokens.shape}: the shapes must be [seed document] and"
            " [document]"
        )
    n_seeds, n_documents = stacked.shape[1:]
    per_seed = stacked.sum(axis=2) / tokens.sum()
    covariance = np.zeros((len(sums), len(sums)))
    if n_seeds > 1:
        covariance += np.atleast_2d(np.cov(per_seed, ddof=1)) / n_seeds
    if n_documents > 1:
        mean = stacked.mean(axis=1)  # [quantity document]
        without = (mean.sum(axis=1, keepdims=True) - mean) / (tokens.sum() - tokens)
        deviation = without - without.mean(axis=1, keepdims=True)
        covariance += (n_documents - 1) / n_documents * deviation @ deviation.T
    return per_seed, covariance


def _half_width(variance: float, n_seeds: int, level: float) -> float:
    quantile = float(student_t.ppf((1 + level) / 2, n_seeds - 1))
    return quantile * float(np.sqrt(variance))


# ---------------------------------------------------------------- curves


def fit_aicc(x: ArrayLike, y: ArrayLike) -> dict[str, Fit]:
    """Fit dilution, `a + b/n`, and growth, `a + b log n`, to a curve; AICc shows which describes it better.

    A mean over n positions of which one (BOS) differs is exactly `a + b/n`. The hackathon study took
    such a curve for a logarithm.

    Args:
        x: n, above 0; points with nan in y are left out.
        y: the averages.

    Returns:
        Both fits, by `form`.

    Raises:
        ValueError: if there are fewer than 5 points (AICc has no value) or an x is not above 0.

    Source: protocol.md sections 1.6 and 7 (P2).
    """
    places, heights = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    kept = ~np.isnan(heights)
    places, heights = places[kept], heights[kept]
    n = len(places)
    if n < 5 or places.min() <= 0:
        raise ValueError(f"fit_aicc: {n} points; it needs 5 or more, each at an x above 0")
    fits = {}
    for form, shape in (("a + b/n", 1 / places), ("a + b log n", np.log(places))):
        design = np.stack([np.ones(n), shape], axis=1)
        (a, b), *_ = np.linalg.lstsq(design, heights, rcond=None)
        rss = float(((heights - design @ (a, b)) ** 2).sum())
        total = float(((heights - heights.mean()) ** 2).sum())
        # The residual of a perfect fit is rounding error; its logarithm would be arbitrary.
        floor = n * (1e-15 * max(float(np.abs(heights).max()), 1e-300)) ** 2
        k = 3  # a, b and the residual variance
        aicc = n * np.log(max(rss, floor, 1e-300) / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)
        r2 = 1 - rss / total if total > 0 else float("nan")
        fits[form] = Fit(form, float(a), float(b), r2, float(aicc))
    return fits
