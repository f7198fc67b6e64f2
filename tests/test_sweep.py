"""Sweep files: each gives the jobs that it describes, the same on every engine; impossible files are refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml

from soluscope.config import load_config
from soluscope.errors import UserError
from soluscope.launching.sweep import read_sweep

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "sweeps").glob("*.yaml"))


def written(tmp_path: Path, parameters: object, method: str = "grid") -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"method": method, "parameters": parameters}, sort_keys=False))
    return path


def grid(**values: object) -> dict[str, object]:
    """Return parameters in wandb's spelling: a list gives values, anything else one value; `__` is a dot."""
    return {
        key.replace("__", "."): {"values": value} if isinstance(value, list) else {"value": value}
        for key, value in values.items()
    }


def test_the_grid_is_the_product_with_its_last_parameter_fastest(tmp_path: Path) -> None:
    path = written(tmp_path, grid(study="mine", seed=[0, 1], variant=["gelu", "solu"]))
    names = [config.run_name for config in read_sweep(path, []).configs]
    assert names == ["gelu-s0", "solu-s0", "gelu-s1", "solu-s1"]


def test_nested_parameters_are_dotted_ones(tmp_path: Path) -> None:
    flat = grid(variant="solu", train__lr=[0.001, 0.002], train__clip=2.0)
    nested = {
        "variant": {"value": "solu"},
        "train": {"parameters": {"lr": {"values": [0.001, 0.002]}, "clip": {"value": 2.0}}},
    }
    configs = read_sweep(written(tmp_path, flat), []).configs
    assert configs == read_sweep(written(tmp_path, nested), []).configs
    assert [config.train.lr for config in configs] == [0.001, 0.002]
    assert {config.train.clip for config in configs} == {2.0}


def test_what_no_name_tells_goes_into_the_tag_with_its_value(tmp_path: Path) -> None:
    path = written(tmp_path, grid(variant="solu_ln", mid__kappa=[0.42, 42], train__lr=[2e-3]))
    names = [config.run_name for config in read_sweep(path, []).configs]
    assert names == ["solu_ln-s0-kappa0.42", "solu_ln-s0-kappa42.0"]


def test_a_tag_of_the_files_own_is_filled_in_for_each_job(tmp_path: Path) -> None:
    path = written(tmp_path, grid(variant="solu", tag="at-${train.lr}", train__lr=[0.001, 0.002]))
    names = [config.run_name for config in read_sweep(path, []).configs]
    assert names == ["solu-s0-at-0.001", "solu-s0-at-0.002"]


def test_an_arm_brings_its_variant_its_words_and_its_name(tmp_path: Path) -> None:
    path = written(tmp_path, grid(arm=["solu", "solu_ln mid.kappa=0.42 train.lr=0.003"]))
    plain, dosed = read_sweep(path, []).configs
    assert plain == load_config(["variant=solu"])
    assert dosed == load_config(
        ["variant=solu_ln", "mid.kappa=0.42", "train.lr=0.003", "tag=kappa0.42-lr0.003"]
    )


def test_an_arm_may_name_itself(tmp_path: Path) -> None:
    arm = "solu_gain mid.gain=runs/first/solu_ln-s{seed} tag=matched"
    (config,) = read_sweep(written(tmp_path, grid(arm=[arm])), []).configs
    assert config.run_name == "solu_gain-s0-matched"
    assert config.mid.gain == "runs/first/solu_ln-s{seed}"


@pytest.mark.parametrize("name", ["no", "1e3", "on", "007"])
def test_names_are_taken_as_they_are_written(name: str) -> None:
    config = load_config(["variant=solu", f"study={name}", f"tag={name}"])
    assert (config.study, config.tag) == (name, name)


def test_the_arms_name_comes_before_the_files_tag(tmp_path: Path) -> None:
    path = written(
        tmp_path, grid(tag="lr${train.lr}", train__lr=[0.001], arm=["solu_gain mid.gain=8"])
    )
    (config,) = read_sweep(path, []).configs
    assert config.run_name == "solu_gain-s0-gain8-lr0.001"


def test_an_override_takes_the_place_of_a_parameters_values() -> None:
    sweep = read_sweep(ROOT / "sweeps" / "demo.yaml", ["study=mine", "seed=2"])
    assert [config.seed for config in sweep.configs] == [2] * 6
    assert {config.study for config in sweep.configs} == {"mine"}
    assert "seed" not in sweep.parameters


def test_the_demo_has_each_layer_norm_with_its_static_twin_at_one_kappa() -> None:
    configs = read_sweep(ROOT / "sweeps" / "demo.yaml", ["seed=0"]).configs
    kappas = {
        variant: [
            each.mid.epsilon(each.model.d_mlp) * each.model.d_mlp**2
            for each in configs
            if each.variant == variant
        ]
        for variant in ("solu_ln", "solu_frozen_ln")
    }
    assert kappas["solu_ln"] == kappas["solu_frozen_ln"] == pytest.approx([41.94, 4e-5], rel=1e-3)
    assert [config.run_name for config in configs if config.variant in ("gelu", "solu")] == [
        "gelu-s0",
        "solu-s0",
    ]


def test_a_jobs_id_is_of_what_moves_its_numbers_and_of_nothing_else(tmp_path: Path) -> None:
    path = written(tmp_path, grid(study="a", variant=["gelu", "solu"]))
    ids = [config.hash for config in read_sweep(path, []).configs]
    there = [
        config.hash for config in read_sweep(path, ["study=b", f"runs_dir={tmp_path}"]).configs
    ]
    other = [config.hash for config in read_sweep(path, ["train.clip=2"]).configs]
    assert ids == there
    assert len({*ids, *other}) == 4


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_sweep_is_named_by_its_study_and_its_jobs_are_apart(path: Path) -> None:
    sweep = read_sweep(path, [])
    assert {config.study for config in sweep.configs} == {path.stem}
    assert len({config.run_dir for config in sweep.configs}) == len(sweep.configs)
    assert len({config.hash for config in sweep.configs}) == len(sweep.configs)


def test_the_shipped_sweeps_ask_what_they_say() -> None:
    def of(name: str) -> tuple:
        return read_sweep(ROOT / "sweeps" / f"{name}.yaml", []).configs

    variants = {(config.variant, config.seed) for config in of("variants")}
    six = ["gelu", "gelu_ln", "solu", "solu_frozen_ln", "solu_gain", "solu_ln"]
    assert variants == set(itertools.product(six, range(4)))
    swept = [c for c in of("kappa") if c.variant != "solu"]
    doses = {(c.variant, c.mid.kappa, c.seed) for c in swept if c.mid.kappa is not None}
    kappas = (4e-5, 0.42, 4.2, 41.94, 419.4)
    arms = ("solu_ln", "solu_frozen_ln", "solu_gain")
    assert doses == set(itertools.product(arms, kappas, range(8)))
    assert {c.mid.gain for c in of("gain") if c.variant == "solu_gain"} == {1, 4, 16, 64, 316}
    sizes = of("sizes")
    assert len({config.model.d_mlp for config in sizes}) >= 3
    shared = {(c.model.ctx, c.train.steps, c.train.batch_size, c.tokens.d_vocab) for c in sizes}
    assert len(shared) == 1, "models of several sizes must see the same tokens"
    assert all(config.model.d_mlp == 4 * config.model.d_model for config in sizes)
    reported = {
        config.seed for name in ("variants", "kappa", "gain", "sizes") for config in of(name)
    }
    assert not {config.seed for config in of("lr")} & reported


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        (grid(variant=["solu"], train__rate=[1, 2]), "no key called 'train.rate'"),
        (grid(variant=["solu_lm"]), "no variant called 'solu_lm'. Did you mean 'solu_ln'?"),
        (grid(variant=[]), "is an empty grid at variant: it needs 'values: [...]'"),
        ({"variant": {"min": 0, "max": 1}}, "is an empty grid at variant"),
        ({}, "is an empty grid: it needs a parameter"),
        (grid(variant="solu", seed=[1, 1]), "gives two jobs the folder runs/default/solu-s1"),
        (grid(variant="solu", tag=["a", "b"]), "gives two jobs the id"),
        (grid(variant="solu", tag="one", train__lr=[1e-3, 2e-3]), "add them to the tag"),
        (grid(variant="solu", study=["a", "b"]), "has the studies a, b, but a sweep must have one"),
        (grid(arm=["solu_ln mid.kappa=1"], mid__kappa=[2]), "both set mid.kappa: remove one of the two"),
        (grid(arm=["solu_ln mid.kappa=1"], variant=["solu"]), "both set variant"),
        (grid(arm=["solu_ln kappa"]), "'kappa' is not key=value; give a variant and key=value words"),
    ],
)  # fmt: skip
def test_what_is_no_grid_of_jobs_is_refused(tmp_path: Path, parameters: object, says: str) -> None:
    with pytest.raises(UserError) as refused:
        read_sweep(written(tmp_path, parameters), [])
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_other_methods_than_a_grid_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it needs 'method: grid'"):
        read_sweep(written(tmp_path, grid(variant="solu"), method="bayes"), [])


@pytest.mark.parametrize(
    "words",
    [
        ["size=tiny"],
        ["size=tiny", "tag=of${seed}-${train.lr}"],
        ["size=tiny", "study=s${.seed}", "seed=4"],
        ["size=tiny", "seed=7"],
    ],
)
def test_an_arm_that_is_read_once_has_the_configurations_of_reading_every_job(
    tmp_path: Path, words: list[str]
) -> None:
    path = tmp_path / "grid.yaml"
    arms = ["solu", "solu_ln mid.kappa=4e-5", "solu_gain mid.gain=3"]
    values = {
        "seed": {"values": [0, 3]},
        "arm": {"values": arms},
        "train.lr": {"values": [1e-3, 2e-3]},
    }
    path.write_text(yaml.safe_dump({"method": "grid", "parameters": values}, sort_keys=False))
    found = {config.run_name: config for config in read_sweep(path, words).configs}
    fixed = [word for word in words if word.startswith("seed=")]
    seeds = [int(word.removeprefix("seed=")) for word in fixed] or [0, 3]
    tags = [word for word in words if word.startswith("tag=")]
    for seed, arm, lr in itertools.product(seeds, arms, (0.001, 0.002)):
        config = load_config(
            [
                f"seed={seed}",
                f"arm={arm}",
                f"train.lr={lr}",
                *(tags or ["tag=lr${train.lr}"]),
                *words,
            ]
        )
        assert found.pop(config.run_name) == config
    assert not found
