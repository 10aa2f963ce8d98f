"""How many threads this process should use, and what becomes of them in a forked child.

PyTorch counts the cores of the machine. A container may use fewer of them, and threads beyond that only wait for each
other. A forked child has none of its parent's threads, but OpenMP believes that they are there and waits for them.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from pathlib import Path, PurePosixPath

import torch

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def threads() -> int:
    """Threads for a computation: PyTorch's, but no more than this process has CPUs."""
    return min(torch.get_num_threads(), cpus())


def limit_threads() -> None:
    """Let PyTorch use no more threads than this process has CPUs, and a forked child only the one that it has."""
    if torch.get_num_threads() > cpus():
        torch.set_num_threads(cpus())
    _watch_forks()


@functools.cache
def cpus() -> int:
    """CPUs that this process may use: by its affinity, the quotas of its control groups, and OMP_THREAD_LIMIT."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # PyTorch does not ask for the limit, and products of its libraries are wrong in a team smaller than they ask for.
    limit = getattr(ctypes.CDLL(torch._C.__file__), "omp_get_thread_limit", lambda: affinity)()
    return max(min([affinity, limit, *map(math.ceil, _quotas())]), 1)


def _quotas() -> list[float]:
    """CPUs that each control group of this process allows, where it has a limit (cgroups v1 and v2)."""
    found = []
    try:
        lines = MEMBERSHIP.read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # The groups above count, too. In a container the path may be the host's, and the mount its own group.
        inner = PurePosixPath(path.lstrip("/"))
        for root in (CGROUPS / controllers, CGROUPS / "cpu") if controllers else (CGROUPS,):
            for group in (inner, *inner.parents):
                found += _quota(root / group)
    return found


def _quota(group: Path) -> list[float]:
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text("ascii").split()[:2]
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text("ascii") for name in ("quota", "period"))
        return [int(quota) / int(period)] if int(quota) > 0 and int(period) > 0 else []
    except (OSError, ValueError):  # no such file, or "max"
        return []


@functools.cache
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))
