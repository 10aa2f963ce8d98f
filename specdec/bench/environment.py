"""The environment of a measurement: machine, load, versions and commit."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers

import specdec
from specdec.base.machine import processor_name


def environment() -> dict[str, Any]:
    """Return facts about the machine and the software as JSON values; None where the system does not report one.

    Keys: date, cpu, cores, threads, memory_gb, load_average (of one minute), gpu, system, python, torch, transformers,
    numpy, specdec (versions) and commit.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of its own
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "specdec": specdec.__version__,
        "commit": _commit(),
    }


def _memory_gb() -> float | None:
    with suppress(OSError, ValueError, AttributeError):
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    return None


def _commit() -> str | None:
    """Return the git commit that the package runs from, with "+" if tracked files differ; None without a repository."""
    root = Path(specdec.__file__).resolve().parents[1]

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    with suppress(OSError, subprocess.SubprocessError):
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root:  # else: it is inside another repository
            return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    return None
