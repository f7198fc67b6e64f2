"""Jobs side by side: each has the bits of a job alone, and a failure or a kill ends only the job that it hits."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from _launching import LAUNCH, at_work, started, sweep_file, until, words_for
from conftest import HANGS_AFTER_S, train_silently

from soluscope import memory
from soluscope.config import Config
from soluscope.engines import inline
from soluscope.errors import UserError
from soluscope.launching.launch import launch
from soluscope.launching.sweep import read_sweep
from soluscope.runs.folder import Run


def weights(config: Config) -> bytes:
    return Run(config.run_dir).weights.read_bytes()


@pytest.mark.slow
def test_jobs_side_by_side_have_the_weights_of_jobs_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One job diverges, and one begins with the weights of a job that is listed after it."""
    runs_dir = tmp_path / "runs"
    origin = runs_dir / "beside" / "solu_ln-s{seed}-first"
    arms = [
        f"solu_ln train.init_from={origin} tag=second",
        "solu train.lr=1e9 train.lr_rest=1e9 train.log_every=1 tag=diverges",
        "solu_ln tag=first",
        "gelu tag=last",
    ]
    path = sweep_file(tmp_path, arm=arms)
    words = [word for word in words_for(runs_dir, "train.steps=12") if "threads" not in word]
    with pytest.raises(UserError, match="4 jobs: 3 done, 1 failed; not done: solu-s0-diverges"):
        launch(path, [*words, "study=beside", "report=off", "inline.jobs=2"])
    said = capsys.readouterr().err
    assert "lower train.lr" in said
    lines = said.splitlines()
    assert len([line for line in lines if line.endswith("training begins")]) == 4
    assert len([line for line in lines if "] " in line and "done, loss" in line]) == 3
    assert lines.index("[4/4] gelu-s0-last: training begins") > lines.index(
        "[3/4] solu_ln-s0-first: training begins"
    )
    alone = [word.replace("beside", "alone") for word in arms]
    configs = read_sweep(
        sweep_file(tmp_path, arm=[alone[2], alone[0], alone[3]]),
        [*words, "study=alone", "train.threads=1"],
    ).configs
    for config in configs:
        train_silently(config)
        beside = Run(runs_dir / "beside" / config.run_name)
        assert weights(config) == beside.weights.read_bytes(), config.run_name
        assert beside.config.train.threads == 1


@pytest.mark.slow
def test_a_killed_worker_fails_its_own_job_and_a_killed_launch_leaves_no_process(
    tmp_path: Path,
) -> None:
    path = sweep_file(tmp_path, variant=["solu", "solu_ln", "gelu"])
    long = ("train.steps=600", "train.checkpoint_every=600", "train.log_every=5")
    words = words_for(tmp_path / "runs", *long)
    command = (LAUNCH, path, *words, "study=killed", "report=false", "inline.jobs=2")
    configs = read_sweep(path, [*words, "study=killed"]).configs
    runs = [Run(config.run_dir) for config in configs]
    study, said = configs[0].study_dir, tmp_path / "said"
    with started(*command, said=said) as process:
        until(lambda: runs[0].last_row() and runs[1].last_row(), "two jobs train")
        os.kill(at_work(study)[runs[0].dir.name], signal.SIGKILL)
        until(lambda: runs[2].last_row(), "the third job takes the place of the first")
        assert "its process was ended by SIGKILL" in str(runs[0].failure())
        process.kill()
        until(lambda: not at_work(study), "the workers end with the process that started them")
    assert any(run.checkpoint.is_file() for run in runs[1:])
    with started(*command, "--retry-failed", said=said) as process:
        assert process.wait(timeout=HANGS_AFTER_S) == 0, said.read_text()
    for config in read_sweep(path, [*words, "study=calm"]).configs:
        train_silently(config)
        assert weights(config) == (study / config.run_name / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "n_cores", "expected"),
    [
        ((), 4, 4),
        ((), 64, 6),
        ((), 1, 1),
        (("train.threads=2",), 5, 2),
        (("train.threads=8",), 4, 1),
        (("train.devices=2",), 4, 1),
        (("train.device=auto",), 4, 1),
    ],
)
def test_as_many_jobs_run_at_once_as_the_cores_allow(
    words: tuple[str, ...],
    n_cores: int,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inline, "n_cores", lambda: n_cores)
    monkeypatch.setattr(inline, "may_have_gpu", lambda: True)
    monkeypatch.setattr(memory, "of_machine", lambda: 1e12)
    path = sweep_file(tmp_path, variant=["solu", "solu_ln"], seed=[0, 1, 2])
    given = [word for word in words_for(tmp_path) if "threads" not in word]
    sweep = read_sweep(path, [*given, *words])
    assert inline.at_once(inline.Params(), sweep) == expected
    monkeypatch.setattr(memory, "of_machine", lambda: 4.5e9)
    assert inline.at_once(inline.Params(), sweep) == min(2, expected)
    if "train.devices=2" not in words:
        assert inline.at_once(inline.Params(jobs=3), sweep) == 3
