"""Intervals and tests: documents are the unit inside a model, training seeds across models.

Knows nothing of models. Every interval covers 95% unless `level` says otherwise, and every random
draw follows from a seed, so that the same numbers give the same interval on every machine.

Source: science.md sections 4 and 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import t as student_t

Floats = NDArray[np.float64]
Method = Literal["bca", "percentile"]
Verdict = Literal["equivalent", "different", "inconclusive"]

MIN_CLUSTERS = 20
"""Fewer documents or strings give no interval: it would be too narrow.

In simulation, with 30% of the variance between clusters, 95% intervals from 20 clusters cover a
mean, a ratio, a median or a share of 16% in 93 to 95% of cases, an sd or a correlation in 92%, a
5% quantile or a share of 2% in 89 to 91%; from 120 clusters all of these in 93 to 96%. For values
with a long tail the sd stays low: 80% from 20 clusters, 87% from 120 (lognormal).
"""
MIN_SEEDS_TO_RESAMPLE = 5
"""Fewer seeds give no bootstrap interval: 2 seeds have 3 resamples, 4 have 35."""
MAX_UNDEFINED = 0.05
"""Share of resamples in which a number may be undefined; with more there is no interval."""
MAX_SEEDS_TO_FLIP = 20
"""2^20 patterns of signs; with more seeds the t interval needs no check."""

ROUNDING = 4096 * float(np.finfo(np.float64).eps)
"""Rounding of a sum, as a share of the sum of its terms' absolute values: 9.1e-13.

Rounding grows as the square root of the number of terms, times the machine epsilon; 4096 is that of
16 million tokens. Processors add in different orders, so that a number within its rounding of 0 is
0 on one machine and has either sign on others. It is 0 here. A number that is small because its
terms are small is not touched.
"""
N_ROUNDINGS = 16
"""Ways to move all sums by their rounding, from which that of a number is estimated."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval, in the unit of what was estimated."""

    value: float
    low: float | None
    """None, like `high`: no interval can be given."""
    high: float | None
    n: int
    """How many values went in."""
    n_clusters: int
    """How many independent units they fall into."""
    p: float | None = None
    """Two-sided p of "no difference", where it was tested."""


@dataclass(frozen=True)
class Fit:
    """A curve `y = a + b * f(x)` by least squares."""

    form: str
    """`a + b/n` or `a + b log n`."""
    a: float
    b: float
    r2: float
    """Share of the variance of y; nan where y does not vary."""
    aicc: float
    """Akaike's criterion with its small-sample term; the lower of two forms describes y better."""


# ---------------------------------------------------------------- rounding


def difference(left: float, right: float) -> float:
    """Return left - right, 0 where the two numbers are equal up to rounding."""
    return 0.0 if np.isclose(left, right, rtol=ROUNDING, atol=0) else left - right


def centred(values: Floats) -> Floats:
    """Return deviations from the mean, 0 where rounding alone makes them."""
    deviations = values - (values.mean() if len(values) else 0)
    unit = ROUNDING * np.abs(values).max(initial=0.0)
    return np.where(np.abs(deviations) <= unit, 0.0, deviations)


def order_of(values: ArrayLike) -> NDArray[np.intp]:
    """Return each value's place among the distinct ones, from 0; values equal up to rounding share one."""
    numbers = np.asarray(values, dtype=np.float64)
    order = np.argsort(numbers, kind="stable")
    unit = ROUNDING * np.abs(numbers).max(initial=0.0)
    places = np.zeros(len(numbers), dtype=np.intp)
    places[order[1:]] = np.cumsum(np.diff(numbers[order]) > unit)
    return places


def n_distinct(values: ArrayLike) -> int:
    """Return how many different numbers there are; numbers equal up to rounding count once."""
    return int(order_of(values).max(initial=-1)) + 1


# ---------------------------------------------------------------- inside a model: documents


def bootstrap_sums(
    sums: ArrayLike,
    value: Callable[[Floats], Floats],
    n: int,
    n_draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    method: Method = "bca",
) -> Interval:
    """A number that follows from sums over clusters, with the interval from resampling clusters.

    `bca` corrects the percentiles for the bias of the draws and for a spread that changes with the
    number (acceleration, from leaving out one cluster at a time). Both methods widen the level for
    the number of clusters, see `_z`.

    Args:
        sums: one row a cluster, [cluster part].
        value: from sums [draw part] to the number [draw]; nan where it is not defined.
        n: how many values went in.
        n_draws: resamples.
        seed: of the resampling.
        level: of the interval.
        method: `bca` or `percentile`.

    Returns:
        The number from all clusters, 0 where it is within its rounding of 0 (see `_rounding`). No
        ends below `MIN_CLUSTERS` clusters, where more than `MAX_UNDEFINED` of the resamples leave
        the number undefined, or where BCa has none: with all draws on one side of the number, or a
        number that hangs on one cluster. Where all draws are equal up to rounding, both ends are
        the number: the sample tells no more (a share of 0 in n clusters may still be 3/n).

    Raises:
        ValueError: if `sums` is not a table.

    Source: Efron 1987; Efron and Tibshirani 1993, section 14.3; science.md section 5.
    """
    per_cluster = _table(sums)
    n_clusters = len(per_cluster)
    if n_clusters == 0:
        return Interval(float("nan"), None, None, n, 0)
    acceleration = None
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = value(_weights(n_clusters, n_draws, seed) @ per_cluster)
        if method == "bca" and len(draws) > 1:
            acceleration = _acceleration(value(_without_each(per_cluster)))
        rounding = _rounding(value, per_cluster)
    draws = np.where(np.abs(draws) <= rounding, 0.0, draws)
    low, high = _ends(draws, n_clusters, level, acceleration, rounding)
    return Interval(float(draws[0]), low, high, n, n_clusters)


def cluster_bootstrap(
    values: ArrayLike,
    clusters: ArrayLike,
    statistic: str = "mean",
    n_draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    method: Method = "bca",
) -> Interval:
    """One number for many tokens, with an interval from resampling whole clusters.

    Tokens of a document depend on each other, so documents are drawn, not tokens. Quantiles have a
    percentile interval whatever the `method`: BCa's acceleration comes from the jackknife, which is
    not consistent for them (Efron and Tibshirani 1993, chapter 11, "Failure of the jackknife").

    Args:
        values: one number a token; nan means "has none" and is left out.
        clusters: which document or string each value belongs to (integers are fastest).
        statistic: `mean`, `median`, `q05` (any two digits), `sd` (population), `share above 0.5`.
        n_draws: resamples.
        seed: of the resampling.
        level: of the interval.
        method: `bca` or `percentile`.

    Returns:
        The statistic of all values (nan where there are none), without ends below `MIN_CLUSTERS`
        clusters and in the cases of `bootstrap_sums`.

    Raises:
        ValueError: if the statistic is unknown, or the lengths differ.

    Source: science.md section 5.
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
        return bootstrap_sums(sums, value, len(numbers), n_draws, seed, level, method)
    if n_clusters == 0:
        return Interval(float("nan"), None, None, 0, 0)
    draws = _quantile(numbers, owner, _weights(n_clusters, n_draws, seed), q)
    return Interval(float(draws[0]), *_ends(draws, n_clusters, level), len(numbers), n_clusters)


def document_bootstrap(
    sums: ArrayLike,
    counts: ArrayLike,
    n_draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    method: Method = "bca",
) -> Interval:
    """`cluster_bootstrap` of a mean, from each document's sum and token count.

    For a paired difference of trained models, `sums` are differences of loss sums (averaged over
    seeds where there are several): the interval is for these models on new documents.

    Returns:
        sum(sums) / sum(counts), `n` tokens, without ends below `MIN_CLUSTERS` documents.
    """
    per_document = np.stack([np.asarray(sums, np.float64), np.asarray(counts, np.float64)], axis=1)
    n_tokens = int(per_document[:, 1].sum())
    return bootstrap_sums(per_document, _quotient, n_tokens, n_draws, seed, level, method)


def _rounding(value: Callable[[Floats], Floats], per_cluster: Floats) -> float:
    """Return how far a number may be off because the sums that it follows from are rounded.

    Every sum is moved, up or down, by ROUNDING of what was added up; the farthest that the number
    moves is its rounding. So a difference of two large numbers has the rounding of these, and a
    small number that follows from small sums has a small one.
    """
    moves = np.random.default_rng(0).choice(
        [-ROUNDING, ROUNDING], (N_ROUNDINGS, per_cluster.shape[1])
    )
    total, size = per_cluster.sum(axis=0), np.abs(per_cluster).sum(axis=0)
    moved = value(np.vstack([total, total + moves * size]))
    distances = np.abs(moved[1:] - moved[0])
    return float(distances[np.isfinite(distances)].max(initial=0.0))


def _ends(
    draws: Floats,
    n_units: int,
    level: float,
    acceleration: float | None = None,
    rounding: float = 0.0,
) -> tuple[float | None, float | None]:
    """Ends of the interval of `draws[0]` from the other draws; percentile without an acceleration.

    Draws that equal the number (up to rounding) count half as below it, half as above, so that
    numbers with few values have a bias correction too.
    """
    number, drawn = draws[0], draws[1:][np.isfinite(draws[1:])]
    if not np.isfinite(number) or len(drawn) == 0:
        return None, None
    if len(drawn) < (1 - MAX_UNDEFINED) * (len(draws) - 1):
        return None, None
    equal = np.isclose(drawn, number, rtol=ROUNDING, atol=rounding)
    if equal.all():
        return float(number), float(number)
    z = _z(level, n_units)
    if acceleration is not None:
        below = np.mean(np.where(equal, 0.5, drawn < number))
        if below in (0, 1):
            return None, None
        bias = ndtri(below)
        stretch = 1 - acceleration * (bias + z)
        if not (stretch > 0).all():
            return None, None
        z = bias + (bias + z) / stretch
    low, high = np.quantile(drawn, ndtr(z))
    return float(low), float(high)


def _z(level: float, n_units: int) -> Floats:
    """Normal quantiles of the two ends, widened for how few units are resampled.

    Resamples of n units have (n - 1) / n of the unbiased variance, and normal ends leave out that
    the variance is itself estimated. Without this, 95% intervals cover 92% with 20 clusters and 90%
    with 8 seeds.

    Source: Hesterberg 2015, "What teachers should know about the bootstrap", expanded percentiles.
    """
    one_side = np.sqrt(n_units / (n_units - 1)) * student_t.ppf((1 + level) / 2, n_units - 1)
    return np.array([-one_side, one_side])


def _acceleration(*left_out: Floats) -> float:
    """Skewness of the number's influences / 6, from its values with each unit left out.

    Args:
        left_out: an array for each kind of unit that is resampled, such as seeds and documents.

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
        raise ValueError(f"sums {per_cluster.shape}: wants one row a cluster, [cluster part]")
    return per_cluster


def _without_each(per_unit: Floats) -> Floats:
    """Sums over all units but one, for each unit, [unit ...]."""
    left: Floats = per_unit.sum(axis=0) - per_unit
    return left


@lru_cache(maxsize=4)
def _weights(n_clusters: int, n_draws: int, seed: int) -> Floats:
    """How often each cluster is drawn, [draw cluster]; a probe asks for the same one many times.

    The first row counts each cluster once, which is the estimate itself; below `MIN_CLUSTERS`
    there is no other.
    """
    weights = np.ones((1, n_clusters))
    if n_clusters >= MIN_CLUSTERS:
        uniform = np.full(n_clusters, 1 / n_clusters)
        drawn = np.random.default_rng(seed).multinomial(n_clusters, uniform, size=n_draws)
        weights = np.concatenate([weights, drawn])
    weights.flags.writeable = False
    return weights


def _quantile_named(statistic: str) -> float | None:
    """0.05 for `q05`; None for what is not a quantile."""
    if statistic == "median":
        return 0.5
    if len(statistic) == 3 and statistic[0] == "q" and statistic[1:].isdigit():
        return int(statistic[1:]) / 100
    return None


def _sums(
    values: Floats, owner: NDArray[np.intp], n_clusters: int, statistic: str
) -> tuple[Floats, Callable[[Floats], Floats]]:
    """Sums over each cluster [cluster part], and how the statistic follows from them."""
    value = _quotient
    if statistic == "mean":
        parts = [values]
    elif statistic == "sd":
        deviations = centred(values)  # small moments differ accurately
        parts, value = [deviations, deviations**2], _sd
    elif statistic.startswith("share above "):
        parts = [(values > float(statistic.removeprefix("share above "))).astype(np.float64)]
    else:
        raise ValueError(
            f"no statistic called {statistic!r}: mean, median, q05, sd, share above 0.5"
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
    """Quantiles (linear between ranks, as numpy's) of the values repeated as `weights` says.

    Running counts over all sorted values would cost n_draws * n. Counts at the edges of 256 bins
    are one small matrix product, and show which few bins hold the quantile in any draw; only
    these are then counted value by value.
    """
    order = np.argsort(values, kind="stable")
    ordered, owner = values[order], owner[order]
    n_values, n_clusters = len(values), weights.shape[1]
    n_bins = min(n_values, 256)
    edges = np.linspace(0, n_values, n_bins + 1).astype(np.intp)
    bin_of = np.repeat(np.arange(n_bins), np.diff(edges))
    in_bin = np.bincount(owner * n_bins + bin_of, minlength=n_clusters * n_bins)
    up_to_bin = np.cumsum(weights @ in_bin.reshape(n_clusters, n_bins), axis=1)  # [draw bin]

    rank = (up_to_bin[:, -1] - 1) * q
    below, above = np.floor(rank), np.ceil(rank)
    first = int((up_to_bin <= below[:, None]).sum(axis=1).min())
    last = int((up_to_bin <= above[:, None]).sum(axis=1).max())
    start, stop = int(edges[first]), int(edges[last + 1])

    result = np.empty(len(weights))
    n_at_once = max(1, 4_000_000 // (stop - start))  # 32 MB a block
    for begin in range(0, len(weights), n_at_once):
        block = slice(begin, begin + n_at_once)
        running = np.cumsum(weights[block][:, owner[start:stop]], axis=1)  # [draw value]
        if first:
            running += up_to_bin[block, first - 1][:, None]
        lower = ordered[start + (running <= below[block, None]).sum(axis=1)]
        upper = ordered[start + (running <= above[block, None]).sum(axis=1)]
        result[block] = lower + (rank - below)[block] * (upper - lower)
    return result


# ---------------------------------------------------------------- is it 0?


def mean_p(sums: ArrayLike, counts: ArrayLike) -> Floats:
    """Two-sided p of "the mean is 0" for many columns at once, such as neurons.

    Student's t of the mean over its jackknife error: clusters are left out one at a time.

    Args:
        sums: of each column over each cluster's tokens, [cluster neuron].
        counts: tokens, [cluster], or [cluster neuron] where columns have tokens of their own.

    Returns:
        One p a column, [neuron]: nan below `MIN_CLUSTERS` clusters, and for a column that is 0
        everywhere. For a list, go on with `benjamini_hochberg`.

    Raises:
        ValueError: if the shapes do not fit.

    Source: Miller 1974, "The jackknife: a review"; Efron and Tibshirani 1993, chapter 11; science.md
    section 5.
    """
    totals, tokens = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    if totals.ndim != 2 or tokens.shape not in (totals.shape, totals.shape[:1]):
        raise ValueError(
            f"sums {totals.shape} and counts {tokens.shape}: wants [cluster neuron], [cluster]"
        )
    tokens = tokens.reshape(len(totals), -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = totals.sum(axis=0) / tokens.sum(axis=0)
        return _jackknife_p(mean, _without_each(totals) / _without_each(tokens))


def _jackknife_p(number: Floats, left_out: Floats) -> Floats:
    """p [...] of numbers [...], from their values with each cluster left out, [cluster ...]."""
    n = len(left_out)
    if n < MIN_CLUSTERS:
        return np.full(number.shape, np.nan)
    variance = (n - 1) / n * ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0)
    p: Floats = 2 * student_t.sf(np.abs(number) / np.sqrt(variance), n - 1)
    return p


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values of one family of tests, adjusted by Holm's method.

    Calling those up to .05 gives at most 5% chance of any false finding, however they depend on each
    other.

    Args:
        p: by name of the test; nan is no test.

    Returns:
        Adjusted p by name, nan where there was none.

    Source: Holm 1979; science.md section 5.
    """
    return dict(zip(p, _adjusted(list(p.values()), "holm").tolist(), strict=True))


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """p-values of a long list, adjusted by Benjamini and Hochberg's method.

    Of those called up to q, the expected share of false findings is at most q, for tests that are
    independent or depend on each other positively.

    Args:
        p: of any shape, such as [neuron]; nan is no test.

    Returns:
        Adjusted p of the same shape, nan where there was none.

    Source: Benjamini and Hochberg 1995; science.md section 5.
    """
    return _adjusted(p, "fdr_bh")


def _adjusted(p: ArrayLike, method: str) -> Floats:
    from statsmodels.stats.multitest import multipletests  # 1 s to import

    adjusted = np.array(p, dtype=np.float64)
    tested = ~np.isnan(adjusted)
    if tested.any():
        adjusted[tested] = multipletests(adjusted[tested], method=method)[1]
    return adjusted


# ---------------------------------------------------------------- across models: seeds


def paired_seeds(numbers: ArrayLike, level: float = 0.95) -> Interval:
    """Mean of one number a seed, with Student's t interval for new seeds and a sign-flip p.

    Args:
        numbers: one a training seed, such as the difference of two variants' losses at that seed.
        level: of the interval.

    Returns:
        No ends with one seed. `p` is exact, over all 2^n patterns of signs, two-sided: it cannot
        be below 2^(1-n), so 2 seeds never give less than .5 and 6 are needed for .05. None above
        `MAX_SEEDS_TO_FLIP` seeds.

    Raises:
        ValueError: with no seed.

    Source: science.md section 5.
    """
    per_seed = np.asarray(numbers, dtype=np.float64)
    n = len(per_seed)
    if n == 0:
        raise ValueError("paired_seeds: no seed; wants one number a seed")
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
    """Mean difference of two variants, for new seeds on new documents.

    SE^2 = var over seeds of the per-seed mean / n_seeds + jackknife variance over documents of the
    mean over seeds; half width = t(n_seeds - 1) * SE. All seeds are measured on the same documents,
    so what a document does to every seed is not in the first term and must be added. What it does
    to one seed alone is in both: the interval errs on the wide side.

    Student's t and not a bootstrap over seeds: 2 seeds have only three resamples, whose spread
    is 0.7 of the standard error and whose ends can never lie outside the two seeds; t with one
    degree of freedom (12.7) says how little two numbers tell.

    Args:
        sums: difference of loss sums, [seed document], nats.
        counts: target tokens, [document], the same for every seed.
        level: of the interval.

    Returns:
        Mean over seeds of sum / tokens; `n` seeds, `n_clusters` documents; `p` from flipping the
        signs of seeds. No ends with one seed or fewer than `MIN_CLUSTERS` documents.

    Source: science.md section 5; the sum of the two variances is ours.
    """
    per_seed, covariance = _per_seed([sums], counts)
    n_seeds, n_documents = per_seed.shape[1], len(np.asarray(counts))
    over_seeds = paired_seeds(per_seed[0])
    low, high = None, None
    if n_seeds > 1 and n_documents >= MIN_CLUSTERS:
        half = _half_width(float(covariance[0, 0]), n_seeds, level)
        low, high = over_seeds.value - half, over_seeds.value + half
    return Interval(over_seeds.value, low, high, n_seeds, n_documents, over_seeds.p)


def fieller(num_sums: ArrayLike, den_sums: ArrayLike, counts: ArrayLike) -> Interval:
    """Ratio of two mean differences over the same seeds and documents, by Fieller's theorem.

    The set of ratios R for which numerator - R * denominator is not separated from 0, with the
    variances of `seeds_and_documents`. So it has two ends exactly where the denominator's own
    interval does not hold 0.

    Args:
        num_sums: differences of loss sums, [seed document], nats.
        den_sums: the same for the denominator.
        counts: target tokens, [document].

    Returns:
        The ratio of the means over seeds. No ends with one seed, fewer than `MIN_CLUSTERS`
        documents, or a denominator that is not separated from 0.

    Source: Fieller 1954; science.md section 4.
    """
    per_seed, covariance = _per_seed([num_sums, den_sums], counts)
    n_seeds, n_documents = per_seed.shape[1], len(np.asarray(counts))
    num, den = per_seed.mean(axis=1)
    ratio = float(num / den) if den else float("nan")
    none = Interval(ratio, None, None, n_seeds, n_documents)
    if n_seeds < 2 or n_documents < MIN_CLUSTERS:
        return none
    t2 = float(student_t.ppf(0.975, n_seeds - 1)) ** 2
    # Ends: roots of (num - R den)^2 = t^2 var(num - R den).
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
    """Ratio of two mean differences, resampling seeds and documents; BCa interval.

    One draw of documents serves all seeds of a resample, because they were measured on the same
    documents: drawing them afresh for each seed would average away what the seeds share, and give
    an interval that is too narrow.

    The acceleration is that of several samples: seeds and documents are left out in turn. The level
    is widened for the number of seeds, see `_z`; where documents and not seeds make the spread, and
    seeds are few, the interval errs on the wide side, as Fieller's does.

    Args:
        num_sums: differences of loss sums, [seed document], nats.
        den_sums: the same for the denominator.
        counts: target tokens, [document].
        n_draws: resamples.
        seed: of the resampling.
        level: of the interval.

    Returns:
        The ratio of the means over seeds. No ends below `MIN_SEEDS_TO_RESAMPLE` seeds or
        `MIN_CLUSTERS` documents: use `fieller` there.

    Source: science.md section 4; Efron and Tibshirani 1993, sections 14.3 and 15.4.
    """
    pair = np.stack([np.asarray(num_sums, np.float64), np.asarray(den_sums, np.float64)])
    _, n_seeds, n_documents = pair.shape
    num, den = pair.sum(axis=(1, 2))
    ratio = float(num / den) if den else float("nan")
    if n_seeds < MIN_SEEDS_TO_RESAMPLE or n_documents < MIN_CLUSTERS:
        return Interval(ratio, None, None, n_seeds, n_documents)
    generator = np.random.default_rng(seed)
    seeds = generator.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=n_draws)
    documents = _weights(n_documents, n_draws, seed + 1)[1:]
    # Token counts are those of the documents in both means, and cancel.
    num_draws, den_draws = np.einsum("ds,qsd->qd", seeds, pair @ documents.T)
    by_seed, by_document = pair.sum(axis=2).T, pair.sum(axis=1).T  # [unit, num and den]
    with np.errstate(divide="ignore", invalid="ignore"):
        acceleration = _acceleration(
            _quotient(_without_each(by_seed)), _quotient(_without_each(by_document))
        )
        draws = np.concatenate([[ratio], num_draws / den_draws])
    return Interval(ratio, *_ends(draws, n_seeds, level, acceleration), n_seeds, n_documents)


def equivalence(interval: Interval, margin: float, around: float = 0.0) -> Verdict:
    """Two one-sided tests at 5% each, read off the 90% interval of a number.

    Args:
        interval: at level .90, in the unit of `margin`.
        margin: the difference that is too small to matter.
        around: what the number is held against.

    Returns:
        `equivalent` if the whole interval is closer to `around` than the margin; `different` if the
        whole interval is farther; `inconclusive` else, also where there is no interval.

    Source: Schuirmann 1987; science.md section 4.
    """
    if interval.low is None or interval.high is None:
        return "inconclusive"
    low, high = interval.low - around, interval.high - around
    if -margin < low and high < margin:
        return "equivalent"
    if low > margin or high < -margin:
        return "different"
    return "inconclusive"


def _per_seed(sums: list[ArrayLike], counts: ArrayLike) -> tuple[Floats, Floats]:
    """Means [quantity seed], and the covariance of their means over new seeds and documents."""
    stacked = np.stack([np.asarray(each, dtype=np.float64) for each in sums])
    tokens = np.asarray(counts, dtype=np.float64)
    if stacked.ndim != 3 or stacked.shape[2:] != tokens.shape:
        raise ValueError(
            f"sums {stacked.shape[1:]} and counts {tokens.shape}: wants [seed document], [document]"
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
    """Which describes a curve better: dilution, `a + b/n`, or growth, `a + b log n`?

    A mean over n positions of which one (BOS) differs is exactly `a + b/n`; the hackathon read the
    same curve as a logarithm.

    Args:
        x: n, above 0; points with nan in y are left out.
        y: what was averaged.

    Returns:
        Both fits, by `form`.

    Raises:
        ValueError: with fewer than 5 points (AICc has no value) or an x that is not above 0.

    Source: science.md sections 1.6 and 7 (P2).
    """
    places, heights = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    kept = ~np.isnan(heights)
    places, heights = places[kept], heights[kept]
    n = len(places)
    if n < 5 or places.min() <= 0:
        raise ValueError(f"fit_aicc: {n} points; wants 5 or more, each at an x above 0")
    fits = {}
    for form, shape in (("a + b/n", 1 / places), ("a + b log n", np.log(places))):
        design = np.stack([np.ones(n), shape], axis=1)
        (a, b), *_ = np.linalg.lstsq(design, heights, rcond=None)
        rss = float(((heights - design @ (a, b)) ** 2).sum())
        total = float(((heights - heights.mean()) ** 2).sum())
        # A perfect fit leaves rounding, whose logarithm would say nothing.
        floor = n * (1e-15 * max(float(np.abs(heights).max()), 1e-300)) ** 2
        k = 3  # a, b and the residual variance
        aicc = n * np.log(max(rss, floor, 1e-300) / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)
        r2 = 1 - rss / total if total > 0 else float("nan")
        fits[form] = Fit(form, float(a), float(b), r2, float(aicc))
    return fits
