"""Weights that are kept during training, the numbers at their steps, and the gaps between arms."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_config, train_silently
from safetensors.torch import load_file

import soluscope
from soluscope.comparison.dynamics import AFTER, BEFORE
from soluscope.comparison.dynamics import dynamics as gaps_of
from soluscope.config import EvalConfig
from soluscope.errors import UserError
from soluscope.evaluation import suite
from soluscope.evaluation.dynamics import _crossing, steps_of
from soluscope.evaluation.loss import document_losses
from soluscope.evaluation.one_run import tokens_of
from soluscope.report import sections
from soluscope.report.dynamics import sentences
from soluscope.results import (
    CROSSES,
    DYNAMICS,
    Comparison,
    LeftOut,
    Measurement,
    Setting,
    Term,
    Verdict,
    of_kind,
)
from soluscope.results import read as read_results
from soluscope.runs.folder import Run
from soluscope.training.snapshots import steps

SMALL = EvalConfig(probes=[], n_tokens=200, n_loss_tokens=1000, n_draws=100, jobs=1)
KEPT = [1, 2, 5]
"""Steps of three snapshots in a run of 12 steps."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a study of three arms with snapshots, and one run without."""
    runs_dir = tmp_path_factory.mktemp("dynamics")
    for variant in ("solu", "solu_frozen_ln", "solu_ln"):
        words = (f"variant={variant}", "wandb=off")
        train_silently(tiny_config(runs_dir, "study=kept", "train.snapshots=3", *words))
    train_silently(tiny_config(runs_dir, "study=plain", *words))
    return runs_dir / "kept"


@pytest.fixture(scope="module")
def evaluated(trained: Path) -> Path:
    """Return the same study with its results."""
    suite._evaluate_runs(suite.finished_runs(trained), SMALL, lambda text: None)
    suite.write_results(trained)
    return trained


# --- snapshots ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "n_steps", "wanted"),
    [
        (0, 100, []),
        (1, 100, [1]),
        (4, 10_000, [1, 10, 100, 1000]),
        (3, 12, KEPT),
        (5, 5, [1, 2, 3, 4]),
        (1, 1, []),
    ],
)
def test_snapshots_are_equally_far_apart_in_logarithms(n: int, n_steps: int, wanted: list[int]):
    words = (f"train.steps={n_steps}", "train.warmup_steps=0", f"train.snapshots={n}")
    assert steps(tiny_config(Path("runs"), "variant=solu", *words).train) == wanted


def test_snapshots_change_neither_the_weights_nor_the_id_of_a_run(trained: Path):
    with_snapshots = Run(trained / "solu_ln-s0")
    without = Run(trained.parent / "plain" / "solu_ln-s0")
    assert with_snapshots.weights.read_bytes() == without.weights.read_bytes()
    assert with_snapshots.facts.config == without.facts.config
    assert without.snapshots() == {}
    assert not (without.dir / "snapshots").exists()
    assert list(with_snapshots.snapshots()) == KEPT
    assert steps_of(with_snapshots) == [0, *KEPT, 12]


def test_any_step_can_be_loaded(trained: Path):
    run = Run(trained / "solu_ln-s0")
    weights = {}
    for step in (0, *KEPT, 12):
        model = soluscope.load(run.dir, step=step)
        assert (model.facts.steps, model.facts.tokens) == (step, step * run.facts.tokens // 12)
        weights[step] = model.W_in[0].detach()
    assert torch.equal(weights[12], soluscope.load(run.dir).W_in[0])
    for step in KEPT:
        assert torch.equal(weights[step], load_file(run.snapshot(step))["blocks.0.mlp.W_in"])
    distance = [float((weights[step] - weights[0]).norm()) for step in (0, *KEPT, 12)]
    assert distance == sorted(distance)
    assert distance[1] > 0


def test_a_step_that_was_not_kept_is_refused(trained: Path):
    with pytest.raises(UserError, match=r"no weights of step 3: set step= .*\(1, 2, 5, 12\)"):
        soluscope.load(trained / "solu_ln-s0", step=3)
    with pytest.raises(UserError, match=r"no weights of step 3: .*\(0, 1, 2, 5, 12\)"):
        suite.evaluate(trained, replace(SMALL, step=3))


def test_names_in_done_that_are_no_steps_are_left_out(trained: Path, tmp_path: Path):
    study = Path(shutil.copytree(trained, tmp_path / "kept"))
    run = Run(study / "solu_ln-s0")
    done = json.loads((run.dir / "done.json").read_text())
    more = dict.fromkeys(
        ["0", "12", "99", "007", "-1", "../2", "9" * 5000, "\u0663"], "no checksum"
    )
    (run.dir / "done.json").write_text(json.dumps(done | {"snapshots": done["snapshots"] | more}))
    assert list(run.snapshots()) == KEPT


@pytest.mark.parametrize("damage", ["changed", "cut", "linked", "gone"])
def test_a_damaged_snapshot_is_refused_by_its_name(trained: Path, tmp_path: Path, damage: str):
    study = Path(shutil.copytree(trained, tmp_path / "kept"))
    path = Run(study / "solu_ln-s0").snapshot(2)
    if damage == "changed":
        shutil.copy(Run(study / "solu_ln-s0").snapshot(5), path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "linked":
        path.unlink()
        path.symlink_to(trained / "solu_ln-s0" / "snapshots" / "2.safetensors")
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"2\.safetensors"):
        soluscope.load(study / "solu_ln-s0", step=2)


def test_a_study_is_probed_at_a_step_in_a_folder_beside_it(evaluated: Path, monkeypatch):
    monkeypatch.setattr(suite, "_calibrated", lambda *words: [])
    before = (evaluated / "results.jsonl").read_bytes()
    path = suite.evaluate(evaluated, replace(SMALL, step=2), lambda text: None)
    assert path == evaluated.parent / "kept-step2" / "results.jsonl"
    assert (evaluated / "results.jsonl").read_bytes() == before
    records = read_results(path)
    assert {each.study for each in records} == {"kept-step2"}
    losses = {row.run: row.value for row in of_kind(records, Measurement) if row.probe == "loss"}
    model = soluscope.load(evaluated / "solu-s0", step=2)
    table = document_losses(model, tokens_of(Run(evaluated / "solu-s0")), "report", SMALL)
    assert losses["solu-s0"] == pytest.approx(table["loss_sum"].sum() / table["n_tokens"].sum())
    final = {row.run: row.value for row in of_kind(read_results(evaluated / "results.jsonl"), Measurement)
             if row.probe == "loss"}  # fmt: skip
    assert losses["solu-s0"] > final["solu-s0"]


# --- numbers --------------------------------------------------------------------------------------


def of_dynamics(study: Path) -> list[Measurement]:
    rows = of_kind(read_results(study / "results.jsonl"), Measurement)
    return [row for row in rows if row.probe == DYNAMICS]


def test_the_numbers_at_a_step_are_those_of_hooks(evaluated: Path):
    run = Run(evaluated / "solu_ln-s0")
    model, cache = soluscope.load(run.dir, step=5), tokens_of(run)
    rows = cache.rows("report", run.facts.ctx)
    tokens = torch.from_numpy(rows[rows.spread(4096, 500)])
    _, hooks = model.run_with_cache(tokens)
    loss = model(tokens, return_type="loss", loss_per_token=True)
    scored = (tokens[:, 1:] != cache.meta["bos"])[:, 1:]  # without the prediction at BOS
    names = ("mlp.hook_mid", "mlp.ln.hook_scale", "hook_mlp_out", "hook_resid_mid", "mlp.hook_pre")
    at = {name: hooks[f"blocks.0.{name}"][:, 1:-1][scored].double() for name in names}
    s2 = at["mlp.hook_mid"].var(-1, unbiased=False)
    squares = at["mlp.hook_mid"].square()
    gain = 1 / at["mlp.ln.hook_scale"][..., 0]
    wanted = {
        "loss": loss[:, 1:][scored].double().mean(), "r": (s2 / (s2 + run.facts.eps)).quantile(0.5),
        "log gain": gain.log().std(unbiased=False), "gain": gain.quantile(0.5),
        "max_p": at["mlp.hook_pre"].softmax(-1).max(-1).values.quantile(0.5),
        "k_eff": (squares.sum(-1) / squares.max(-1).values).quantile(0.5),
        "|mlp_out|": at["hook_mlp_out"].norm(dim=-1).quantile(0.5),
        "|resid_mid|": at["hook_resid_mid"].norm(dim=-1).quantile(0.5),
    }  # fmt: skip
    found = {
        row.quantity: row.value
        for row in of_dynamics(evaluated)
        if (row.run, row.x) == (run.dir.name, 5 * run.facts.tokens // 12)
    }
    assert {name: found[name] for name in wanted} == pytest.approx(
        {name: float(value) for name, value in wanted.items()}, rel=1e-4
    )


def test_every_run_has_a_curve_from_the_start_to_the_end(evaluated: Path):
    for variant, has_r in (("solu", False), ("solu_frozen_ln", False), ("solu_ln", True)):
        rows = [row for row in of_dynamics(evaluated) if row.variant == variant]
        tokens = [row.x for row in rows if row.quantity == "loss"]
        assert [x / tokens[-1] * 12 for x in tokens] == pytest.approx([0, *KEPT, 12])
        assert any(row.quantity == "r" for row in rows) == has_r
        assert any(row.quantity == CROSSES for row in rows) == has_r
        assert any(row.quantity == "gain" for row in rows) == (variant != "solu")


BASE = Measurement(study="study", run="solu_ln-s0", seed=0, arm="solu_ln", variant="solu_ln", probe=DYNAMICS,
                   quantity="r", statistic="median", value=None, unit="share")  # fmt: skip


@pytest.mark.parametrize(
    ("r", "value", "note"),
    [
        ([0.0, 0.1, 0.3, 0.7, 0.9], math.sqrt(100 * 1000), ""),
        ([0.1, 0.9, 0.9, 0.9, 0.9], 5.0, ""),
        ([0.0, 0.1, 0.2, 0.3, 0.4], None, "stays below 0.5"),
        ([0.9, 0.1, 0.1, 0.1, 0.1], None, "is 0.9 at the first step already"),
    ],
)
def test_the_crossing_lies_between_two_steps(r: list[float], value: float | None, note: str):
    rows = [
        replace(BASE, x=x, value=y) for x, y in zip([0.0, 10.0, 100.0, 1000.0, 1e4], r, strict=True)
    ]
    (row,) = _crossing(rows, BASE)
    assert row.value == (value if value is None else pytest.approx(value))
    assert note in row.note
    assert list(_crossing([replace(row, quantity="gain") for row in rows], BASE)) == []


# --- gaps -----------------------------------------------------------------------------------------

STATIC = Comparison(
    study="study", term=Term.STATIC, arm="solu_ln", variant="solu_ln", against="solu_frozen_ln", cluster="seed",
    value=0.0, unit="nats / token", p=0.01, p_adj=0.02,
)  # fmt: skip
STEPS = [100.0, 1000.0, 10_000.0, 100_000.0]


def curves(
    gap: list[float], seed: int, noise: float = 0.0005
) -> dict[str, dict[int, pd.DataFrame]]:
    """Return losses of a static arm and of LN, which is worse by `gap` at each of `STEPS`, at 8 seeds."""
    random = np.random.default_rng(seed)
    counts = random.integers(50, 150, 40)
    level = 4 + random.normal(size=40)
    found: dict[str, dict[int, pd.DataFrame]] = {"solu_ln": {}, "solu_frozen_ln": {}}
    for number in range(8):
        for arm, added in (("solu_ln", gap), ("solu_frozen_ln", [0.0] * len(gap))):
            parts = [
                pd.DataFrame({
                    "tokens": int(x), "document": range(40), "n_tokens": counts,
                    "loss_sum": counts * (level - math.log(x) / 10 + more + noise * random.normal(size=40)),
                })
                for x, more in zip(STEPS, added, strict=True)
            ]  # fmt: skip
            found[arm][number] = pd.concat(parts, ignore_index=True)
    return found


def crossings(value: float | None) -> list[Measurement]:
    return [
        replace(BASE, quantity=CROSSES, statistic="", unit="tokens", seed=seed, value=value)
        for seed in range(8)
    ]


def found(
    gap: list[float], crossing: float | None
) -> tuple[dict[float, float], dict[str, Comparison]]:
    """Return the gaps by step, and the changes by stretch."""
    records = gaps_of([STATIC, *crossings(crossing)], curves(gap, seed=0).__getitem__)
    rows = [row for row in records if row.cluster == "seed"]
    return (
        {row.x: row.value for row in rows if row.term is Term.GAP},
        {row.group: row for row in rows if row.term is Term.SINCE},
    )


def test_the_gap_that_follows_the_crossing_is_found():
    gaps, changes = found([0.05, 0.05, 0.05, -0.05], crossing=20_000)
    assert gaps == pytest.approx(dict(zip(STEPS, [0.05, 0.05, 0.05, -0.05], strict=True)), abs=1e-3)
    assert changes[AFTER].value == pytest.approx(-0.1, abs=1e-3)
    assert changes[AFTER].verdict is Verdict.DIFFERENT
    assert changes[BEFORE].verdict is Verdict.EQUIVALENT
    assert "at 8 of 8 seeds" in changes[AFTER].note


def test_a_gap_that_changes_before_the_crossing_does_not_follow_it():
    _, changes = found([0.05, -0.05, -0.05, -0.05], crossing=20_000)
    assert changes[BEFORE].verdict is Verdict.DIFFERENT
    assert changes[AFTER].verdict is Verdict.EQUIVALENT


def test_a_norm_that_stays_pinned_has_no_change():
    gaps, changes = found([0.0, 0.0, 0.0, 0.0], crossing=None)
    assert len(gaps) == len(STEPS)
    for stretch in (BEFORE, AFTER):
        assert (changes[stretch].value, changes[stretch].verdict) == (None, Verdict.UNDEFINED)
        assert "at none of 8 seeds" in changes[stretch].note


def test_arms_are_compared_with_plain_solu_at_common_seeds_and_steps():
    tables = curves([0.1, 0.1, 0.1, 0.1], seed=0)
    tables["solu_ln"][0] = tables["solu_ln"][0].query("tokens > 100")
    del tables["solu_ln"][7]
    setting = Setting(study="study", arm="solu_frozen_ln", values={}, role="plain")
    row = replace(STATIC, term=Term.DIFFERENCE)
    rows = [each for each in gaps_of([setting, row], tables.__getitem__) if each.cluster == "seed"]
    assert [(each.x, each.n) for each in rows] == [(x, 7) for x in STEPS[1:]]
    assert [each.value for each in rows] == pytest.approx([0.1] * 3, abs=1e-3)
    assert gaps_of([row], tables.__getitem__) == []  # no plain arm
    assert gaps_of([setting, row], lambda arm: {}) == []


def test_other_documents_are_refused():
    tables = curves([0.0] * 4, seed=0)
    tables["solu_ln"][3] = tables["solu_ln"][3].assign(n_tokens=7)
    with pytest.raises(UserError, match="not measured on the same documents during training"):
        gaps_of([STATIC], tables.__getitem__)


# --- the report -----------------------------------------------------------------------------------


def test_the_report_shows_the_curves_and_the_gaps(evaluated: Path):
    records = read_results(evaluated / "results.jsonl")
    gaps = [
        row
        for row in of_kind(records, Comparison)
        if row.term is Term.GAP and row.cluster == "seed"
    ]
    assert {(row.arm, row.against) for row in gaps} >= {
        ("solu_ln", "solu"),
        ("solu_ln", "solu_frozen_ln"),
    }
    (section,) = (each for each in sections.build(records) if each.name == "dynamics")
    captions = [plot.caption for plot in section.plots]
    assert {"mean of loss", "median of r", "sd of log gain", "Gap of the loss during training"} <= {
        *captions
    }
    assert any("solu_ln" in text for text in sentences(records))
    assert not any(row.probe == DYNAMICS for row in of_kind(records, LeftOut))


def test_a_study_without_snapshots_has_no_dynamics(trained: Path):
    study = trained.parent / "plain"
    suite._evaluate_runs(suite.finished_runs(study), SMALL, lambda text: None)
    suite.write_results(study)
    records = read_results(study / "results.jsonl")
    assert not of_dynamics(study)
    assert "dynamics" not in {each.name for each in sections.build(records)}
    assert "snapshots" not in json.loads((study / "solu_ln-s0" / "done.json").read_text())
