"""Registrations: a plan is written before any run at a reported seed, and departures from it are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import tiny_config, train_silently

from soluscope.errors import UserError
from soluscope.launching import launch
from soluscope.report import words
from soluscope.report.sections import build
from soluscope.results import Registered
from soluscope.runs import registration

GRID = {
    "method": "grid",
    "predictions": ["LN lowers the loss."],
    "parameters": {
        "study": {"value": "first"}, "size": {"value": "tiny"}, "select_seeds": {"value": [100]},
        "seed": {"values": [0, 1]}, "corpus.max_mb": {"value": 1}, "train.steps": {"value": 12},
        "arm": {"values": ["solu", "solu_ln"]},
    },
}  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(GRID, sort_keys=False))
    return path


def places(path: Path, *others: str) -> list[str]:
    return [
        f"runs_dir={path.parent}",
        f"tokens.cache_dir={path.parent / '.tokens'}",
        "wandb=off",
        "train.precision=fp32",
        *others,
    ]


def registered(path: Path) -> registration.Registration:
    launch.launch(path, places(path), preregister=True)
    found = registration.read(path.parent / "first")
    assert found is not None
    return found


def test_a_plan_names_what_is_estimated_from_which_runs_and_by_which_rules(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = registered(path)
    plan = found.plan
    assert (plan["select_seeds"], plan["seeds"], plan["arms"]) == (
        [100],
        [0, 1],
        ["solu", "solu_ln"],
    )
    assert plan["thresholds"]["margin, nats per token"] == 0.005
    assert plan["predictions"] == ["LN lowers the loss."]
    assert plan["settings"]["train.steps"] == 12
    assert "seed" not in plan["settings"]
    assert found.sha256 in capsys.readouterr().out
    assert not list((path.parent / "first").glob("*/config.yaml"))


def test_the_same_launch_follows_the_plan_on_any_machine(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registered(path)
    launch.launch(
        path, places(path, "train.device=cpu", "train.threads=2", "eval.jobs=1"), dry_run=True
    )
    assert "2 jobs: 2 waiting" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("seed=5", "seeds: registered [0, 1], now [5]"),
        ("train.steps=7", "settings.train.steps: registered"),
        ("eval.n_tokens=500", "evaluation.n_tokens: registered 10000, now 500"),
        ("select_seeds=[7]", "select_seeds: registered [100], now [7]"),
    ],
)
def test_another_launch_is_refused_or_its_reason_is_kept(path: Path, word: str, told: str) -> None:
    before = registered(path)
    with pytest.raises(UserError) as refused:
        launch.launch(path, places(path, word), dry_run=True)
    assert told in str(refused.value)
    assert "depart=" in str(refused.value)
    launch.launch(path, places(path, word, "depart=a bug"), dry_run=True)
    assert registration.read(path.parent / "first") == before  # a dry run writes nothing
    found = registration.read(path.parent / "first")
    assert found is not None
    registration.depart(path.parent / "first", found, [told], "a bug")
    registration.depart(path.parent / "first", found, [told], "a bug")
    again = registration.read(path.parent / "first")
    assert again is not None
    assert again.departures == [f"{told} (reason: a bug)"]
    assert (again.plan, again.sha256) == (before.plan, before.sha256)


def test_a_plan_after_a_run_at_a_reported_seed_is_refused(path: Path) -> None:
    train_silently(tiny_config(path.parent, "study=first", "variant=solu", "seed=1"))
    with pytest.raises(UserError, match=r"runs at reported seeds already \(solu-s1\)"):
        launch.launch(path, places(path), preregister=True)
    assert registration.read(path.parent / "first") is None


def test_a_run_at_a_select_seed_may_come_before_the_plan(path: Path) -> None:
    train_silently(tiny_config(path.parent, "study=first", "variant=solu", "seed=100"))
    assert registered(path).plan["seeds"] == [0, 1]


def test_a_study_is_registered_once(path: Path) -> None:
    registered(path)
    with pytest.raises(UserError, match="registered once"):
        launch.launch(path, places(path), preregister=True)


def test_a_changed_plan_is_refused(path: Path) -> None:
    registered(path)
    file = path.parent / "first" / registration.NAME
    content = json.loads(file.read_text())
    content["plan"]["seeds"] = [0, 1, 2]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="was changed"):
        registration.read(path.parent / "first")


@pytest.mark.parametrize("seeds", [3, [[1]], ["1"], None, [True], {"a": 1}])
def test_a_plan_with_broken_seeds_is_refused_in_one_line(path: Path, seeds: object) -> None:
    found = registered(path)
    plan = {**found.plan, "seeds": seeds}
    content = {"plan": plan, "sha256": registration.checksum_of(plan), "at": found.at}
    (path.parent / "first" / registration.NAME).write_text(json.dumps(content))
    with pytest.raises(UserError, match="seeds is not a list of whole numbers"):
        registration.read(path.parent / "first")


def test_the_report_says_whether_the_plan_was_followed() -> None:
    made = Registered(study="s", sha256="ab" * 32, at="2026-11-29T00:00:00+00:00")
    assert (
        "preregistered 2026-11-29, sha256 abababababab: the plan was followed"
        in words.certainty([made])
    )
    departed = Registered(study="s", sha256="ab" * 32, at="2026-11-29", departures=("seeds: <b>",))
    assert any("1 departure from the plan" in each for each in words.certainty([departed]))
    (section,) = (each for each in build([departed]) if each.name == "registration")
    assert "seeds: <b>" in str(section.blocks)
