"""How many threads this process and its forked children use.

PyTorch counts the cores of the machine. A container may have fewer CPUs, and more threads than CPUs only wait for each
other. In a forked child, OpenMP waits for the parent's threads, which do not exist there.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from pathlib import Path

import torch

from specdec.base.machine import control_groups


def threads() -> int:
    """Return the number of threads for a computation: PyTorch's setting, but at most ``cpus()``."""
    return min(torch.get_num_threads(), cpus())


def limit_threads() -> None:
    """Limit PyTorch's threads in this process to ``cpus()``, and in children that are forked later to one."""
    if torch.get_num_threads() > cpus():
        torch.set_num_threads(cpus())
    _watch_forks()


@functools.cache
def cpus() -> int:
    """Return how many CPUs this process may use, at least 1.

    It is the smallest of the CPU affinity, the quotas of the process's control groups, rounded up, and
    OMP_THREAD_LIMIT. The first result is kept.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # PyTorch ignores this limit, and matrix products are wrong if OpenMP gives its libraries fewer threads.
    limit = getattr(ctypes.CDLL(torch._C.__file__), "omp_get_thread_limit", lambda: affinity)()
    return max(min([affinity, limit, *map(math.ceil, _quotas())]), 1)


def _quotas() -> list[float]:
    """Return the numbers of CPUs, maybe fractions, that the control groups of this process allow (cgroups v1 and v2).

    There is a number for each group with a quota, parent groups included; []: no group has one.
    """
    return [quota for group in control_groups("cpu") for quota in _quota(group)]


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
