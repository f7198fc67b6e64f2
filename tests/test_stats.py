"""Statistics against closed forms, brute force, other libraries, and their nominal rates."""

from __future__ import annotations

import itertools
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.multitest import multipletests

from soluscope.comparison import stats

pytestmark = pytest.mark.arithmetic


def tokens(n_clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return values and clusters: documents of 1 to 30 tokens, each with a different mean."""
    random = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(n_clusters), random.integers(1, 31, n_clusters))
    return random.normal(size=n_clusters)[clusters] + random.normal(size=len(clusters)), clusters


def mean_of(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]


def correlation_of(sums: np.ndarray) -> np.ndarray:
    n, x, y, xy, xx, yy = sums.T
    return (xy / n - x * y / n**2) / np.sqrt((xx / n - (x / n) ** 2) * (yy / n - (y / n) ** 2))


@pytest.mark.parametrize(
    ("statistic", "expected"),
    [
        ("mean", np.mean),
        ("median", np.median),
        ("q05", lambda v: np.quantile(v, 0.05)),
        ("q95", lambda v: np.quantile(v, 0.95)),
        ("sd", np.std),
        ("share above 0.5", lambda v: np.mean(v > 0.5)),
    ],
)
@pytest.mark.parametrize("n_clusters", [3, 60])
def test_cluster_bootstrap_estimates_what_numpy_computes(statistic, expected, n_clusters):
    values, clusters = tokens(n_clusters, seed=1)
    interval = stats.cluster_bootstrap(values, clusters, statistic, n_draws=50)
    assert interval.value == pytest.approx(expected(values), rel=1e-12)
    assert (interval.n, interval.n_clusters) == (len(values), n_clusters)


@pytest.mark.parametrize("statistic", ["mean", "median", "q05", "sd", "share above 0.5"])
def test_every_bootstrap_draw_equals_the_statistic_of_the_repeated_tokens(statistic):
    values, clusters = tokens(30, seed=2)
    weights = stats._weights(30, 40, 0)
    q = stats._quantile_named(statistic)
    if q is None:
        sums, value = stats._sums(values, clusters, 30, statistic)
        draws = value(weights @ sums)
    else:
        draws = stats._quantile(values, clusters, weights, q)
    function = {
        "mean": np.mean,
        "median": np.median,
        "q05": lambda v: np.quantile(v, 0.05),
        "sd": np.std,
        "share above 0.5": lambda v: np.mean(v > 0.5),
    }[statistic]
    repeated = [function(np.repeat(values, row[clusters].astype(int))) for row in weights]
    np.testing.assert_allclose(draws, repeated, rtol=1e-10, atol=1e-12)


def test_quantiles_are_exact_with_more_values_than_bins_and_with_ties():
    random = np.random.default_rng(3)
    values = random.integers(0, 40, 5000).astype(float)
    clusters = random.integers(0, 25, 5000)
    weights = stats._weights(25, 30, 0)
    draws = stats._quantile(values, clusters, weights, 0.95)
    repeated = [np.quantile(np.repeat(values, row[clusters].astype(int)), 0.95) for row in weights]
    np.testing.assert_allclose(draws, repeated, rtol=1e-12)


def test_cluster_bootstrap_is_as_wide_as_a_cluster_robust_regression_says():
    # Sandwich variance of a regression on a constant: sum over clusters of squared residual sums.
    values, clusters = tokens(400, seed=4)
    residual_sums = np.bincount(clusters, values - values.mean())
    robust = np.sqrt((residual_sums**2).sum()) / len(values)
    interval = stats.cluster_bootstrap(values, clusters, n_draws=4000)
    assert (interval.high - interval.low) / (2 * 1.96) == pytest.approx(robust, rel=0.05)
    fit = OLS(values, np.ones(len(values))).fit(
        cov_type="cluster", cov_kwds={"groups": clusters, "use_correction": False}
    )
    assert robust == pytest.approx(fit.bse[0], rel=1e-9)


def test_dependent_tokens_give_a_wider_interval_than_independent_ones():
    values, clusters = tokens(60, seed=5)
    by_document = stats.cluster_bootstrap(values, clusters)
    by_token = stats.cluster_bootstrap(values, np.arange(len(values)))
    assert by_document.high - by_document.low > 2 * (by_token.high - by_token.low)


def test_cluster_bootstrap_drops_nan_and_takes_names_as_clusters():
    values, clusters = tokens(30, seed=6)
    holes = np.concatenate([values, [np.nan, np.nan]])
    names = np.array([f"document {c:03d}" for c in [*clusters, 0, 1]])
    assert stats.cluster_bootstrap(holes, names) == stats.cluster_bootstrap(values, clusters)


def test_no_interval_is_given_below_twenty_clusters():
    values, clusters = tokens(19, seed=7)
    interval = stats.cluster_bootstrap(values, clusters)
    assert interval.low is None
    assert interval.high is None
    assert interval.value == pytest.approx(values.mean())
    assert stats.bootstrap_mean(np.ones(19), np.ones(19)).low is None


@pytest.mark.parametrize("statistic", ["mean", "sd", "q05", "median", "q99", "share above 100"])
def test_no_interval_is_given_below_thirty_clusters(statistic):
    values = np.random.default_rng(41).permutation(300.0 + np.arange(300))
    few, enough = np.arange(290) % 29, np.arange(300) % 30
    assert stats.cluster_bootstrap(values[:290], few, statistic).low is None
    assert stats.cluster_bootstrap(values, enough, statistic).low is not None
    other = values[::-1].copy() ** 1.1
    difference = stats.statistic_difference
    assert difference(values[:290], other[:290], few, statistic).low is None
    assert difference(values, other, enough, statistic).low is not None


def test_all_nan_has_no_value_and_no_interval():
    interval = stats.cluster_bootstrap([np.nan] * 3, [0, 1, 2])
    assert np.isnan(interval.value)
    assert (interval.low, interval.n) == (None, 0)


def test_an_unknown_statistic_is_refused():
    with pytest.raises(ValueError, match="no statistic called 'mode'"):
        stats.cluster_bootstrap([1.0], [0], "mode")


def test_a_constant_has_an_interval_of_no_width():
    for statistic in ("mean", "median", "q05"):
        interval = stats.cluster_bootstrap(np.full(180, 7.0), np.arange(180) % 60, statistic)
        assert (interval.low, interval.value, interval.high) == (7.0, 7.0, 7.0)


def test_the_mean_of_documents_is_the_cluster_bootstrap_of_the_tokens():
    values, clusters = tokens(40, seed=8)
    from_sums = stats.bootstrap_mean(np.bincount(clusters, values), np.bincount(clusters))
    from_tokens = stats.cluster_bootstrap(values, clusters)
    assert from_sums.low == pytest.approx(from_tokens.low, rel=1e-9)
    assert from_sums.high == pytest.approx(from_tokens.high, rel=1e-9)
    assert (from_sums.n, from_sums.n_clusters) == (from_tokens.n, from_tokens.n_clusters)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values, clusters = tokens(40, seed=9)
    assert stats.cluster_bootstrap(values, clusters) == stats.cluster_bootstrap(values, clusters)
    assert stats.cluster_bootstrap(values, clusters) != stats.cluster_bootstrap(
        values, clusters, seed=1
    )


# ---------------------------------------------------------------- BCa


@pytest.mark.parametrize("level", [0.95, 0.90])
@pytest.mark.parametrize("statistic", ["mean", "sd", "share above 0.5"])
def test_bca_of_single_values_is_scipys_of_the_same_draws(statistic, level):
    # One value per cluster is the ordinary bootstrap. scipy uses our draws and our widened level.
    values = np.random.default_rng(30).exponential(size=45)
    function = {"mean": np.mean, "sd": np.std, "share above 0.5": share_above_half}[statistic]
    sums, value = stats._sums(values, np.arange(45), 45, statistic)
    drawn = SimpleNamespace(bootstrap_distribution=value(stats._weights(45, 2000, 0) @ sums)[1:])
    units = 45 * stats._freedom(statistic)
    widened = scipy.stats.norm.cdf(stats._z(level, units)[1]) * 2 - 1
    scipys = scipy.stats.bootstrap(
        (values,), function, n_resamples=0, bootstrap_result=drawn, confidence_level=widened
    ).confidence_interval
    ours = stats.cluster_bootstrap(values, np.arange(45), statistic, level=level, method="bca")
    assert (ours.low, ours.high) == pytest.approx((scipys.low, scipys.high), rel=1e-9)


def share_above_half(values: np.ndarray, axis: int) -> np.ndarray:
    return np.mean(values > 0.5, axis=axis)


def test_bca_of_unequal_clusters_is_scipys_bootstrap_of_the_clusters():
    random = np.random.default_rng(31)
    counts = random.integers(5, 60, 40)
    sums = counts * random.exponential(size=40)

    def mean(chosen):
        return sums[chosen].sum() / counts[chosen].sum()

    scipys = scipy.stats.bootstrap(
        (np.arange(40),), mean, vectorized=False, n_resamples=20_000, rng=random,
        confidence_level=scipy.stats.norm.cdf(stats._z(0.95, 40)[1]) * 2 - 1,
    )  # fmt: skip
    table = np.stack([sums, counts], axis=1)
    ours = stats.bootstrap_sums(table, stats._quotient, counts.sum(), n_draws=20_000)
    off = np.subtract((ours.low, ours.high), scipys.confidence_interval) / scipys.standard_error
    np.testing.assert_allclose(off, 0, atol=0.1)  # Monte Carlo; percentile bounds are .2 away
    percentile = stats.bootstrap_sums(
        table, stats._quotient, counts.sum(), n_draws=20_000, method="percentile"
    )
    assert percentile.high < ours.high - 0.15 * scipys.standard_error


# ---------------------------------------------------------------- studentised


def test_the_studentised_interval_is_that_of_resamples_made_one_by_one():
    random = np.random.default_rng(33)
    counts = random.integers(5, 60, 40).astype(float)
    sums = counts * random.lognormal(size=40)

    def mean_and_error(chosen):
        total, size = sums[chosen], counts[chosen]
        mean = total.sum() / size.sum()
        residuals = total - mean * size
        return mean, np.sqrt((residuals**2).sum() * 40 / 39) / size.sum()

    mean, error = mean_and_error(np.arange(40))
    t = []
    for weights in stats._weights(40, 2000, 0)[1:].astype(int):
        again, its_error = mean_and_error(np.repeat(np.arange(40), weights))
        t.append((again - mean) / its_error)
    n_effective = counts.sum() ** 2 / (counts**2).sum()
    low_t, high_t = np.quantile(t, scipy.stats.norm.cdf(stats._z(0.95, n_effective)))
    ours = stats.bootstrap_mean(sums, counts)
    assert ours.n_effective == pytest.approx(n_effective)
    assert (ours.low, ours.high) == pytest.approx((mean - high_t * error, mean - low_t * error))


def test_a_mean_of_skewed_documents_is_covered_where_bca_falls_short():
    def drawn(random):
        sizes = np.ceil(np.minimum(random.lognormal(7.5, 1.4, 45), 500))
        effects = random.lognormal(0, 1, 45) - np.exp(0.5)
        return sizes * effects, sizes

    random = np.random.default_rng(34)
    hits = np.zeros(2)
    for _ in range(1000):
        sums, sizes = drawn(random)
        ours = stats.bootstrap_mean(sums, sizes, n_draws=1000)
        table = np.stack([sums, sizes], axis=1)
        bca = stats.bootstrap_sums(table, stats._quotient, 1, n_draws=1000)
        hits += [each.low <= 0 <= each.high for each in (ours, bca)]
    assert hits[0] / 1000 >= 0.92
    assert hits[1] < hits[0] - 10


def test_a_studentised_interval_is_that_of_errors_by_moving_each_documents_weight():
    random = np.random.default_rng(42)
    owner = np.repeat(np.arange(40), random.integers(5, 30, 40))
    values = 5 + random.gamma(1.5, size=40)[owner] + random.normal(size=len(owner))

    def number(weights):
        return np.average(values, weights=weights[owner])

    def error(weights):
        moves = 1e-5 * np.eye(40)
        slopes = [(number(weights + step) - number(weights - step)) / 2e-5 for step in moves]
        return np.sqrt((np.square(slopes) * weights).sum() * 40 / 39)

    draws = stats._weights(40, 200, 0)
    whole, t = number(draws[0]), [(number(w) - number(draws[0])) / error(w) for w in draws[1:]]
    units = stats.effective_number(np.bincount(owner))
    top, bottom = np.quantile(t, scipy.stats.norm.cdf(stats._z(0.95, units)))
    expected = whole - bottom * error(draws[0]), whole - top * error(draws[0])
    ours = stats.cluster_bootstrap(values, owner, n_draws=200)
    assert (ours.low, ours.high) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("statistic", ["mean", "sd"])
def test_the_interval_of_a_difference_covers_it_where_documents_are_skewed(statistic):
    def interval(random):
        owner = np.repeat(np.arange(40), 20)
        shared = random.gamma(2, 0.5, 40)[owner]
        left = 3 + shared * random.normal(size=800) + shared
        right = 3 + random.normal(size=800) + shared
        right[::7] = np.nan
        return stats.statistic_difference(left, right, owner, statistic, n_draws=1000)

    # E shared^2 = 1.5 and var shared = .5, so the variances are 1.5 + .5 and 1 + .5
    truth = 0.0 if statistic == "mean" else np.sqrt(2) - np.sqrt(1.5)
    assert 0.93 <= coverage(interval, truth) <= 0.97


def test_few_long_documents_count_as_few():
    sizes = np.array([10_000.0] * 3 + [100.0] * 57)
    found = stats.bootstrap_mean(sizes, sizes)
    assert found.n_clusters == 60
    assert found.n_effective == pytest.approx(35_700**2 / (3e8 + 57e4))
    assert found.low is None
    assert stats.effective_number(np.full(60, 7)) == pytest.approx(60)
    assert stats.effective_number([]) == 0
    three = np.stack([sizes, 2 * sizes])
    assert stats.seeds_and_documents(three, sizes).low is None
    assert stats.fieller(three, 2 * three, sizes).low is None


def test_the_interval_of_a_mean_stays_among_the_values():
    values = np.repeat([1.0] * 29 + [0.2], 5)
    found = stats.cluster_bootstrap(values, np.repeat(np.arange(30), 5))
    assert found.high == 1.0
    assert found.low >= 0.2


def test_the_expected_maximum_of_normal_numbers_is_known():
    assert stats.expected_maximum(1) == pytest.approx(0, abs=1e-9)
    assert stats.expected_maximum(2) == pytest.approx(1 / np.sqrt(np.pi))
    assert stats.expected_maximum(3) == pytest.approx(1.5 / np.sqrt(np.pi))
    drawn = np.random.default_rng(35).standard_normal((200_000, 10)).max(axis=1)
    assert stats.expected_maximum(10) == pytest.approx(drawn.mean(), abs=0.01)


def test_two_level_bca_is_scipys_bootstrap_of_seeds_and_documents():
    random = np.random.default_rng(32)
    counts = random.integers(20, 60, 40)
    den = (0.04 + 0.01 * random.exponential(size=(8, 1)) + 0.02 * random.normal(size=40)) * counts
    num = 0.3 * den + 0.004 * random.normal(size=(8, 1)) * counts

    def ratio(seeds, documents):
        chosen = np.ix_(seeds, documents)
        return num[chosen].sum() / den[chosen].sum()

    scipys = scipy.stats.bootstrap(
        (np.arange(8), np.arange(40)), ratio, vectorized=False, n_resamples=20_000, rng=random,
        confidence_level=scipy.stats.norm.cdf(stats._z(0.95, 8)[1]) * 2 - 1,
    )  # fmt: skip
    ours = stats.two_level_bootstrap_ratio(num, den, counts, n_draws=20_000)
    off = np.subtract((ours.low, ours.high), scipys.confidence_interval) / scipys.standard_error
    np.testing.assert_allclose(off, 0, atol=0.15)


def test_few_units_widen_the_interval_to_students():
    # Normal scores: the mean's bootstrap is as symmetric as can be, and t is exact.
    values = scipy.stats.norm.ppf((np.arange(30) + 0.5) / 30)
    low, high = scipy.stats.t.interval(0.95, 29, values.mean(), scipy.stats.sem(values))
    for method in ("bca", "percentile"):
        interval = stats.cluster_bootstrap(values, np.arange(30), n_draws=40_000, method=method)
        assert (interval.low, interval.high) == pytest.approx((low, high), rel=0.04)


def test_draws_equal_to_the_number_count_half_as_below_it():
    draws = np.array([1.0, *[0.0] * 25, *[1.0] * 50, *[2.0] * 25])
    assert stats._ends(draws, 50, 0.95, acceleration=0.0) == pytest.approx(
        stats._ends(draws, 50, 0.95)
    )
    skewed = np.array([1.0, *[0.0] * 10, *[1.0] * 40, *[2.0] * 50])
    bias = scipy.stats.norm.ppf(0.30)
    z = 2 * bias + stats._z(0.80, 50)
    assert stats._ends(skewed, 50, 0.80, acceleration=0.0) == pytest.approx(
        np.quantile(skewed[1:], scipy.stats.norm.cdf(z))
    )


def test_numbers_that_are_often_undefined_have_no_interval():
    sums = np.stack([np.random.default_rng(0).normal(size=30), np.ones(30)], axis=1)

    def undefined(share):
        def value(sums):
            means = mean_of(sums)
            lowest = means[1:] < np.quantile(means[1:], share)
            return np.where([False, *lowest], np.nan, means)

        return value

    assert stats.bootstrap_sums(sums, undefined(0.06), 30, method="percentile").low is None
    few = stats.bootstrap_sums(sums, undefined(0.04), 30, method="percentile")
    drawn = undefined(0.04)(stats._weights(30, 2000, 0) @ sums)[1:]
    ends = np.nanquantile(drawn, scipy.stats.norm.cdf(stats._z(0.95, 30)))
    assert (few.low, few.high) == pytest.approx(tuple(ends), rel=1e-9)


def test_a_number_that_hangs_on_one_document_has_no_interval():
    top, bottom = np.zeros(30), np.zeros(30)
    top[3], bottom[3] = 2.0, 4.0
    interval = stats.bootstrap_sums(np.stack([top, bottom], axis=1), mean_of, 30)
    assert (interval.value, interval.low, interval.high) == (0.5, None, None)


def test_a_number_outside_all_its_draws_has_no_interval():
    # The number of different documents: a resample never contains all of them.
    interval = stats.bootstrap_sums(np.eye(30), lambda sums: (sums > 0).sum(axis=1) / 1.0, 30)
    assert (interval.value, interval.low) == (30, None)


# --- rounding -------------------------------------------------------------------------------------


def mean_difference(sums):
    """Return the difference of two columns' means, which has the rounding of these means."""
    return sums[:, 0] / sums[:, 2] - sums[:, 1] / sums[:, 2]


def two_columns(share: float, scale: float = 1.0) -> np.ndarray:
    """Return the sums of x, of x (1 - share) and of 1 over 60 clusters."""
    x = 28 * scale * np.random.default_rng(0).uniform(0.5, 1.5, 60)
    return np.stack([x, x * (1 - share), np.ones(60)], axis=1)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("share", [0.0, 2e-16, -1e-15])
def test_what_rounding_leaves_of_equal_numbers_is_zero(share, scale):
    interval = stats.bootstrap_sums(two_columns(share, scale), mean_difference, n=60)
    assert (interval.low, interval.value, interval.high) == (0, 0, 0)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_a_difference_of_one_in_ten_billion_is_real(scale):
    interval = stats.bootstrap_sums(two_columns(1e-10, scale), mean_difference, n=60)
    unit = two_columns(1e-10, scale)[:, 0].mean() * 1e-10
    assert interval.value == pytest.approx(unit, rel=1e-4)
    assert 0.8 * unit < interval.low < interval.value < interval.high < 1.2 * unit


def test_a_mean_of_tiny_values_is_real():
    """Its interval is as wide in proportion as that of large values, since nothing was cancelled."""
    values, clusters = tokens(60, seed=1)
    large = stats.cluster_bootstrap(values, clusters)
    tiny = stats.cluster_bootstrap(values * 1e-30, clusters)
    wanted = [number * 1e-30 for number in (large.low, large.value, large.high)]
    assert [tiny.low, tiny.value, tiny.high] == pytest.approx(wanted, rel=1e-9, abs=0)


def test_draws_that_differ_from_the_number_by_rounding_equal_it():
    draws = np.array([3.6e-14, *np.zeros(200)])
    assert stats._ends(draws, 200, 0.95, acceleration=0.0) == (None, None)
    ends = stats._ends(draws, 200, 0.95, acceleration=0.0, rounding=1e-13)
    assert ends == (3.6e-14, 3.6e-14)


def test_a_number_has_the_rounding_of_what_it_follows_from():
    of_sums = np.array([[1.0, 2.0, 1.0]] * 30)
    difference = stats._rounding(mean_difference, of_sums)
    assert stats.ROUNDING < difference < 6 * stats.ROUNDING
    small = stats._rounding(lambda sums: sums[:, 0] * sums[:, 1] * 1e-30, of_sums)
    assert small < 2e3 * 4 * stats.ROUNDING * 1e-30


def test_values_that_rounding_tells_apart_have_no_spread():
    clusters = np.arange(1000) % 50
    rounded = 0.1 * (1 + 2e-16 * np.tile([0, 1, 2, 3], 250))
    assert len(np.unique(rounded)) > 1
    interval = stats.cluster_bootstrap(rounded, clusters, "sd")
    assert (interval.low, interval.value, interval.high) == (0, 0, 0)
    assert stats.n_distinct(rounded) == 1
    spread = 0.1 * (1 + 1e-9 * np.tile([0, 1, 2, 3], 250))
    interval = stats.cluster_bootstrap(spread, clusters, "sd")
    assert interval.value == pytest.approx(np.std(spread), rel=1e-5)
    assert stats.n_distinct(spread) == 4
    assert stats.order_of([3.0, 0.3, 0.1 + 0.2, -1.0]).tolist() == [2, 1, 1, 0]
    assert (stats.n_distinct([]), stats.n_distinct([0.0, 0.0])) == (0, 1)


def test_sums_must_be_a_table():
    with pytest.raises(
        ValueError, match=r"sums has shape \(30,\); it must have one row per cluster"
    ):
        stats.bootstrap_sums(np.ones(30), mean_of, 30)
    empty = stats.bootstrap_sums(np.ones((0, 2)), mean_of, 0)
    assert np.isnan(empty.value)
    assert empty.low is None


# ---------------------------------------------------------------- coverage

N_SETS = 2000
"""At 95% the share of covering intervals has a standard error of half a percent."""


def documents(random: np.random.Generator, n_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Return standard normal tokens in documents of 5 to 29; 30% of the variance is between documents."""
    owner = np.repeat(np.arange(n_clusters), random.integers(5, 30, n_clusters))
    own, shared = random.normal(size=len(owner)), random.normal(size=n_clusters)
    return np.sqrt(0.7) * own + np.sqrt(0.3) * shared[owner], owner


def coverage(interval, truth: float, n_sets: int = N_SETS) -> float:
    """Return the share of intervals `interval(random)` that contain the truth."""
    random = np.random.default_rng(10)
    made = [interval(random) for _ in range(n_sets)]
    return float(np.mean([each.low <= truth <= each.high for each in made]))


@pytest.mark.parametrize(
    ("statistic", "truth", "n_clusters", "method"),
    [
        ("mean", 0.0, stats.MIN_CLUSTERS + 20, "studentised"),
        ("mean", 0.0, 60, "studentised"),
        ("mean", 0.0, 60, "bca"),
        ("mean", 0.0, 60, "percentile"),
        ("sd", 1.0, 60, "bca"),
        ("share above 1", 1 - scipy.stats.norm.cdf(1), 60, "bca"),
        ("share above 1", 1 - scipy.stats.norm.cdf(1), 60, "percentile"),
        ("median", 0.0, 60, "percentile"),
        ("q95", scipy.stats.norm.ppf(0.95), 60, "percentile"),
        ("q99", scipy.stats.norm.ppf(0.99), 60, "percentile"),
    ],
)
def test_cluster_intervals_cover_the_truth_as_often_as_they_say(
    statistic, truth, n_clusters, method
):
    def interval(random):
        values, owner = documents(random, n_clusters)
        n_draws = (
            500 if statistic in ("median", "q95", "q99") else 2000
        )  # quantiles take 20 times longer
        return stats.cluster_bootstrap(values, owner, statistic, n_draws, method=method)

    assert 0.93 <= coverage(interval, truth) <= 0.97


def test_intervals_at_90_percent_cover_90_percent():
    def interval(random):
        return stats.cluster_bootstrap(*documents(random, 60), n_draws=1000, level=0.90)

    assert 0.88 <= coverage(interval, 0.0) <= 0.92


@pytest.mark.parametrize("method", ["bca", "percentile"])
@pytest.mark.parametrize("n_clusters", [stats.MIN_CLUSTERS, 60])
def test_interval_of_a_ratio_covers_it_as_often_as_it_says(n_clusters, method):
    def interval(random):
        counts = random.integers(5, 30, n_clusters)
        level = random.gamma(2, 0.5, n_clusters)
        top = counts * (0.5 * level + 0.3 * random.normal(size=n_clusters))
        noise = np.sqrt(counts) * random.normal(size=(2, n_clusters))
        sums = np.stack([top + noise[0], counts * level + 0.3 * noise[1]], axis=1)
        return stats.bootstrap_sums(sums, mean_of, counts.sum(), n_draws=1000, method=method)

    assert 0.93 <= coverage(interval, 0.5) <= 0.97


def moments(x: np.ndarray, y: np.ndarray, owner: np.ndarray) -> np.ndarray:
    parts = (np.ones(len(x)), x, y, x * y, x * x, y * y)
    return np.stack([np.bincount(owner, part) for part in parts], axis=1)


@pytest.mark.parametrize(("rho", "n_clusters"), [(0.0, 200), (0.6, 200)])
@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_interval_of_a_correlation_covers_it_as_often_as_it_says(rho, n_clusters, method):
    def interval(random):
        owner = np.repeat(np.arange(n_clusters), random.integers(5, 30, n_clusters))
        own, shared = random.normal(size=(2, len(owner))), random.normal(size=(2, n_clusters))
        x, other = np.sqrt(0.7) * own + np.sqrt(0.3) * shared[:, owner]
        y = rho * x + np.sqrt(1 - rho**2) * other
        sums = moments(x, y, owner)
        return stats.bootstrap_sums(sums, correlation_of, len(x), n_draws=1000, method=method)

    assert 0.93 <= coverage(interval, rho) <= 0.97


def test_interval_of_eight_seeds_covers_the_truth_as_often_as_it_says():
    assert 0.93 <= coverage(lambda random: stats.paired_seeds(random.normal(size=8)), 0.0) <= 0.97


def differences(random: np.random.Generator, n_seeds: int, share: float = 1.0) -> np.ndarray:
    """Return loss sums [seed document] of 50 documents of 100 tokens, .02 nats per token on average.

    Seeds, documents, and the interaction of the two each have a standard deviation of .003 nats.
    """
    noise = random.normal(size=(n_seeds, 1)) + random.normal(size=50)
    noise = noise + random.normal(size=(n_seeds, 50))
    return (0.02 * share + 0.003 * noise) * 100


def test_interval_for_new_seeds_and_documents_covers_as_often_as_it_says_where_seeds_matter():
    counts = np.full(50, 100.0)

    def interval(random):
        return stats.seeds_and_documents(differences(random, 8), counts)

    assert 0.93 <= coverage(interval, 0.02) <= 0.97


def test_fieller_covers_as_often_as_it_says():
    counts = np.full(50, 100.0)

    def interval(random):
        return stats.fieller(differences(random, 8, 0.3), differences(random, 8), counts)

    assert 0.93 <= coverage(interval, 0.3) <= 0.97


@pytest.mark.parametrize("n_seeds", [stats.MIN_SEEDS_TO_RESAMPLE, 8])
def test_two_level_bca_covers_as_often_as_it_says(n_seeds):
    counts = np.full(50, 100.0)

    def interval(random):
        num, den = differences(random, n_seeds, 0.3), differences(random, n_seeds)
        return stats.two_level_bootstrap_ratio(num, den, counts, n_draws=1000)

    assert 0.93 <= coverage(interval, 0.3) <= 0.97


# ---------------------------------------------------------------- p-values


def test_mean_p_of_equal_documents_is_the_t_test():
    means = np.random.default_rng(33).normal(0.1, size=(35, 7))
    ours = stats.mean_p(means * 4, np.full(35, 4))
    np.testing.assert_allclose(ours, scipy.stats.ttest_1samp(means, 0).pvalue, rtol=1e-9)


def test_mean_p_of_many_columns_is_the_jackknifes_t_of_each():
    random = np.random.default_rng(34)
    counts = random.integers(1, 40, (30, 5)).astype(float)
    sums = counts * random.normal(0.2, size=(30, 5))
    ours = stats.mean_p(sums, counts)
    one_by_one = []
    for s, c in zip(sums.T, counts.T, strict=True):
        left_out = np.array([np.delete(s, i).sum() / np.delete(c, i).sum() for i in range(30)])
        error = np.sqrt(29 / 30 * ((left_out - left_out.mean()) ** 2).sum())
        one_by_one.append(2 * scipy.stats.t.sf(abs(s.sum() / c.sum()) / error, 29))
    np.testing.assert_allclose(ours, one_by_one, rtol=1e-9)
    np.testing.assert_allclose(
        stats.mean_p(sums, counts[:, 0]), stats.mean_p(sums, np.tile(counts[:, :1], 5))
    )


def test_p_of_the_mean_is_uniform_where_there_is_nothing():
    random = np.random.default_rng(35)
    counts = random.integers(5, 30, 60)
    means = random.normal(size=(60, 3000)) + random.normal(size=(60, 3000)) / np.sqrt(
        counts[:, None]
    )
    p = stats.mean_p(means * counts[:, None], counts)
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.05
    assert np.mean(p < 0.05) == pytest.approx(0.05, abs=0.012)


def test_there_is_no_p_of_a_dead_neuron_or_of_few_documents():
    sums = np.random.default_rng(37).normal(size=(35, 3))
    sums[:, 1] = 0
    assert np.isnan(stats.mean_p(sums, np.ones(35))).tolist() == [False, True, False]
    assert np.isnan(stats.mean_p(sums[:19], np.ones(19))).all()
    with pytest.raises(ValueError, match=r"sums \(35, 3\) and counts \(34,\)"):
        stats.mean_p(sums, np.ones(34))


def test_holm_by_hand():
    adjusted = stats.holm({"a": 0.01, "b": 0.04, "none": float("nan"), "c": 0.03})
    assert np.isnan(adjusted.pop("none"))
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert stats.holm({}) == {}


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_holm_is_that_of_statsmodels(n):
    p = np.random.default_rng(n).uniform(size=n).round(1) ** 2  # with ties, zeros and ones
    adjusted = stats.holm({str(i): value for i, value in enumerate(p)})
    assert [*adjusted.values()] == multipletests(p, method="holm")[1].tolist()


def test_holm_keeps_the_chance_of_any_false_finding():
    random = np.random.default_rng(38)
    any_false = []
    for _ in range(2000):
        # Four tests on the same eight seeds; only the first difference is real.
        seeds = random.normal(size=(4, 8)) + random.normal(size=8) + [[3.0], [0], [0], [0]]
        p = {str(i): stats.paired_seeds(numbers).p for i, numbers in enumerate(seeds)}
        adjusted = stats.holm(p)
        any_false.append(min(adjusted[name] for name in "123") <= 0.05)
    assert np.mean(any_false) <= 0.05


def test_benjamini_hochberg_is_scipys_and_passes_nan_on():
    p = np.random.default_rng(39).uniform(size=(4, 50)) ** 2
    p[1, 3] = np.nan
    adjusted = stats.benjamini_hochberg(p)
    assert adjusted.shape == p.shape
    tested = ~np.isnan(p)
    assert np.isnan(adjusted[1, 3])
    np.testing.assert_allclose(
        adjusted[tested], scipy.stats.false_discovery_control(p[tested]), rtol=1e-12
    )
    assert np.isnan(stats.benjamini_hochberg([np.nan, np.nan])).all()


def test_benjamini_hochberg_keeps_the_share_of_false_findings():
    random = np.random.default_rng(40)
    false_shares = []
    for _ in range(300):
        shift = np.where(np.arange(200) < 40, 0.6, 0.0)
        found = stats.benjamini_hochberg(
            stats.mean_p(random.normal(shift, 1, size=(30, 200)), np.ones(30))
        )
        claimed = found <= 0.10
        false_shares.append(claimed[40:].sum() / max(1, claimed.sum()))
    # The expected share is q times the share of columns without an effect: .08.
    assert np.mean(false_shares) == pytest.approx(0.08, abs=0.008)


def test_importing_the_statistics_stays_light():
    program = "import sys, soluscope.comparison.stats; print({'torch', 'statsmodels', 'pandas'} & set(sys.modules))"
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "set()"


# ---------------------------------------------------------------- seeds


def test_paired_interval_and_p_equal_scipys():
    a, b = np.random.default_rng(11).normal(size=(2, 8))
    ours = stats.paired_seeds(a - b)
    low, high = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((low, high), rel=1e-10)
    exact = scipy.stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    )
    assert ours.p == pytest.approx(exact.pvalue)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_sign_flip_p_equals_brute_force(n):
    numbers = np.random.default_rng(n).normal(size=n) + 0.5
    sums = [abs(np.dot(signs, numbers)) for signs in itertools.product((-1, 1), repeat=n)]
    expected = np.mean(np.array(sums) >= abs(numbers.sum()) - 1e-12)
    assert stats.paired_seeds(numbers).p == expected


def test_eight_seeds_of_one_sign_give_the_smallest_p_there_is():
    assert stats.paired_seeds(np.arange(1.0, 9.0)).p == 2 / 256


def test_sign_flip_p_is_uniform_where_there_is_no_difference():
    # p takes each of 32 values equally often: P(p <= level) equals the level at these values, and is less between.
    random = np.random.default_rng(12)
    p = np.array([stats.paired_seeds(random.normal(size=6)).p for _ in range(4000)])
    times = np.bincount(np.round(p * 32).astype(int), minlength=33)
    assert times[0] == 0
    assert scipy.stats.chisquare(times[1:]).pvalue > 0.05
    np.testing.assert_allclose(p * 32, np.round(p * 32))


def test_one_seed_gives_no_interval():
    assert stats.paired_seeds([0.3]) == stats.Interval(0.3, None, None, 1, 1, 1.0)
    counts = np.full(30, 10.0)
    assert stats.seeds_and_documents(np.ones((1, 30)), counts).low is None
    assert stats.fieller(np.ones((1, 30)), np.ones((1, 30)), counts).low is None
    with pytest.raises(ValueError, match="no seed"):
        stats.paired_seeds([])


def test_seeds_and_documents_by_hand():
    # Equal documents: the jackknife term is the variance of document means / n_documents.
    random = np.random.default_rng(13)
    sums, counts = random.normal(size=(3, 50)), np.full(50, 4.0)
    interval = stats.seeds_and_documents(sums, counts)
    per_seed = sums.sum(axis=1) / 200
    per_document = sums.mean(axis=0) / 4
    se = np.sqrt(per_seed.var(ddof=1) / 3 + per_document.var(ddof=1) / 50)
    half = 4.302652729911275 * se  # t(.975, 2)
    assert interval.value == pytest.approx(per_seed.mean())
    assert interval.high - interval.value == pytest.approx(half)
    assert (interval.n, interval.n_clusters) == (3, 50)


def test_without_document_noise_only_seeds_count():
    per_seed = np.array([0.01, 0.02, 0.04])
    counts = np.arange(1.0, 61.0)
    ours = stats.seeds_and_documents(per_seed[:, None] * counts, counts)
    theirs = stats.paired_seeds(per_seed)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


@pytest.mark.parametrize("n_seeds", [2, 4])
def test_interval_for_new_seeds_and_documents_covers_at_least_as_often_as_it_says(n_seeds):
    random = np.random.default_rng(14)
    n_sets, covered = 2000, 0
    for _ in range(n_sets):
        counts = random.integers(50, 300, 40).astype(float)
        per_token = (
            random.normal(size=(n_seeds, 1)) * 0.003
            + random.normal(size=(1, 40)) * 0.01
            + random.normal(size=(n_seeds, 40)) * 0.01
        )
        interval = stats.seeds_and_documents(per_token * counts, counts)
        covered += interval.low <= 0 <= interval.high
    assert covered / n_sets >= 0.94


def test_fieller_without_document_noise_is_the_textbook_formula():
    num, den = np.array([0.2, 0.3, 0.25, 0.35]), np.array([1.0, 1.1, 0.9, 1.2])
    counts = np.full(30, 5.0)
    ours = stats.fieller(np.outer(num, counts), np.outer(den, counts), counts)
    t = scipy.stats.t.ppf(0.975, 3)
    v = np.cov(num, den) / 4
    g = t**2 * v[1, 1] / den.mean() ** 2
    ratio = num.mean() / den.mean()
    root = np.sqrt(
        v[0, 0] - 2 * ratio * v[0, 1] + ratio**2 * v[1, 1] - g * (v[0, 0] - v[0, 1] ** 2 / v[1, 1])
    )
    centre = ratio - g * v[0, 1] / v[1, 1]
    expected = ((centre + sign * t / den.mean() * root) / (1 - g) for sign in (-1, 1))
    assert (ours.low, ours.high) == pytest.approx(tuple(expected))


def test_fieller_ends_exist_exactly_where_the_denominator_is_separated_from_zero():
    random = np.random.default_rng(15)
    counts = random.integers(10, 40, 50).astype(float)
    n_separated = 0
    for _ in range(300):
        num, den = random.normal(size=(2, 3, 50)) + random.normal(size=(2, 1, 1)) * 2
        separated = stats.seeds_and_documents(den, counts)
        excludes_zero = separated.low > 0 or separated.high < 0
        assert (stats.fieller(num, den, counts).low is not None) == excludes_zero
        n_separated += excludes_zero
    assert 30 < n_separated < 270


def test_two_level_bootstrap_of_a_constant_share_has_no_width():
    den = np.random.default_rng(16).normal(1, 0.1, size=(8, 30))
    interval = stats.two_level_bootstrap_ratio(0.4 * den, den, np.full(30, 10.0))
    assert (interval.low, interval.value, interval.high) == pytest.approx((0.4, 0.4, 0.4))


def test_two_level_bootstrap_agrees_with_fieller_when_there_are_many_seeds():
    random = np.random.default_rng(17)
    counts = np.full(60, 20.0)
    den = (1 + 0.2 * random.normal(size=(16, 1)) + 0.5 * random.normal(size=(1, 60))) * 20
    num = (0.3 + 0.1 * random.normal(size=(16, 1)) + 0.3 * random.normal(size=(1, 60))) * 20
    drawn = stats.two_level_bootstrap_ratio(num, den, counts)
    exact = stats.fieller(num, den, counts)
    assert drawn.value == pytest.approx(exact.value)
    assert drawn.high - drawn.low == pytest.approx(exact.high - exact.low, rel=0.2)


def test_few_seeds_are_not_resampled():
    sums = np.random.default_rng(18).normal(1, 0.1, size=(4, 30))
    assert stats.two_level_bootstrap_ratio(sums, sums, np.ones(30)).low is None


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.004, 0.004, "equivalent"),
        (0.001, 0.004, "equivalent"),
        (0.006, 0.02, "different"),
        (-0.02, -0.0051, "different"),
        (0.001, 0.02, "inconclusive"),
        (-0.005, 0.001, "inconclusive"),
        (None, None, "inconclusive"),
    ],
)
def test_equivalence_needs_the_whole_interval_inside_the_margin(low, high, verdict):
    assert stats.equivalence(stats.Interval(0.0, low, high, 8, 8), 0.005) == verdict


def test_equivalence_is_to_what_the_number_is_held_against():
    interval = stats.Interval(0.701, 0.697, 0.704, 8, 8)
    assert stats.equivalence(interval, 0.005, around=0.7) == "equivalent"
    assert stats.equivalence(interval, 0.005, around=0.69) == "different"
    assert stats.equivalence(interval, 0.005) == "different"
    assert stats.equivalence(interval, 0.002, around=0.7) == "inconclusive"


def test_equivalence_is_wrongly_claimed_at_the_margin_in_one_case_of_twenty():
    random = np.random.default_rng(19)
    claimed = [
        stats.equivalence(
            stats.paired_seeds(random.normal(0.005, 0.001, size=6), level=0.90), 0.005
        )
        == "equivalent"
        for _ in range(3000)
    ]
    assert np.mean(claimed) == pytest.approx(0.05, abs=0.012)


def test_fit_finds_the_dilution_by_bos_that_was_put_in():
    n = np.arange(1.0, 33.0)
    fits = stats.fit_aicc(n, 311.6 - 14.4 / n)
    assert (fits["a + b/n"].a, fits["a + b/n"].b) == pytest.approx((311.6, -14.4))
    assert fits["a + b/n"].r2 == pytest.approx(1)
    assert fits["a + b/n"].aicc < fits["a + b log n"].aicc


def test_fit_finds_the_logarithm_that_was_put_in():
    n = np.arange(1.0, 33.0)
    y = 300 + 5 * np.log(n) + 0.1 * np.random.default_rng(20).normal(size=32)
    fits = stats.fit_aicc(n, y)
    assert fits["a + b log n"].b == pytest.approx(5, rel=0.05)
    assert fits["a + b log n"].aicc < fits["a + b/n"].aicc


def test_fit_agrees_with_linregress_and_the_aicc_formula():
    random = np.random.default_rng(21)
    n, y = np.arange(3.0, 20.0), random.normal(size=17)
    fit = stats.fit_aicc(n, y)["a + b log n"]
    line = scipy.stats.linregress(np.log(n), y)
    rss = ((y - line.intercept - line.slope * np.log(n)) ** 2).sum()
    assert (fit.a, fit.b) == pytest.approx((line.intercept, line.slope))
    assert fit.r2 == pytest.approx(line.rvalue**2)
    assert fit.aicc == pytest.approx(17 * np.log(rss / 17) + 6 + 24 / 13)


def test_fit_refuses_what_it_cannot_judge():
    with pytest.raises(ValueError, match="4 points"):
        stats.fit_aicc([1, 2, 3, 4, 5], [1, 2, 3, 4, float("nan")])
    with pytest.raises(ValueError, match="above 0"):
        stats.fit_aicc([0, 1, 2, 3, 4], [1, 2, 3, 4, 5])


# ---------------------------------------------------------------- two models at the same tokens


@pytest.mark.parametrize("statistic", ["mean", "median", "q95", "sd", "share above 0.5"])
def test_a_difference_of_statistics_resamples_both_models_together(statistic: str) -> None:
    """The same documents are drawn for both, so their common effect cancels; compared with resampling by hand."""
    generator = np.random.default_rng(0)
    document = np.repeat(np.arange(45), 20)
    shared = generator.normal(size=45)[document]
    left = shared + generator.normal(size=900)
    right = shared + generator.normal(size=900)
    right[::7] = np.nan  # each statistic is of the tokens that have a value
    found = stats.statistic_difference(left, right, document, statistic, n_draws=400)

    def value(values: np.ndarray) -> float:
        known = values[~np.isnan(values)]
        if statistic == "sd":
            return float(known.std())
        if statistic.startswith("share"):
            return float((known > 0.5).mean())
        return float(
            {"mean": np.mean, "median": np.median, "q95": lambda v: np.quantile(v, 0.95)}[
                statistic
            ](known)
        )

    assert found.value == pytest.approx(value(left) - value(right), abs=1e-12)
    assert (found.n, found.n_clusters) == (900, 45)
    draws = []
    for _ in range(400):
        rows = (document == generator.integers(45, size=45)[:, None]).nonzero()[1]
        draws.append(value(left[rows]) - value(right[rows]))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.35 * (high - low))
    assert found.high == pytest.approx(high, abs=0.35 * (high - low))
    apart = stats.cluster_bootstrap(left, document, statistic)
    assert found.high - found.low < 1.5 * (apart.high - apart.low)


def test_a_model_minus_itself_is_0() -> None:
    values, document = np.random.default_rng(1).normal(size=400), np.repeat(np.arange(40), 10)
    for statistic in ("mean", "q05", "sd"):
        found = stats.statistic_difference(values, values, document, statistic)
        assert (found.value, found.low, found.high) == (0, 0, 0)
    nothing = stats.statistic_difference(values, np.full(400, np.nan), document)
    assert np.isnan(nothing.value)
    assert nothing.low is None
