"""CPU cores that this process may use, and the number of threads that its user asked for. No torch is loaded."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path


def n_cores() -> int:
    """Return the number of cores that this process may use, by its affinity and its cgroup's CPU quota."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no affinity
        cores = os.cpu_count() or 1
    return max(1, math.floor(min(cores, cpu_quota())))


def omp_threads() -> int | None:
    """Return the number in OMP_NUM_THREADS, of the outermost level if it has several; None without a number."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return (int(first) or None) if first.isascii() and first.isdigit() else None


def cpu_quota(root: Path = Path("/")) -> float:
    """Return the smallest CPU quota of this process's cgroup and of the cgroups above it, in cores.

    Args:
        root: folder that contains proc/ and sys/.

    Returns:
        Infinity without a quota, or without cgroups.
    """
    quotas = [math.inf]
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf8").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            inner = top / group.strip("/")  # in a container, the group's path may begin outside it
            for folder in (inner, *(each for each in inner.parents if each.is_relative_to(top))):
                quotas += _quota_of(folder)
    return min(quotas)


def _quota_of(folder: Path) -> list[float]:
    """Return the CPU quota of one cgroup of version 2 or 1, in cores; empty without a quota."""
    with suppress(OSError, ValueError):
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="utf8").split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="utf8")
                for name in ("quota", "period")
            )
        if int(quota) > 0:  # ValueError for `max`, and -1 in version 1, mean no quota
            return [int(quota) / int(period)]
    return []
