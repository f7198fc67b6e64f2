"""Statistics against closed forms, brute force, other libraries, and their own promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from soluscope import stats


def tokens(n_clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents of 1 to 30 tokens, each with a mean of its own."""
    random = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(n_clusters), random.integers(1, 31, n_clusters))
    return random.normal(size=n_clusters)[clusters] + random.normal(size=len(clusters)), clusters


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
    draws = stats._statistic(values, clusters, weights, statistic)
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
    draws = stats._statistic(values, clusters, weights, "q95")
    repeated = [np.quantile(np.repeat(values, row[clusters].astype(int)), 0.95) for row in weights]
    np.testing.assert_allclose(draws, repeated, rtol=1e-12)


def test_cluster_bootstrap_is_as_wide_as_a_cluster_robust_regression_says():
    # Sandwich variance of a regression on a constant: sum over clusters of squared residual sums.
    values, clusters = tokens(400, seed=4)
    residual_sums = np.bincount(clusters, values - values.mean())
    robust = np.sqrt((residual_sums**2).sum()) / len(values)
    interval = stats.cluster_bootstrap(values, clusters, n_draws=4000)
    assert (interval.high - interval.low) / (2 * 1.96) == pytest.approx(robust, rel=0.05)
    sm = pytest.importorskip("statsmodels.api")
    fit = sm.OLS(values, np.ones(len(values))).fit(
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
    assert stats.document_bootstrap(np.ones(19), np.ones(19)).low is None


def test_all_nan_has_no_value_and_no_interval():
    interval = stats.cluster_bootstrap([np.nan] * 3, [0, 1, 2])
    assert np.isnan(interval.value)
    assert (interval.low, interval.n) == (None, 0)


def test_an_unknown_statistic_is_refused():
    with pytest.raises(ValueError, match="no statistic called 'mode'"):
        stats.cluster_bootstrap([1.0], [0], "mode")


def test_a_constant_has_an_interval_of_no_width():
    for statistic in ("mean", "median", "q05"):
        interval = stats.cluster_bootstrap(np.full(100, 7.0), np.arange(100) % 25, statistic)
        assert (interval.low, interval.value, interval.high) == (7.0, 7.0, 7.0)


def test_document_bootstrap_is_the_cluster_bootstrap_of_the_tokens():
    values, clusters = tokens(40, seed=8)
    from_sums = stats.document_bootstrap(np.bincount(clusters, values), np.bincount(clusters))
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


def test_cluster_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(10)
    n_sets, covered = 2000, 0
    for _ in range(n_sets):
        counts = random.integers(5, 30, 60)
        sums = counts * random.normal(size=60) + np.sqrt(counts) * random.normal(size=60)
        interval = stats.document_bootstrap(sums, counts, n_draws=500)
        covered += interval.low <= 0 <= interval.high
    assert 0.93 <= covered / n_sets <= 0.97


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
    random = np.random.default_rng(12)
    p = np.array([stats.paired_seeds(random.normal(size=6)).p for _ in range(3000)])
    for level in (1 / 32, 4 / 32, 0.25, 0.5, 0.75):
        assert np.mean(p <= level) == pytest.approx(level, abs=0.027)


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
    sums, counts = random.normal(size=(3, 25)), np.full(25, 4.0)
    interval = stats.seeds_and_documents(sums, counts)
    per_seed = sums.sum(axis=1) / 100
    per_document = sums.mean(axis=0) / 4
    se = np.sqrt(per_seed.var(ddof=1) / 3 + per_document.var(ddof=1) / 25)
    half = 4.302652729911275 * se  # t(.975, 2)
    assert interval.value == pytest.approx(per_seed.mean())
    assert interval.high - interval.value == pytest.approx(half)
    assert (interval.n, interval.n_clusters) == (3, 25)


def test_without_document_noise_only_seeds_count():
    per_seed = np.array([0.01, 0.02, 0.04])
    counts = np.arange(1.0, 31.0)
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
    counts = np.full(20, 5.0)
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
    counts = random.integers(10, 40, 25).astype(float)
    n_separated = 0
    for _ in range(300):
        num, den = random.normal(size=(2, 3, 25)) + random.normal(size=(2, 1, 1)) * 2
        separated = stats.seeds_and_documents(den, counts)
        excludes_zero = separated.low > 0 or separated.high < 0
        assert (stats.fieller(num, den, counts).low is not None) == excludes_zero
        n_separated += excludes_zero
    assert 30 < n_separated < 270


def test_two_level_bootstrap_of_a_constant_share_has_no_width():
    den = np.random.default_rng(16).normal(1, 0.1, size=(6, 30))
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
