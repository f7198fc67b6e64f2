"""The statistics of blind ratings against closed forms, simulations and independent software."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from _rating import ARMS, MadeUp
from scipy.optimize import check_grad
from scipy.special import expit

from soluscope import results
from soluscope.rating import agreement, mixed, power
from soluscope.rating.analysis import analyse
from soluscope.rating.database import Database
from soluscope.rating.plan import ANSWERS, Kind
from soluscope.rating.serve import open_plan
from soluscope.rating.settings import PlanConfig
from soluscope.report import rating as section
from soluscope.results import Rated, Rating

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(60)


def mean_share(odds: float, sd: float) -> float:
    return float(expit(odds + sd * NODES) @ WEIGHTS / WEIGHTS.sum())


# ---------------------------------------------------------------- kappa and shares


def test_kappa_by_hand() -> None:
    """Cohen's kappa of 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no is (.7 - .5) / (1 - .5) = .4."""
    one = [True] * 25 + [False] * 25
    two = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    found = agreement.kappa(one, two)
    assert found.value == pytest.approx(0.4, abs=1e-12)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.4 < found.high


def test_kappa_agrees_with_statsmodels() -> None:
    from statsmodels.stats.inter_rater import cohens_kappa

    rng = np.random.default_rng(0)
    one = rng.random(200) < 0.4
    two = np.where(rng.random(200) < 0.7, one, rng.random(200) < 0.5)
    table = [[sum((one == a) & (two == b)) for b in (True, False)] for a in (True, False)]
    wanted = cohens_kappa(table)
    found = agreement.kappa(list(one), list(two))
    assert found.value == pytest.approx(wanted.kappa, abs=1e-12)
    # The bootstrap and the asymptotic interval differ by about a tenth of their width at 200 items.
    assert found.low == pytest.approx(wanted.kappa_low, abs=0.03)
    assert found.high == pytest.approx(wanted.kappa_upp, abs=0.03)


def test_kappa_of_equal_answers_is_one_and_of_one_answer_undefined() -> None:
    assert agreement.kappa([True, False] * 10, [True, False] * 10).value == 1
    assert math.isnan(agreement.kappa([True] * 20, [True] * 20).value)


def test_share_has_the_exact_bounds() -> None:
    """With 0 of n, the upper bound solves (1 - p)^n = .025."""
    value, low, high = agreement.share(0, 10)
    assert (value, low) == (0, 0)
    assert high == pytest.approx(1 - 0.025**0.1, abs=1e-9)


# ---------------------------------------------------------------- the mixed model


def test_the_gradient_is_that_of_the_posterior() -> None:
    rng = np.random.default_rng(0)
    design = np.eye(3)[rng.integers(3, size=60)]
    model = mixed._Model(rng.choice([-1.0, 1.0], 60), design, rng.integers(20, size=60), 20, True)
    at = rng.normal(size=model.n)
    # scipy's forward differences have an error of about 1e-8 times the second derivative.
    assert check_grad(lambda x: model(x)[0], lambda x: model(x)[1], at) < 1e-4


def test_the_posterior_is_the_integral_over_neurons() -> None:
    """Compare with the sum over a fine grid of one neuron's effect."""
    answers, sd, odds = np.array([1.0, 1.0, -1.0]), 1.3, 0.4
    model = mixed._Model(answers, np.ones((3, 1)), np.zeros(3, int), 1, True)
    grid = np.linspace(-12, 12, 200_001)
    density = np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi)
    inner = np.prod([expit(each * (odds + sd * grid)) for each in answers], axis=0)
    wanted = -np.log((inner * density).sum() * (grid[1] - grid[0]))
    marginal = odds / np.sqrt(1 + mixed.SLOPE * sd**2)
    prior = marginal**2 / mixed.FIXED_SD**2 / 2 + np.log(sd) ** 2 / mixed.LOG_SD**2 / 2
    assert model(np.array([marginal, np.log(sd)]))[0] == pytest.approx(wanted + prior, abs=1e-5)


def test_with_one_rating_per_neuron_the_share_is_the_share_of_yes() -> None:
    """The prior with sd 2.5 moves .1 by logit(.1) / (300 * 2.5^2 * .09) = .013 log odds, which is .0012."""
    answers = [True] * 120 + [False] * 180 + [True] * 30 + [False] * 270
    cells = ["a"] * 300 + ["b"] * 300
    found = mixed.fit(answers, cells, ["ann"] * 600, [str(i) for i in range(600)])
    assert found.sd_neurons is None
    assert found.share("a")[0] == pytest.approx(0.4, abs=0.001)
    assert found.share("b")[0] == pytest.approx(0.1, abs=0.002)
    value, low, high = found.difference("a", "b")
    se = math.sqrt(0.24 / 300 + 0.09 / 300)
    assert (value, low, high) == pytest.approx((0.3, 0.3 - 1.96 * se, 0.3 + 1.96 * se), abs=0.006)


def test_a_cell_with_equal_answers_has_a_finite_share() -> None:
    found = mixed.fit([True] * 40, ["a"] * 20 + ["b"] * 20, ["ann"] * 40, list(map(str, range(40))))
    value, low, high = found.share("a")
    assert 0.7 < low < value < high <= 1


def test_shares_are_those_of_the_answers_where_neurons_differ_much() -> None:
    """Eight answers per neuron, an eighth of them wrong, make the integrand narrow. 24 nodes were off by .05."""
    rows = [
        ((i < yes) != (number == 0), cell, f"{cell}{i}")
        for cell, yes in (("a", 6), ("b", 24))
        for i in range(30)
        for number in range(8)
    ]
    answers, cells, neurons = ([*column] for column in zip(*rows, strict=True))
    found = mixed.fit(answers, cells, ["ann"] * len(rows), neurons)
    for cell in "ab":
        plain = np.mean([yes for yes, at in zip(answers, cells, strict=True) if at == cell])
        assert found.share(cell)[0] == pytest.approx(plain, abs=0.02)


@pytest.mark.parametrize("n_answers", [2, 3, 8])
def test_shares_are_right_where_all_answers_to_a_neuron_agree(n_answers: int) -> None:
    """Gauss-Hermite quadrature gave .36 for .2. Equal answers add nothing to the interval of 60 neurons."""
    rows = [
        (i < yes, cell, f"{cell}{i}")
        for cell, yes in (("a", 12), ("b", 48))
        for i in range(60)
        for _ in range(n_answers)
    ]
    answers, cells, neurons = ([*column] for column in zip(*rows, strict=True))
    found = mixed.fit(answers, cells, ["ann"] * len(rows), neurons)
    _, low, high = agreement.share(12, 60)
    assert found.share("a") == pytest.approx((0.2, low, high), abs=0.02)
    assert found.share("b")[0] == pytest.approx(0.8, abs=0.02)


def test_a_strict_rater_does_not_move_the_difference() -> None:
    """Ann rates all neurons; Bob, who says yes more often, rates only arm a. Plain shares would favour arm a."""
    rng = np.random.default_rng(0)
    answers, cells, raters, neurons = [], [], [], []
    for cell in "ab":
        for i in range(400):
            for rater, odds in (("ann", -0.5), ("bob", 1.5))[: 2 if cell == "a" else 1]:
                answers.append(bool(rng.random() < expit(odds)))
                cells.append(cell)
                raters.append(rater)
                neurons.append(f"{cell}{i}")
    found = mixed.fit(answers, cells, raters, neurons)
    value, low, high = found.difference("a", "b")
    assert low < 0 < high
    assert abs(value) < 0.1
    plain = np.mean(np.array(answers)[:800]) - np.mean(np.array(answers)[800:])
    assert plain > 0.15


def simulated(
    rng: np.random.Generator, n_raters: int, odds: tuple[float, float], sd: float
) -> tuple[list[bool], list[str], list[str], list[str]]:
    """Return ratings of 60 neurons in each of two cells by raters of equal strictness, a tenth of them twice."""
    answers, cells, raters, neurons = [], [], [], []
    for cell, level in zip("ab", odds, strict=True):
        for i in range(60):
            effect = level + sd * rng.normal()
            for rater in range(n_raters):
                for _ in range(2 if i < 6 else 1):
                    answers.append(bool(rng.random() < expit(effect)))
                    cells.append(cell)
                    raters.append(str(rater))
                    neurons.append(f"{cell}{i}")
    return answers, cells, raters, neurons


@pytest.mark.long
@pytest.mark.parametrize(("n_raters", "sd"), [(1, 1.5), (2, 2.0), (3, 1.5)])
def test_intervals_contain_the_truth_as_often_as_they_say(n_raters: int, sd: float) -> None:
    """Of 200 intervals, at least 90% contain the truth: under 95% coverage, fewer are so few in 1 of 500 cases."""
    rng, odds = np.random.default_rng(1), (-0.8, 0.5)
    truth = mean_share(odds[1], sd) - mean_share(odds[0], sd)
    hits = 0
    for _ in range(200):
        _, low, high = mixed.fit(*simulated(rng, n_raters, odds, sd)).difference("b", "a")
        hits += low <= truth <= high
    assert hits >= 180


@pytest.mark.slow
def test_shares_agree_with_the_mixed_model_of_statsmodels() -> None:
    """Its random effects are variational, so shares agree within a third of their standard error, .02 of .07."""
    from statsmodels.genmod.bayes_mixed_glm import BinomialBayesMixedGLM

    answers, cells, raters, neurons = simulated(np.random.default_rng(2), 2, (-0.8, 0.5), 1.5)
    found = mixed.fit(answers, cells, raters, neurons)
    fixed = np.array([[each == "a", each == "b"] for each in cells], float)
    names = sorted(set(neurons))
    random = np.array([[each == name for name in names] for each in neurons], float)
    model = BinomialBayesMixedGLM(
        np.array(answers, float), fixed, random, np.zeros(len(names), int), vcp_p=1, fe_p=2
    )
    fitted = model.fit_vb(rng=np.random.default_rng(0))
    sd = math.exp(float(fitted.vcp_mean[0]))
    for cell, odds in zip("ab", fitted.fe_mean, strict=True):
        assert found.share(cell)[0] == pytest.approx(mean_share(float(odds), sd), abs=0.02)


# ---------------------------------------------------------------- power


@pytest.mark.parametrize(("n_raters", "difference"), [(1, 0.2), (1, 0.3), (3, 0.2)])
def test_power_is_the_share_of_simulated_studies_that_find_the_difference(
    n_raters: int, difference: float
) -> None:
    """Answers of raters to one neuron are equal with probability kappa, else independent.

    With 4,000 studies the standard error is below .008. The interval is that of the plain difference of shares; the
    normal approximation has an error of about .02 at 60 neurons.
    """
    rng, n, n_studies = np.random.default_rng(0), 60, 4000

    def shares(p: float) -> tuple[np.ndarray, np.ndarray]:
        common = rng.random((n_studies, n, 1)) < p
        own = rng.random((n_studies, n, n_raters)) < p
        # Each rater takes the common answer with probability sqrt(kappa): two raters correlate by kappa.
        takes = rng.random((n_studies, n, n_raters)) < math.sqrt(power.KAPPA)
        of_neuron = np.where(takes, common, own).mean(axis=2)
        return of_neuron.mean(axis=1), of_neuron.var(axis=1, ddof=1) / n

    (low, low_var), (high, high_var) = shares(power.BASE), shares(power.BASE + difference)
    found = (high - low) > 1.96 * np.sqrt(low_var + high_var)
    assert power.power(n, difference, n_raters) == pytest.approx(found.mean(), abs=0.03)


def test_the_detectable_difference_has_the_wanted_power() -> None:
    for n, n_raters in ((60, 1), (60, 3), (200, 2)):
        least = power.detectable(n, n_raters)
        assert least is not None
        assert power.power(n, least, n_raters) == pytest.approx(0.85, abs=1e-6)
    assert power.detectable(3) is None


def test_sixty_neurons_do_not_find_twenty_points_in_most_cases() -> None:
    """By hand: se = sqrt((.24 + .24) / 60) = .0894, and P(z > 1.96 - .2 / .0894) = .61."""
    assert power.power(60, 0.2) == pytest.approx(0.61, abs=0.005)
    assert "20 points is found in 61% of cases" in power.sentence(60, 1)


# ---------------------------------------------------------------- from ratings to records


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Database:
    """Return ratings by two people: zznormed is interpretable at .8, zzplain at .2; Bob errs in a tenth."""
    study = tmp_path_factory.mktemp("runs") / "first"
    study.mkdir()
    config = PlanConfig(30, ["top"], ["mid", "post"], n_examples=10, planted=0.3)
    database = open_plan(study, MadeUp(), config)
    rng = np.random.default_rng(0)
    truth: dict[tuple[str, int | None], bool] = {}
    for number, item in enumerate(database.items()):
        share = {"zznormed": 0.8, "zzplain": 0.2}.get(item.arm, 0.5)
        if item.kind is Kind.UNTRAINED:
            share = 0.3
        answer = truth.setdefault(
            (f"{item.kind}{item.run}", item.neuron), bool(rng.random() < share)
        )
        answer = ANSWERS.get(item.kind, answer)
        for rater in ("ann", "bob"):
            wrong = rater == "bob" and rng.random() < 0.1
            database.rate(rater, number, answer != wrong, "", 60.0 + 30 * (rater == "bob"))
    return database


@pytest.fixture(scope="module")
def records(rated: Database) -> list[Rated]:
    return analyse(rated, "abc", reference="zzplain")


def of(records: list[Rated], term: Rating, **names: object) -> list[Rated]:
    return [
        each
        for each in records
        if each.term is term and all(getattr(each, name) == value for name, value in names.items())
    ]


def test_shares_and_differences_are_those_of_the_answers(
    records: list[Rated], rated: Database
) -> None:
    """The prior and the neurons' distribution move a share of 30 neurons by less than .03."""
    for arm in ARMS:
        (row,) = of(records, Rating.SHARE, arm=arm, stage="post", untrained=False)
        answers = [
            each.interpretable
            for each in rated.ratings()
            if each.arm == arm and each.stage == "post" and each.kind is Kind.STUDY
        ]
        assert row.value == pytest.approx(np.mean(answers), abs=0.03)
        assert row.n == len(answers)
        assert row.low is not None
        assert row.low < row.value < (row.high or 0)
        assert (row.n_clusters, row.cluster, row.unit) == (30, "neuron", "share")
    (row,) = of(records, Rating.DIFFERENCE, stage="post")
    assert (row.arm, row.against) == ("zznormed", "zzplain")
    assert row.low is not None
    assert row.low > 0.2
    # zzplain has no norm: zznormed before its norm is compared with zzplain as it is.
    assert [each.against for each in of(records, Rating.DIFFERENCE, stage="mid")] == ["zzplain"]
    (row,) = of(records, Rating.STAGES)
    assert row.arm == "zznormed"
    assert row.value == pytest.approx(0, abs=0.1)  # the same neurons get the same answers


def test_untrained_neurons_are_a_separate_share_without_an_interval_if_they_are_few(
    records: list[Rated],
) -> None:
    found = of(records, Rating.SHARE, untrained=True)
    assert {each.stage for each in found} == {"mid", "post"}
    assert all(each.arm == "" for each in found)
    assert all(each.low is None and each.note for each in found if each.n_clusters < 20)


def test_agreement_and_planted_answers_are_those_of_each_rater(
    records: list[Rated], rated: Database
) -> None:
    (between,) = of(records, Rating.BETWEEN)
    n_items = sum(each.repeats is None for each in rated.items())
    assert (between.rater, between.against, between.n) == ("ann", "bob", n_items)
    assert between.value is not None
    assert 0.6 < between.value < 0.95
    within = {each.rater: each for each in of(records, Rating.WITHIN)}
    assert within["ann"].value == 1
    assert within["bob"].n == sum(each.repeats is not None for each in rated.items())
    known = {each.rater: each for each in of(records, Rating.KNOWN)}
    assert known["ann"].value == 1
    assert known["bob"].value is not None
    assert known["bob"].value < 1
    seconds = {each.rater: each.value for each in of(records, Rating.SECONDS)}
    assert seconds == {"ann": 60, "bob": 90}


def test_records_survive_the_file_and_the_section_shows_them(
    records: list[Rated], tmp_path: Path
) -> None:
    results.write(tmp_path / "results.jsonl", records)
    read = results.read(tmp_path / "results.jsonl")
    assert read == records
    texts = str(section.blocks(read))
    for text in ("2 people", "zznormed minus zzplain", "kappa between raters", "85% of cases"):
        assert text in texts


def test_without_ratings_there_is_no_number_and_the_section_says_how_to_make_some(
    tmp_path: Path,
) -> None:
    (tmp_path / "first").mkdir()
    database = open_plan(tmp_path / "first", MadeUp(), PlanConfig(6, n_examples=10))
    assert analyse(database, "abc") == []
    (block,) = section.blocks([])
    assert "Nobody has rated" in str(block)
    assert "soluscope rate" in str(block)


def test_a_rating_that_was_taken_back_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    database = open_plan(tmp_path / "first", MadeUp(), PlanConfig(6, n_examples=10))
    for number in range(12):
        database.rate("ann", number, True, "x", 1.0)
    before = analyse(database, "abc")
    database.rate("ann", 12, False, "", 500.0)
    database.undo("ann")
    assert analyse(database, "abc") == before


def test_one_arm_alone_has_no_difference(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    config = PlanConfig(6, n_examples=10, arms=[ARMS[0]])
    database = open_plan(tmp_path / "first", MadeUp(), config)
    for number in range(len(database.items())):
        database.rate("ann", number, number % 2 == 0, "x", 1.0)
    terms = {each.term for each in analyse(database, "abc")}
    assert Rating.DIFFERENCE not in terms
    assert Rating.DETECTABLE not in terms
