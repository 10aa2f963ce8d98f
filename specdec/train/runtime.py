"""What training runs on: the memory it takes, and the fused runtime, or the reference for families it does not know."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch
from transformers import PreTrainedModel

from specdec.base import machine
from specdec.base.errors import SpecDecError
from specdec.models.device import as_dtype
from specdec.models.gguf import model as gguf_model
from specdec.runtimes.fused import FusedTarget
from specdec.runtimes.reference import ReferenceTarget
from specdec.runtimes.target import Target


def training_target(model: PreTrainedModel) -> Target:
    """The runtime for blocks of many tokens, with gradients. Raises SpecDecError for unsupported models."""
    try:
        return FusedTarget(model, packs=False)
    except SpecDecError:
        return ReferenceTarget(model)


def keep_freed_memory() -> None:
    """Have glibc reuse large blocks instead of returning them: fresh pages cost more than the arithmetic on them.

    An elementwise operation on 20 MB was seen to take 42 ms with the defaults and 5 ms so. Elsewhere: no effect.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its highest
            mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
            mallopt(-2, 256 << 20)  # M_TOP_PAD


def check_memory(name: str, config: Any, dtype: str, device: torch.device) -> None:
    """Raise SpecDecError if the weights of a model of ``config`` are larger than the device's free memory."""
    kind = as_dtype(dtype)
    kind = kind if isinstance(kind, torch.dtype) else getattr(config, "dtype", None) or torch.float32
    try:
        model = gguf_model.empty_model(config, kind)
    except Exception:  # an architecture with code of its own: what cannot be built is refused when it is loaded
        return
    need = sum(parameter.numel() for parameter in model.parameters()) * kind.itemsize
    if device.type != "cuda":
        machine.check_memory(name, need)
    elif (free := torch.cuda.mem_get_info(device)[0]) < need:
        raise SpecDecError(
            f"not enough memory on '{device}' for '{name}': its weights take {need / 1e6:.0f} MB, and {free / 1e6:.0f} "
            "MB are free; use a smaller model or the device cpu"
        )
