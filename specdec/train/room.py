"""What a run takes of memory and disk, estimated before weights are read and states are computed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from specdec.base.errors import SpecDecError
from specdec.models import catalogue, gguf_model, loading
from specdec.runtimes.cache import KVCache
from specdec.runtimes.target import Target
from specdec.train.data import Answer
from specdec.train.states import Wanted, first_kept, whole_pass


def check_memory(name: str, config: Any, dtype: str, device: torch.device) -> None:
    """Raise SpecDecError if the weights of a model of ``config`` are larger than the device's free memory."""
    kind = loading.as_dtype(dtype)
    kind = kind if isinstance(kind, torch.dtype) else getattr(config, "dtype", None) or torch.float32
    try:
        model = gguf_model.skeleton(config, kind)
    except Exception:  # an architecture with code of its own: what cannot be built is refused when it is loaded
        return
    need = sum(parameter.numel() for parameter in model.parameters()) * kind.itemsize
    if device.type != "cuda":
        catalogue.check_memory(name, need)
    elif (free := torch.cuda.mem_get_info(device)[0]) < need:
        raise SpecDecError(
            f"not enough memory on '{device}' for '{name}': its weights take {need / 1e6:.0f} MB, and {free / 1e6:.0f} "
            "MB are free; use a smaller model or the device cpu"
        )


def check_disk(folder: Path, target: Target, answers: Sequence[Answer], wanted: Wanted) -> None:
    """Raise SpecDecError if the teacher states of these answers are larger than what is free on the folder's disk."""
    need = states_bytes(target, answers, wanted)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    if need > there + free:
        raise SpecDecError(
            f"not enough disk space for the teacher states in '{folder}': {(need - there) / 1e6:.0f} MB needed for "
            f"{sum(map(len, answers))} tokens, {free / 1e6:.0f} MB free; make room, give fewer answers or another "
            "--output"
        )


@torch.inference_mode()
def states_bytes(target: Target, answers: Sequence[Answer], wanted: Wanted) -> int:
    """The size of the teacher states of these answers. One token shows what a layer keeps of each."""
    cache = KVCache(target.num_layers, 1, target.device)
    whole_pass(target, torch.zeros(1, 1, dtype=torch.long, device=target.device), cache, {})
    token = 4  # the id
    for layer in wanted.kv:
        for buffer in (cache.keys[layer], cache.values[layer]):
            assert buffer is not None
            token += buffer.shape[1] * buffer.shape[3] * buffer.itemsize
    position = len(wanted.hidden) * target.hidden_size * target.dtype.itemsize + 8  # states, the best token and log Z
    kept = sum(len(a) - 1 - first_kept(len(a.prompt_ids)) for a in answers)
    return token * sum(map(len, answers)) + position * kept
