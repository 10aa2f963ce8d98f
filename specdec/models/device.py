"""Devices and dtypes by name, tried out before a model is loaded."""

from __future__ import annotations

import contextlib

import torch

from specdec.base.errors import SpecDecError, did_you_mean, one_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def as_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """The dtype for transformers, or "auto". Raises SpecDecError for an unknown name."""
    if dtype == "auto" or dtype in DTYPES.values():
        return dtype
    name = str(dtype).removeprefix("torch.")
    if isinstance(dtype, str) and SHORT.get(name, name) in DTYPES:
        return DTYPES[SHORT.get(name, name)]
    known = ["auto", *DTYPES, *SHORT]
    raise SpecDecError(f"unknown dtype '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}")


def find_device(device: str | torch.device, dtype: str | torch.dtype = "auto") -> torch.device:
    """The device by name. Raises SpecDecError if it is unknown, missing, or cannot compute in ``dtype``."""
    if device == "auto":
        with contextlib.suppress(SpecDecError):  # this PyTorch does not support the driver or the GPU
            return find_device("cuda", dtype)
        device = "cpu"
    place = _device(device)
    _try_out(place, dtype)
    return place


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise SpecDecError(f"unknown device '{device}'; known: auto, cpu, cuda, cuda:N, mps") from None
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise SpecDecError("device 'mps' is missing: this PyTorch or this machine has no Metal; use cpu")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise SpecDecError(
            f"device '{place}' is missing: PyTorch finds {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    return place


def _try_out(place: torch.device, dtype: str | torch.dtype) -> None:
    """Raise SpecDecError if the device cannot multiply two numbers in ``dtype``; no list of devices can be complete."""
    kind = dtype if isinstance(dtype, torch.dtype) else torch.float32
    try:
        one = torch.ones(1, 1, dtype=kind, device=place)
        (one @ one).item()
    except Exception as error:  # the type depends on the backend
        what = str(kind).removeprefix("torch.")
        raise SpecDecError(f"this machine cannot compute in {what} on device '{place}' ({one_line(error)})") from None
