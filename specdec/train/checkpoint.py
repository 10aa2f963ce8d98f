"""The checkpoint of a run, one file that is replaced atomically, and its best parameters in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from specdec.base import files
from specdec.base.errors import SpecDecError
from specdec.train.output import CHECKPOINT, METRICS, writing

MASTERS, SLOTS = "masters/", "optimizer/"  # prefixes of tensor names


def write(output: Path, masters: Mapping[str, nn.Parameter], optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Replace the checkpoint. state: JSON values that are stored with the tensors."""
    tensors = {f"{MASTERS}{name}": parameter.detach() for name, parameter in masters.items()}
    for index, slot in optimizer.state_dict()["state"].items():
        tensors |= {f"{SLOTS}{index}/{key}": torch.as_tensor(value) for key, value in slot.items()}
    contiguous = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    with writing("a checkpoint", output):
        files.write_atomically(output / CHECKPOINT, save(contiguous, {"state": json.dumps(state)}))


@torch.no_grad()
def restore(output: Path, masters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Any]:
    """Restore tensors and return the state. Raises SpecDecError for a damaged file and another run's file."""
    path = output / CHECKPOINT
    slots: dict[int, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            state: dict[str, Any] = json.loads((file.metadata() or {})["state"])
            for name, parameter in masters.items():
                parameter.copy_(file.get_tensor(f"{MASTERS}{name}"))
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if key.startswith(SLOTS):
                    _, index, name = key.split("/")
                    slots.setdefault(int(index), {})[name] = file.get_tensor(key)
        optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise SpecDecError(f"'{path}' is not a checkpoint of this run ({error}); delete it to start anew") from None
    return state


def rewind_metrics(output: Path, update: int) -> None:
    """Remove metrics after ``update``, the update of the checkpoint, and an unfinished last line."""
    path, kept = output / METRICS, ""
    with writing("metrics", output):
        for line in path.read_text("utf-8", "replace").splitlines(True) if path.exists() else ():
            try:
                if not line.endswith("\n") or json.loads(line)["update"] > update:
                    break
            except (ValueError, KeyError, TypeError):  # the run was killed as it wrote this line
                break
            kept += line
        files.write_atomically(path, kept.encode())


class BestParameters:
    """A copy of the parameters with the lowest held-out loss so far.

    start: held-out loss before the first update.
    least, update: lowest held-out loss, and its update.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], start: float, update: int = 0) -> None:
        self.parameters, self.start = parameters, start
        self.keep(start, update)

    def keep(self, loss: float, update: int) -> None:
        """Keep the current parameters as the best."""
        self.least, self.update = loss, update
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def put_back(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self.values[name])
