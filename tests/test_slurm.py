"""engine=slurm, on a real SLURM of one node on loopback."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from _slurm_cluster import NoCluster, slurm_cluster, wait_until
from conftest import HANGS_AFTER_S, ROOT, run_python, tiny_config, train_silently

from soluscope.config import EvalConfig
from soluscope.engines import slurm
from soluscope.launching import jobs
from soluscope.launching.launch import Evaluate
from soluscope.launching.sweep import Sweep, read_sweep

pytestmark = pytest.mark.slow

LONG = 500
"""Steps of a job that a test disturbs; they take some seconds."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    try:
        with (
            slurm_cluster(tmp_path_factory.mktemp("slurm")) as conf,
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setenv("SLURM_CONF", str(conf))
            yield conf
    except NoCluster as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of all tests' tokens."""
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    """Return the run folder of the long job, trained in this process and never stopped."""
    return train_silently(tiny_config(tmp_path_factory.mktemp("undisturbed"), *long_words(tokens)))


def long_words(tokens: Path) -> list[str]:
    """Return the words of the long job, which writes no checkpoint unless it is stopped."""
    return [
        f"tokens.cache_dir={tokens}", "study=long", "variant=solu_ln", "seed=0", f"train.steps={LONG}",
        "train.log_every=5", "train.checkpoint_every=100000", "wandb=off",
    ]  # fmt: skip


def sweep_file(path: Path, *variants: str) -> Path:
    grid = {"method": "grid", "parameters": {"variant": {"values": list(variants)}}}
    path.write_text(json.dumps(grid))
    return path


def launch(runs_dir: Path, *words: str | Path) -> list[str]:
    """Run the launcher, and return the lines that it prints on stderr."""
    result = run_python(
        ROOT / "sweeps" / "launch.py", "engine=slurm", "slurm.cpus=1", "report=false", "wandb=off",
        f"runs_dir={runs_dir}", *words,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stderr.splitlines()


def launch_long(tmp_path: Path, tokens: Path) -> Path:
    """Put the long job into the queue, and return its run folder."""
    runs_dir = tmp_path / "runs"
    config = tiny_config(runs_dir, *long_words(tokens))
    words = [word for word in long_words(tokens) if not word.startswith("variant=")]
    small = ("size=tiny", "corpus.max_mb=1", "train.threads=1", "train.precision=fp32")
    launch(runs_dir, sweep_file(tmp_path / "long.yaml", "solu_ln"), *small, *words)
    return config.run_dir


def wait_for_step(run_dir: Path, step: int) -> None:
    def reached() -> bool:
        metrics = run_dir / "metrics.jsonl"
        return metrics.is_file() and len(metrics.read_text().splitlines()) * 5 >= step

    wait_until(reached, HANGS_AFTER_S)


def queue() -> list[str]:
    """Return the ids of SLURM's jobs that wait, run or end."""
    return subprocess.run(
        ["squeue", "--noheader", "--array", "--format=%i"], capture_output=True, text=True, check=True
    ).stdout.split()  # fmt: skip


def wait_for_the_queue_to_empty() -> None:
    wait_until(lambda: not queue(), HANGS_AFTER_S)


def logs(study_dir: Path) -> str:
    return "".join(path.read_text() for path in sorted((study_dir / "slurm").glob("*.out")))


def weights(run_dir: Path) -> bytes:
    return (run_dir / "model.safetensors").read_bytes()


def states(study_dir: Path) -> list[str]:
    return [jobs.standing(study_dir, job).state for job in jobs.listed(study_dir)]


def test_a_sweep_ends_done_with_the_weights_that_one_process_gives(
    cluster: Path, tokens: Path, tmp_path: Path
) -> None:
    words = ("seed=0", "train.precision=fp32", f"tokens.cache_dir={tokens}")
    said = launch(tmp_path, ROOT / "sweeps" / "smoke.yaml", *words)
    assert f"To see their states: soluscope sweep --status {tmp_path / 'smoke'}" in said
    wait_for_the_queue_to_empty()
    assert states(tmp_path / "smoke") == ["done", "done"]
    for variant in ("solu", "solu_ln"):
        own = tiny_config(
            tmp_path / "own", f"variant={variant}", f"tokens.cache_dir={tokens}",
            "train.checkpoint_every=5", "wandb=off",
        )  # fmt: skip
        assert weights(train_silently(own)) == weights(tmp_path / "smoke" / f"{variant}-s0")
    # The last job saw that all other jobs were done.
    assert f"{tmp_path / 'smoke'}: 2 jobs: 2 done\n" in logs(tmp_path / "smoke")


@pytest.mark.long
def test_a_job_at_its_time_limit_is_requeued_and_ends_bit_equal(
    cluster: Path, tokens: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = launch_long(tmp_path, tokens)
    wait_for_step(run_dir, 50)
    # SLURM sends this signal 90 seconds before the limit. Here it is sent at once.
    subprocess.run(["scancel", "--me", "--state=RUNNING", "--signal=USR2"], check=True)
    wait_until(lambda: "returns to the queue" in logs(run_dir.parent), HANGS_AFTER_S)
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert 50 <= checkpoint["global_step"] < LONG
    wait_for_the_queue_to_empty()
    assert states(run_dir.parent) == ["done"]
    assert weights(run_dir) == weights(undisturbed)
    assert f"{run_dir.parent}: 1 job: 1 done\n" in logs(run_dir.parent)  # only at the end


@pytest.mark.long
def test_a_cancelled_job_is_finished_bit_equal_by_the_same_command(
    cluster: Path, tokens: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = launch_long(tmp_path, tokens)
    wait_for_step(run_dir, 50)
    subprocess.run(["scancel", "--me"], check=True)
    wait_for_the_queue_to_empty()
    assert states(run_dir.parent) == ["resume"]  # it has saved its progress
    launch_long(tmp_path, tokens)
    wait_for_the_queue_to_empty()
    assert states(run_dir.parent) == ["done"]
    assert weights(run_dir) == weights(undisturbed)


@pytest.mark.long
def test_two_tasks_train_one_model_to_the_loss_of_one(
    cluster: Path, tokens: Path, tmp_path: Path
) -> None:
    words = ("seed=0", "variant=solu", "train.precision=fp32", f"tokens.cache_dir={tokens}")
    launch(tmp_path, ROOT / "sweeps" / "smoke.yaml", "train.devices=2", *words)
    wait_for_the_queue_to_empty()
    shared = tmp_path / "smoke" / "solu-s0"
    assert states(tmp_path / "smoke") == ["done"], logs(tmp_path / "smoke")
    alone = train_silently(
        tiny_config(tmp_path / "own", "variant=solu", f"tokens.cache_dir={tokens}", "wandb=off")
    )
    loss = [json.loads((run / "done.json").read_text())["report_loss"] for run in (shared, alone)]
    assert loss[0] == pytest.approx(loss[1], abs=1e-5)


def run_by_hand(sweep: Sweep, params: slurm.Params) -> None:
    listed = tuple(jobs.job_of(config) for config in sweep.configs)
    slurm.run(
        sweep,
        [jobs.Task(each) for each in sweep.configs],
        params,
        Evaluate(sweep.study_dir, listed, EvalConfig(), False),
    )


def test_what_waits_in_the_queue_is_not_submitted_again(
    cluster: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["size=tiny", f"runs_dir={tmp_path}", f"tokens.cache_dir={tokens}"]
    later = slurm.Params(cpus=1, options={"begin": "now+1hour"})
    path = tmp_path / "late.yaml"
    run_by_hand(read_sweep(sweep_file(path, "solu", "gelu"), words), later)
    before = queue()
    assert len(before) == 3
    run_by_hand(read_sweep(path, words), later)
    assert queue() == before
    # With one more job, only that job is new, and the report waits for all three jobs.
    capsys.readouterr()
    run_by_hand(read_sweep(sweep_file(path, "solu", "gelu", "solu_ln"), words), later)
    assert "jobs submitted: 1, in the queue: 3" in capsys.readouterr().err
    (last,) = {job for job in queue() if job not in before and waits_for(job)}
    assert waits_for(last) == {before[0].partition("_")[0], str(int(last) - 1)}
    subprocess.run(["scancel", "--me"], check=True)
    wait_for_the_queue_to_empty()


def waits_for(job: str) -> set[str]:
    """Return the ids of the jobs that a job waits for."""
    shown = subprocess.run(
        ["squeue", "--noheader", "--format=%E", "--jobs", job], capture_output=True, text=True
    ).stdout
    return set(re.findall(r"afterany:(\d+)", shown))


@pytest.mark.long
def test_a_job_submitted_twice_is_trained_once(
    cluster: Path,
    tokens: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config(tmp_path, *long_words(tokens))
    monkeypatch.setattr(slurm, "_queued", lambda folder: {})
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    sweep = Sweep(tmp_path / "long.yaml", (), {}, (config,))
    run_by_hand(sweep, slurm.Params(cpus=1))
    wait_for_step(config.run_dir, 5)
    run_by_hand(sweep, slurm.Params(cpus=1))
    wait_for_the_queue_to_empty()
    assert states(config.study_dir) == ["done"]
    assert weights(config.run_dir) == weights(undisturbed)
    printed = logs(config.study_dir)
    assert printed.count(f"{LONG}/{LONG}") == 1  # one progress bar
    assert printed.count("1 job: 1 done") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["slurm.partition=mian"], "no partition called 'mian'. Did you mean 'main'?"),
        (["slurm.gpus=2"], "slurm.gpus=2 does not fit train.devices=1: set slurm.gpus=1 or 0"),
        (["slurm.minutes=1"], "slurm.minutes=1 must be 5 or more"),
        (["slurm.options.mem=900T"], "SLURM refused the jobs: sbatch: error: "),
    ],
)
def test_what_the_cluster_cannot_do_is_one_line(
    cluster: Path, tokens: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    result = run_python(
        ROOT / "sweeps" / "launch.py", ROOT / "sweeps" / "smoke.yaml", "engine=slurm", "wandb=off",
        f"runs_dir={tmp_path}", f"tokens.cache_dir={tokens}", *words,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: {said}")
    assert "Traceback" not in result.stderr
    assert not queue()


def test_without_slurm_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run_python(
        ROOT / "sweeps" / "launch.py", ROOT / "sweeps" / "smoke.yaml", "engine=slurm", "wandb=off",
        f"runs_dir={tmp_path}",
    )  # fmt: skip
    assert result.returncode == 2
    assert re.fullmatch(
        "error: engine=slurm needs sbatch and srun on the PATH: .*\n", result.stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_nothing_in_a_study_is_unpickled(
    cluster: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["size=tiny", f"runs_dir={tmp_path}", f"tokens.cache_dir={tokens}"]
    later = slurm.Params(cpus=1, options={"begin": "now+1hour"})
    path = sweep_file(tmp_path / "late.yaml", "solu", "gelu")
    sweep = read_sweep(path, words)
    run_by_hand(sweep, later)
    ids = json.loads((sweep.study_dir / "slurm" / "jobs.json").read_text())
    assert sorted(ids.values()) == sorted(queue())
    for job_id in ids.values():
        for name in (f"{job_id}_submitted.pkl", f"{job_id}_0_result.pkl"):
            planted = b"cposix\nsystem\n(S'touch " + bytes(tmp_path / "owned") + b"'\ntR."
            (sweep.study_dir / "slurm" / name).write_bytes(planted)
    run_by_hand(sweep, later)
    assert sorted(ids.values()) == sorted(queue())
    subprocess.run(["scancel", "--me"], check=True)
    wait_for_the_queue_to_empty()
    run_by_hand(sweep, slurm.Params(cpus=1))
    wait_for_the_queue_to_empty()
    assert states(sweep.study_dir) == ["done", "done"], logs(sweep.study_dir)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        "[" * 100_000,
        '{"solu-s0": {}, "after": [1]}',
        '{"solu-s0": "1; id"}',
    ],
)
def test_broken_list_of_ids_counts_as_empty(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_ask", lambda *words: "1\n2_0\n")
    (tmp_path / "jobs.json").write_text(text)
    assert slurm._queued(tmp_path) == {}
    (tmp_path / "jobs.json").write_text('{"solu-s0": "2_0", "gelu-s0": "3_0", "after": "1"}')
    assert slurm._queued(tmp_path) == {"solu-s0": "2_0", "after": "1"}


@pytest.mark.parametrize("clip", ["1", "inf"])
def test_work_arrives_on_the_node_as_it_was_asked_for(clip: str, tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        "variant=solu_gain",
        f"mid.gain={tmp_path}/it's $HOME/s{{seed}}",
        f"train.clip={clip}",
    )
    task = jobs.Task(config, EvalConfig(probes=["engagement"]))
    assert slurm.work_of(json.dumps({"task": task.to_json()})).args == (task,)
    after = Evaluate(tmp_path, (jobs.job_of(config),), EvalConfig(probes=["engagement"]), False)
    assert slurm.work_of(json.dumps({"after": after.to_json()})) == after


def test_no_module_unpickles() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        code = path.read_text()
        assert not re.search(
            r"^\s*(import|from) (c?loud)?pickle|submitit|allow_pickle=True", code, re.MULTILINE
        )
        assert code.count("torch.load(") == code.count("weights_only=True)"), path
