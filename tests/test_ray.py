"""engine=ray: the same weights as on any engine, whatever dies, and refusals instead of endless waits."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from _launching import LAUNCH, at_work, parent, session, started, sweep_file, until, words_for
from conftest import HANGS_AFTER_S, train_silently

from soluscope.config import Config
from soluscope.engines import ray as engine
from soluscope.errors import UserError
from soluscope.launching import jobs
from soluscope.launching.sweep import Sweep, read_sweep

# Read when Ray is imported. The clusters of these tests stay on the loopback and report no usage.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
NODE = {"object_store_memory": 100_000_000, "include_dashboard": False}


def weights(config: Config) -> bytes:
    return (config.run_dir / "model.safetensors").read_bytes()


def trained_inline(path: Path, runs_dir: Path, *words: str) -> dict[str, bytes]:
    """Return the final weights by run, each trained in this process without interruption."""
    sweep = read_sweep(path, words_for(runs_dir, *words, "study=inline"))
    return {config.run_name: weights(config) for config in sweep.configs if train_silently(config)}


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Yield a function that starts a Ray cluster on the loopback, from the CPUs and GPUs of each node."""
    pytest.importorskip("ray", reason="engine=ray is not installed: pip install 'soluscope[ray]'")
    from ray.cluster_utils import Cluster

    made = []
    # The dashboard's port is taken, so Ray's statistics server exits. It would contact cloud providers.
    with socket.create_server(("127.0.0.1", 0)) as taken:

        def make(*nodes: dict[str, int]) -> tuple[Any, list[Any]]:
            head = {**NODE, "dashboard_port": taken.getsockname()[1], "num_cpus": 0}
            made.append(Cluster(initialize_head=True, head_node_args=head))
            return made[0], [made[0].add_node(**NODE, **node) for node in nodes]

        yield make
    for one in made:
        one.shutdown()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Run a sweep of two jobs that train and two that diverge, on a local Ray that leaves no process behind."""
    pytest.importorskip("ray", reason="engine=ray is not installed: pip install 'soluscope[ray]'")
    folder = tmp_path_factory.mktemp("local")
    path = sweep_file(folder, arm=["solu", "solu train.lr=1e9"], seed=[0, 1])
    words = words_for(folder / "runs", "study=ray", "train.steps=40")
    said = folder / "said"
    with started(LAUNCH, path, *words, "engine=ray", "report=false", said=said) as process:
        status = process.wait(timeout=HANGS_AFTER_S)
        until(lambda: not session(process.pid), "nothing of Ray is left")
    return SimpleNamespace(sweep=read_sweep(path, words), status=status, said=said.read_text())


@pytest.mark.slow
def test_a_sweep_on_ray_has_the_weights_of_training_inline(local: SimpleNamespace) -> None:
    sound = [config for config in local.sweep.configs if not config.tag]
    assert len(sound) == 2
    runs_dir = local.sweep.study_dir.parent
    inline = trained_inline(sweep_file(runs_dir, variant=["solu"], seed=[0, 1]),
                            runs_dir, "train.steps=40")  # fmt: skip
    assert {config.run_name: weights(config) for config in sound} == inline


@pytest.mark.long
def test_a_job_that_fails_is_told_and_the_others_go_on(local: SimpleNamespace) -> None:
    states = {
        config.run_name: jobs.standing(local.sweep.study_dir, jobs.job_of(config)).state
        for config in local.sweep.configs
    }
    assert states == {"solu-s0": "done", "solu-s1": "done",
                      "solu-s0-lr1e9": "failed", "solu-s1-lr1e9": "failed"}  # fmt: skip
    assert local.status == 2
    for seed in (0, 1):
        (told,) = (
            line for line in local.said.splitlines() if line.startswith(f"solu-s{seed}-lr1e9: the")
        )
        assert "at step" in told
        assert told.endswith("lower train.lr, now 1e+09")
    assert local.said.splitlines()[-1].startswith("error: 4 jobs: 2 done, 2 failed; not done: ")


@pytest.mark.long
def test_two_jobs_share_a_gpu_when_each_wants_half(cluster: Any, tmp_path: Path) -> None:
    """There are CPUs for all four jobs, yet two work at once. The GPU does not exist: Ray only counts it."""
    head, _ = cluster({"num_cpus": 4, "num_gpus": 1})
    path = sweep_file(tmp_path, variant=["solu", "solu_ln"], seed=[0, 1])
    words = words_for(
        tmp_path / "runs", "study=ray", "train.steps=400", "report=false", "engine=ray"
    )
    most = 0
    with started(LAUNCH, path, *words, f"ray.address={head.address}", "ray.gpus=0.5",
                 said=tmp_path / "said") as process:  # fmt: skip
        while process.poll() is None:
            most = max(most, len(at_work(tmp_path / "runs" / "ray")))
            time.sleep(0.05)
    assert process.returncode == 0, (tmp_path / "said").read_text()
    assert most == 2


@pytest.mark.long
def test_a_job_moves_to_another_node_when_its_own_is_lost(cluster: Any, tmp_path: Path) -> None:
    head, nodes = cluster({"num_cpus": 1}, {"num_cpus": 1})
    path = sweep_file(tmp_path, variant=["solu", "solu_ln"])
    steps = ("train.steps=800", "train.checkpoint_every=20", "train.log_every=20")
    words = words_for(tmp_path / "runs", "study=ray", *steps)
    sweep = read_sweep(path, words)
    study = sweep.study_dir

    def step(config: Config) -> int:
        return jobs.standing(study, jobs.job_of(config)).step

    with started(LAUNCH, path, *words, "report=false", "engine=ray", f"ray.address={head.address}",
                 said=tmp_path / "said") as process:  # fmt: skip
        until(lambda: all(map(step, sweep.configs)), "both jobs train")
        working = at_work(study)
        raylets = {node.all_processes["raylet"][0].process.pid: node for node in nodes}
        homes = {run: parent(pid) for run, pid in working.items()}
        assert set(homes.values()) == set(raylets)  # one job on each node
        lost = min(homes)
        head.remove_node(raylets[homes[lost]])
        assert step(next(c for c in sweep.configs if c.run_name == lost)) < 800
        assert process.wait(timeout=HANGS_AFTER_S) == 0, (tmp_path / "said").read_text()
    assert {config.run_name: weights(config) for config in sweep.configs} == trained_inline(
        path, tmp_path / "runs", *steps
    )


@pytest.mark.long
def test_a_job_that_loses_its_worker_too_often_is_told_and_not_done(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="engine=ray is not installed: pip install 'soluscope[ray]'")
    path = sweep_file(tmp_path, variant=["solu"])
    words = words_for(tmp_path / "runs", "study=ray", "train.steps=100000", "report=false")
    study, said = tmp_path / "runs" / "ray", tmp_path / "said"
    with started(LAUNCH, path, *words, "engine=ray", "ray.retries=1", said=said) as process:
        # The launcher holds a run's lock for an instant while it reads the run's state.
        workers: list[int] = []

        def worker_is_at_work() -> bool:
            workers[:] = {*at_work(study).values()} - {process.pid}
            return bool(workers)

        for _ in range(2):
            until(worker_is_at_work, "a worker is at work")
            (pid,) = workers
            os.kill(pid, signal.SIGKILL)
            until(lambda: not Path(f"/proc/{pid}").exists(), "it is gone")  # noqa: B023
        assert process.wait(timeout=HANGS_AFTER_S) == 2
    lines = said.read_text().splitlines()
    assert [line for line in lines if line.startswith("solu-s0: lost WorkerCrashedError: ")]
    assert lines[-1].startswith(
        "error: 1 job: 1 failed; not done: solu-s0 (lost WorkerCrashedError: "
    )


# Refusals


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    path = sweep_file(tmp_path, variant=["solu"])
    return read_sweep(path, words_for(tmp_path / "runs", "study=ray"))


def refusal(sweep: Sweep, **params: Any) -> str:
    """Return the message with which a launch with `params` is refused, before it has made any file."""
    with pytest.raises(UserError) as caught:
        engine.check(engine.Params(**params), sweep)
    assert "\n" not in str(caught.value)
    assert not sweep.study_dir.exists()
    return str(caught.value)


def with_train(sweep: Sweep, **train: Any) -> Sweep:
    """Return the same sweep with other values below train."""
    words = [f"train.{key}={value}" for key, value in train.items()]
    return read_sweep(sweep.path, [*sweep.words, *words])


def test_ray_that_is_not_installed_names_the_extra(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert (
        refusal(sweep)
        == "engine=ray needs Ray: run \"pip install -c constraints.txt -e '.[ray]'\" in the clone"
    )


def test_an_address_where_nobody_is_is_refused_at_once(sweep: Sweep) -> None:
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert refusal(sweep, address=f"127.0.0.1:{port}").startswith(
        f"no Ray cluster at ray.address=127.0.0.1:{port}: Connection refused; start a cluster with"
    )


def test_an_address_that_is_silent_is_not_waited_for(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server accepts connections and never answers. Ray itself would wait for minutes."""
    pytest.importorskip("ray")
    monkeypatch.setattr(engine, "ANSWER_S", 2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        said = refusal(sweep, address=address)
    assert said.startswith(f"no Ray cluster at ray.address={address}: no answer in 2 seconds")


@pytest.mark.parametrize("address", ["here", "ray://", "host:", "10.0.0.1"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="must be auto, host:port or ray://host:port"):
        engine.Params(address=address)


def test_a_job_that_is_larger_than_every_node_is_refused(sweep: Sweep) -> None:
    pytest.importorskip("ray")
    said = refusal(sweep, cpus=10_000)
    assert said.startswith("solu-s0 needs 10000 CPUs and 0 GPUs on one node, but the nodes have ")
    assert said.endswith(": lower ray.cpus, ray.gpus or train.devices")
    assert refusal(sweep, gpus=0.5).startswith("solu-s0 needs 1 CPUs and 0.5 GPUs on one node")
    devices = with_train(sweep, devices=8, batch_size=16)
    assert refusal(devices, cpus=5_000).startswith("solu-s0 needs 40000 CPUs and 0 GPUs")
    nodes = with_train(sweep, nodes=2)
    assert refusal(nodes).startswith(
        "solu-s0 has train.nodes=2, but engine=ray runs each job on one node"
    )


def test_a_job_takes_what_its_processes_need_and_no_gpu_it_was_not_given(sweep: Sweep) -> None:
    """Jobs are placed on two nodes that are described but do not exist: one has only CPUs, one has GPUs."""
    nodes = ({"CPU": 64.0}, {"CPU": 16.0, "GPU": 4.0})

    def placed(params: engine.Params, **train: Any) -> tuple[Any, ...]:
        (config,) = with_train(sweep, **train).configs
        job, resources = engine._place(config, params, nodes)
        assert job.hash == config.hash  # the placement leaves the job's id unchanged
        return resources["num_cpus"], resources["num_gpus"], job.train.device, job.train.threads

    anything = {"device": "auto", "threads": "null"}
    assert placed(engine.Params(), **anything) == (1, 1, "auto", 1)
    assert placed(engine.Params(cpus=4), device="cpu", threads="null") == (4, 0, "cpu", 4)
    assert placed(engine.Params(cpus=4), device="cpu", threads=2) == (4, 0, "cpu", 2)
    assert placed(engine.Params(gpus=0), **anything) == (1, 0, "cpu", 1)
    assert placed(engine.Params(gpus=0.25), device="cuda") == (1, 0.25, "cuda", 1)
    assert placed(engine.Params(cpus=2, gpus=0.5), **anything, devices=4) == (8, 4, "auto", 2)
    with pytest.raises(UserError, match=r"train\.device=cuda but would get no GPU"):
        placed(engine.Params(gpus=0), device="cuda")
    with pytest.raises(
        UserError, match="needs 20 CPUs and 4 GPUs on one node, but the nodes have 64 and 0, 16"
    ):
        placed(engine.Params(cpus=5), **anything, devices=4)


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_the_sockets_have_short_paths_where_the_temporary_folder_has_a_long_one(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", None)  # read TMPDIR again
    long = tmp_path / ("job" * 30) / ("scratch" * 5)
    long.mkdir(parents=True)
    monkeypatch.setenv(variable, str(long))
    with engine._folder() as folder:
        assert Path(folder).is_dir()
        assert len(f"{folder}/{engine.SOCKET}") <= 107
    assert not Path(folder).exists()
    monkeypatch.setenv(variable, "/tmp")
    monkeypatch.setattr("tempfile.tempdir", None)
    with engine._folder() as folder:
        assert folder == "/tmp/ray"


def test_a_long_temporary_folder_is_refused_in_one_line_where_tmp_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("job" * 30)))
    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    message = r"RAY_TMPDIR, .* is too long .*Permission denied.*at most \d+ bytes"
    with pytest.raises(UserError, match=message), engine._folder():
        pass


def test_an_error_of_rays_start_is_one_line() -> None:
    with (
        pytest.raises(
            UserError, match=r"^Ray does not start .*in /tmp/ray \(timed out\): launch .*$"
        ),
        engine._one_line("/tmp/ray"),
    ):
        raise Exception("timed out\nsecond line")
