"""A real SLURM of one node on loopback: this machine's slurmctld and slurmd, in a separate folder."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "sinfo", "squeue", "scancel", "setpriv")
UP_WITHIN_S = 30


class NoCluster(Exception):
    """The reason why no cluster is available."""


@contextmanager
def slurm_cluster(folder: Path, n_cpus: int = 4) -> Iterator[Path]:
    """Start a cluster that accepts jobs. At the end, kill the cluster and every process that it started.

    Args:
        folder: an empty folder for the configuration, the state and the logs.
        n_cpus: number of cores that SLURM assumes.

    Yields:
        The path of slurm.conf. Commands find the cluster by the environment variable SLURM_CONF.

    Raises:
        NoCluster: if SLURM is not installed, or does not start in time.
    """
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])  # Debian's daemons are there
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        raise NoCluster(f"SLURM is not installed: no {missing[0]}")
    conf = folder / "slurm.conf"
    conf.write_text(_configuration(folder, n_cpus))
    environment = {**os.environ, "PATH": path, "SLURM_CONF": str(conf)}
    with ExitStack() as stack:
        for daemon in ("slurmctld", "slurmd"):
            log = stack.enter_context((folder / f"{daemon}.out").open("w"))
            # The daemons die with the tests, however the tests end.
            words = ["setpriv", "--pdeathsig", "KILL", daemon, "-D"]
            stack.enter_context(subprocess.Popen(words, env=environment, stdout=log, stderr=log))
            stack.callback(_end_all_of, conf)
        try:
            wait_until(lambda: "idle" in _ask(environment, "sinfo", "-h", "-o", "%t"), UP_WITHIN_S)
        except TimeoutError as error:
            logs = "".join((folder / f"{name}.log").read_text() for name in ("slurmctld", "slurmd"))
            errors = [line for line in logs.splitlines() if "error" in line] or ["no error logged"]
            raise NoCluster(f"SLURM did not come up in {UP_WITHIN_S} s: {errors[-1]}") from error
        yield conf


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    """Poll until `holds()` is true. Raises TimeoutError if it is not true in time."""
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(0.1)


def _ask(environment: dict[str, str], *words: str) -> str:
    try:
        return subprocess.run(
            words, env=environment, capture_output=True, text=True, timeout=10
        ).stdout
    except subprocess.TimeoutExpired:
        return ""


def _configuration(folder: Path, n_cpus: int) -> str:
    host, user = socket.gethostname().split(".")[0], pwd.getpwuid(os.getuid()).pw_name
    settings = {
        "ClusterName": "loopback",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": _free_port(),
        "SlurmdPort": _free_port(),
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/none",
        "CredType": "cred/none",
        "AuthInfo": "cred_expire=5",  # wait before a requeued job starts: 120 s by default, 5 at least
        "SchedulerParameters": "sched_interval=1,bf_interval=1",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "SwitchType": "switch/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "AccountingStorageType": "accounting_storage/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "JobCompType": "jobcomp/none",
        "JobRequeue": 1,
        "KillWait": 10,
        "ReturnToService": 2,
        "SlurmdParameters": "config_overrides",  # use the number of CPUs given here
        "NodeName": f"{host} NodeAddr=127.0.0.1 CPUs={n_cpus}",
        "PartitionName": f"main Nodes={host} Default=YES State=UP",
    }
    for name in ("state", "spool"):
        (folder / name).mkdir()
    return "".join(f"{key}={value}\n" for key, value in settings.items())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _end_all_of(conf: Path) -> None:
    """Kill every process that was started with this SLURM_CONF: daemons, jobs and their children."""
    mark = f"SLURM_CONF={conf}".encode()
    for _ in range(20):
        alive = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                is_ours = mark in (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # the process has ended, or belongs to another user
                continue
            if is_ours and int(entry.name) != os.getpid():
                alive.append(int(entry.name))
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if not alive:
            return
        time.sleep(0.1)
