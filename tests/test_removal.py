"""Removal of the per-token gain: the best gain, the refit of the readout, and the numbers from stored tables."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from _records import number
from conftest import tiny_config, train_silently
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax

from soluscope import plugins, results
from soluscope.config import RemoveConfig
from soluscope.controls import _shell
from soluscope.controls.smear_shared import VOCAB
from soluscope.errors import UserError
from soluscope.evaluation.removed import of_study, tables_in
from soluscope.evaluation.removing import remove
from soluscope.hooked.ablation import best_gain
from soluscope.hooked.activations import HookedRun, observe, planted
from soluscope.removal import refit as refitting
from soluscope.removal.losses import frozen
from soluscope.removal.numbers import of_arm, of_run
from soluscope.removal.refit import Weights, own_weights, refit, text_of
from soluscope.report import removal as section
from soluscope.results import Order, Removal, RemovalOfArm, Removed, of_kind
from soluscope.runs.folder import Run

BASE = Removal(
    study="s", run="r", arm="a", value=None, unit="nats / token", step=Removed.FROZEN, seed=0
)


def expected_text(name: str, n: int) -> HookedRun:
    """Return a control's activations on rows of BOS, a token and the next token, about as often as expected."""
    model = plugins.pick("soluscope.controls", name).build().model
    counts = (n * _shell.logits(model).softmax(-1)).round().long()
    counts[_shell.BOS] = counts[:, _shell.BOS] = 0
    pairs = counts.nonzero().repeat_interleave(counts[counts > 0], dim=0)
    rows = torch.cat([torch.full_like(pairs[:, :1], _shell.BOS), pairs], dim=1)
    return observe(model, _shell._stream("natural", rows, range(len(rows)), VOCAB))


@pytest.fixture(scope="module")
def disjoint() -> HookedRun:
    return expected_text("disjoint", n=30)


def cost(run: HookedRun, weights: Weights, gain: float | None, final_norm="frozen") -> float:
    """Return the loss with a readout, minus the model's own loss."""
    trained = text_of(run, None, final_norm).all_losses(own_weights(run.readout))
    return float((text_of(run, gain, final_norm).all_losses(weights) - trained).mean())


def test_the_best_gain_is_that_of_brute_force_with_hooks():
    control = plugins.pick("soluscope.controls", "smear_graded").build()
    stream = control.streams["natural"]
    run = observe(control.model, stream)

    def loss_at(log_gain: float) -> float:
        def freeze(scale, hook):
            return torch.full_like(scale, np.exp(-log_gain))

        with torch.no_grad():
            logits = control.model.run_with_hooks(
                stream.tokens, fwd_hooks=[("blocks.0.mlp.ln.hook_scale", freeze)]
            )
        losses = torch.nn.functional.cross_entropy(
            logits[:, 1:-1].flatten(0, 1), stream.tokens[:, 2:].flatten()
        )
        return float(losses)

    found = best_gain(run)
    near = np.log(found) + np.linspace(-2, 2, 9)
    centre = near[np.argmin([loss_at(each) for each in near])]
    wanted = minimize_scalar(loss_at, bounds=(centre - 0.5, centre + 0.5), method="bounded")
    assert np.log(found) == pytest.approx(wanted.x, abs=0.01)
    table = frozen(run, run).table
    assert float(run.loss[run.scored].mean() + table["one gain"].mean()) == pytest.approx(
        wanted.fun, abs=1e-5
    )


def small_text(final_norm: str) -> refitting.Text:
    """Return 40 tokens of a model with 3 neurons, 4 residual dimensions and 5 tokens in the vocabulary."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    out = replace(
        planted(torch.ones(1, 2, 3)).readout,
        W_out=normal(3, 4), b_out=normal(4), gamma=1 + normal(3) / 4, beta=normal(3), ln_w=1 + normal(4) / 4,
        ln_b=normal(4), ln_eps=1e-5, ln_centred=True, W_U=normal(4, 5), b_U=normal(5),
    )  # fmt: skip
    resid, features, target = normal(40, 4), normal(40, 3), torch.arange(40) % 5
    scale = 0.5 + normal(40, 1).abs() if final_norm == "frozen" else None
    return refitting.Text(features, resid, scale, target, out)


@pytest.fixture
def exact(monkeypatch):
    """Let a fit end at its optimum up to rounding. By default it ends where a step gains less than a millionth."""
    monkeypatch.setattr(refitting, "TOLERANCE", 1e-12)
    monkeypatch.setattr(refitting, "MAX_STEPS", 600)


@pytest.mark.parametrize("final_norm", ["frozen", "live"])
def test_the_refit_is_the_minimum_that_scipy_finds_and_its_gradient_is_0(final_norm, exact):
    """The reference is written with numpy, with a gradient by differences; the two share no code."""
    text, penalty = small_text(final_norm), 0.01
    out = {name: np.asarray(value) for name, value in vars(text.out).items()}
    F, resid, target = (np.asarray(x) for x in (text.features, text.resid_mid, text.target))
    start = out["gamma"][:, None] * out["W_out"], out["b_out"] + out["beta"] @ out["W_out"]
    mean_square = (F**2).mean(0)[:, None]
    size2 = (mean_square * start[0] ** 2).sum()

    def objective(flat: np.ndarray) -> float:
        W, b = flat[:12].reshape(3, 4), flat[12:]
        R = resid + F @ W + b
        R = R - R.mean(1, keepdims=True)
        S = np.sqrt((R**2).mean(1, keepdims=True) + out["ln_eps"])
        S = S if text.scale is None else np.asarray(text.scale)
        logits = (R / S * out["ln_w"] + out["ln_b"]) @ out["W_U"] + out["b_U"]
        loss = -log_softmax(logits, axis=1)[np.arange(40), target].mean()
        change = (mean_square * (W - start[0]) ** 2).sum() + ((b - start[1]) ** 2).sum()
        return float(loss + penalty * change / size2)

    begin = np.concatenate([start[0].ravel(), start[1]])
    search = refitting._Search(text)
    assert search.minimise(penalty)
    found = np.concatenate([np.asarray(search.weights.W).ravel(), np.asarray(search.weights.b)])
    again = minimize(objective, found, method="BFGS", options={"gtol": 1e-8})
    assert objective(begin) > objective(found) + 0.1
    assert objective(found) == pytest.approx(again.fun, abs=1e-6)
    steps = 1e-5 * np.eye(len(found))
    gradient = [(objective(found + e) - objective(found - e)) / 2e-5 for e in steps]
    assert np.abs(gradient).max() < 1e-4
    if (
        final_norm == "frozen"
    ):  # the minimum of a convex problem does not depend on where the search begins
        elsewhere = minimize(objective, begin[::-1], method="BFGS", options={"gtol": 1e-8})
        assert objective(found) == pytest.approx(elsewhere.fun, abs=1e-6)


def codes(kind: str) -> torch.Tensor:
    """Return the activations of 8 tokens on 8 neurons, as in the planted models of the same names but smaller.

    The first four tokens have one neuron each at height 1. The others are 100 times lower: on the other four
    neurons in `disjoint`, on the same neurons in `magnitude`.
    """
    high = torch.eye(8, dtype=torch.float64)[:4]
    return torch.cat([high, 0.01 * (high.roll(4, dims=1) if kind == "disjoint" else high)])


def small_run(kind: str) -> HookedRun:
    """Return a run of 8 tokens whose targets have the model's own frequencies, up to 1/400."""
    generator = torch.Generator().manual_seed(0)
    run = planted(torch.stack([codes(kind)] * 3, dim=1), eps=1e-12)
    W = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    W -= torch.cat(
        [W[:4].mean(0).expand(4, 8), W[4:].mean(0).expand(4, 8)]
    )  # see the control `disjoint`
    W_U = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    run = replace(run, readout=replace(run.readout, W_out=W, W_U=W_U, b_U=0 * W_U[0])).subset(
        run.pos == 1
    )
    text = replace(text_of(run, None, "frozen"), target=torch.zeros(8, dtype=torch.long))
    resid = text.resid_mid + text.features @ W
    logits = (resid - resid.mean(-1, keepdim=True)) / text.scale @ W_U
    counts = (400 * logits.softmax(-1)).round().long()
    token, target = (counts > 0).nonzero().repeat_interleave(counts[counts > 0], dim=0).T
    return replace(run.subset(token), target=target, string=torch.arange(len(token)))


@pytest.mark.parametrize("kind", ["disjoint", "magnitude"])
def test_a_refit_makes_up_for_one_gain_where_a_gain_for_each_neuron_does(kind, exact):
    """On these texts no model has a loss below the planted one's by more than the rounding of the frequencies.

    In `magnitude` a token and its copy of a hundredth of the height have the same answers, so at one gain the
    logits after the copy are a hundredth of those after the token, plus the bias.
    """
    run = small_run(kind)
    gain = best_gain(run, "frozen")
    assert cost(run, own_weights(run.readout), gain) > 0.1
    search = refitting._Search(text_of(run, gain, "frozen"))
    costs = []
    for penalty in (1e-2, 1e-4, 1e-6):
        search.minimise(penalty)
        costs.append(cost(run, search.weights, gain))
    assert costs == sorted(costs, reverse=True)
    if kind == "disjoint":
        assert abs(costs[-1]) < 0.001
    else:
        assert costs[-1] > 0.1


def test_one_gain_with_gamma_is_exactly_as_good_in_the_same_model(disjoint):
    """The weights are those of the control's docstring, so this needs no search."""
    first = torch.arange(64)[:, None] < 32
    gamma = torch.where(first, 64 / (63**0.5 * 11.9954), 8 / (7**0.5 * 0.034961))
    own = own_weights(disjoint.readout)
    assert abs(cost(disjoint, Weights(gamma * own.W, own.b), 1.0)) < 1e-4


def test_a_refit_that_fits_noise_is_not_taken(disjoint):
    """With 12 documents to fit, every refit is worse on other documents than the readout as it is."""
    gain = best_gain(disjoint, "frozen")
    text = text_of(disjoint, None, "frozen")
    found = refit(text.part(torch.arange(0, len(text.target), len(text.target) // 12)), text)
    assert found.penalty is None
    assert torch.equal(found.weights.W, own_weights(disjoint.readout).W)
    assert gain > 0


def table(one: np.ndarray, own: np.ndarray | None = None) -> pd.DataFrame:
    document = np.arange(len(one)) // 2
    columns = {f"one gain{how}": one for how in ("", ", final norm frozen")}
    if own is not None:
        columns |= {f"own gains{how}": own for how in ("", ", final norm frozen")}
    return pd.DataFrame({"document": document} | columns)


def tables(shift: float = 0.0, refit_cost: float = 0.1) -> dict[str, pd.DataFrame]:
    noise = np.random.default_rng(0).normal(size=80) / 100
    tuned = table(0.05 + noise, noise - 0.02)[["document", "one gain", "own gains"]]
    return {
        "frozen": table(0.2 + shift + noise),
        "refit": table(refit_cost + shift + noise, noise),
        "fine_tuned-700-0.3": tuned.assign(**{"from the start: static": noise + 0.01}),
    }


def test_the_numbers_of_a_run_are_means_of_its_tables():
    rows = {
        (row.step, row.before, row.against): row
        for row in of_run(tables(), BASE, 200, 0)
        if row.final_norm == "live"
    }
    mean = tables()["frozen"]["one gain"].mean()
    assert rows[Removed.FROZEN, None, "as trained"].value == pytest.approx(mean)
    assert rows[Removed.REFIT, None, "as trained"].value == pytest.approx(mean - 0.1)
    same = rows[Removed.REFIT, None, "same adaptation"]
    assert (same.value, same.low, same.high) == pytest.approx((0.1, 0.1, 0.1))
    fall = rows[Removed.REFIT, Removed.FROZEN, "as trained"]
    assert (fall.value, fall.order) == (pytest.approx(0.1), Order.HOLDS)
    assert (fall.n, fall.n_clusters, fall.cluster) == (80, 40, "document")
    fall = rows[Removed.FINE_TUNED, Removed.REFIT, "as trained"]
    assert (fall.value, fall.order, fall.n_tuned) == (pytest.approx(0.05), Order.HOLDS, 700)
    assert rows[Removed.FINE_TUNED, None, "same adaptation"].value == pytest.approx(0.07)
    assert rows[Removed.FINE_TUNED, None, "static"].value == pytest.approx(0.04)


def test_steps_in_the_wrong_order_are_flagged_on_the_page():
    rows = of_run(tables(refit_cost=0.3), BASE, 200, 0)
    orders = {row.order for row in rows if row.before is Removed.FROZEN}
    assert orders == {Order.VIOLATED}
    assert len(section.warnings(rows)) == 2
    assert "by 0.1000" in section.warnings(rows)[0]
    assert not section.warnings(of_run(tables(), BASE, 200, 0))


def test_no_sentence_says_that_one_gain_is_enough_where_ln_final_rescales_each_token():
    arm = {"arm": "a", "run": "r"}
    small, large = (
        [number("output_size", "|o| / |r0|", size, statistic="median", **arm)]
        for size in (1.0, 20.0)
    )
    enough = "One gain is enough here"
    for shift, size, wanted in (
        (-0.07, small, enough),
        (-0.07, large, "this does not show that one gain is enough"),
        (-0.07, [], "only if ln_final does not rescale each token"),
        (0.0, small, "worth more than the margin"),
    ):
        given = tables()
        tuned = given["fine_tuned-700-0.3"]
        given["fine_tuned-700-0.3"] = tuned.assign(**{"one gain": tuned["one gain"] + shift})
        (sentence,) = section.sentences([*of_run(given, BASE, 200, 0), *size])
        assert wanted in sentence
        assert (enough in sentence) == (wanted == enough)


def test_an_arm_has_the_mean_over_its_seeds_and_an_interval_for_new_seeds():
    base = RemovalOfArm(study="s", arm="a", value=None, unit="nats / token", step=Removed.FROZEN)
    first = next(iter(of_arm([tables(), tables(shift=0.02)], base)))
    mean = tables()["frozen"]["one gain"].mean()
    assert first.value == pytest.approx(mean + 0.01)
    assert (first.n, first.cluster) == (2, "seed")
    assert first.high - first.value > 0.01 * 12  # Student's t with one degree of freedom
    assert not list(of_arm([tables()], base))


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Return a study of a run with a per-token gain, its twin and plain SoLU, after the removal of the gain."""
    runs_dir = tmp_path_factory.mktemp("removal")
    for variant in ("solu_ln", "solu_frozen_ln", "solu"):
        kappa = [] if variant == "solu" else ["mid.kappa=4e-5"]
        config = tiny_config(runs_dir, f"variant={variant}", "study=s", *kappa)
        train_silently(config)
    remove(runs_dir / "s", CONFIG, lambda text: None)
    return runs_dir / "s"


CONFIG = RemoveConfig(n_tokens=2000, n_fit_tokens=1500, n_draws=100, fine_tune_tokens=2 * 8 * 32)


def test_the_command_writes_records_that_the_report_shows(study):
    from soluscope.report import build

    records = results.read(study / "results.jsonl")
    found = of_kind(records, Removal)
    assert {row.run for row in found} == {"solu_ln-s0"}
    both = {(step, norm) for step in (Removed.FROZEN, Removed.REFIT) for norm in ("live", "frozen")}
    assert {(row.step, row.final_norm) for row in found} == {*both, (Removed.FINE_TUNED, "live")}
    assert {row.against for row in found if row.step is Removed.FINE_TUNED} == {
        "as trained",
        "same adaptation",
        "solu_frozen_ln",
    }
    assert {row.step for row in found if row.untrained} == {Removed.FROZEN}
    frozen_rows = tables_in(study / "solu_ln-s0" / "removal")["frozen"]
    (live,) = (
        row
        for row in found
        if (row.step, row.final_norm, row.untrained) == (Removed.FROZEN, "live", False)
    )
    assert live.value == pytest.approx(frozen_rows["one gain"].mean())
    page = build(study).read_text()
    assert "Removal of the per-token gain" in page


@pytest.mark.parametrize(("lost", "kept"), [("refit", "frozen"), ("frozen", "refit")])
def test_a_removal_is_resumed_and_gives_the_same_numbers(study, tmp_path, lost, kept):
    copy = tmp_path / "s"
    shutil.copytree(study, copy, symlinks=True)
    folder = copy / "solu_ln-s0" / "removal"
    before = (folder / f"{lost}.jsonl").read_text()
    (folder / f"{lost}.jsonl").unlink()
    told: list[str] = []
    remove(copy, CONFIG, told.append)
    assert [line for line in told if f" {lost} " in line]
    assert not [line for line in told if f" {kept} " in line]
    assert (folder / f"{lost}.jsonl").read_text() == before
    told.clear()
    remove(copy, CONFIG, told.append)
    assert told == ["[1/1] solu_ln-s0: done already"]
    assert (copy / "results.jsonl").read_text() == (study / "results.jsonl").read_text()


def test_a_changed_table_is_named_and_the_same_command_makes_it_again(study, tmp_path):
    copy = tmp_path / "s"
    shutil.copytree(study, copy, symlinks=True)
    folder = copy / "solu_ln-s0" / "removal"
    path = folder / "refit.parquet"
    pd.read_parquet(path).assign(**{"one gain": 0.0}).to_parquet(path)
    runs = [Run(copy / "solu_ln-s0")]
    with pytest.raises(
        UserError, match=r"refit\.parquet is not as it was written.*soluscope remove"
    ):
        of_study(runs)
    remove(copy, CONFIG, lambda text: None)
    assert (copy / "results.jsonl").read_text() == (study / "results.jsonl").read_text()
    (folder / "refit.jsonl").unlink()
    with pytest.raises(UserError, match=r"no results at .*refit\.jsonl: .*soluscope remove"):
        of_study(runs)
    (folder / "other.jsonl").touch()
    with pytest.raises(UserError, match="'other' is not the name of a result"):
        of_study(runs)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop(columns="document"),
        lambda table: table.astype(str),
        lambda table: table.assign(**{"own gains": np.nan}),
        lambda table: table.iloc[1:],
        lambda table: table.iloc[:0],
        lambda table: table.rename(columns={"one gain": "two gains"}),
    ],
)
def test_a_received_table_that_does_not_fit_is_refused(study, tmp_path, change):
    folder = tmp_path / "run" / "removal"
    shutil.copytree(study / "solu_ln-s0" / "removal", folder)
    path = folder / "refit.parquet"
    change(pd.read_parquet(path)).to_parquet(path)
    with pytest.raises(UserError, match=r"refit\.parquet is broken .*soluscope remove") as caught:
        tables_in(folder)
    assert "\n" not in str(caught.value)


def test_further_training_begins_at_the_model_with_one_gain_and_its_loss_is_that_of_the_trained_run(
    study,
):
    """The reference is the model of the training code on the same rows, without hooks and closed forms."""
    from soluscope.data import cache as tokens
    from soluscope.data.streams import from_cache
    from soluscope.removal.fine_tune import kept, with_gain
    from soluscope.training.module import TrainingModule

    run, cache = Run(study / "solu_ln-s0"), tokens.of_study(study)
    tables = tables_in(run.dir / "removal")
    tuned = next(path for path in study.with_name("s-removed").glob("solu_frozen_ln-*"))
    rows = from_cache(cache, "report", 32, 2000, "natural").tokens
    gain = Run(tuned).config.mid.gain

    @torch.no_grad()
    def mean_loss(model) -> float:
        losses = model.loss(rows, cache.meta["bos"], reduction="none")[:, 1:]
        return float(losses[rows[:, 2:] != cache.meta["bos"]].double().mean())

    one, unchanged = with_gain(run, gain, 2, 0.3), kept(run, 2, 0.3)
    trained = mean_loss(run.load_model())
    before = mean_loss(TrainingModule(one, cache).model)
    assert before - trained == pytest.approx(tables["frozen"]["one gain"].mean(), abs=1e-5)
    assert mean_loss(TrainingModule(unchanged, cache).model) == trained
    after = mean_loss(Run(tuned).load_model())
    assert Run(tuned).facts.init_from.run == "s/solu_ln-s0"
    (name,) = (name for name in tables if name.startswith("fine_tuned"))
    assert after - trained == pytest.approx(tables[name]["one gain"].mean(), abs=1e-5)


def test_a_study_without_a_per_token_gain_is_refused(study, tmp_path):
    copy = tmp_path / "s"
    shutil.copytree(study, copy, symlinks=True)
    shutil.rmtree(copy / "solu_ln-s0")
    with pytest.raises(UserError, match="train a variant with the role per_token"):
        remove(copy, CONFIG, lambda text: None)
