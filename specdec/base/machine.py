"""The processor, the free memory and the control groups of this process, as Linux describes them."""

from __future__ import annotations

import platform
import re
from contextlib import suppress
from pathlib import Path, PurePosixPath

from specdec.base.errors import SpecDecError

CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def processor(cpuinfo: Path = CPUINFO) -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo, such as "model name"; empty without this file."""
    try:
        first = cpuinfo.read_text("utf-8", "replace").partition("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def features(cpuinfo: Path = CPUINFO) -> set[str]:
    """Return the instruction sets of the first processor by Linux's names, such as "avx2"; empty if unknown."""
    fields = processor(cpuinfo)
    return set((fields.get("flags") or fields.get("Features", "")).split())  # of x86, of Arm


def processor_name() -> str:
    return processor().get("model name") or platform.processor() or platform.machine()


def available_memory() -> int | None:
    """Return how many bytes of memory this process can still allocate; None if the system does not report it.

    It is the smaller of what the machine has free and what the limits of the process's control groups leave.
    """
    found = [left for group in control_groups("memory") for left in _left(group)]
    with suppress(OSError, ValueError, StopIteration):
        lines = MEMINFO.read_text("ascii").splitlines()
        found.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    return min(found, default=None)


def control_groups(controller: str) -> list[Path]:
    """Return the folders of this process's control groups and their parents (cgroups v1 and v2); some may not exist.

    controller: what they limit, "cpu" or "memory".
    """
    found = []
    try:
        lines = MEMBERSHIP.read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # In a container the path may be the host's, and the mount the container's group.
        inner = PurePosixPath(path.lstrip("/"))
        for root in (CGROUPS / controllers, CGROUPS / controller) if controllers else (CGROUPS,):
            found += [root / group for group in (inner, *inner.parents)]
    return found


def _left(group: Path) -> list[int]:
    """Return [bytes that the control group ``group`` can still allocate], or [] if it has no limit.

    Pages of files count as free, as in MemAvailable.
    """
    new = (group / "memory.max").exists()
    names = ("max", "current") if new else ("limit_in_bytes", "usage_in_bytes")
    try:
        limit, used = (int((group / f"memory.{name}").read_text("ascii")) for name in names)
        parts = dict(line.split() for line in (group / "memory.stat").read_text("ascii").splitlines())
        pages = (int(parts.get(f"{'' if new else 'total_'}{kind}_file", 0)) for kind in ("active", "inactive"))
        return [max(limit - used + sum(pages), 0)]
    except (OSError, ValueError):  # no such file, or "max"
        return []


def resident(field: str, pid: int | str = "self") -> float | None:
    """Return the resident memory of a process in MB; None if the system does not report it.

    field: "VmRSS" (current) or "VmHWM" (peak). pid: the process; "self": this one.
    """
    with suppress(OSError):
        found = re.search(rf"{field}:\s*(\d+)", Path(f"/proc/{pid}/status").read_text("utf-8"))
        return int(found[1]) * 1024 / 1e6 if found else None
    return None


def check_memory(name: str, need: int) -> None:
    """Raise SpecDecError if this machine has less than ``need`` bytes of memory free for the model ``name``.

    No effect if the system does not report its free memory.
    """
    free = available_memory()
    if free is not None and free < need:
        raise SpecDecError(
            f"not enough memory for '{name}': its weights need {need / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free; "
            "end other programs or use a smaller model"
        )
