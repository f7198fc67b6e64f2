"""Runs evaluated side by side: the files are those of one process, and a run that fails stops no other."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, train_silently

from soluscope.config import EvalConfig
from soluscope.errors import UserError
from soluscope.evaluation import suite
from soluscope.evaluation.suite import evaluate
from soluscope.runs.folder import Run

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
    assert said == [f"[{n}/3] {name}: probed already"
                    for n, name in enumerate(("gelu-s0", "solu-s0", "solu_ln-s0"), 1)]  # fmt: skip
    assert contents(beside) == contents(alone)


@pytest.mark.parametrize("n_jobs", [1, 2])
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
