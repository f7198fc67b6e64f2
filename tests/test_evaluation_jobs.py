"""Runs evaluated side by side: the files are those of one process, and a run that fails stops no other."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _launching import sweep_file, words_for
from conftest import tiny_config, train_silently

from soluscope import results
from soluscope.config import EvalConfig
from soluscope.errors import UserError
from soluscope.evaluation import one_run, suite
from soluscope.evaluation.suite import evaluate
from soluscope.launching.launch import launch
from soluscope.results import Measurement, of_kind
from soluscope.runs.folder import Busy, Run, lock

PROBES = ["gain_variation", "scale_freeze"]
CONFIG = EvalConfig(probes=PROBES, n_tokens=200, n_loss_tokens=500, n_draws=100)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a study of three runs that are not evaluated."""
    runs_dir = tmp_path_factory.mktemp("trained")
    for variant in ("gelu", "solu", "solu_ln"):
        words = ("study=beside", f"variant={variant}", "wandb=off")
        folder = train_silently(tiny_config(runs_dir, *words))
    return folder.parent


@pytest.fixture(autouse=True)
def _no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the controls, which are computed in one process in any case."""
    monkeypatch.setattr(suite, "_calibrated", lambda *words: [])


def copy_of(study: Path, to: Path) -> Path:
    return Path(shutil.copytree(study, to / study.name))


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.long
def test_runs_side_by_side_have_the_files_of_one_process(trained: Path, tmp_path: Path) -> None:
    """The process has two threads, but a run is evaluated with one thread by itself and beside others."""
    alone, beside = copy_of(trained, tmp_path / "alone"), copy_of(trained, tmp_path / "beside")
    before, said = torch.get_num_threads(), list[str]()
    torch.set_num_threads(2)
    try:
        evaluate(alone, replace(CONFIG, jobs=1), lambda text: None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    evaluate(beside, replace(CONFIG, jobs=2), said.append)
    assert contents(beside) == contents(alone)
    assert sorted(said) == sorted(
        f"[{number}/3] {name}: {text}"
        for number, name in enumerate(("gelu-s0", "solu-s0", "solu_ln-s0"), 1)
        for text in ("5 results to compute", "probed")
    )
    said.clear()
    evaluate(beside, replace(CONFIG, jobs=2), said.append)
    assert said == ["3 of 3 runs: probed already"]
    assert contents(beside) == contents(alone)


@pytest.mark.parametrize("n_jobs", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_that_cannot_be_evaluated_stops_no_other_and_is_one_line(
    n_jobs: int, trained: Path, tmp_path: Path
) -> None:
    study = copy_of(trained, tmp_path)
    broken = study / "gelu-s0" / "model.safetensors"
    broken.write_bytes(bytes(broken.stat().st_size))
    with pytest.raises(UserError, match="1 of 3 runs are not evaluated: gelu-s0: ") as caught:
        evaluate(study, replace(CONFIG, probes=[], jobs=n_jobs), lambda text: None)
    assert "\n" not in str(caught.value)
    assert str(broken) in str(caught.value)
    for name in ("solu-s0", "solu_ln-s0"):
        assert (study / name / "probes" / "tokens.jsonl").is_file()
    assert not any(Run(path).at_work() for path in study.glob("*-s0"))
    assert not (study / "results.jsonl").exists()


def test_a_run_at_which_a_job_is_at_work_is_left_out_and_the_others_are_compared(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, said = copy_of(trained, tmp_path), list[str]()
    monkeypatch.setattr(one_run, "LEFT_BEHIND_S", 0.1)
    with lock(study / "solu-s0"):
        written = evaluate(study, replace(CONFIG, jobs=1), said.append)
        (left_out,) = [line for line in said if "solu-s0" in line]
        assert left_out.startswith("[2/3] solu-s0: left out: ")
        assert "another process" in left_out
        runs = {each.run for each in of_kind(results.read(written), Measurement)}
        assert runs == {"gelu-s0", "solu_ln-s0"}
        with pytest.raises(Busy):
            evaluate(study / "solu-s0", replace(CONFIG, jobs=1), said.append)
    evaluate(study, replace(CONFIG, jobs=1), said.append)
    runs = {each.run for each in of_kind(results.read(written), Measurement)}
    assert runs == {"gelu-s0", "solu-s0", "solu_ln-s0"}


def results_of(study: Path) -> dict[str, list[str]]:
    """Return the lines of each file of results in a study's runs, without the study's name."""
    return {
        str(path.relative_to(study)): path.read_text().replace(f'"{study.name}"', "").splitlines()
        for path in study.glob("*/probes/*.jsonl")
    }


WORDS = ("eval.probes=[gain_variation,scale_freeze]", "eval.n_tokens=200", "eval.n_loss_tokens=500",
         "eval.n_draws=100")  # fmt: skip


def test_a_run_whose_evaluation_fails_in_its_job_is_evaluated_after_the_last_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(run: Run, *words: object) -> None:
        raise ValueError(f"no room for {run.dir.name}\nwith a second line")

    path = sweep_file(tmp_path, variant=["solu"])
    monkeypatch.setattr(one_run, "evaluate_run", fail)
    launch(
        path,
        [*words_for(tmp_path / "runs", "inline.jobs=1", "train.steps=12", "study=fails"), *WORDS],
    )
    told = capsys.readouterr().err.splitlines()
    assert "solu-s0 is not probed yet: no room for solu-s0" in told
    assert "[1/1] solu-s0: probed" in told


@pytest.mark.parametrize("n_jobs", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_sweeps_jobs_are_evaluated_right_after_their_training(
    n_jobs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files are those of an evaluation after the last job; a run that lacks a result is evaluated again."""
    path = sweep_file(tmp_path, variant=["solu", "solu_ln"])
    words = words_for(tmp_path / "runs", f"inline.jobs={n_jobs}", "train.steps=12")
    launch(path, [*words, *WORDS, "study=jobs"])
    told = capsys.readouterr().err.splitlines()
    assert "2 of 2 runs: probed already" in told
    launch(path, [*words, "study=after", "report=off"])
    evaluate(tmp_path / "runs" / "after", replace(CONFIG, jobs=n_jobs), lambda line: None)
    jobs, after = (results_of(tmp_path / "runs" / study) for study in ("jobs", "after"))
    assert jobs == after
    study = tmp_path / "runs" / "jobs"
    before = contents(study)
    (study / "solu-s0" / "probes" / "scale_freeze.jsonl").unlink()
    capsys.readouterr()
    launch(path, [*words, *WORDS, "study=jobs"])
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if "begins" in line] == ["[1/1] solu-s0: probing begins"]
    assert contents(study) == before
