"""Stored results stay until new ones are complete, and one process at a time evaluates or launches a study."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _launching import until
from conftest import HANGS_AFTER_S, ROOT, run_python

from soluscope import memory
from soluscope.config import EvalConfig
from soluscope.errors import UserError
from soluscope.evaluation import one_run
from soluscope.evaluation.suite import evaluate
from soluscope.launching.launch import launch
from soluscope.runs.folder import Busy, Run, holder, lock

SMALL = {
    "probes": ["engagement"],
    "n_tokens": 500,
    "n_loss_tokens": 1000,
    "n_draws": 100,
    "jobs": 1,
}
SMOKE = ROOT / "sweeps" / "smoke.yaml"


@pytest.fixture(scope="module")
def evaluated(tiny_study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a study of one run with results of one probe. Copy it before you change it."""
    study = tmp_path_factory.mktemp("evaluated") / "study"
    others = {path.name for path in tiny_study.glob("*-s[0-9]")} - {"solu_ln-s0"}
    shutil.copytree(tiny_study, study, ignore=lambda folder, names: others & {*names})
    evaluate(study, EvalConfig(**SMALL), lambda text: None)
    return study


@pytest.fixture
def study(evaluated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(evaluated, tmp_path / "study"))


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# Results that stay


REFUSED = {
    "prepared": ({"prepared": "/typo"}, "/typo"),
    "device": ({"device": "cuda"}, "device=cuda, but torch finds no GPU here"),
    "draws": ({"n_draws": 1_000_000}, "n_draws=1000000 needs at least"),
    "wandb": ({"wandb": "online"}, "wandb=online"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_evaluation_changes_nothing(name: str, study: Path, monkeypatch) -> None:
    settings, says = REFUSED[name]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(memory, "of_machine", lambda: 1e6)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    before = contents(study)
    with pytest.raises(UserError) as caught:
        evaluate(study, EvalConfig(**SMALL | {"n_tokens": 2000} | settings), lambda text: None)
    assert says in str(caught.value)
    assert contents(study) == before


@pytest.mark.parametrize(
    "file", ["model.json", "config.yaml", "../data.json", "../tokens/meta.json"]
)
def test_evaluation_of_a_broken_run_changes_nothing(file: str, study: Path) -> None:
    (study / "solu_ln-s0" / file).write_text("{")
    before = contents(study)
    with pytest.raises(UserError):
        evaluate(study, EvalConfig(**SMALL | {"n_tokens": 2000}), lambda text: None)
    assert contents(study) == before


def test_evaluation_that_fails_midway_keeps_the_old_results_and_the_next_one_continues(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = study / "solu_ln-s0" / "probes"
    before, said = contents(probes), []
    other = EvalConfig(**SMALL | {"n_tokens": 700})
    real = one_run._probe_records
    monkeypatch.setattr(one_run, "_probe_records", lambda *words: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(study, other, said.append)
    assert contents(probes) == before
    assert (study / "results.jsonl").is_file()
    monkeypatch.setattr(one_run, "_probe_records", real)
    said.clear()
    evaluate(study, other, said.append)
    assert said == [
        "[1/1] solu_ln-s0: inputs or code have changed since last time: all results are recomputed",
        "[1/1] solu_ln-s0: 1 result to compute",
        "[1/1] solu_ln-s0: probed",
    ]
    assert contents(probes).keys() == before.keys()
    assert contents(probes) != before
    assert sorted(path.name for path in probes.parent.glob(".probes*")) == []
    again = contents(study)
    evaluate(study, other, said.append)
    assert said[-1] == "solu_ln-s0: probed already"
    assert contents(study) == again


@pytest.mark.parametrize("point", ["after the first rename", "after the second rename"])
def test_process_that_is_killed_while_it_exchanges_results_loses_none(
    point: str, study: Path
) -> None:
    probes = study / "solu_ln-s0" / "probes"
    before = contents(probes)
    if point == "after the first rename":
        probes.rename(probes.with_name(".probes.old"))
    else:
        shutil.copytree(probes, probes.with_name(".probes.old"))
    evaluate(study, EvalConfig(**SMALL), lambda text: None)
    assert contents(probes) == before
    assert not probes.with_name(".probes.old").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"shared": 1}', "[" * 100_000])
def test_results_whose_hashes_cannot_be_read_are_recomputed(text: str, study: Path) -> None:
    probes = study / "solu_ln-s0" / "probes"
    before = contents(probes)
    (probes / "made_with.json").write_text(text)
    evaluate(study, EvalConfig(**SMALL), lambda line: None)
    assert contents(probes) == before


# The process that holds a study


HOLDS = """
import sys, time; from pathlib import Path; from soluscope.runs.folder import lock
with lock(Path(sys.argv[1])):
    print(1, flush=True)
    sys.stdin.read()
"""


def holding(folder: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"1\n"
    return process


def test_second_evaluation_and_launch_say_who_holds_the_study(study: Path, tmp_path: Path) -> None:
    with holding(study) as process:
        with pytest.raises(Busy) as caught:
            evaluate(study, EvalConfig(**SMALL), lambda text: None)
        assert f"(process {process.pid} on {socket.gethostname()} since 20" in str(caught.value)
        assert str(caught.value).endswith("or give wait=yes to wait for it")
        process.stdin.close()
    held = tmp_path / "runs" / "smoke" / ".sweep"
    held.mkdir(parents=True)
    words = (f"runs_dir={tmp_path / 'runs'}", "wandb=off", "report=off")
    with holding(held) as process:
        told = run_python(ROOT / "sweeps" / "launch.py", SMOKE, *words)
        assert told.returncode == 2
        assert f"(process {process.pid} on {socket.gethostname()} since 20" in told.stderr
        assert "give wait=yes to wait for it, or set study=" in told.stderr
        assert told.stderr.count("\n") == 1
        assert [path.name for path in held.parent.iterdir()] == [".sweep"]
        process.stdin.close()


def test_launch_that_waits_goes_on_when_the_other_one_ends(tmp_path: Path) -> None:
    held = tmp_path / "runs" / "smoke" / ".sweep"
    held.mkdir(parents=True)
    words = (f"runs_dir={tmp_path / 'runs'}", f"tokens.cache_dir={tmp_path / 'tokens'}", "wandb=off", "report=off",
             "seed=0", "variant=solu", "wait=yes")  # fmt: skip
    with holding(held) as process:
        waiting = subprocess.Popen(
            [sys.executable, ROOT / "sweeps" / "launch.py", SMOKE, *words], stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        )  # fmt: skip
        first = waiting.stderr.readline()
        assert first.startswith(
            f"waiting, because another process is at work in {held} (process {process.pid} on "
        )
        assert not (held.parent / "solu-s0").exists()
        process.stdin.close()
    _, rest = waiting.communicate(timeout=HANGS_AFTER_S)
    assert waiting.returncode == 0, rest
    assert Run(held.parent / "solu-s0").is_done()
    assert holder(held) == ""


def test_launch_holds_its_study_until_its_jobs_have_ended(tmp_path: Path, monkeypatch) -> None:
    from soluscope.engines import inline

    words = [
        f"runs_dir={tmp_path}",
        f"tokens.cache_dir={tmp_path / '.tokens'}",
        "wandb=off",
        "report=off",
        "inline.jobs=1",
    ]
    seen = []

    def execute(task, progress, step) -> None:
        with pytest.raises(Busy), lock(tmp_path / "smoke" / ".sweep"):
            pass
        seen.append(task.config.run_name)

    monkeypatch.setattr(inline.jobs, "execute", execute)
    with pytest.raises(UserError, match="not done"):
        launch(SMOKE, words)
    assert len(seen) == 4
    with lock(tmp_path / "smoke" / ".sweep"):
        pass


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "[" * 100_000, '{"pid": "x", "host": 1, "since": 2}', '{"pid": 1}'],
)
def test_broken_word_about_the_holder_is_left_out(text: str, tmp_path: Path) -> None:
    with holding(tmp_path) as process:
        (tmp_path / ".held_by.json").write_text(text)
        with pytest.raises(Busy) as caught, lock(tmp_path):
            pass
        assert f"is at work in {tmp_path}: wait until it ends" in str(caught.value)
        process.stdin.close()
    until(lambda: not Run(tmp_path).at_work(), "the lock is free")


def test_long_words_about_the_holder_are_cut(tmp_path: Path) -> None:
    known = {"pid": 1, "host": "h" * 10_000, "since": "s" * 10_000}
    (tmp_path / ".held_by.json").write_text(json.dumps(known))
    assert len(holder(tmp_path)) < 200
