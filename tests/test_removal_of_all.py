"""Removal of all per-token scales from trained models, the claims about them, and their place in the comparison."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, train_silently

from soluscope import results
from soluscope.config import EvalConfig, RemoveConfig
from soluscope.data.cache import of_study
from soluscope.data.streams import from_cache
from soluscope.errors import UserError
from soluscope.evaluation import further
from soluscope.evaluation.one_run import evaluate_run
from soluscope.evaluation.removing import remove
from soluscope.evaluation.suite import evaluate
from soluscope.hooked.activations import observe
from soluscope.hooked.convert import load
from soluscope.removal.fine_tune import with_gain
from soluscope.report import build
from soluscope.report import removal as section
from soluscope.report.names import named
from soluscope.results import (
    ClaimTested,
    Comparison,
    Measurement,
    Removal,
    Removed,
    Setting,
    Term,
    of_kind,
)
from soluscope.runs.folder import Run

pytestmark = pytest.mark.slow
N_TUNED = 14 * 8 * 32
ALL = RemoveConfig(
    norms="all", n_tokens=600, n_draws=100, fine_tune_tokens=N_TUNED, n_loss_tokens=1000
)
LOSSES = EvalConfig(probes=[], n_tokens=600, n_loss_tokens=1000, n_draws=100, jobs=1)


def silent(text: str) -> None: ...


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Return a study of SoLU + LN after the removal of all scales, and after further training with a gain of 30."""
    runs_dir = tmp_path_factory.mktemp("all")
    train_silently(tiny_config(runs_dir, "study=s", "variant=solu_ln", "mid.kappa=4e-5"))
    train_silently(with_gain(Run(runs_dir / "s" / "solu_ln-s0"), 30.0, 14, 0.3))
    evaluate(runs_dir / "s", LOSSES, silent)
    remove(runs_dir / "s", ALL, silent)
    return runs_dir / "s"


@pytest.fixture(scope="module")
def records(study) -> list[results.Record]:
    return results.read(study / "results.jsonl")


def without_scales(study: Path, arm: str = "solu_ln") -> Run:
    return Run(next(study.with_name("s-removed").glob(f"{arm}-s0-of-*-no-norms")))


def test_a_run_without_scales_loads_like_any_run_and_has_one_scale_for_all_tokens(study):
    run = without_scales(study)
    model = load(run.dir)
    stream = from_cache(of_study(study), "report", 32, 500, "natural")
    _, cache = model.run_with_cache(stream.tokens)
    for name in ("blocks.0.ln1", "blocks.0.ln2", "blocks.0.mlp.ln", "ln_final"):
        assert cache[f"{name}.hook_scale"].unique().numel() == 1
    facts = run.facts
    assert facts.eps is None
    assert facts.gain == pytest.approx(1 / cache["blocks.0.mlp.ln.hook_scale"][0, 0].item())
    assert observe(model, stream).engagement.max() == 0
    assert facts.init_from.run == "s/solu_ln-s0"


def check_losses(study: Path, arm: str) -> None:
    """Compare the stored differences of losses with those of the models of the training code on the same rows."""
    run, cache = without_scales(study, arm), of_study(study)
    rows = from_cache(cache, "report", 32, ALL.n_tokens, "natural").tokens

    @torch.no_grad()
    def mean_loss(run: Run) -> float:
        losses = run.load_model().loss(rows, cache.meta["bos"], reduction="none")[:, 1:]
        return float(losses[rows[:, 2:] != cache.meta["bos"]].double().mean())

    trained, after = mean_loss(Run(study / f"{arm}-s0")), mean_loss(run)
    control = mean_loss(Run(run.dir.with_name(run.dir.name.removesuffix("-no-norms"))))
    found = {
        row.against: row.value
        for row in of_kind(results.read(study / "results.jsonl"), Removal)
        if (row.step, row.run) == (Removed.ALL, f"{arm}-s0")
    }
    assert found["as trained"] == pytest.approx(after - trained, abs=1e-5)
    assert found["same adaptation"] == pytest.approx(after - control, abs=1e-5)


def test_its_losses_are_those_of_the_training_code(study):
    check_losses(study, "solu_ln")


@pytest.mark.parametrize("variant", ["gelu", "solu", "solu_block", "solu_frozen_ln_bos"])
def test_scales_are_removed_from_variants_with_no_mid_norm_or_another_one(variant, tmp_path):
    train_silently(tiny_config(tmp_path, "study=s", f"variant={variant}"))
    remove(tmp_path / "s", ALL, silent)
    check_losses(tmp_path / "s", variant)
    rows = of_kind(results.read(tmp_path / "s" / "results.jsonl"), ClaimTested)
    for row in rows:
        left_out = variant == "solu_block" and row.probe != "exact_dla"
        assert ("needs one gain for each token" in row.note) == left_out
        assert row.within is None or row.holds is (None if left_out else True)


def test_the_claims_are_rows_with_the_numbers_of_three_models(records):
    rows = of_kind(records, ClaimTested)
    assert {row.run for row in rows} == {"solu_ln-s0"}
    assert {row.probe for row in rows} == {
        "exact_dla",
        "attribution_patching",
        "entropy_neurons",
    }
    for row in rows:
        assert None not in (row.before, row.kept, row.after, row.change), row.note
        assert row.change.value == pytest.approx(row.after.value - row.before.value, abs=1e-12)
        if row.within is not None:
            assert (row.within, row.holds) == (1e-6, True)
            assert abs(row.after.value) < 1e-6
        if row.probe == "exact_dla":  # the error is large with a live ln_final, and 0 without
            assert min(row.before.value, row.kept.value) > 1e-3
    shares = [row for row in rows if row.quantity.startswith("share of entropy")]
    assert min(row.before.value for row in shares) > 1e-3


def test_arms_trained_further_are_compared_with_the_same_training_of_the_unchanged_model(records):
    known = {each.arm: each for each in of_kind(records, Setting)}
    arms = {arm for arm, each in known.items() if each.after}
    of_ln = {arm for arm in arms if known[arm].after == "solu_ln"}
    words = ("as-before", "with-one-gain", "without-per-token-scales")
    assert of_ln == {f"solu_ln-then-{each}-14-steps-0.3" for each in words}
    assert {known[arm].role for arm in arms} == {"other"}
    assert {known[arm].values["further_tokens"] for arm in arms} == {N_TUNED}
    assert {known[arm].size for arm in known} == {""}  # beside the study's own arms
    compared = of_kind(records, Comparison)
    assert arms <= {row.arm for row in compared if row.term is Term.LOSS}
    unchanged = "solu_ln-then-as-before-14-steps-0.3"
    beside = {
        row.arm: row for row in compared if row.against == unchanged and row.cluster == "seed"
    }
    assert beside.keys() == of_ln - {unchanged}
    assert not [row for row in compared if row.term in (Term.STATIC, Term.SHARE)]
    losses = {
        (row.arm, row.seed): row for row in of_kind(records, Measurement) if row.probe == "loss"
    }
    for arm, row in beside.items():
        assert row.value == pytest.approx(losses[arm, 0].value - losses[unchanged, 0].value)


def test_losses_of_other_documents_are_not_compared_and_the_reason_is_told(study, tmp_path):
    for name in ("s", "s-removed"):
        shutil.copytree(study.with_name(name), tmp_path / name, symlinks=True)
    origin = Run(tmp_path / "s" / "solu_ln-s0")
    shutil.rmtree(origin.dir / "probes")
    evaluate_run(origin, replace(LOSSES, n_loss_tokens=500), silent, lambda *step: None)
    each, *_ = further.trained_further([origin])
    assert "probe both studies with the same n_loss_tokens=" in further.obstacle(each)
    assert not list(further.compared([origin]))


def test_two_further_runs_that_are_one_arm_are_named_and_not_compared(study, tmp_path):
    for name in ("s", "s-removed"):
        shutil.copytree(study.with_name(name), tmp_path / name, symlinks=True)
    origin = Run(tmp_path / "s" / "solu_ln-s0")
    before = {each.arm for each in further.trained_further([origin])}
    assert further.doubled([origin]) == []
    train_silently(with_gain(origin, 31.0, 14, 0.3))
    (line,) = further.doubled([origin])
    assert line.count("-s0-of-solu_ln-14-steps-0.3-gain") == 2
    assert line.endswith(
        "are one arm and differ in their gain, so none of them is compared: delete all but one"
    )
    after = {each.arm for each in further.trained_further([origin])}
    assert after < before
    assert len(before - after) == 1


def test_the_command_resumes(study):
    told: list[str] = []
    remove(study, ALL, told.append)
    assert told == ["[1/1] solu_ln-s0: done already"]


def test_the_page_shows_the_losses_the_claims_and_the_names_of_the_arms(records):
    shown = str(section.blocks(named(records)))
    assert "Direct logit attribution is exact: of the whole MLP." in shown
    assert "no per-token scale" in shown
    names = {each.arm for each in of_kind(named(records), Setting)}
    assert "SoLU + LN, kappa 4e-5, then trained without per-token scales for 3,584 tokens" in names


def test_the_report_is_built(study):
    assert "Removal of the per-token gain" in build(study).read_text()


def test_too_short_a_training_is_refused(study):
    with pytest.raises(UserError, match="need 12 optimizer steps, and there are 2"):
        remove(study, replace(ALL, fine_tune_tokens=2 * 8 * 32), silent)
