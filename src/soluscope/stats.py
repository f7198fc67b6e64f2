"""Intervals and tests: documents are the unit inside a model, training seeds across models.

Knows nothing of models. Every interval covers 95% unless `level` says otherwise, and every random
draw follows from a seed, so that the same numbers give the same interval on every machine.

Source: science.md sections 4 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student_t

Floats = NDArray[np.float64]
Verdict = Literal["equivalent", "different", "inconclusive"]

MIN_CLUSTERS = 20
"""Fewer documents or strings give no interval: the percentiles would be too narrow."""
MIN_SEEDS_TO_RESAMPLE = 5
"""Fewer seeds give no bootstrap interval: 2 seeds have 3 resamples, 4 have 35."""
MAX_SEEDS_TO_FLIP = 20
"""2^20 patterns of signs; with more seeds the t interval needs no check."""


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


# ---------------------------------------------------------------- inside a model: documents


def cluster_bootstrap(
    values: ArrayLike,
    clusters: ArrayLike,
    statistic: str = "mean",
    n_draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """One number for many tokens, with a percentile interval from resampling whole clusters.

    Tokens of a document depend on each other, so documents are drawn, not tokens.

    Args:
        values: one number a token; nan means "has none" and is left out.
        clusters: which document or string each value belongs to (integers are fastest).
        statistic: `mean`, `median`, `q05` (any two digits), `sd` (population), `share above 0.5`.
        n_draws: resamples.
        seed: of the resampling.

    Returns:
        The statistic of all values (nan where there are none), without ends below `MIN_CLUSTERS`
        clusters.

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
    if len(numbers) == 0:
        return Interval(float("nan"), None, None, 0, 0)
    weights = _weights(len(unique), n_draws, seed)
    estimates = _statistic(numbers, owner, weights, statistic)
    return _percentile(estimates, len(numbers), len(unique))


def document_bootstrap(
    sums: ArrayLike, counts: ArrayLike, n_draws: int = 2000, seed: int = 0
) -> Interval:
    """`cluster_bootstrap` of a mean, from each document's sum and token count.

    For a paired difference of trained models, `sums` are differences of loss sums (averaged over
    seeds where there are several): the interval is for these models on new documents.

    Returns:
        sum(sums) / sum(counts), `n` tokens, without ends below `MIN_CLUSTERS` documents.
    """
    per_document = np.stack([np.asarray(sums, np.float64), np.asarray(counts, np.float64)])
    n_documents = per_document.shape[1]
    top, bottom = per_document @ _weights(n_documents, n_draws, seed).T  # [draw] each
    return _percentile(top / bottom, int(per_document[1].sum()), n_documents)


def _percentile(estimates: Floats, n: int, n_clusters: int) -> Interval:
    """The first of `estimates`, and the middle 95% of the others where there are any."""
    if len(estimates) == 1:
        return Interval(float(estimates[0]), None, None, n, n_clusters)
    low, high = np.nanquantile(estimates[1:], [0.025, 0.975])
    return Interval(float(estimates[0]), float(low), float(high), n, n_clusters)


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


def _statistic(values: Floats, owner: NDArray[np.intp], weights: Floats, name: str) -> Floats:
    """The statistic `name` under each row of cluster weights, [draw]."""
    if name == "mean":
        return _mean(values, owner, weights)
    if name == "sd":
        centred = values - values.mean()  # keeps the difference of the two moments accurate
        variance = _mean(centred**2, owner, weights) - _mean(centred, owner, weights) ** 2
        return np.sqrt(np.maximum(variance, 0))
    if name == "median":
        return _quantile(values, owner, weights, 0.5)
    if len(name) == 3 and name[0] == "q" and name[1:].isdigit():
        return _quantile(values, owner, weights, int(name[1:]) / 100)
    if name.startswith("share above "):
        above = values > float(name.removeprefix("share above "))
        return _mean(above.astype(np.float64), owner, weights)
    raise ValueError(f"no statistic called {name!r}: mean, median, q05, sd, share above 0.5")


def _mean(values: Floats, owner: NDArray[np.intp], weights: Floats) -> Floats:
    n_clusters = weights.shape[1]
    sums = np.bincount(owner, values, minlength=n_clusters)
    counts = np.bincount(owner, minlength=n_clusters)
    result: Floats = (weights @ sums) / (weights @ counts)
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
        rounding = 1e-12 * np.abs(per_seed).sum()
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
    num_sums: ArrayLike, den_sums: ArrayLike, counts: ArrayLike, n_draws: int = 2000, seed: int = 0
) -> Interval:
    """Ratio of two mean differences, resampling seeds and documents; percentile interval.

    One draw of documents serves all seeds of a resample, because they were measured on the same
    documents: drawing them afresh for each seed would average away what the seeds share, and give
    an interval that is too narrow.

    Args:
        num_sums: differences of loss sums, [seed document], nats.
        den_sums: the same for the denominator.
        counts: target tokens, [document].
        n_draws: resamples.
        seed: of the resampling.

    Returns:
        The ratio of the means over seeds. No ends below `MIN_SEEDS_TO_RESAMPLE` seeds or
        `MIN_CLUSTERS` documents: use `fieller` there.

    Source: science.md section 4.
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
    drawn = np.einsum("ds,qsd->qd", seeds, pair @ documents.T)
    low, high = np.quantile(drawn[0] / drawn[1], [0.025, 0.975])
    return Interval(ratio, float(low), float(high), n_seeds, n_documents)


def equivalence(interval: Interval, margin: float) -> Verdict:
    """Two one-sided tests at 5% each, read off the 90% interval of a difference.

    Args:
        interval: at level .90, in the unit of `margin`.
        margin: the difference that is too small to matter.

    Returns:
        `equivalent` if the whole interval is closer to 0 than the margin; `different` if the whole
        interval is farther; `inconclusive` else, also where there is no interval.

    Source: Schuirmann 1987; science.md section 4.
    """
    if interval.low is None or interval.high is None:
        return "inconclusive"
    if -margin < interval.low and interval.high < margin:
        return "equivalent"
    if interval.low > margin or interval.high < -margin:
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
