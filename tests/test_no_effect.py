"""A study of one variant under three names makes claims at most at their nominal rate."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT
from scipy.stats import binomtest

pytestmark = pytest.mark.long

N_STUDIES, N_SEEDS, N_STEPS = 16, 4, 6


@pytest.fixture(scope="module")
def no_effect() -> ModuleType:
    spec = importlib.util.spec_from_file_location("no_effect", ROOT / "benchmarks" / "no_effect.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_studies_without_an_effect_claim_one_at_most_at_the_nominal_rate(
    no_effect: ModuleType, tmp_path: Path
) -> None:
    """Fails by chance in fewer than 1 of 1,000 draws of the pool; the pool's seeds are fixed."""
    pool = no_effect.train_pool(3 * N_SEEDS * N_STUDIES, N_STEPS, str(tmp_path))
    found = no_effect.count(pool, N_STUDIES, N_SEEDS)
    for name, nominal in zip(no_effect.CLAIMS, no_effect.NOMINAL, strict=True):
        assert binomtest(found[name], N_STUDIES, nominal, "greater").pvalue > 0.001, name


def test_a_planted_difference_is_claimed(no_effect: ModuleType, tmp_path: Path) -> None:
    """The same study, with .1 nats more in the runs that are dealt to plain SoLU."""
    pool = no_effect.train_pool(3 * N_SEEDS, N_STEPS, str(tmp_path))
    worse = pool["number"] < N_SEEDS
    pool.loc[worse, "loss_sum"] += 0.1 * pool.loc[worse, "n_tokens"]
    lowers, _, _ = no_effect.claims(no_effect.study(pool, range(3 * N_SEEDS)))
    assert lowers
