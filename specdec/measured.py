"""Choices between ways that compute the same: timed once per machine and model, and kept in the cache folder.

What else the machine does only ever makes a way slower, so the least of several timings counts, and nothing is decided
while others use the cores that are timed. Knows nothing about what is timed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from specdec import artifacts, embedded
from specdec.machine import processor

CONFIRMED = 1.1  # a figure is believed once it was reached a second time, within this factor
REPEATS, PATIENCE = 3, 1.0  # fewest timings of each way; seconds after which there is no other
WORTH = 1.05  # another way than the usual must be faster by this factor
SPARE = 0.5  # cores beyond those that are timed which others may use and be taken for idle


def machine(device: torch.device) -> str:
    """What timings on ``device`` depend on, of the machine and of PyTorch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    fields = processor()
    cpu = " ".join(fields[key] for key in ("cpu family", "model", "model name") if key in fields)
    cpu = f"{cpu} {platform.machine()} {platform.node()}"
    return f"{cpu} {name} {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"


def read(what: str) -> Any:
    """What was kept under ``what``: JSON data, to be checked as any file's; None if there is nothing readable."""
    try:
        return json.loads(_place(what).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def keep(what: str, figures: Mapping[str, Any]) -> None:
    """Keep ``figures`` under ``what``. A cache folder that cannot be written costs measuring again, nothing else."""
    try:
        _place(what).parent.mkdir(parents=True, exist_ok=True)
        artifacts.replace(_place(what), json.dumps({**figures, "of": what}).encode())
    except OSError:
        pass


def seconds(what: str, ways: Mapping[str, Callable[[], object]]) -> dict[str, float] | None:
    """Seconds that each of ``ways`` takes on this CPU, kept or measured; None where the machine is too busy to tell."""
    what = f"{what} {machine(torch.device('cpu'))}"
    kept = read(what)
    if isinstance(kept, dict) and all(isinstance(kept.get(way), float) and kept[way] > 0 for way in ways):
        return {way: kept[way] for way in ways}
    found: dict[str, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        for run in ways.values():
            run()
        start, others, rounds = time.perf_counter(), _Others(), 0
        while rounds < REPEATS or time.perf_counter() - start < PATIENCE:
            rounds += 1
            for way, run in ways.items():
                begin = time.perf_counter()
                run()
                found[way].append(time.perf_counter() - begin)
            if rounds >= REPEATS and all(map(confirmed, found.values())):
                break
    if others.disturb() or not all(map(confirmed, found.values())):
        return None
    best = {way: min(times) for way, times in found.items()}
    keep(what, best)
    return best


def choose(found: Mapping[str, float] | None, usual: str) -> str:
    """The fastest of what was found; the usual one unless another is faster by ``WORTH``, or nothing is known."""
    return usual if found is None else min(found, key=lambda way: found[way] * (1.0 if way == usual else WORTH))


def confirmed(timings: Sequence[float]) -> bool:
    """Whether the least of ``timings`` was reached twice."""
    least, second = sorted(timings)[:2]
    return second <= CONFIRMED * least


class _Others:
    """The share of the machine that other processes use from now on. Known on Linux; elsewhere nobody disturbs."""

    def __init__(self) -> None:
        self.begin = self._used()

    def disturb(self) -> bool:
        """Whether they left too few cores for this process's threads."""
        now = self._used()
        if now is None or self.begin is None or now[0] <= self.begin[0]:
            return False
        wall, used = (after - before for after, before in zip(now, self.begin, strict=True))
        return used / wall > max((os.cpu_count() or 1) - torch.get_num_threads(), 0) + SPARE

    @staticmethod
    def _used() -> tuple[float, float] | None:
        """(wall seconds, core seconds that others have used)."""
        try:
            fields = Path("/proc/stat").read_text("ascii").split("\n", 1)[0].split()[1:]
            ticks, tick = [int(field) for field in fields], os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            return None
        user, nice, system = ticks[:3]
        return time.perf_counter(), (user + nice + system) / tick - time.process_time()


def _place(what: str) -> Path:
    return embedded.cache_dir() / "costs" / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.json"
