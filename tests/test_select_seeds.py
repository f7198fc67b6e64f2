"""Sweeps in two stages: arms are chosen at select seeds, and the chosen ones are trained at the reported seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import command

from soluscope import results
from soluscope.comparison.compare import Choices
from soluscope.errors import UserError
from soluscope.launching import jobs, launch
from soluscope.launching.sweep import choosing, read_sweep, reporting
from soluscope.results import OfRun, Term, of_kind
from soluscope.runs.folder import Run

pytestmark = pytest.mark.slow

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
        "eval.jobs=1",
        "report=off",
    )
    return [
        *places,
        *evaluation,
        "wandb=off",
        "train.threads=1",
        "train.precision=fp32",
        "train.device=cpu",
        "inline.jobs=1",
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
    chosen = frozenset({sweep.configs[0].arm})
    part = reporting(sweep, Choices(chosen, chosen, {}))
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
    places = [word for word in words(tmp_path) if not word.startswith(("wandb=", "inline."))]
    done = command("sweep", here, *places, "engine=wandb", status=2)
    assert done.stderr.startswith("error: select_seeds= trains some arms only, but engine=wandb")
    assert done.stderr.count("\n") == 1


SEARCH = """method: grid
parameters:
  study: {value: searched}
  size: {value: tiny}
  corpus.max_mb: {value: 1}
  train.steps: {value: 12}
  select_seeds: {value: [100]}
  seed: {values: [0]}
  arm: {values: [solu, solu_ln mid.kappa=4e-5, solu_frozen_ln mid.kappa=4e-5]}
tune:
  axes:
    train.lr: {start: [0.004], least: 0.002, most: 0.008}
    model.mlp_out_scale: {start: [1], least: 0.5, most: 1}
  designs: [{}, {model.mlp_out_scale: 1}, {model.mlp_out_scale: baseline}]
  line: {key: train.lr, values: [0.002, 0.004, 0.008], at: {model.mlp_out_scale: 1}}
"""


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the study of a sweep with a search, launched once inline."""
    folder = tmp_path_factory.mktemp("searched")
    (folder / "searched.yaml").write_text(SEARCH)
    given = [word for word in words(folder) if word != "report=off"]
    launch.launch(folder / "searched.yaml", given)
    return folder / "searched"


def test_a_search_ends_with_every_best_point_inside_its_axes_or_at_their_ends(
    searched: Path,
) -> None:
    points = of_kind(results.read(searched / "results.jsonl"), results.ChoicePoint)
    chosen = [each for each in points if each.arm == each.chosen_arm and each.setting == "lr"]
    assert len(chosen) == 3
    for best in chosen:
        of_arm = [p for p in points if p.setting == "lr" and p.chosen_arm == best.arm]
        beside = {p.x for p in of_arm if p.out_scale == best.out_scale}
        wanted = {best.x / 2, best.x * 2}
        assert {x for x in wanted if 0.002 <= x <= 0.008} <= beside


def test_the_reported_arms_are_compared_in_every_design_and_along_the_line(searched: Path) -> None:
    records = results.read(searched / "results.jsonl")
    compared = of_kind(records, results.Comparison)
    static = {row.design for row in compared if row.term is Term.STATIC}
    assert static == {"", "alpha 1", "alpha matched"}
    of_line = [row for row in compared if row.term is Term.SENSITIVITY]
    assert len(of_line) == 3
    assert all("3 rates from 0.002 to 0.008" in row.note and row.n == 1 for row in of_line)
    steps = [row.value or 0.0 for row in compared if row.term is Term.SENSITIVITY_STEP]
    ends = {row.variant: row.value or 0.0 for row in of_line}
    assert sum(steps) == pytest.approx(ends["solu"] - ends["solu_ln"], abs=1e-9)


def test_only_the_best_points_at_the_reported_seeds_are_probed(searched: Path) -> None:
    probed = {path.parents[1].name for path in searched.glob("*/probes/engagement.jsonl")}
    measured = {path.parents[1].name for path in searched.glob("*/probes/loss.jsonl")}
    assert len(probed) == 3
    assert all("-s0-" in name for name in probed)
    assert len(measured) == len(list(searched.glob("*/done.json"))) > 20


@pytest.mark.long
def test_the_same_command_ends_the_search_where_it_was(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in searched.glob("*/model.safetensors")}
    given = [word for word in words(searched.parent) if word != "report=off"]
    launch.launch(searched.parent / "searched.yaml", given)
    assert {
        path: path.stat().st_mtime_ns for path in searched.glob("*/model.safetensors")
    } == before
    assert "Robustness to the learning rate" in (searched / "report.html").read_text()


def test_a_diverged_run_ends_a_plain_sweep_and_not_a_search(tmp_path: Path) -> None:
    text = SEARCH.replace("searched", "far").replace(
        "solu, solu_ln mid.kappa=4e-5, solu_frozen_ln mid.kappa=4e-5", "solu"
    )
    text = text.replace(
        "start: [0.004], least: 0.002, most: 0.008", "start: [1.0e+9], least: 1, most: 1.0e+9"
    )
    (tmp_path / "far.yaml").write_text(
        text.replace("values: [0.002, 0.004, 0.008]", "values: [0.004]")
    )
    words_here = [
        *words(tmp_path),
        "train.warmup_steps=0",
        "train.log_every=1",
        "train.lr_rest=1e9",
    ]
    with pytest.raises(UserError, match=r"no finished run|0 done"):
        launch.launch(tmp_path / "far.yaml", words_here)
    failed = [Run(path.parent) for path in tmp_path.glob("far/*/failed.json")]
    assert failed
    assert all(run.has_diverged() for run in failed)
