"""What a run takes of memory, estimated before weights are read."""

from __future__ import annotations

from typing import Any

import torch

from specdec.base.errors import SpecDecError
from specdec.models import catalogue, gguf_model, loading


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
