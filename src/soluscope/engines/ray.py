"""The Ray engine: jobs run in parallel on all cores and GPUs of this machine or of a running cluster.

It uses Ray core without Tune. If a worker or a node dies, its job is started again, up to `retries` times, and
resumes from its checkpoint. The state of a job is read from its run folder, never from Ray. Every node must be
able to read the run folders, so a cluster of several machines needs a shared file system.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from soluscope.config import Config
from soluscope.config import check as require
from soluscope.engines import After, Engine
from soluscope.errors import UserError
from soluscope.files import reason
from soluscope.launching import jobs
from soluscope.launching.sweep import Sweep
from soluscope.runs.folder import Run
from soluscope.terminal import say

ANSWER_S = 9.0
"""Seconds within which a cluster must answer."""
SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.9"
"""Longest name of a socket in Ray's folder. The kernel limits the path of a socket to 107 bytes."""
GRACE_S = 5.0
"""Seconds in which interrupted jobs can save their checkpoints. Stopping Ray takes two more seconds."""

_ADDRESS = re.compile(r"auto|(ray://)?(?P<host>\S+):(?P<port>\d{1,5})")

Node = Mapping[str, float]
"""Resources of a node: its numbers of CPUs ("CPU") and GPUs ("GPU")."""


@dataclass(frozen=True)
class Params:
    address: str | None = None
    """Address of a running cluster: `auto` for the cluster on this machine, host:port, or ray://host:port.
    null: start Ray on this machine, and stop it after the last job."""
    cpus: int = 1
    """CPUs of each process of a job. Also its train.threads, if train.threads is null."""
    gpus: float | None = None
    """GPUs of each process of a job, at most 1; two jobs with 0.5 share a GPU. null: 1 if there are GPUs and
    train.device is not cpu, else 0. A job with several train.devices gets whole GPUs."""
    retries: int = 3
    """How often a job is started again after its worker or its node dies."""

    def __post_init__(self) -> None:
        require(
            self.address is None or _ADDRESS.fullmatch(self.address) is not None,
            f"ray.address={self.address} must be auto, host:port or ray://host:port",
        )
        require(self.cpus >= 1, f"ray.cpus={self.cpus} must be 1 or more")
        require(self.gpus is None or 0 <= self.gpus <= 1, f"ray.gpus={self.gpus} must be in [0, 1]")
        require(self.retries >= 0, f"ray.retries={self.retries} must be 0 or more")


def check(params: Params, sweep: Sweep) -> None:
    """Refuse the sweep if Ray is not installed, does not answer, or has no node large enough for a job.

    Raises:
        UserError: within 10 seconds, naming the setting to change.
    """
    _import_ray(params.address)
    nodes = [_this_machine(sweep.configs)] if params.address is None else _ask(params.address)
    for config in sweep.configs:
        _place(config, params, nodes)


def run(sweep: Sweep, todo: Sequence[jobs.Task], params: Params, after: After) -> None:
    """Run as many jobs at once as the cluster has room for, and show the states in their run folders.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the jobs have had time to save their checkpoints.
    """
    if todo:
        with _connected(params, todo) as ray:
            _run_all(ray, sweep, todo, params)
    after()


def _run_all(ray: Any, sweep: Sweep, todo: Sequence[jobs.Task], params: Params) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    environment = {
        key: value
        for key, value in os.environ.items()
        if key == "OMP_NUM_THREADS" or key.startswith(("WANDB_", "HF_"))
    }
    started: dict[Any, Config] = {}
    for task in todo:
        placed, resources = _place(task.config, params, nodes)
        # Each job gets a new process. A job that fails stores its error in its run folder.
        job = ray.remote(**resources, max_calls=1, max_retries=params.retries)(_job)
        described = replace(task, config=placed).to_json()
        started[job.remote(described, os.getcwd(), environment)] = task.config
    waiting = list(started)
    with jobs.live(sweep.study_dir, [jobs.job_of(config) for config in sweep.configs]) as show:
        try:
            while waiting:
                ended, waiting = ray.wait(waiting, timeout=1)
                show()
                for job in ended:
                    _report_if_lost(ray, job, started[job])
        except KeyboardInterrupt:
            for job in reversed(waiting):  # first the jobs that have not started
                ray.cancel(job)  # a started job gets a KeyboardInterrupt and saves a checkpoint
            ray.wait(waiting, num_returns=len(waiting), timeout=GRACE_S)
            show()
            raise


def _job(described: str, folder: str, environment: dict[str, str]) -> None:
    """Run a job in a worker, in the working directory of the launch, so that relative paths stay valid."""
    # ray.cancel sends SIGINT, which a launch in the background ignores, and workers inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    os.chdir(folder)
    jobs.execute(jobs.Task.from_json(described))


def _report_if_lost(ray: Any, job: Any, config: Config) -> None:
    """Record and print the failure of a job that could not do so itself.

    Its process died too often, or its node lacks a package or a file.
    """
    try:
        ray.get(job)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        lines = str(cause).strip().splitlines() or [""]
        lost = f"lost {type(cause).__name__}: {lines[0]}"
        run = Run(config.run_dir)
        if not run.at_work() and not run.is_done():
            run.record_failure(UserError(lost))
        say(f"{config.run_name}: {lost}")


# --- resources of jobs and nodes ------------------------------------------------------------------


def _place(
    config: Config, params: Params, nodes: Sequence[Node]
) -> tuple[Config, dict[str, float]]:
    """Return the job's configuration for this engine, and Ray's num_cpus and num_gpus for the job.

    Raises:
        UserError: if no node is large enough, because Ray would wait for such a node forever.
    """
    train = config.train
    require(
        train.nodes == 1,
        f"{config.run_name} has train.nodes={train.nodes}, but engine=ray runs each job on one node: set "
        "train.nodes=1, or choose engine=slurm",
    )
    gpus = params.gpus
    if gpus is None:
        gpus = float(train.device != "cpu" and any(node.get("GPU", 0) for node in nodes))
    require(
        gpus > 0 or train.device != "cuda",
        f"{config.run_name} has train.device=cuda but would get no GPU: set ray.gpus, or train.device=cpu",
    )
    n_cpus = params.cpus * train.devices
    n_gpus = gpus if train.devices == 1 or gpus == 0 else float(train.devices)
    if not any(node.get("CPU", 0) >= n_cpus and node.get("GPU", 0) >= n_gpus for node in nodes):
        largest = ", ".join(
            f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in nodes[:4]
        )
        raise UserError(
            f"{config.run_name} needs {n_cpus} CPUs and {n_gpus:g} GPUs on one node, but the nodes have "
            f"{largest}: lower ray.cpus, ray.gpus or train.devices"
        )
    # Without ray.gpus, a job must not use a GPU: Ray hides the GPUs of other jobs only from jobs with GPUs.
    device = "cpu" if gpus == 0 else train.device
    placed = replace(train, threads=train.threads or params.cpus, device=device)
    return replace(config, train=placed), {"num_cpus": n_cpus, "num_gpus": n_gpus}


def _this_machine(configs: Sequence[Config]) -> Node:
    """Return the numbers of cores that this process may use and of GPUs that torch finds."""
    from ray._private.utils import get_num_cpus  # respects the CPU limit of a container

    n_gpus = 0
    if any(config.train.device != "cpu" for config in configs):
        import torch

        n_gpus = torch.cuda.device_count()
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    return {"CPU": min(len(cores), int(get_num_cpus())), "GPU": n_gpus}


# --- Ray ------------------------------------------------------------------------------------------


def _import_ray(address: str | None) -> Any:
    # Ray reads these when it is imported: send no usage statistics, and use no environment from `uv run`.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    if address is None:
        # Anyone with access to Ray's ports can run code, so it listens only on the loopback interface. The
        # jobs run at normal priority instead of Ray's nice 15.
        os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0"}
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "engine=ray needs Ray: run \"pip install -c constraints.txt -e '.[ray]'\" in the clone"
        ) from error
    return ray


@contextmanager
def _connected(params: Params, todo: Sequence[jobs.Task]) -> Iterator[Any]:
    """Connect to Ray, or start it here, and yield it. Inside the block, SIGTERM raises KeyboardInterrupt."""
    ray = _import_ray(params.address)
    before = signal.getsignal(signal.SIGTERM)
    quiet = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    folders = ExitStack()
    try:
        if params.address is None:
            here, folder = (
                _this_machine([task.config for task in todo]),
                folders.enter_context(_folder()),
            )
            # Even without a dashboard, Ray starts the dashboard's server for its statistics, and the server
            # contacts the addresses of cloud providers. With a port that is already in use, it does not start.
            with socket.create_server(("127.0.0.1", 0)) as taken, _one_line(folder):
                ray.init(
                    address="local", num_cpus=here["CPU"], num_gpus=here["GPU"],
                    object_store_memory=100_000_000,  # jobs exchange no data
                    include_dashboard=False, dashboard_port=taken.getsockname()[1],
                    _temp_dir=folder, **quiet,
                )  # fmt: skip
        else:
            ray.init(address=params.address, runtime_env=_search_path(), **quiet)
        signal.signal(signal.SIGTERM, _interrupt)  # replaces the handler that Ray has set
        yield ray
    finally:
        ray.shutdown()
        folders.close()
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _folder() -> Iterator[str]:
    """Yield a folder for Ray's logs and sockets: the usual one, or a new one in /tmp where its path would be long.

    Raises:
        UserError: if no folder with a short path can be written.
    """
    usual = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()).absolute() / "ray"
    if len(os.fsencode(usual / SOCKET)) <= 107:
        yield str(usual)
        return
    try:
        short = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(
            f"the path of TMPDIR or RAY_TMPDIR, {usual.parent}, is too long for Ray's sockets, and /tmp cannot be "
            f"written ({error.strerror}): set RAY_TMPDIR to a folder with a path of at most "
            f"{107 - len(SOCKET) - len('//ray')} bytes"
        ) from error
    with short:
        yield short.name


@contextmanager
def _one_line(folder: str) -> Iterator[None]:
    """Turn an error of Ray's start into a UserError. Ray raises many kinds, among them bare Exceptions."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"Ray does not start on this machine, with its logs in {folder} ({reason(error)}): launch the sweep "
            "again, or set engine=inline"
        ) from error


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _search_path() -> dict[str, dict[str, str]]:
    """Return the environment with which a cluster's workers find soluscope. Ray logs it, so it has no secrets."""
    path = os.environ.get("PYTHONPATH")
    return {"env_vars": {"PYTHONPATH": path}} if path else {}


_ASK = """
import json, logging, ray, sys
ray.init(address=sys.argv[1], logging_level=logging.CRITICAL, log_to_driver=False)
print(json.dumps([node["Resources"] for node in ray.nodes() if node["Alive"]]))
"""


def _ask(address: str) -> list[Node]:
    """Return the nodes of a running cluster.

    A separate process connects to the cluster, because Ray waits long for a silent server and then ends the
    process.

    Raises:
        UserError: if the cluster does not answer in time.
    """
    until = time.monotonic() + ANSWER_S
    parts = _ADDRESS.fullmatch(address)
    try:
        if parts is not None and parts["host"]:
            there = (parts["host"].strip("[]"), int(parts["port"]))
            socket.create_connection(there, timeout=ANSWER_S / 2).close()
        asked = subprocess.run([sys.executable, "-c", _ASK, address], capture_output=True, text=True,
                               timeout=until - time.monotonic())  # fmt: skip
        if asked.returncode == 0:
            nodes: list[Node] = json.loads(asked.stdout.splitlines()[-1])
            return nodes
        error_lines = asked.stderr.strip().splitlines() or [f"exit status {asked.returncode}"]
        problem = error_lines[-1]
    except subprocess.TimeoutExpired:
        problem = f"no answer in {ANSWER_S:g} seconds"
    except (OSError, OverflowError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    raise UserError(
        f"no Ray cluster at ray.address={address}: {problem}; start a cluster with 'ray start --head', or omit "
        "ray.address to start Ray on this machine"
    )


ENGINE = Engine(params=Params, check=check, run=run)
