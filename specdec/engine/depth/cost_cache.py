"""What is known about the costs of steps, in the cache folder: later processes begin with it.

Nothing is measured before a request: the times of real steps correct the figures (``AutoDepth``).
"""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

import torch
from pydantic import TypeAdapter

from specdec.base import files, machine
from specdec.engine.depth.costs import Costs
from specdec.models import identity
from specdec.runtimes.target import Target
from specdec.speculation.drafter import Drafter

FORMAT, FILE = 7, TypeAdapter(Costs)


def load(target: Target, drafter: Drafter) -> Costs | None:
    """Return the costs that earlier processes measured for ``drafter`` on ``target``.

    None: there is no file of them (``_file``), or it cannot be read.
    """
    with suppress(OSError, ValueError):  # no file, or not one of ``store``
        return FILE.validate_json(_file(target, drafter).read_bytes())
    return None


def store(target: Target, drafter: Drafter, costs: Costs) -> None:
    """Write ``costs``, those of ``drafter`` on ``target``, to a file in the cache folder, where ``load`` finds them.

    Replaces the file if there is one. An OSError is ignored, since the next process then measures again.
    """
    with suppress(OSError):
        path = _file(target, drafter)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, FILE.dump_json(costs))


def _file(target: Target, drafter: Drafter) -> Path:
    """Return the path of the costs' file in the cache folder, which may not exist.

    Its name is a hash of what costs depend on: the weights and their formats, the machine, the drafter.
    """
    device, processor = target.device, f"{torch.get_num_threads()} threads of {machine.processor_name()}"
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else processor
    experts = None if target.experts is None else target.experts.describe()  # more tokens load more experts
    name = identity.numbers(target, FORMAT, platform.node(), place, drafter.name, drafter.traits.cost_key, experts)
    return files.cache_dir() / "costs" / f"{name[:24]}.json"
