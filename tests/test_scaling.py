"""The baseline's curve over sizes and the multipliers: planted power laws, scipy's fit, coverage, and sentences."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import curve_fit

from soluscope.comparison.scaling import EXPONENTS, OfSize, fit, scaling
from soluscope.config import ModelConfig, n_block_weights
from soluscope.report import scaling as page
from soluscope.report.sections import build
from soluscope.results import (
    Bound,
    Comparison,
    Curve,
    Multiplier,
    ScalingCurve,
    Setting,
    Term,
    of_kind,
)

SIZES = np.array([12_288.0, 49_152.0, 196_608.0, 786_432.0, 3_145_728.0])
FLOOR, SCALE, EXPONENT = 3.0, 20.0, 0.3
N_DOCUMENTS = 40
ABOUT = {"study": "s", "commit": "abc"}


def law(n: np.ndarray | float) -> np.ndarray | float:
    return FLOOR + SCALE * n**-EXPONENT


def planted(
    arm: Callable[[float], float], n_seeds: int = 4, noise: float = 0.0, common: float = 0.0, seed: int = 0,
    sizes: np.ndarray = SIZES,
) -> list[OfSize]:  # fmt: skip
    """Return gelu with the planted power law, and an arm with the losses of `arm`, by number of weights.

    Args:
        arm: the arm's loss at each size.
        n_seeds: number of seeds.
        noise: sd over runs of a loss.
        common: sd over documents of a part of the loss that all runs share.
        seed: seed of the noise.
        sizes: numbers of weights.
    """
    random = np.random.default_rng(seed)
    counts = random.integers(50, 150, N_DOCUMENTS).astype(float)
    level = common * random.normal(size=N_DOCUMENTS)
    found = []
    for n in sizes:
        runs = {
            name: {s: counts * (value + noise * random.normal() + level) for s in range(n_seeds)}
            for name, value in ((f"gelu-{n:.0f}", law(n)), (f"arm-{n:.0f}", arm(n)))
        }
        base, other = runs
        of = OfSize(f"n {n:.0f}", int(n), counts, base, {base: "gelu", other: "arm"}, runs)
        found.append(of)
    return found


def multipliers(sizes: list[OfSize], curve: Curve = Curve.POWER_LAW) -> dict[int, Multiplier]:
    rows = of_kind(scaling(sizes, ABOUT), Multiplier)
    return {row.n_weights: row for row in rows if row.curve is curve}


# --- the fit --------------------------------------------------------------------------------------


def test_weights_are_those_of_the_blocks_matrices() -> None:
    """Queries, keys, values and outputs have d_model^2 weights each; W_in and W_out d_model d_mlp each."""
    model = ModelConfig(d_model=64, n_heads=4, d_mlp=256, n_layers=3)
    assert n_block_weights(64, 256, 3) == 3 * (4 * 64 * 64 + 2 * 64 * 256)
    assert model.n_matrix_weights(1000) == n_block_weights(64, 256, 3) + 64 * (2 * 1000 + model.ctx)


@pytest.mark.parametrize("exponent", [0.07, 0.3, 0.9])
def test_a_planted_power_law_is_found(exponent: float) -> None:
    losses = 2.5 + 8 * (SIZES / 1e5) ** -exponent
    found = fit(SIZES, losses)
    assert found.exponent == pytest.approx(exponent, rel=1e-4)
    assert found.floor == pytest.approx(2.5, abs=2e-3)
    np.testing.assert_allclose(found(SIZES), losses, atol=1e-7)
    assert found.scale == pytest.approx(8 * (found.centre / 1e5) ** -exponent, rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_is_scipys(seed: int) -> None:
    losses = law(SIZES) + 0.01 * np.random.default_rng(seed).normal(size=len(SIZES))
    found = fit(SIZES, losses)

    def curve(x, floor, scale, exponent):
        return floor + scale * np.exp(-exponent * (x - math.log(found.centre)))

    wanted, _ = curve_fit(
        curve, np.log(SIZES), losses, p0=(3.0, 0.5, 0.3), maxfev=10_000, ftol=1e-14, xtol=1e-14
    )
    assert (found.floor, found.scale, found.exponent) == pytest.approx(tuple(wanted), rel=1e-4)


def test_a_straight_line_in_the_logarithm_has_no_floor_and_says_so() -> None:
    sizes = planted(lambda n: law(n))
    straight = [
        OfSize(of.size, of.n_weights, of.counts, of.baseline, of.variants,
               {name: {0: of.counts * (6 - 0.1 * math.log(of.n_weights))} for name in of.losses})
        for of in sizes
    ]  # fmt: skip
    (curve,) = of_kind(scaling(straight, ABOUT), ScalingCurve)
    assert curve.exponent == pytest.approx(EXPONENTS[0], rel=1e-3)
    assert "the floor is not determined" in curve.note
    assert curve.misfit < 0.01


# --- multipliers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.5, 0.95, 1.0, 1.7])
def test_an_arm_with_the_loss_of_a_larger_baseline_has_that_multiplier(factor: float) -> None:
    found = multipliers(planted(lambda n: law(factor * n)))
    for n in SIZES[1:-1]:
        assert found[int(n)].value == pytest.approx(factor, rel=2e-4)
        assert found[int(n)].bound is Bound.NONE
    assert found[int(SIZES[1])].against == f"gelu-{SIZES[1]:.0f}"


def test_between_sizes_the_multiplier_follows_a_straight_line() -> None:
    """Losses 5, 4, 3.5 at 1, 4 and 16 thousand weights: .25 nats below 4 is half of the way, a factor of 2."""
    counts = np.full(N_DOCUMENTS, 10.0)
    sizes = [
        OfSize("", n, counts, f"g{n}", {f"g{n}": "gelu", f"a{n}": "arm"},
               {f"g{n}": {0: counts * loss, 1: counts * loss}, f"a{n}": {0: counts * (loss - 0.25)}})
        for n, loss in ((1000, 5.0), (4000, 4.0), (16_000, 3.5))
    ]  # fmt: skip
    records = scaling(sizes, ABOUT)
    (curve,) = of_kind(records, ScalingCurve)
    assert curve.floor is None
    assert curve.note == "a power law needs 4 sizes, and there are 3"
    found = {row.n_weights: row for row in of_kind(records, Multiplier)}
    assert {row.curve for row in found.values()} == {Curve.LOCAL}
    assert found[1000].value == pytest.approx(4**0.25, rel=1e-6)
    assert found[4000].value == pytest.approx(2.0, rel=1e-6)
    assert (found[16_000].value, found[16_000].bound) == (1.0, Bound.AT_LEAST)
    assert found[4000].low is None  # one seed


def test_a_baseline_off_its_curve_has_the_multiplier_1_and_so_has_an_arm_with_its_loss() -> None:
    bent = law(SIZES) + 0.03 * np.array([1, -1, 1, -1, 1])
    sizes = [
        OfSize(of.size, of.n_weights, of.counts, of.baseline, of.variants,
               {name: {0: of.counts * loss} for name in of.losses})
        for of, loss in zip(planted(law), bent, strict=True)
    ]  # fmt: skip
    records = scaling(sizes, ABOUT)
    (curve,) = of_kind(records, ScalingCurve)
    assert curve.misfit > 0.01
    assert all(row.value == pytest.approx(1, rel=1e-9) for row in of_kind(records, Multiplier))


def test_beyond_the_largest_and_the_smallest_baseline_a_multiplier_is_a_bound() -> None:
    largest, smallest = int(SIZES[-1]), int(SIZES[0])
    better = multipliers(planted(lambda n: law(2 * n), noise=1e-5))
    assert (better[largest].bound, better[largest].value) == (Bound.AT_LEAST, 1.0)
    assert better[largest].high_is_bound
    assert better[smallest].bound is Bound.NONE
    worse = multipliers(planted(lambda n: law(n / 2), noise=1e-5))
    assert (worse[smallest].bound, worse[smallest].value) == (Bound.AT_MOST, 1.0)
    assert worse[smallest].low_is_bound
    far = multipliers(planted(lambda n: law(1e9)))  # below the loss of every baseline
    assert far[smallest].value == pytest.approx(SIZES[-1] / SIZES[0])
    assert far[smallest].bound is Bound.AT_LEAST


def test_an_interval_that_leaves_the_curve_ends_in_a_bound() -> None:
    n = int(SIZES[-2])
    row = multipliers(planted(lambda n: law(2.5 * n), noise=0.05))[n]
    assert row.bound is Bound.NONE
    assert row.high_is_bound
    assert not row.low_is_bound
    assert row.high == pytest.approx(SIZES[-1] / n)


def test_intervals_contain_the_truth_as_often_as_they_say() -> None:
    """95% of 100 intervals, give or take 3 standard errors of a share. The documents' common part cancels."""
    n, n_inside, n_bounded = int(SIZES[2]), 0, 0
    for seed in range(100):
        sizes = planted(lambda n: law(1.3 * n), noise=0.01, common=0.5, seed=seed)
        row = multipliers(sizes, Curve.POWER_LAW)[n]
        n_inside += row.low <= 1.3 <= row.high
        n_bounded += row.low_is_bound or row.high_is_bound
    assert 88 <= n_inside < 100
    assert n_bounded < 10


def test_one_seed_gives_no_interval_and_one_size_nothing() -> None:
    row = multipliers(planted(lambda n: law(1.2 * n), n_seeds=1))[int(SIZES[1])]
    assert (row.low, row.high, row.n) == (None, None, 1)
    assert row.value == pytest.approx(1.2, rel=1e-3)
    assert scaling(planted(law)[:1], ABOUT) == []


def test_a_loss_that_rises_with_size_has_no_power_law() -> None:
    sizes = planted(law)
    turned = [
        OfSize(of.size, of.n_weights, of.counts, of.baseline, of.variants,
               {of.baseline: other.losses[other.baseline]})
        for of, other in zip(sizes, reversed(sizes), strict=True)
    ]  # fmt: skip
    (curve,) = scaling(turned, ABOUT)
    assert curve.exponent is None
    assert "does not fall with size" in curve.note


def test_sizes_without_a_common_seed_say_so() -> None:
    first, second = planted(law, n_seeds=1)[:2]
    moved = OfSize(second.size, second.n_weights, second.counts, second.baseline, second.variants,
                   {name: {9: of[0]} for name, of in second.losses.items()})  # fmt: skip
    (curve,) = scaling([first, moved], ABOUT)
    assert curve.note == "the sizes share no seed"


# --- the page -------------------------------------------------------------------------------------


def reported(sizes: list[OfSize]) -> list:
    """Return the records of a study: curves, multipliers, settings and losses."""
    settings = [
        Setting(study="s", arm=arm, variant=variant, role="baseline" if variant == "gelu" else "plain",
                values={"d_model": i}, size=of.size, n=4)
        for i, of in enumerate(sizes) for arm, variant in of.variants.items()
    ]  # fmt: skip
    losses = [
        Comparison(study="s", term=Term.LOSS, arm=arm, variant=of.variants[arm], cluster="seed", unit="nats",
                   value=float(by_seed[0].sum() / of.counts.sum()), low=3.0, high=9.0, n=4, size=of.size)
        for of in sizes for arm, by_seed in of.losses.items()
    ]  # fmt: skip
    return [*settings, *losses, *scaling(sizes, ABOUT)]


def test_sentences_cover_the_number_both_bounds_and_a_missing_curve() -> None:
    texts = page.sentences(reported(planted(lambda n: law(2 * n), noise=1e-4)))
    assert "has the loss of a baseline of 2 times its size [" in texts[1]
    assert "lies below that of the largest baseline, so its multiplier is at least 1 [" in texts[-1]
    assert texts[-1].endswith(", above 1].")
    texts = page.sentences(reported(planted(lambda n: law(n / 2), noise=1e-4)))
    assert (
        "lies above that of the smallest baseline, so its multiplier is at most 1 [below 1, "
        in texts[0]
    )
    few = reported(planted(lambda n: law(2 * n), sizes=SIZES[:3]))
    (section,) = (each for each in build(few) if each.name == "size")
    first = section.blocks[0].items[0]
    assert first.startswith(
        "The baseline's loss has no fitted curve: a power law needs 4 sizes, and there are 3."
    )


def test_the_section_has_the_curve_the_bars_and_a_row_for_every_multiplier() -> None:
    records = reported(planted(lambda n: law(1.3 * n), noise=0.003))
    (section,) = (each for each in build(records) if each.name == "size")
    curve, bars = section.plots
    assert {trace.name for trace in curve.figure.data if trace.name} == {
        "gelu", "arm", "fitted curve of the baseline",
    }  # fmt: skip
    fitted = next(t for t in curve.figure.data if t.name == "fitted curve of the baseline")
    np.testing.assert_allclose(fitted.y, law(np.array(fitted.x)), atol=0.02)
    (bar,) = (trace for trace in bars.figure.data if trace.type == "bar")
    rows = [row for row in of_kind(records, Multiplier) if row.curve is Curve.POWER_LAW]
    assert [base + y for base, y in zip([bar.base] * 5, bar.y, strict=True)] == pytest.approx(
        [row.value for row in rows]
    )
    table = section.blocks[-1]
    assert len(table.lines) == len(of_kind(records, Multiplier))
