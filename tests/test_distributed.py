"""One model trained by several processes: the numbers are the same, and no process is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from _launching import LAUNCH, sweep_file
from conftest import HANGS_AFTER_S, ROOT, tiny_config, train_silently
from safetensors.torch import load_file

from soluscope.config import load_config
from soluscope.data.cache import prepare
from soluscope.errors import UserError
from soluscope.runs.folder import Run
from soluscope.training import processes
from soluscope.training.batches import Batches

pytestmark = pytest.mark.slow

STEPS = 100
TRAIN = ROOT / "train" / "run.py"
WORDS = (
    "size=tiny", "corpus.max_mb=1", "variant=solu_ln", f"train.steps={STEPS}", "train.log_every=1",
    "train.checkpoint_every=10", "train.threads=1", "train.precision=fp32", "wandb=off",
)  # fmt: skip
TOGETHER = ("train.devices=2", "train.micro_batches=2")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
MARK = "SOLUSCOPE_TEST"
FROM_OUTSIDE = ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
                "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS_PER_NODE")  # fmt: skip


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(runs_dir: Path) -> Run:
    """Return a run that was trained by one process."""
    return Run(train_silently(tiny_config(runs_dir, *WORDS[2:], "study=alone")))


@pytest.fixture(scope="module")
def together(alone: Run, runs_dir: Path) -> Run:
    """Return the same run trained by two processes on two nodes under torchrun, each with half of every batch."""
    port = str(free_port())
    nodes = [
        start("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}",
              "--master-addr=127.0.0.1", f"--master-port={port}", TRAIN,
              *words(runs_dir, "study=together", "train.nodes=2", "train.micro_batches=2"))
        for rank in (0, 1)
    ]  # fmt: skip
    first, second = (node.communicate(timeout=HANGS_AFTER_S) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], (first, second)
    run = Run(runs_dir / "together" / "solu_ln-s0")
    assert first[0] == f"{run.dir} is finished\n"
    # Only the first process reports. torchrun of either node may log, with its stack, that the other has left.
    assert run.dir.name in first[1]
    assert (second[0], run.dir.name in second[1]) == ("", False)
    return run


def words(runs_dir: Path, *others: str) -> list[str]:
    """Return the words of a run of STEPS steps, with its tokens beside its runs."""
    return [*WORDS, f"runs_dir={runs_dir}", f"tokens.cache_dir={runs_dir / '.tokens'}", *others]


def start(*command: str | Path, mark: str = "") -> subprocess.Popen[str]:
    """Start `python command` in a new session. The process and its children carry a mark for `ranks_of`."""
    inherited = {key: value for key, value in os.environ.items() if key not in FROM_OUTSIDE}
    search_path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=inherited | {"PYTHONPATH": search_path, MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def reach(process: subprocess.Popen[str], run: Run, step: int, mark: str) -> list[int]:
    """Wait until a step has been logged. Return the ids of the processes that train, by rank."""
    until = time.monotonic() + HANGS_AFTER_S
    while run.last_row().get("step", 0) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.005)
    ranks = ranks_of(mark)
    assert sorted(ranks) == ["0", "1"]
    return [ranks["0"], ranks["1"]]


def ranks_of(mark: str) -> dict[str, int]:
    """Return the ids of the processes that torchrun started under a command with this mark, by rank."""
    ranks = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended, or belongs to another user
            lines = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            environment = dict(line.partition("=")[::2] for line in lines)
            if environment.get(MARK) == mark and "RANK" in environment:
                ranks[environment["RANK"]] = int(folder.name)
    return ranks


def ended(pids: list[int], process: subprocess.Popen[str]) -> str:
    """Wait until the process and all of `pids` have ended. Return the stderr of the process."""
    complaint = process.communicate(timeout=HANGS_AFTER_S)[1]
    until = time.monotonic() + HANGS_AFTER_S
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.02)
    return complaint


def rows(run: Run) -> list[dict[str, Any]]:
    lines = map(json.loads, run.metrics.read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


def step_of_checkpoint(run: Run) -> int:
    step: int = torch.load(run.checkpoint, weights_only=True)["global_step"]
    return step


def assert_same(run: Run, reference: Run) -> None:
    """Compare losses and weights to 1e-5. Leave out b_K: its gradient is pure rounding, which Adam amplifies."""
    losses, wanted = ([row["loss"] for row in rows(each)] for each in (run, reference))
    assert len(losses) == STEPS
    assert losses == pytest.approx(wanted, rel=0, abs=1e-5)
    weights, right = (load_file(each.weights) for each in (run, reference))
    assert weights.keys() == right.keys()
    for name in weights.keys() - {"blocks.0.attn.b_K"}:
        torch.testing.assert_close(weights[name], right[name], rtol=0, atol=1e-5)


def test_two_processes_train_as_one_does_with_the_doubled_batch(alone: Run, together: Run) -> None:
    assert_same(together, alone)
    done, expected = together.done(), alone.done()
    assert done is not None
    assert expected is not None
    assert done["report_loss"] == pytest.approx(expected["report_loss"], abs=1e-5)
    assert done["tokens"] == expected["tokens"]


@pytest.mark.long
def test_processes_that_were_stopped_and_then_lost_go_on_bit_for_bit(
    together: Run, runs_dir: Path, tmp_path: Path
) -> None:
    """A sweep's job is stopped by Ctrl-C, then loses a process, then is finished, and at last has nothing to do."""
    run = Run(runs_dir / "interrupted" / "solu_ln-s0")
    sweep = sweep_file(tmp_path, variant=["solu_ln"])
    ours = words(runs_dir, "study=interrupted", *TOGETHER)
    in_sweep = [word for word in ours if not word.startswith("variant=")]

    first = start(LAUNCH, sweep, *in_sweep, "report=false", mark="stopped")
    pids = reach(first, run, 15, "stopped")
    os.killpg(first.pid, signal.SIGINT)
    complaint = ended(pids, first)
    assert first.returncode == 130, complaint
    assert complaint.splitlines()[-1] == "interrupted; the same command resumes from here"
    stopped_at = step_of_checkpoint(run)
    assert stopped_at in {run.last_row()["step"], run.last_row()["step"] + 1}
    assert (run.at_work(), run.failure()) == (False, None)

    second = start(*TORCHRUN, TRAIN, *ours, mark="lost")
    pids = reach(second, run, stopped_at + 15, "lost")
    os.kill(pids[1], signal.SIGKILL)
    complaint = ended(pids, second)
    assert second.returncode != 0
    assert run.failure() is None  # a lost process is not a failure of the run
    assert stopped_at < step_of_checkpoint(run) < STEPS
    assert not run.is_done()

    third = start(*TORCHRUN, TRAIN, *ours)
    assert third.communicate(timeout=HANGS_AFTER_S)[0] == f"{run.dir} is finished\n"
    assert rows(run) == rows(together)
    left, right = (load_file(each.weights) for each in (run, together))
    assert all(torch.equal(left[name], right[name]) for name in right)

    before = {p: p.stat().st_mtime_ns for p in run.dir.rglob("*") if p.name != ".lock"}
    fourth = start(*TORCHRUN, TRAIN, *ours)
    assert fourth.communicate(timeout=HANGS_AFTER_S)[0] == f"{run.dir} was already finished\n"
    assert before == {p: p.stat().st_mtime_ns for p in run.dir.rglob("*") if p.name != ".lock"}


@pytest.mark.long
def test_a_job_of_a_sweep_whose_loss_diverges_fails_with_one_line(
    alone: Run, runs_dir: Path, tmp_path: Path
) -> None:
    ours = words(runs_dir, "study=diverged", *TOGETHER, "train.lr=1e4", "train.warmup_steps=20")
    in_sweep = [word for word in ours if not word.startswith("variant=")]
    sweep = sweep_file(tmp_path, variant=["solu_ln"])
    process = start(LAUNCH, sweep, *in_sweep, "report=false", mark="diverged")
    complaint = process.communicate(timeout=HANGS_AFTER_S)[1]
    assert process.returncode == 2
    assert not ranks_of("diverged")
    failure = Run(runs_dir / "diverged" / "solu_ln-s0").failure()
    assert failure is not None
    assert "at step" in failure
    assert "lower train.lr, now 10000" in failure
    assert complaint.count(f"solu_ln-s0 failed: {failure}\n") == 1
    assert "1 job: 1 failed" in complaint.splitlines()[-1]


@pytest.mark.long
def test_processes_that_wait_for_the_first_end_when_it_refuses_to_start(
    alone: Run, runs_dir: Path
) -> None:
    ours = words(runs_dir, "study=alone", *TOGETHER, "train.lr_rest=0.5")
    process = start(*TORCHRUN, TRAIN, *ours, mark="refused")
    printed, complaint = process.communicate(timeout=HANGS_AFTER_S)
    assert (process.returncode, printed) == (1, "")
    assert complaint.count(f"error: {alone.dir} has a different configuration") == 1
    assert not ranks_of("refused")


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


UNDER_TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "LOCAL_RANK": "3"}
UNDER_SRUN = {
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "0",
}


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Remove the variables that a launcher sets, and return the patch of the environment."""
    for name in (*FROM_OUTSIDE, "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        (UNDER_TORCHRUN | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, 3),
        (UNDER_SRUN | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}, 2),
        # torchrun inside a SLURM allocation.
        (UNDER_SRUN | UNDER_TORCHRUN | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "SLURM_NTASKS": "1"}, 3),
    ],
)  # fmt: skip
def test_the_launcher_says_which_process_this_is(
    outside: pytest.MonkeyPatch, environment: dict[str, str], rank: int
) -> None:
    for name, value in environment.items():
        outside.setenv(name, value)
    train = load_config(["variant=gelu", "size=tiny", "train.devices=4"]).train
    assert processes.cluster_environment(train).global_rank() == rank


@pytest.mark.parametrize(
    ("environment", "words", "wanted"),
    [
        ({}, ("train.devices=4",), "torchrun --standalone --nproc-per-node=4 train/run.py"),
        ({}, ("train.nodes=2",), "torchrun --nnodes=2 --nproc-per-node=1"),
        # A SLURM allocation in which srun has started only this process.
        (UNDER_SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, ("train.devices=4",), "torchrun"),
        (UNDER_TORCHRUN | {"WORLD_SIZE": "2"}, ("train.devices=4",), "--nproc-per-node=4"),
        (UNDER_TORCHRUN | {"WORLD_SIZE": "2"}, ("train.devices=1",), "--nproc-per-node=1"),
        (UNDER_TORCHRUN | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, ("train.devices=2", "train.nodes=2"),
         "--nnodes=2 --nproc-per-node=2"),
        (UNDER_SRUN | {"SLURM_STEP_NUM_TASKS": "2"}, ("train.devices=4",), "--ntasks-per-node=4"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, ("train.devices=4",), "--ntasks-per-node=4"),
    ],
)  # fmt: skip
def test_another_number_of_processes_is_refused_with_the_command(
    outside: pytest.MonkeyPatch, environment: dict[str, str], words: tuple[str, ...], wanted: str
) -> None:
    for name, value in environment.items():
        outside.setenv(name, value)
    with pytest.raises(UserError, match=wanted) as refusal:
        processes.cluster_environment(load_config(["variant=gelu", "size=tiny", *words]).train)
    assert "\n" not in str(refusal.value)


def test_one_process_ignores_the_allocation_around_it(
    tmp_path: Path, outside: pytest.MonkeyPatch
) -> None:
    """srun has started four tasks, each with its own run; this process is one of them."""
    for name, value in {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_NAME": "sweep",
                        "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NODEID": "0"}.items():  # fmt: skip
        outside.setenv(name, value)
    run = Run(train_silently(tiny_config(tmp_path, "variant=gelu", "wandb=off")))
    assert run.is_done()
    assert step_of_checkpoint(run) == 12


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port
