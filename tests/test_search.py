"""Sweeps with `tune:`: the points of each arm's surface, the designs, and the reported arms."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from soluscope.comparison.compare import Choices
from soluscope.config import Config
from soluscope.errors import UserError
from soluscope.launching.search import Search, read_search
from soluscope.launching.sweep import Sweep, find_sweep, read_sweep, reporting, searching

TUNE: dict[str, Any] = {
    "axes": {
        "train.lr": {"start": [0.001, 0.004], "least": 0.0005, "most": 0.064},
        "model.mlp_out_scale": {"start": [0.0625, 1], "least": 0.015625, "most": 4},
        "mid.gain": {"start": [8], "least": 1, "most": 512, "arms": ["solu_frozen_ln"]},
    },
    "designs": [{}, {"model.mlp_out_scale": 1}, {"model.mlp_out_scale": "baseline"}],
    "line": {"key": "train.lr", "values": [0.001, 0.016], "at": {"model.mlp_out_scale": 1}},
}


def write_sweep(folder: Path, tune: Any, **parameters: Any) -> Path:
    arms = ["solu", "solu_ln mid.kappa=4e-5", "solu_frozen_ln"]
    values = {
        "select_seeds": {"value": [100, 101]},
        "seed": {"values": [0, 1]},
        "arm": {"values": arms},
    }
    path = folder / "mine.yaml"
    content = {"method": "grid", "parameters": values | parameters, "tune": tune}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return read_sweep(write_sweep(tmp_path, TUNE), ["size=tiny", f"runs_dir={tmp_path}"])


def searched(sweep: Sweep, loss: Callable[[Config], float]) -> tuple[Sweep, dict[str, float]]:
    """Return the last first stage of a search, and all losses."""
    losses: dict[str, float] = {}
    while True:
        stage = searching(sweep, losses)
        new = {each.arm: loss(each) for each in stage.configs if each.arm not in losses}
        if not new:
            return stage, losses
        losses |= new


def values(config: Config) -> tuple[float, float | str]:
    assert config.train.lr is not None
    return config.train.lr, config.model.mlp_out_scale


def test_the_first_stage_is_the_coarse_grid_of_every_arm_at_the_select_seeds(sweep: Sweep) -> None:
    stage = searching(sweep, {})
    assert {config.seed for config in stage.configs} == {100, 101}
    of_ln = [c for c in stage.configs if c.variant == "solu_ln" and c.seed == 100]
    assert {values(config) for config in of_ln} == {
        (lr, alpha) for lr in (0.001, 0.004) for alpha in (0.0625, 1.0, "baseline")
    }
    assert all(config.mid.kappa == 4e-5 for config in of_ln)
    assert "solu_ln-s100-kappa4e-5-lr0.004-mlp_out_scale0.0625" in {c.run_name for c in of_ln}


def test_an_axis_of_some_arms_leaves_the_other_arms_alone(sweep: Sweep) -> None:
    stage = searching(sweep, {})
    assert {c.mid.gain for c in stage.configs if c.variant == "solu_frozen_ln"} == {8}
    assert not any("gain" in c.arm for c in stage.configs if c.variant != "solu_frozen_ln")


def test_every_arm_ends_with_its_best_point_inside_in_every_design(sweep: Sweep) -> None:
    best = {"solu": (0.002, 1.0), "solu_ln": (0.016, 0.125), "solu_frozen_ln": (0.008, 0.25)}

    def loss(config: Config) -> float:
        lr, alpha = values(config)
        at = best[config.variant]
        off = math.log(lr / at[0]) ** 2
        off += math.log((0.3 if isinstance(alpha, str) else alpha) / at[1]) ** 2
        return off + math.log(getattr(config.mid, "gain", 32.0) / 32) ** 2 / 10

    stage, losses = searched(sweep, loss)
    for variant, (lr, alpha) in best.items():
        of_arm = {c.arm: c for c in stage.configs if c.variant == variant}
        chosen = of_arm[min(of_arm, key=losses.__getitem__)]
        assert values(chosen) == (lr, alpha)
        assert getattr(chosen.mid, "gain", 32) == 32
        for fixed in (1.0, "baseline"):
            cut = {c.train.lr: losses[c.arm] for c in of_arm.values() if values(c)[1] == fixed}
            assert min(cut, key=cut.__getitem__) == lr
            assert {lr / 2, lr * 2} <= cut.keys()
    assert len({c.arm for c in stage.configs}) < 130  # of about a thousand on the whole surfaces


def test_a_diverged_point_is_left_behind(sweep: Sweep) -> None:
    stage, losses = searched(sweep, lambda c: math.inf if values(c)[0] >= 0.004 else -values(c)[0])
    best = min((c for c in stage.configs if c.variant == "solu"), key=lambda c: losses[c.arm])
    assert best.train.lr == 0.002


def test_the_second_stage_has_the_chosen_points_and_the_line_at_the_reported_seeds(
    sweep: Sweep,
) -> None:
    stage, losses = searched(sweep, lambda c: abs(math.log(values(c)[0] / 0.002)))
    chosen = {c.arm for c in stage.configs if values(c) == (0.002, 1.0) and c.variant == "solu"}
    assert len(chosen) == 1
    second = reporting(sweep, Choices(frozenset(chosen), frozenset(chosen), losses))
    assert {config.seed for config in second.configs} == {0, 1}
    of_solu = {values(c) for c in second.configs if c.variant == "solu"}
    assert of_solu == {(0.002, 1.0), (0.001, 1.0), (0.016, 1.0)}
    assert {values(c) for c in second.configs if c.probes} == {(0.002, 1.0)}
    on_line = {(c.train.lr, c.mid.gain) for c in second.configs if c.variant == "solu_frozen_ln"}
    assert on_line == {(0.001, "init"), (0.016, "init")}  # the arm's own gain


def test_two_designs_share_their_common_points(sweep: Sweep) -> None:
    names = [config.run_name for config in searching(sweep, {}).configs]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"axes": {}}, "no axes"),
        ({"axes": {"train.lr": {"start": [1]}}}, "tune: .*least"),
        ({"designs": [{"train.steps": 3}]}, "train.steps is not among the axes"),
        ({"line": {"key": "train.beta1", "values": [1]}}, "train.beta1 is not among the axes"),
        ({"line": 3}, "tune: "),
    ],
)
def test_a_bad_search_is_refused_in_one_line(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as refused:
        read_search(Path("mine.yaml"), TUNE | change)
    assert "\n" not in str(refused.value)


def test_a_search_needs_select_seeds(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, TUNE, select_seeds={"value": []})
    with pytest.raises(UserError, match="needs select_seeds"):
        read_sweep(path, ["size=tiny"])


def test_a_value_outside_its_setting_is_refused(sweep: Sweep) -> None:
    search: Search = read_search(Path("mine.yaml"), TUNE)
    with pytest.raises(UserError, match="mlp_out_scale=-1"):
        search.at(sweep.configs[0], {"model.mlp_out_scale": -1.0})


def test_an_axis_names_arms_of_the_sweep(tmp_path: Path) -> None:
    axes: dict[str, Any] = TUNE["axes"]
    gain = axes["mid.gain"] | {"arms": ["solu_ln-kappa4e-5", "solu_gain"]}
    path = write_sweep(tmp_path, TUNE | {"axes": axes | {"mid.gain": gain}})
    with pytest.raises(
        UserError, match=r"mid.gain has arms: solu_gain, but the sweep has solu, so"
    ):
        read_sweep(path, ["size=tiny"])
    read_sweep(path, ["size=tiny", "arm=solu"])  # the command has replaced the arms


@pytest.mark.parametrize("words", [[], ["size=mini"], ["size=gpu"], ["size=solu1l"]])
def test_a_searched_gain_trains_no_point_of_the_headline_twice(words: list[str]) -> None:
    """Epsilon sets only the gain at which a static norm starts, so kappa does nothing beside a number."""
    stage = searching(read_sweep(find_sweep("headline"), words), {})
    points = [
        (c.variant, c.seed, values(c), c.mid.gain)
        for c in stage.configs
        if isinstance(getattr(c.mid, "gain", None), float)
    ]
    assert len(points) == len(set(points))
