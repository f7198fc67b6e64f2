"""Threads of training: the requested number, or else as many as affinity and the quota of the cgroup allow."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from conftest import tiny_config

from soluscope import cores as machine
from soluscope.training import device


def cgroup(root: Path, membership: str, files: dict[str, str]) -> Path:
    """Return `root` as the root of a machine whose process is in a cgroup with the given files."""
    files = {"proc/self/cgroup": membership} | {f"sys/fs/cgroup/{k}": v for k, v in files.items()}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        (
            "0::/job/step\n",
            {"job/cpu.max": "400000 100000\n", "job/step/cpu.max": "max 100000\n"},
            4,
        ),
        (
            "0::/job/step\n",
            {"job/cpu.max": "max 100000\n", "job/step/cpu.max": "200000 100000\n"},
            2,
        ),
        ("0::/docker/abc\n", {"cpu.max": "300000 100000\n"}, 3),
        (
            "4:cpu,cpuacct:/job\n3:cpuset:/\n0::/\n",
            {"cpu/job/cpu.cfs_quota_us": "50000\n", "cpu/job/cpu.cfs_period_us": "100000\n"},
            0.5,
        ),
        (
            "4:cpu,cpuacct:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            math.inf,
        ),
        ("", {}, math.inf),
        ("not a cgroup\n", {}, math.inf),
    ],
)
def test_quota_is_the_smallest_of_the_cgroup_and_those_above_it(
    tmp_path: Path, membership: str, files: dict[str, str], cores: float
) -> None:
    assert machine.cpu_quota(cgroup(tmp_path, membership, files)) == cores
    assert machine.cpu_quota(tmp_path / "nowhere") == math.inf


@pytest.mark.parametrize(
    ("words", "asked", "quota", "expected"),
    [
        ((), None, math.inf, 8),
        ((), None, 2.5, 2),
        ((), None, 0.5, 1),
        ((), "3", 2.5, 3),
        ((), "4,2", 2.5, 4),
        ((), "many", 2.5, 2),
        ((), "0", 2.5, 2),
        (("train.threads=5",), "3", 2.5, 5),
        (("train.devices=2",), None, math.inf, 4),
        (("train.devices=2",), "3", math.inf, 3),
    ],
)
def test_threads_are_those_asked_for_or_those_allowed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    asked: str | None,
    quota: float,
    expected: int,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    device.set_threads(tiny_config(tmp_path, "variant=solu", "train.threads=null", *words))
    assert chosen == [expected]


def test_one_thread_under_torchrun_is_its_default_and_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert device._asked_threads() == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert device._asked_threads() is None
