"""The processor and the free memory, as Linux describes them."""

from __future__ import annotations

import platform
import re
from contextlib import suppress
from pathlib import Path

from specdec.base.errors import SpecDecError

CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")


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
    """Return how many bytes of memory programs can still allocate; None if the system does not report it."""
    try:
        lines = MEMINFO.read_text("ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def resident(field: str, pid: int | str = "self") -> float | None:
    """Return the resident memory of a process in MB; None if the system does not report it.

    field: "VmRSS" (current) or "VmHWM" (peak). pid: the process; "self": this one.
    """
    with suppress(OSError):
        found = re.search(rf"{field}:\s*(\d+)", Path(f"/proc/{pid}/status").read_text("utf-8"))
        return int(found[1]) * 1024 / 1e6 if found else None
    return None


def check_memory(name: str, need: int, other: str = "use a smaller model") -> None:
    """Raise SpecDecError if this machine has less than ``need`` bytes of memory free for the model ``name``.

    No effect if the system does not report its free memory. name: in the message. other: the advice at its end.
    """
    free = available_memory()
    if free is not None and free < need:
        raise SpecDecError(
            f"not enough memory for '{name}': its weights need {need / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free; "
            f"end other programs or {other}"
        )
