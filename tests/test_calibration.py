"""Estimates from sums over strings, the conditions of gates, and the rates of false positives."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

from soluscope import plugins
from soluscope.comparison.stats import Interval
from soluscope.evaluation import calibration
from soluscope.evaluation.calibration import judge, untrained_run
from soluscope.probes import Gate, _estimates

pytestmark = pytest.mark.arithmetic

RNG = np.random.default_rng(0)
STRING = np.sort(RNG.integers(0, 30, 400))
X = RNG.normal(size=400) + STRING / 10
Y = X + RNG.normal(size=400)
Z = X - 0.5 * Y + RNG.normal(size=400)


def value_of(estimate, weights=None):
    weights = np.ones((1, len(estimate.sums))) if weights is None else weights
    return estimate.value(weights @ estimate.sums)


def partial_spearman(x, y, z):
    """Return the correlation of the residuals of ranks."""
    ranks = [scipy_stats.rankdata(v) for v in (x, y, z)]
    residuals = [r - np.polyval(np.polyfit(ranks[2], r, 1), ranks[2]) for r in ranks[:2]]
    return scipy_stats.pearsonr(*residuals)[0]


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (_estimates.ratio("q", X, Y, STRING), X.mean() / Y.mean()),
        (_estimates.slope("q", X, Y, STRING), scipy_stats.linregress(X, Y).slope),
        (_estimates.correlation("q", X, Y, STRING), scipy_stats.pearsonr(X, Y)[0]),
        (_estimates.rank_correlation("q", X, Y, STRING), scipy_stats.spearmanr(X, Y)[0]),
        (_estimates.rank_correlation("q", X, Y, STRING, given=[Z]), partial_spearman(X, Y, Z)),
        (_estimates.mean_over_strings("q", Y), Y.mean()),
    ],
)
def test_a_number_from_sums_is_what_scipy_gives_from_tokens(made, wanted):
    assert value_of(made)[0] == pytest.approx(wanted, rel=1e-9)
    assert made.n == 400


def test_a_string_drawn_twice_counts_as_its_tokens_written_twice():
    made = _estimates.correlation("q", X, Y, STRING)
    twice = STRING == 7
    weights = np.ones(len(made.sums))
    weights[7] = 2
    wanted = scipy_stats.pearsonr(np.r_[X, X[twice]], np.r_[Y, Y[twice]])[0]
    assert value_of(made, weights[None])[0] == pytest.approx(wanted, rel=1e-9)


def test_a_token_without_a_value_is_left_out_of_all_sums():
    holes = np.where(np.arange(400) % 5 == 0, np.nan, Y)
    kept = ~np.isnan(holes)
    for make in (_estimates.correlation, _estimates.rank_correlation, _estimates.slope):
        full = value_of(make("q", X[kept], Y[kept], STRING[kept]))
        assert value_of(make("q", X, holes, STRING))[0] == pytest.approx(full[0])


def test_a_correlation_with_a_constant_is_undefined_and_not_zero():
    assert np.isnan(value_of(_estimates.correlation("q", X, np.ones(400), STRING)))
    rounded = 0.1 * (1 + 2e-16 * np.tile([0, 1, 2, 3], 100))
    assert len(np.unique(rounded)) > 1
    assert np.isnan(value_of(_estimates.correlation("q", X, rounded, STRING)))
    assert np.isnan(value_of(_estimates.rank_correlation("q", X, rounded, STRING)))
    assert np.isnan(value_of(_estimates.slope("q", rounded, X, STRING)))
    tiny = 1e-20 * Y
    assert value_of(_estimates.correlation("q", X, tiny, STRING)) == pytest.approx(
        value_of(_estimates.correlation("q", X, Y, STRING))
    )
    assert np.isnan(value_of(_estimates.rank_correlation("q", X, np.ones(400), STRING)))


@pytest.mark.parametrize(
    ("gate", "interval", "passed"),
    [
        (Gate("c", "q", above=0.5), (0.7, 0.6, 0.8), True),
        (Gate("c", "q", above=0.5), (0.7, 0.4, 0.8), False),
        (Gate("c", "q", above=0.5), (0.7, None, None), False),
        (Gate("c", "q", below=-0.5), (-0.7, -0.8, -0.6), True),
        (Gate("c", "q", below=-0.5), (-0.7, -0.8, -0.4), False),
        (Gate("c", "q", above=0.5, truth=0.72), (0.7, 0.6, 0.8), True),
        (Gate("c", "q", above=0.5, truth=0.8), (0.7, 0.6, 0.8), False),
        (Gate("c", "q", within=0.01), (0.0, -0.005, 0.005), True),
        (Gate("c", "q", within=0.01), (0.0, -0.02, 0.005), False),
        (Gate("c", "q", within=0.01, around=1.0), (1.0, 0.995, 1.005), True),
    ],
)
def test_a_gate_asks_the_interval_and_not_the_estimate(gate, interval, passed):
    value, low, high = interval
    judged, asked = judge(gate, Interval(value, low, high, 100, 30))
    assert judged is passed
    assert asked


def test_untrained_models_differ_in_their_seed_and_have_an_active_layer_norm():
    one, again, other = (untrained_run(seed, "natural") for seed in (0, 0, 1))
    assert torch.equal(one.mid, again.mid)
    assert not torch.equal(one.mid, other.mid)
    assert torch.equal(one.tokens, other.tokens)
    assert len(one.string.unique()) >= 40
    r = one.mid.var(-1, correction=0) / (one.mid.var(-1, correction=0) + one.eps)
    assert r.min() > 0.9


def test_permuting_a_field_keeps_its_values_and_leaves_bos_where_it_is():
    run = untrained_run(0, "natural")
    moved = calibration._permuted(run, "tokens", np.random.default_rng(0))
    assert torch.equal(moved.tokens[run.is_bos], run.tokens[run.is_bos])
    assert torch.equal(moved.tokens.sort().values, run.tokens.sort().values)
    assert not torch.equal(moved.tokens, run.tokens)
    assert torch.equal(moved.mid, run.mid)


def test_false_positives_are_counted_with_their_binomial_interval(monkeypatch):
    """The rate is about one in twenty if only the seed differs, and 1 if the rule is rigged."""
    monkeypatch.setattr(calibration, "N_MODELS", 64)
    rows = list(calibration.false_positives("engagement", n_draws=60))
    assert all(row.passed and row.note == "nominal 0.05" for row in rows)
    assert all(row.value < 0.2 for row in rows)
    assert [row.source for row in rows] == ["untrained models", "shuffled labels"]
    for row in rows:
        assert 0 <= row.low <= row.value <= row.high <= 1
        wanted = scipy_stats.binomtest(round(row.value * row.n), row.n).proportion_ci()
        assert (row.low, row.high) == pytest.approx((wanted.low, wanted.high))
    monkeypatch.setattr(calibration, "_leaves_out_zero", lambda interval: True)
    for row in calibration.false_positives("engagement", n_draws=20):
        assert row.value == 1  # for any interval
        assert row.passed is False


def test_a_probe_that_misses_its_control_is_marked(monkeypatch):
    probe = plugins.pick("soluscope.probes", "engagement")
    wrong = dataclasses.replace(probe, gates=(Gate("pinned", "r", above=0.5),))
    monkeypatch.setattr("soluscope.probes.engagement.PROBE", wrong)
    (gate,) = calibration.check_gates("engagement")
    assert not gate.passed
    assert (gate.asked, gate.sign, gate.note) == ("above 0.5", "positive", "")
    assert (gate.probe, gate.control, gate.section) == ("engagement", "pinned", "C3")


def test_where_a_probe_must_find_nothing_the_gate_is_negative(monkeypatch):
    probe = plugins.pick("soluscope.probes", "engagement")
    nothing = dataclasses.replace(probe, gates=(Gate("pinned", "r", within=0.01),))
    monkeypatch.setattr("soluscope.probes.engagement.PROBE", nothing)
    (gate,) = calibration.check_gates("engagement")
    assert (gate.passed, gate.sign) == (True, "negative")
    assert gate.asked == "within 0.01 of 0 (90% interval)"


def test_a_difference_between_random_halves_is_of_the_halves_own_estimates():
    made = _estimates.ratio("q", X, Y, STRING)
    halves = calibration._between_halves(made, np.random.default_rng(3))
    inside = np.random.default_rng(3).permutation(30) < 15
    half = inside[STRING]
    wanted = X[half].sum() / Y[half].sum() - X[~half].sum() / Y[~half].sum()
    assert value_of(halves)[0] == pytest.approx(wanted)
