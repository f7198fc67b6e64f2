"""Jobs side by side on Ray: all cores and GPUs of this machine, or of a running cluster. Ray core, no Tune.

A job whose worker or node dies is started again, up to `retries` times, and goes on from its checkpoint.
What Ray remembers is never asked: where a job stands is read from its run folder, which every node has to
see (a shared file system, where the cluster is more than this machine).
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
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from soluscope.config import Config
from soluscope.config import check as require
from soluscope.engines import After, Engine
from soluscope.errors import UserError
from soluscope.launching import jobs
from soluscope.launching.sweep import Sweep
from soluscope.runs.folder import Run

ANSWER_S = 9.0
"""Seconds that a cluster has to answer."""
GRACE_S = 5.0
"""Seconds that interrupted jobs have to save their checkpoints; stopping Ray takes two more."""

_ADDRESS = re.compile(r"auto|(ray://)?(?P<host>\S+):(?P<port>\d{1,5})")

Node = Mapping[str, float]
"""What a node has: CPU, GPU."""


@dataclass(frozen=True)
class Params:
    address: str | None = None
    """Of a running cluster: `auto` for the one on this machine, host:port, or ray://host:port. null: a Ray
    of its own on this machine, gone at the end."""
    cpus: int = 1
    """CPUs that a job's process takes; also its train.threads, where that is null."""
    gpus: float | None = None
    """GPUs that a job's process takes, up to 1; jobs of 0.5 share one. null: 1 where there are GPUs and
    train.device is not cpu, else 0. Jobs of several train.devices have whole ones."""
    retries: int = 3
    """Times that a job is started again when its worker or its node dies."""

    def __post_init__(self) -> None:
        require(
            self.address is None or _ADDRESS.fullmatch(self.address) is not None,
            f"ray.address={self.address}: wanted auto, host:port or ray://host:port",
        )
        require(self.cpus >= 1, f"ray.cpus={self.cpus} must be 1 or more")
        require(self.gpus is None or 0 <= self.gpus <= 1, f"ray.gpus={self.gpus} must be in [0, 1]")
        require(self.retries >= 0, f"ray.retries={self.retries} must be 0 or more")


def check(params: Params, sweep: Sweep) -> None:
    """Ray is installed, answers, and has a node that is large enough for each job.

    Raises:
        UserError: within 10 seconds, with the knob.
    """
    _import_ray(params.address)
    nodes = [_this_machine(sweep.configs)] if params.address is None else _ask(params.address)
    for config in sweep.configs:
        _place(config, params, nodes)


def run(sweep: Sweep, todo: Sequence[Config], params: Params, after: After) -> None:
    """All jobs at once, as far as there is room; the table is of the run folders.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the jobs have saved their checkpoints.
    """
    if todo:
        with _connected(params, todo) as ray:
            _run_all(ray, sweep, todo, params)
    after()


def _run_all(ray: Any, sweep: Sweep, todo: Sequence[Config], params: Params) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    environment = {
        key: value
        for key, value in os.environ.items()
        if key == "OMP_NUM_THREADS" or key.startswith(("WANDB_", "HF_"))
    }
    started: dict[Any, Config] = {}
    for config in todo:
        placed, resources = _place(config, params, nodes)
        # A job is a fresh process; one that ends with an exception has told it in its run folder.
        task = ray.remote(**resources, max_calls=1, max_retries=params.retries)(_job)
        started[task.remote(placed, os.getcwd(), environment)] = config
    waiting = list(started)
    with jobs.live(sweep.study_dir, [jobs.job_of(config) for config in sweep.configs]) as show:
        try:
            while waiting:
                ended, waiting = ray.wait(waiting, timeout=1)
                show()
                for task in ended:
                    _tell_if_lost(ray, task, started[task])
        except KeyboardInterrupt:
            for task in reversed(waiting):  # those that wait for room first
                ray.cancel(task)  # a KeyboardInterrupt inside the job, which saves
            ray.wait(waiting, num_returns=len(waiting), timeout=GRACE_S)
            show()
            raise


def _job(config: Config, folder: str, environment: dict[str, str]) -> None:
    """What a worker does: paths mean what they mean where the sweep was launched."""
    # ray.cancel comes as Ctrl-C does. A launch in the background has handed on that it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    os.chdir(folder)
    jobs.execute(config)


def _tell_if_lost(ray: Any, task: Any, config: Config) -> None:
    """A job that could not say itself how it ended: it died too often, or its node lacks something."""
    try:
        ray.get(task)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        lines = str(cause).strip().splitlines() or [""]
        lost = f"lost {type(cause).__name__}: {lines[0]}"
        run = Run(config.run_dir)
        if not run.at_work():
            run.record_failure(UserError(lost))
        jobs.say(f"{config.run_name}: {lost}")


# --- what a job takes, and who has it -------------------------------------------------------------


def _place(
    config: Config, params: Params, nodes: Sequence[Node]
) -> tuple[Config, dict[str, float]]:
    """The job as it will run, and Ray's num_cpus and num_gpus for it.

    Raises:
        UserError: if no node has as many; Ray would wait for one for ever.
    """
    train = config.train
    require(
        train.nodes == 1,
        f"{config.run_name} has train.nodes={train.nodes}, but engine=ray runs a job on one node: set it to "
        "1, or choose engine=slurm",
    )
    gpus = params.gpus
    if gpus is None:
        gpus = float(train.device != "cpu" and any(node.get("GPU", 0) for node in nodes))
    require(
        gpus > 0 or train.device != "cuda",
        f"{config.run_name} has train.device=cuda and would get no GPU: set ray.gpus, or train.device=cpu",
    )
    n_cpus = params.cpus * train.devices
    n_gpus = gpus if train.devices == 1 or gpus == 0 else float(train.devices)
    if not any(node.get("CPU", 0) >= n_cpus and node.get("GPU", 0) >= n_gpus for node in nodes):
        largest = ", ".join(
            f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in nodes[:4]
        )
        raise UserError(
            f"{config.run_name} wants {n_cpus} CPUs and {n_gpus:g} GPUs on one node, and the nodes have "
            f"{largest}: lower ray.cpus, ray.gpus or train.devices"
        )
    # A job that was given no GPU takes none: Ray hides the others' only from jobs that have some.
    device = "cpu" if gpus == 0 else train.device
    placed = replace(train, threads=train.threads or params.cpus, device=device)
    return replace(config, train=placed), {"num_cpus": n_cpus, "num_gpus": n_gpus}


def _this_machine(configs: Sequence[Config]) -> Node:
    """The cores that this process may use, and the GPUs that torch sees."""
    from ray._private.utils import get_num_cpus  # knows a container's share

    n_gpus = 0
    if any(config.train.device != "cpu" for config in configs):
        import torch

        n_gpus = torch.cuda.device_count()
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    return {"CPU": min(len(cores), int(get_num_cpus())), "GPU": n_gpus}


# --- Ray ------------------------------------------------------------------------------------------


def _import_ray(address: str | None) -> Any:
    # What Ray reads when it is imported: it is to send no statistics and take no environment from `uv run`.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    if address is None:
        # Whoever reaches Ray's ports may run code: listen on the loopback alone. And jobs are what this
        # machine is for now, not something to do at nice 15.
        os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0"}
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "engine=ray needs Ray: pip install -c constraints.txt -e '.[ray]' in the clone"
        ) from error
    return ray


@contextmanager
def _connected(params: Params, todo: Sequence[Config]) -> Iterator[Any]:
    """Ray, connected or started here; SIGTERM is a KeyboardInterrupt until it is left."""
    ray = _import_ray(params.address)
    before = signal.getsignal(signal.SIGTERM)
    quiet = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    try:
        if params.address is None:
            here = _this_machine(todo)
            # Also without a dashboard Ray starts its server, for statistics, and that asks the addresses of
            # cloud providers who they are, statistics or not. On a port that is taken it gives up.
            with socket.create_server(("127.0.0.1", 0)) as taken:
                ray.init(
                    address="local", num_cpus=here["CPU"], num_gpus=here["GPU"],
                    object_store_memory=100_000_000,  # jobs hand nothing over
                    include_dashboard=False, dashboard_port=taken.getsockname()[1], **quiet,
                )  # fmt: skip
        else:
            ray.init(address=params.address, runtime_env=_search_path(), **quiet)
        signal.signal(signal.SIGTERM, _interrupt)  # Ray has set its own
        yield ray
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _search_path() -> dict[str, dict[str, str]]:
    """What a cluster's workers need to find soluscope. Nothing secret: Ray writes it to its logs."""
    path = os.environ.get("PYTHONPATH")
    return {"env_vars": {"PYTHONPATH": path}} if path else {}


_ASK = """
import json, logging, ray, sys
ray.init(address=sys.argv[1], logging_level=logging.CRITICAL, log_to_driver=False)
print(json.dumps([node["Resources"] for node in ray.nodes() if node["Alive"]]))
"""


def _ask(address: str) -> list[Node]:
    """The nodes of a running cluster.

    In a process of its own: Ray waits long for a server that is silent, and ends the process that asked.

    Raises:
        UserError: if it does not answer in time.
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
        f"no Ray cluster at ray.address={address}: {problem}; start one with 'ray start --head', or leave "
        "ray.address out for one on this machine"
    )


ENGINE = Engine(params=Params, check=check, run=run)
