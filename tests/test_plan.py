"""The number of seeds that a study needs, compared with simulated studies and with the tests that it plans."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from _records import LN
from scipy.stats import ttest_1samp

from soluscope import results
from soluscope.comparison import stats
from soluscope.errors import UserError
from soluscope.report import plan
from soluscope.results import MARGIN, Comparison, Measurement, Record, Term


@pytest.mark.parametrize("n_seeds", [1, 2, 6, 8])
def test_the_least_p_is_that_of_the_test_when_all_seeds_agree(n_seeds: int) -> None:
    found = stats.paired_seeds(1 + 0.1 * np.arange(n_seeds)).p
    assert found == pytest.approx(plan.least_p(n_seeds))


@pytest.mark.parametrize(("n_tests", "n_seeds"), [(1, 6), (2, 7), (5, 8), (6, 8)])
def test_so_many_seeds_survive_the_correction_and_one_fewer_does_not(
    n_tests: int, n_seeds: int
) -> None:
    assert plan.seeds_to_reject(n_tests) == n_seeds
    for n, is_significant in ((n_seeds, True), (n_seeds - 1, False)):
        p = {"best": plan.least_p(n)} | {str(i): 1.0 for i in range(n_tests - 1)}
        assert (stats.holm(p)["best"] < 0.05) == is_significant
        assert (plan.cannot_reject(n, n_tests) == "") == is_significant


@pytest.mark.parametrize("seed_sd", [0.002, 0.004, 0.008])
def test_so_many_seeds_detect_a_difference_that_matters_in_four_studies_of_five(
    seed_sd: float,
) -> None:
    n = plan.seeds_to_detect(seed_sd)
    assert n is not None
    studies = np.random.default_rng(0).normal(MARGIN, seed_sd, size=(4000, n))
    power = (ttest_1samp(studies, 0, axis=1).pvalue < 0.05).mean()
    assert 0.76 < power < 0.93
    if n > 3:
        fewer = studies[:, : n - 2]
        assert (ttest_1samp(fewer, 0, axis=1).pvalue < 0.05).mean() < 0.80


def test_no_number_of_seeds_makes_up_for_too_few_documents() -> None:
    assert plan.seeds_to_detect(0.001, document_se=MARGIN / 2.5) is None
    assert plan.seeds_to_detect(0.001, document_se=MARGIN / 4) is not None


def study(half: float = 0.0001) -> list[Record]:
    """Return a study of three seeds: solu minus solu_ln is .01, .02, .03; documents give half an interval."""
    losses = {"solu_ln": [3.0, 3.0, 3.0], "solu": [3.01, 3.02, 3.03]}
    rows: list[Record] = [LN]
    for arm, values in losses.items():
        rows += [
            Measurement(study="s", run=f"{arm}-s{seed}", arm=arm, variant=arm, seed=seed, probe="loss",
                        quantity="loss", value=value, unit="nats / token")
            for seed, value in enumerate(values)
        ]  # fmt: skip
    benefit = Comparison(study="s", term=Term.BENEFIT, arm="solu_ln", against="solu", value=0.02, unit="nats",
                         low=-0.01, high=0.05, cluster="seed", n=3)  # fmt: skip
    ends = {"low": 0.02 - half, "high": 0.02 + half}
    documents = Comparison(study="s", term=Term.BENEFIT, arm="solu_ln", against="solu", value=0.02, unit="nats",
                           cluster="document", n=3, **ends)  # fmt: skip
    return [*rows, benefit, documents]


def test_the_plan_of_a_study_rests_on_the_spread_of_its_seeds() -> None:
    (need,) = plan.plan(study())
    assert (need.arm, need.against, need.n_seeds) == ("solu_ln", "solu", 3)
    assert need.seed_sd == pytest.approx(0.01)
    assert need.document_se == pytest.approx(0.0001 / 1.96, rel=1e-3)
    assert need.needed == plan.seeds_to_detect(0.01, need.document_se)
    assert need.needed == pytest.approx((1.96 + 0.84) ** 2 * 0.01**2 / MARGIN**2, abs=3)
    assert next(iter(plan.plan(study(half=0.01)))).needed is None


def test_the_plan_is_printed_or_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results.write(tmp_path / "results.jsonl", study())
    plan.show(tmp_path)
    said = capsys.readouterr().out
    assert "solu minus" in said
    assert "0.0100" in said
    assert str(next(iter(plan.plan(study()))).needed) in said
    results.write(tmp_path / "results.jsonl", [LN])
    with pytest.raises(UserError, match="two seeds or more"):
        plan.show(tmp_path)


def test_a_p_that_no_test_can_reach_is_said_to_be_so() -> None:
    assert "the least possible p is 0.5" in plan.cannot_reject(2, 1)
    assert "after correction for 5 arms" in plan.cannot_reject(7, 5)
    assert math.isclose(plan.least_p(3, 10), 1.0)
