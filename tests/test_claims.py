"""The arms of a study differ in nothing but what they claim; the headline sweep's presets are such studies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from soluscope.config import Config, ModelConfig, TrainConfig
from soluscope.launching import launch
from soluscope.launching.sweep import choosing, find_sweep, read_sweep
from soluscope.report import words
from soluscope.results import Provenance
from soluscope.runs.claims import apart
from soluscope.training import timing

PRESETS = {"mini": 4, "demo": 12, "gpu": 4, "solu1l": 5}
"""Number of arms of each preset of the headline sweep."""
ONE = Config(variant="solu", train=TrainConfig(lr=0.001))


def test_variants_and_tuned_settings_are_claimed() -> None:
    other = replace(
        ONE, variant="solu_ln", seed=7, train=TrainConfig(lr=0.004), model=ModelConfig(mlp_out_scale=0.5)
    )  # fmt: skip
    found = apart([ONE, other])
    assert found.claimed == ("model.mlp_out_scale", "train.lr", "variant")
    assert found.unclaimed == ()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"train": TrainConfig(lr=0.001, weight_decay=0.1)}, "train.weight_decay"),
        ({"train": TrainConfig(lr=0.001, warmup_steps=7)}, "train.warmup_steps"),
        ({"train": TrainConfig(lr=0.001, init_from="runs/a/solu-s0")}, "train.init_from"),
        ({"model": ModelConfig(init_std=0.1)}, "model.init_std"),
    ],
)
def test_another_setting_is_named(changes: dict[str, object], name: str) -> None:
    assert apart([ONE, replace(ONE, variant="solu_ln", **changes)]).unclaimed == (name,)  # type: ignore[arg-type]


def test_settings_of_different_sizes_may_differ() -> None:
    wide = replace(ONE, model=ModelConfig(d_mlp=1024), train=TrainConfig(lr=0.001, warmup_steps=7))
    assert apart([ONE, wide]).unclaimed == ()


def test_the_report_warns_of_an_unclaimed_difference_and_names_the_claimed_ones() -> None:
    made = Provenance(
        study="first", documents={}, tokens={}, n_overlapping={}, versions={},
        apart=("train.lr", "variant"), unclaimed=("train.clip",),
    )  # fmt: skip
    (warning,) = words.warnings([made])
    assert (
        "differ in more than their variants and the settings that are tuned for each: train.clip"
        in warning
    )
    assert "the arms differ in train.lr, variant" in words.certainty([made])
    assert words.warnings([replace(made, unclaimed=())]) == []


@pytest.mark.parametrize("size", PRESETS)
def test_a_preset_is_a_study_whose_arms_differ_in_their_claims_only(size: str) -> None:
    sweep = read_sweep(find_sweep("headline"), [f"size={size}"])
    assert len({config.arm for config in sweep.configs}) == PRESETS[size]
    assert apart(sweep.configs).unclaimed == ()
    assert sweep.search is not None
    assert sweep.search.line is not None
    roles = {config.variant for config in choosing(sweep).configs}
    assert {"solu", "solu_frozen_ln", "solu_ln_det", "solu_ln"} <= roles  # every part of the chain


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ("mini", ["Training takes about", "10 ms per step", "4 arms in 3 designs", "With 2 seeds no test"]),
        ("gpu", ["Training takes about", "tokens", "With 2 seeds no test over seeds"]),
        ("solu1l", ["The time is not estimated: a step of", "FLOPs, too many to time on a CPU."]),
    ],
)  # fmt: skip
def test_a_dry_run_of_a_preset_says_what_it_takes_and_what_it_can_show(
    size: str, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.setattr(timing, "seconds_per_step", lambda *args, **named: 0.01)
    places = (f"runs_dir={tmp_path}", f"tokens.cache_dir={tmp_path}", "train.device=cpu")
    launch.launch(find_sweep("headline"), [f"size={size}", *places], dry_run=True)
    printed = " ".join(capsys.readouterr().out.split())
    for each in (*told, "The arms differ in", "and in nothing else."):
        assert each in printed
    assert not list(tmp_path.iterdir())


def test_a_dry_run_names_a_setting_that_is_not_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "seconds_per_step", lambda *args, **named: 0.01)
    (tmp_path / "mixed.yaml").write_text(
        "method: grid\nparameters:\n  size: {value: tiny}\n  study: {value: mixed}\n"
        "  arm: {values: [solu, solu_ln train.clip=2]}\n"
    )
    launch.launch(tmp_path / "mixed.yaml", [f"runs_dir={tmp_path}"], dry_run=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert "also in train.clip, so a difference may not come from the variants alone" in printed
