"""The processor, as Linux describes it."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def processor(cpuinfo: Path = CPUINFO) -> dict[str, str]:
    """The fields of the first processor, such as "model name" and "flags"; empty where there is no such file."""
    try:
        first = cpuinfo.read_text("utf-8", "replace").partition("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def processor_name() -> str:
    return processor().get("model name") or platform.processor() or platform.machine()
