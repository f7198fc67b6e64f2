"""Runs survive kills at any moment, stops, full disks and half-copied folders.

Each run ends bit for bit as if nothing had happened, or stops with one line of instructions.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from _launching import LAUNCH, at_work, session, started, sweep_file, until, words_for
from conftest import HANGS_AFTER_S, ROOT, tiny_config, train_silently

import soluscope
from soluscope.config import Config
from soluscope.errors import UserError
from soluscope.launching import jobs
from soluscope.launching.sweep import read_sweep
from soluscope.runs.folder import Run
from soluscope.training.callback import TrainingCallback

TRAIN = ROOT / "train" / "run.py"


def weights(config: Config) -> bytes:
    return (config.run_dir / "model.safetensors").read_bytes()


# --- kills ----------------------------------------------------------------------------------------

N_WORKER_KILLS, N_DRIVER_KILLS = (
    int(number) for number in os.environ.get("SOLUSCOPE_KILLS", "5,3").split(",")
)
"""Kills of workers and of the launching process; SOLUSCOPE_KILLS=14,6 takes six minutes on two cores."""
STEPS = 225 * (N_WORKER_KILLS + N_DRIVER_KILLS)
EVERY = 20
"""Steps between checkpoints, so few that some kills interrupt the writing of a checkpoint."""


class Kills:
    """SIGKILLs at random moments of a sweep, and the runs that they hit."""

    def __init__(self, configs: tuple[Config, ...], seed: int) -> None:
        self.configs = configs
        self.study = configs[0].study_dir
        self.random = random.Random(seed)
        self.told: list[str] = []
        self.n_in_training = 0

    def wait(self, launch: subprocess.Popen[bytes]) -> dict[str, int]:
        """Wait until a job is at work, and on to a random moment. Return the processes at work then, by run."""

        def going() -> bool:
            assert launch.poll() is None, f"the sweep ended with {launch.returncode}; {self}"
            return bool(at_work(self.study))

        until(going, f"a job is at work; {self}")
        before = self._steps()
        if self.random.random() < 0.8:  # during training, else while training starts
            n_steps = self.random.randint(1, 150)
            until(
                lambda: any(
                    now >= then + n_steps for now, then in zip(self._steps(), before, strict=True)
                ),
                f"{n_steps} more steps; {self}",
            )
        time.sleep(self.random.uniform(0, 0.2))
        return at_work(self.study)

    def kill(self, what: str, pids: dict[str, int], runs: dict[str, int]) -> None:
        """Kill the processes `pids` while `runs` are at work, and record the steps."""
        hit = [config for config in self.configs if config.run_name in runs]
        steps = {config.run_name: Run(config.run_dir).last_row().get("step", 0) for config in hit}
        self.n_in_training += any(
            Run(config.run_dir).checkpoint.is_file() and not Run(config.run_dir).is_done()
            for config in hit
        )
        self.told.append(f"{what} at {steps}")
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)

    def _steps(self) -> list[int]:
        return [Run(config.run_dir).last_row().get("step", 0) for config in self.configs]

    def __str__(self) -> str:
        return "killed so far: " + "; ".join(self.told)


@pytest.mark.long
@pytest.mark.parametrize("seed", [0])
def test_a_sweep_that_is_killed_again_and_again_has_the_weights_of_one_that_was_not(
    tmp_path: Path, seed: int
) -> None:
    """Some kills hit workers, one of them or all, which Ray starts again; the others hit the launching process,
    and the same command follows each."""
    pytest.importorskip("ray", reason="engine=ray is not installed: pip install 'soluscope[ray]'")
    path = sweep_file(tmp_path, variant=["solu", "solu_ln"], seed=[0, 1])
    every = (f"train.checkpoint_every={EVERY}", f"train.log_every={EVERY}")
    words = words_for(tmp_path / "runs", f"train.steps={STEPS}", *every)
    command = (LAUNCH, path, *words, "engine=ray", "ray.retries=20", "report=false")
    said = tmp_path / "said"
    with started(*command, "study=calm", said=said) as launch:
        assert launch.wait(timeout=HANGS_AFTER_S) == 0, said.read_text()
    calm = read_sweep(path, [*words, "study=calm"]).configs
    configs = read_sweep(path, [*words, "study=killed"]).configs
    kills = Kills(configs, seed)
    study = kills.study
    for attempt in range(N_DRIVER_KILLS):
        with started(*command, "study=killed", said=said) as launch:
            for _ in range(N_WORKER_KILLS if attempt == 0 else 0):
                working = kills.wait(launch)
                if working and kills.random.random() < 0.2:
                    working = dict([kills.random.choice(sorted(working.items()))])
                kills.kill("workers", working, working)
                until(lambda: not set(at_work(study).values()) & set(working.values()), "they die")  # noqa: B023
            working = kills.wait(launch)
            kills.kill("driver", {"": launch.pid}, working)
            launch.wait()
            until(lambda: not at_work(study), f"the workers die with it; {kills}")
    with started(*command, "study=killed", said=said) as launch:
        assert launch.wait(timeout=HANGS_AFTER_S) == 0, f"{said.read_text()}; {kills}"
    assert len(kills.told) == N_WORKER_KILLS + N_DRIVER_KILLS
    assert kills.n_in_training >= len(kills.told) / 2, str(kills)
    for one, other in zip(calm, configs, strict=True):
        assert weights(one) == weights(other), f"{other.run_name} differs; {kills}"
        steps = [json.loads(line)["step"] for line in (other.run_dir / "metrics.jsonl").open()]
        assert steps == list(range(EVERY, STEPS + 1, EVERY)), f"{other.run_name}; {kills}"
    # The same command, given once more, has nothing to do.
    before = {
        config.run_name: (config.run_dir / "done.json").stat().st_mtime_ns for config in configs
    }
    with started(*command, "study=killed", said=said) as launch:
        assert launch.wait(timeout=HANGS_AFTER_S) == 0
    after = {
        config.run_name: (config.run_dir / "done.json").stat().st_mtime_ns for config in configs
    }
    assert after == before


# --- stops ----------------------------------------------------------------------------------------

LONG = ("train.steps=1500", "train.checkpoint_every=1500", "train.log_every=10")
"""Words of a run that saves its first checkpoint at the last step, unless it is stopped."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of runs with the study `calm`: solu and solu_ln, trained with LONG."""
    runs_dir = tmp_path_factory.mktemp("undisturbed")
    for config in long_configs(runs_dir, "calm"):
        train_silently(config)
    return runs_dir


def long_configs(runs_dir: Path, study: str) -> tuple[Config, ...]:
    path = sweep_file(runs_dir, variant=["solu", "solu_ln"])
    return read_sweep(path, words_for(runs_dir, *LONG, f"study={study}")).configs


@pytest.mark.long
@pytest.mark.parametrize(
    ("way", "number"),
    [
        ("run", "SIGTERM"),
        ("inline.jobs=1", "SIGTERM"),
        ("inline.jobs=2", "SIGTERM"),
        ("inline.jobs=2", "SIGINT"),
        ("engine=ray", "SIGTERM"),
        ("engine=ray", "SIGINT"),
    ],
)
def test_a_stop_saves_and_the_same_command_goes_on(
    undisturbed: Path, tmp_path: Path, way: str, number: str
) -> None:
    """SIGTERM goes to the command only, as from a scheduler. Ctrl-C goes to its group, as from a terminal."""
    if way == "engine=ray":
        pytest.importorskip("ray", reason="engine=ray is not installed")
    study = f"{way.replace('=', '-')}-{number}"
    configs = long_configs(undisturbed, study)
    words = words_for(undisturbed, *LONG, f"study={study}")
    if way == "run":
        configs = configs[:1]
        command = [TRAIN, *words, "variant=solu"]
    else:
        command = [LAUNCH, undisturbed / "small.yaml", *words, way, "report=false"]
    # the runs that are at work together
    expected = configs[:1] if way in ("run", "inline.jobs=1") else configs
    said = tmp_path / "said"
    with started(*command, said=said) as process:
        until(lambda: all(Run(config.run_dir).last_row() for config in expected), "training begins")
        assert not any(Run(config.run_dir).checkpoint.exists() for config in configs)
        (os.killpg if number == "SIGINT" else os.kill)(process.pid, getattr(signal, number))
        status = process.wait(timeout=HANGS_AFTER_S)
        until(lambda: not session(process.pid), "all its processes end")
    assert status == 130, said.read_text()
    assert said.read_text().splitlines()[-1] == "interrupted; the same command resumes from here"
    for config in expected:
        assert (
            0 < torch.load(Run(config.run_dir).checkpoint, weights_only=True)["global_step"] < 1500
        )
        assert not Run(config.run_dir).is_done()
    with started(*command, said=said) as process:
        assert process.wait(timeout=HANGS_AFTER_S) == 0, said.read_text()
    for config in configs:
        assert (
            weights(config)
            == (undisturbed / "calm" / config.run_name / "model.safetensors").read_bytes()
        )


def test_ctrl_c_within_a_step_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes after the weights have taken the fifth step and before the step is counted."""
    words = ("variant=solu", "wandb=off", "train.device=cpu")
    calm = tiny_config(tmp_path, *words, "study=calm")
    config = tiny_config(tmp_path, *words, "study=stopped")
    train_silently(calm)
    take_step, taken = torch.optim.AdamW.step, itertools.count(1)

    def step_and_stop(optimizer: torch.optim.AdamW, closure: Any = None) -> Any:
        loss = take_step(optimizer, closure)
        if next(taken) == 5:
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(torch.optim.AdamW, "step", step_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train_silently(config)
    saved = torch.load(Run(config.run_dir).checkpoint, weights_only=True)
    assert saved["global_step"] == 5
    train_silently(config)
    assert weights(config) == weights(calm)


# --- a disk that fills up -------------------------------------------------------------------------

# Runs in a separate mount namespace. argv is the folder to mount on, then the command.
FULL_DISK = """
import json, shutil, subprocess, sys
folder, *command = sys.argv[1:]
def mount(*options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", *options, "tmpfs", folder], check=True)
def run():
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    return [done.returncode, done.stderr, subprocess.run(["find", folder, "-type", "f"],
            capture_output=True, text=True).stdout.split()]
mount("size=1000k")  # a checkpoint has 590k
first = run()
shutil.copytree(folder, folder + "-full")
mount("remount,size=64m")
second = run()
shutil.copytree(folder, folder + "-done")
print(json.dumps([first, second]))
"""


def can_mount() -> bool:
    """Return whether this user may mount a file system in a separate namespace."""
    try:
        tried = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return subprocess.run(tried, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not can_mount(), reason="no right to mount a small file system (needs root)")
@pytest.mark.long
def test_a_file_system_that_fills_up_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    """The second checkpoint does not fit beside the first."""
    runs_dir = tmp_path / "runs"
    runs_dir.mkdir()
    words = ("variant=solu", "wandb=off", "train.steps=30", "train.checkpoint_every=10",
             "train.device=cpu", f"tokens.cache_dir={tmp_path / 'tokens'}")  # fmt: skip
    calm = train_silently(tiny_config(tmp_path / "calm", *words))
    config = tiny_config(runs_dir, *words)
    yaml = tmp_path / "config.yaml"
    yaml.write_text(
        (calm / "config.yaml").read_text().replace(str(tmp_path / "calm"), str(runs_dir))
    )
    script = tmp_path / "script.py"
    script.write_text(FULL_DISK)
    search_path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        ["unshare", "-m", sys.executable, str(script), str(runs_dir), str(TRAIN), str(yaml)],
        env={**os.environ, "PYTHONPATH": search_path}, capture_output=True, text=True, timeout=HANGS_AFTER_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (status, errors, files), (status_after, errors_after, _) = json.loads(done.stdout)
    checkpoint = Run(config.run_dir).checkpoint
    assert status == 2
    assert errors.splitlines()[-1].startswith("error: cannot save the checkpoint of step 20 (")
    assert errors.splitlines()[-1].endswith(
        f"free disk space; the checkpoint of step 10 stays in {checkpoint}"
    )
    assert "Traceback" not in errors
    assert [name for name in files if "checkpoints" in name] == [str(checkpoint)]
    inside = checkpoint.relative_to(runs_dir)
    saved = torch.load(tmp_path / "runs-full" / inside, weights_only=True)
    assert saved["global_step"] == 10
    assert status_after == 0, errors_after
    finished = tmp_path / "runs-done" / config.run_dir.relative_to(runs_dir)
    assert (finished / "model.safetensors").read_bytes() == (
        calm / "model.safetensors"
    ).read_bytes()


# --- folders that were copied half-way ------------------------------------------------------------

CUT, GONE, ZEROS = "cut", "gone", "zeros"

DAMAGES: dict[str, dict[str, str]] = {
    "nothing": {},
    "weights cut": {"model.safetensors": CUT},
    "weights missing": {"model.safetensors": GONE},
    "facts missing": {"model.json": GONE},
    "done cut": {"done.json": CUT},
    "weights and checkpoint missing": {"model.safetensors": GONE, "checkpoints/last.ckpt": GONE},
    "weights and checkpoint cut": {"model.safetensors": CUT, "checkpoints/last.ckpt": CUT},
    "weights and metrics cut": {"model.safetensors": CUT, "metrics.jsonl": CUT},
    "unfinished": {"done.json": GONE},
    "unfinished, checkpoint cut": {"done.json": GONE, "checkpoints/last.ckpt": CUT},
    "unfinished, checkpoint ends in zeros": {"done.json": GONE, "checkpoints/last.ckpt": ZEROS},
    "unfinished, checkpoint missing": {"done.json": GONE, "checkpoints/last.ckpt": GONE},
    "unfinished, metrics cut in a line": {"done.json": GONE, "metrics.jsonl": CUT},
    "unfinished, configuration missing": {"done.json": GONE, "config.yaml": GONE},
    "unfinished, configuration cut": {"done.json": GONE, "config.yaml": CUT},
    "configuration missing": {"config.yaml": GONE},
    "configuration cut": {"config.yaml": CUT},
    "study's data cut": {"done.json": GONE, "../data.json": CUT},
    "study's data missing": {"done.json": GONE, "../data.json": GONE},
    "study's tokenizer cut": {"done.json": GONE, "../tokenizer.json": CUT},
    "study's tokenizer missing": {"done.json": GONE, "../tokenizer.json": GONE},
}
"""Damage to the copy of a finished run whose checkpoint is from the middle of training, by case and file."""


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    half = len(content) // 2
    if how == GONE:
        path.unlink()
    else:
        path.write_bytes(content[:half] + (bytes(len(content) - half) if how == ZEROS else b""))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return a finished run of 24 steps with a checkpoint of step 12, as if copied while it was written."""
    config = tiny_config(tmp_path_factory.mktemp("original"), *COPIED)
    middle = config.run_dir / "middle.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        save = TrainingCallback._save

        def save_and_keep(callback: TrainingCallback, trainer: Any) -> None:
            save(callback, trainer)
            if trainer.global_step == 12:
                shutil.copy(callback.run.checkpoint, middle)

        patch.setattr(TrainingCallback, "_save", save_and_keep)
        train_silently(config)
    middle.replace(Run(config.run_dir).checkpoint)
    return config


COPIED = ("variant=solu_ln", "wandb=off", "train.steps=24", "train.checkpoint_every=12",
          "train.log_every=2", "train.device=cpu")  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_a_run_that_was_copied_half_way_is_finished_or_refused_with_what_to_delete(
    original: Config, tmp_path: Path, case: str
) -> None:
    """The weights are always the same. After a refusal, the named file is deleted, and then the run finishes."""
    shutil.copytree(original.study_dir, tmp_path / original.study)
    config = tiny_config(tmp_path, *COPIED, f"tokens.cache_dir={original.tokens.cache_dir}")
    for name, how in DAMAGES[case].items():
        damage(config.run_dir / name, how)
    try:
        train_silently(config)
        model = soluscope.load(config.run_dir)
    except UserError as error:
        said = str(error)
        assert "\n" not in said
        named = re.search(r"delete (?!it )(/\S+)|(/\S+).*delete it ", said)
        assert named is not None, said
        path = Path((named[1] or named[2]).rstrip(",.;:"))
        assert path.is_relative_to(config.study_dir), said
        assert path.exists(), said
        (shutil.rmtree if path.is_dir() else Path.unlink)(path)
        train_silently(config)
        model = soluscope.load(config.run_dir)
    assert weights(config) == weights(original)
    assert model.facts.run == config.run_name
    assert jobs.standing(config.study_dir, jobs.job_of(config)).state == "done"
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").open()]
    if "metrics" not in case:
        assert [row["step"] for row in rows] == list(range(2, 25, 2))
