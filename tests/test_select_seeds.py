"""Sweeps in two stages: arms are chosen at select seeds, and the chosen ones are trained at the reported seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, run_python

from soluscope import results
from soluscope.errors import UserError
from soluscope.launching import jobs, launch
from soluscope.launching.sweep import choosing, read_sweep, reporting
from soluscope.results import OfRun, Term, of_kind

SWEEP = """method: grid
parameters:
  study: {value: chosen}
  size: {value: tiny}
  corpus.max_mb: {value: 1}
  train.steps: {value: 12}
  select_seeds: {value: [100]}
  seed: {values: [0, 1]}
  train.lr: {values: [0.0001, 0.01]}
  arm: {values: [solu, solu_ln, solu_gain mid.gain=1, solu_gain mid.gain=8]}
"""
N_ARMS = 8
LAUNCH = ROOT / "sweeps" / "launch.py"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "chosen.yaml"
    path.write_text(SWEEP)
    return path


def words(runs_dir: Path, *others: str) -> list[str]:
    places = (f"runs_dir={runs_dir}", f"tokens.cache_dir={runs_dir / '.tokens'}")
    evaluation = (
        "eval.probes=[engagement]",
        "eval.n_tokens=500",
        "eval.n_loss_tokens=2000",
        "report=off",
    )
    return [
        *places,
        *evaluation,
        "wandb=off",
        "train.threads=1",
        "train.precision=fp32",
        "train.device=cpu",
        *others,
    ]


@pytest.fixture(scope="module")
def study(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the study of the sweep, launched once inline and evaluated with one probe."""
    runs_dir = tmp_path_factory.mktemp("runs")
    launch.launch(path, words(runs_dir))
    with_report = [word for word in words(runs_dir) if word != "report=off"]
    launch.launch(path, with_report)  # everything is trained, so this only evaluates
    return runs_dir / "chosen"


def test_all_arms_are_trained_at_the_select_seeds_and_the_chosen_ones_at_the_others(
    study: Path,
) -> None:
    runs = [path.parent.name for path in sorted(study.glob("*/done.json"))]
    tried = {run for run in runs if "-s10" in run}
    reported = sorted(set(runs) - tried)
    assert len(tried) == N_ARMS
    assert len(reported) == 2 * 3
    # At so few steps the higher rate is far better for each arm.
    assert {run.split("-s")[0] for run in reported} == {"solu", "solu_ln", "solu_gain"}
    assert all("lr0.01" in run for run in reported)
    assert sorted(job.run for job in jobs.listed(study)) == sorted(runs)


def test_no_number_of_a_select_seed_is_reported(study: Path) -> None:
    records = results.read(study / "results.jsonl")
    assert {record.seed for record in records if isinstance(record, OfRun)} == {0, 1}
    static = [row for row in of_kind(records, results.Comparison) if row.term is Term.STATIC]
    assert {(row.n_candidates, row.optimism) for row in static} == {(2, 0.0)}
    curves = of_kind(records, results.ChoicePoint)
    assert len([point for point in curves if point.setting == "lr"]) == N_ARMS
    assert {point.n for point in curves} == {1}
    assert sorted(row.n for row in of_kind(records, results.Setting)) == [0] * 5 + [2] * 3


def test_the_same_command_trains_nothing_again(
    study: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in study.glob("*/model.safetensors")}
    launch.launch(path, words(study.parent))
    assert {path: path.stat().st_mtime_ns for path in study.glob("*/model.safetensors")} == before
    said = capsys.readouterr()
    assert f"chosen: {N_ARMS} jobs: {N_ARMS} done" in said.err
    assert "chosen: 6 jobs: 6 done" in said.err
    assert "chosen at the select seeds: solu-" in said.err


def test_the_second_stage_starts_from_its_description_on_another_machine(
    study: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = launch.SecondStage(path, tuple(words(study.parent)), retry=False).to_json()
    again = launch.after_from_json(described)
    assert again == launch.SecondStage(path, tuple(words(study.parent)), retry=False)
    again()
    assert "14 jobs: 14 done" in capsys.readouterr().out


def test_a_dry_run_shows_the_first_stage_and_says_how_many_follow(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch.launch(path, words(tmp_path), dry_run=True)
    said = " ".join(capsys.readouterr().out.split())
    assert f"{N_ARMS} jobs: {N_ARMS} waiting" in said
    assert (
        f"Then the chosen arms, at most {N_ARMS}, are trained at 2 seeds that are reported." in said
    )
    assert not list(tmp_path.iterdir())


def test_the_stages_are_the_grid_at_other_seeds_and_a_part_of_the_grid(path: Path) -> None:
    sweep = read_sweep(path, [])
    first = choosing(sweep)
    assert {config.seed for config in first.configs} == {100}
    assert {config.arm for config in first.configs} == {config.arm for config in sweep.configs}
    alone = read_sweep(path, ["seed=100", "select_seeds=[101]"])
    of_seed = {config.arm: replace(config, select_seeds=[100]) for config in alone.configs}
    assert all(of_seed[c.arm] == c for c in first.configs)
    part = reporting(sweep, {sweep.configs[0].arm})
    assert {config.arm for config in part.configs} == {sweep.configs[0].arm}
    assert {config.seed for config in part.configs} == {0, 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=100"], "seed 100 is among seed= and select_seeds="),
        (["select_seeds=[0,5]"], "seed 0 is among seed= and select_seeds="),
    ],
)
def test_a_seed_has_one_role(path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_sweep(path, words)


def test_wandbs_agents_are_refused_in_one_line(path: Path, tmp_path: Path) -> None:
    text = SWEEP.replace(
        "method: grid",
        'method: grid\nprogram: train/run.py\ncommand: ["${interpreter}", "${program}", "${args_no_hyphens}"]',
    )
    here = tmp_path / "agents.yaml"
    here.write_text(text)
    places = [word for word in words(tmp_path) if not word.startswith("wandb=")]
    done = run_python(LAUNCH, here, *places, "engine=wandb")
    assert done.returncode == 2
    assert done.stderr.startswith("error: select_seeds= trains some arms only, but engine=wandb")
    assert done.stderr.count("\n") == 1
