"""One model trained by several processes: the same numbers, and no process left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, tiny_config, train_silently
from safetensors.torch import load_file

from soluscope.config import load_config
from soluscope.data.cache import prepare
from soluscope.errors import UserError
from soluscope.runs.folder import at_work, last_checkpoint, last_row
from soluscope.training import processes
from soluscope.training.run import Batches

STEPS = 100
WORDS = (
    "size=tiny", "corpus.max_mb=1", "variant=solu_ln", f"train.steps={STEPS}", "train.log_every=1",
    "train.checkpoint_every=10", "train.threads=1", "train.precision=fp32", "wandb=off",
)  # fmt: skip
FROM_OUTSIDE = ("LOCAL_RANK", "RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR",
                "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS_PER_NODE")  # fmt: skip


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(runs_dir: Path) -> Path:
    """Trained by one process."""
    return train_silently(tiny_config(runs_dir, *WORDS[2:], "study=alone"))


@pytest.fixture(scope="module")
def together(alone: Path, runs_dir: Path) -> Path:
    """The same, trained by two: half of each batch each."""
    return finished(start(runs_dir, "study=together", "train.devices=2"), runs_dir / "together")


def start(
    runs_dir: Path, *words: str, launcher: tuple[str, ...] = (), **environment: str
) -> subprocess.Popen[str]:
    """`train/run.py words`, its tokens beside its runs."""
    places = (f"runs_dir={runs_dir}", f"tokens.cache_dir={runs_dir / '.tokens'}")
    inherited = {key: value for key, value in os.environ.items() if key not in FROM_OUTSIDE}
    search_path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "train/run.py"), *WORDS, *places, *words],
        env=inherited | {"PYTHONPATH": search_path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str], study_dir: Path) -> Path:
    """The run's folder, once the process has ended well."""
    printed, complaint = process.communicate(timeout=120)
    assert process.returncode == 0, complaint
    assert printed == f"{study_dir / 'solu_ln-s0'} is finished\n"
    return study_dir / "solu_ln-s0"


def reach(process: subprocess.Popen[str], run_dir: Path, step: int) -> list[int]:
    """Wait until a step has been logged; the process, and those that it has started, by their ids."""
    until = time.monotonic() + 60
    while last_row(run_dir).get("step", 0) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.005)
    helpers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(helpers) == 1
    return [process.pid, *map(int, helpers)]


def ended(pids: list[int], process: subprocess.Popen[str]) -> str:
    """What the process has said on stderr, once it and all the others are gone: within 10 seconds."""
    until = time.monotonic() + 10
    complaint = process.communicate(timeout=10)[1]
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.02)
    return complaint


def rows(run_dir: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


def assert_same(run_dir: Path, reference: Path) -> None:
    """Losses and weights to 1e-5. b_K's gradient is 0 but for rounding, which Adam makes large."""
    losses, wanted = ([row["loss"] for row in rows(run)] for run in (run_dir, reference))
    assert len(losses) == STEPS
    assert losses == pytest.approx(wanted, rel=0, abs=1e-5)
    weights, right = (load_file(run / "model.safetensors") for run in (run_dir, reference))
    assert weights.keys() == right.keys()
    for name in weights.keys() - {"blocks.0.attn.b_K"}:
        torch.testing.assert_close(weights[name], right[name], rtol=0, atol=1e-5)


def test_two_processes_train_as_one_does_with_the_doubled_batch(
    alone: Path, together: Path
) -> None:
    assert_same(together, alone)
    here, there = (json.loads((run / "done.json").read_text()) for run in (together, alone))
    assert here["report_loss"] == pytest.approx(there["report_loss"], abs=1e-5)
    assert here["tokens"] == there["tokens"]


def test_two_processes_with_micro_batches_train_as_one_does(alone: Path, runs_dir: Path) -> None:
    words = ("study=micro", "train.devices=2", "train.micro_batches=2")
    run_dir = finished(start(runs_dir, *words), runs_dir / "micro")
    assert_same(run_dir, alone)


def test_two_nodes_under_torchrun_train_as_one_does_and_only_the_first_speaks(
    alone: Path, runs_dir: Path
) -> None:
    launcher = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
                "--master-addr=127.0.0.1", f"--master-port={free_port()}")  # fmt: skip
    nodes = [
        start(runs_dir, "study=nodes", "train.nodes=2", launcher=(*launcher, f"--node-rank={rank}"))
        for rank in (0, 1)
    ]
    assert_same(finished(nodes[0], runs_dir / "nodes"), alone)
    printed, complaint = nodes[1].communicate(timeout=20)
    assert nodes[1].returncode == 0, complaint
    assert (printed, complaint) == ("", "")


@pytest.mark.slow
def test_processes_that_were_stopped_and_then_killed_go_on_bit_for_bit(
    together: Path, runs_dir: Path
) -> None:
    words, run_dir = ("study=interrupted", "train.devices=2"), runs_dir / "interrupted/solu_ln-s0"
    first = start(runs_dir, *words)
    pids = reach(first, run_dir, 15)
    first.send_signal(signal.SIGTERM)
    complaint = ended(pids, first)
    assert first.returncode == 130
    assert complaint.splitlines()[-1] == "interrupted; the same command goes on from here"
    assert "Traceback" not in complaint
    checkpoint = torch.load(last_checkpoint(run_dir), weights_only=True)
    stopped_at = checkpoint["global_step"]
    assert stopped_at in {last_row(run_dir)["step"], last_row(run_dir)["step"] + 1}
    assert not at_work(run_dir)

    second = start(runs_dir, *words)
    pids = reach(second, run_dir, stopped_at + 15)
    second.kill()  # and nothing is sent to the one that it has started
    ended(pids, second)
    assert stopped_at < torch.load(last_checkpoint(run_dir), weights_only=True)["global_step"]
    assert last_row(run_dir)["step"] < STEPS

    finished(start(runs_dir, *words), runs_dir / "interrupted")
    assert rows(run_dir) == rows(together)
    left, right = (load_file(run / "model.safetensors") for run in (run_dir, together))
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_a_lost_process_ends_the_other_with_one_line_and_one_alone_can_go_on(
    alone: Path, runs_dir: Path
) -> None:
    run_dir = runs_dir / "lost/solu_ln-s0"
    process = start(runs_dir, "study=lost", "train.devices=2")
    pids = reach(process, run_dir, 12)
    os.kill(pids[1], signal.SIGKILL)
    complaint = ended(pids, process)
    assert process.returncode == 2
    assert "Traceback" not in complaint
    assert "another of the 2 processes of solu_ln-s0 has ended" in complaint.splitlines()[-1]
    assert not (run_dir / "failed.json").exists()  # a lost machine is no failure of the run's
    assert 0 < torch.load(last_checkpoint(run_dir), weights_only=True)["global_step"] < STEPS
    assert_same(train_silently(tiny_config(runs_dir, *WORDS[2:], "study=lost")), alone)


def test_a_diverged_loss_ends_all_processes_with_one_line(runs_dir: Path) -> None:
    words = ("train.lr=1e4", "train.warmup_steps=20", "train.log_every=5")
    process = start(runs_dir, "study=diverged", "train.devices=2", *words)
    printed, complaint = process.communicate(timeout=60)
    assert process.returncode == 2
    said = [line for line in complaint.splitlines() if not line.startswith("solu_ln-s0 ")]
    assert len(said) == 1
    assert "at step" in said[0]
    assert "lower train.lr, now 10000" in said[0]
    assert printed == ""


def test_processes_that_wait_for_the_first_end_when_it_refuses_to_start(
    alone: Path, runs_dir: Path
) -> None:
    """`alone`'s folder is of another configuration."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = ("study=alone", "train.nodes=2", "train.lr_rest=0.5")
    nodes = [start(runs_dir, *words, NODE_RANK=str(rank), **meeting) for rank in (0, 1)]
    first, second = (node.communicate(timeout=60)[1] for node in nodes)
    assert nodes[0].returncode == 2
    assert f"{alone} is of another configuration" in first
    assert len(first.splitlines()) == 1
    assert (second, nodes[1].returncode) == ("", 0)


def test_the_shares_of_all_processes_are_the_batch(runs_dir: Path) -> None:
    config = tiny_config(runs_dir, "variant=gelu", "train.micro_batches=2", "train.devices=2")
    cache = prepare(config)

    def first_two_steps(batches: Batches) -> torch.Tensor:
        batches.trainer = type("At", (), {"global_step": 3})
        stream = iter(batches.train_dataloader())
        return torch.stack([next(stream) for _ in range(4)])

    whole = first_two_steps(
        Batches(tiny_config(runs_dir, "variant=gelu", "train.micro_batches=2"), cache)
    )
    shares = [first_two_steps(Batches(config, cache, rank)) for rank in (0, 1)]
    assert shares[0].shape == (4, 2, 32)
    assert torch.equal(torch.stack(shares, dim=2).flatten(1, 2), whole)


@pytest.mark.parametrize(
    ("environment", "rank", "started"),
    [
        ({}, 0, False),
        ({"LOCAL_RANK": "1"}, 1, True),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, 3, True),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4",
          "SLURM_PROCID": "2", "SLURM_LOCALID": "2", "SLURM_NODEID": "0"}, 2, True),
        # An allocation in which srun has not started them, or only this one.
        ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "0"}, 0, False),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, 0, False),
    ],
)  # fmt: skip
def test_the_environment_says_which_process_this_is(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], rank: int, started: bool
) -> None:
    for name in (*FROM_OUTSIDE, "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = processes.place(load_config(["variant=gelu", "size=tiny", "train.devices=4"]))
    assert (found.rank, found.started) == (rank, started)


@pytest.mark.parametrize(
    ("environment", "words", "wanted"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}, ("train.devices=4",), "--nproc-per-node=4"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, ("train.devices=4",), "--ntasks-per-node=4"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, ("train.devices=4",), "--ntasks-per-node=4"),
        ({}, ("train.nodes=2",), "MASTER_ADDR"),
    ],
)  # fmt: skip
def test_processes_of_another_number_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    words: tuple[str, ...],
    wanted: str,
) -> None:
    for name in FROM_OUTSIDE:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=wanted) as refusal:
        processes.place(load_config(["variant=gelu", "size=tiny", *words]))
    assert "\n" not in str(refusal.value)


def test_one_process_ignores_the_allocation_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one task of four that srun has started, each with a run of its own."""
    for name, value in {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_NAME": "sweep",
                        "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NODEID": "0"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    run_dir = train_silently(tiny_config(tmp_path, "variant=gelu", "wandb=off"))
    assert (run_dir / "done.json").is_file()
    assert torch.load(last_checkpoint(run_dir), weights_only=True)["global_step"] == 12


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port
