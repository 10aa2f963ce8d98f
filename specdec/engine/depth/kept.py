"""What is known about the costs of steps, in the cache folder: later processes begin with it.

Nothing is measured before a request: the times of real steps correct the figures (``AutoDepth``).
"""

from __future__ import annotations

import hashlib
import platform
from contextlib import suppress
from pathlib import Path

import torch
from pydantic import TypeAdapter

from specdec.base import files, machine
from specdec.engine.depth.costs import Costs
from specdec.runtimes.target import Target
from specdec.speculation.draft import Drafter

FORMAT, FILE = 4, TypeAdapter(Costs)


def load(target: Target, drafter: Drafter) -> Costs | None:
    """What earlier processes knew about ``drafter`` on ``target``, on this machine."""
    with suppress(OSError, ValueError):  # no file, or not one of ``store``
        return FILE.validate_json(_file(target, drafter).read_bytes())
    return None


def store(target: Target, drafter: Drafter, costs: Costs) -> None:
    """Write ``costs`` to the cache folder. If that fails, the next process begins anew."""
    with suppress(OSError):
        path = _file(target, drafter)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, FILE.dump_json(costs))


def _file(target: Target, drafter: Drafter) -> Path:
    """The file of the costs: its name is a hash of everything that they depend on."""
    device, cpu = target.device, machine.processor_name()
    units = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    parts: list[object] = [cpu, platform.node(), units, torch.__version__, torch.backends.cpu.get_cpu_capability()]
    parts += [
        FORMAT,
        target.runtime,
        target.weight_format,
        target.activations,
        target.kv_cache,
        target.dtype,
        target.fingerprint,
    ]
    parts += [drafter.name, drafter.path]
    parts += [] if target.experts is None else [target.experts.describe()]  # more tokens load more experts
    name = hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:24]
    return files.cache_dir() / "costs" / f"{name}.json"
