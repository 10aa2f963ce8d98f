"""Transfers of small tensors between host and device, events of a device, and modules without memory.

A GPU runs asynchronously. Reading from it waits for all of its work, and so does writing to it from memory that is not
pinned. So a step of decoding reads once and writes from pinned memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from specdec.base.machine import processor_name

FILLED = {f"{name}_" for name in ("normal", "uniform", "kaiming_uniform", "zero", "zeros", "fill", "mul")}  # in place


class _Unfilled(TorchFunctionMode):
    """A mode (``with`` block) in which initializing a tensor on the device "meta" does nothing.

    PyTorch would import SymPy for it, which is slow. ``torch.rand`` and ``torch.randn`` return tensors without values.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (torch.randn, torch.rand):
            func = torch.empty
        given = kwargs or {}
        if getattr(func, "__name__", "") in FILLED:
            values = args[0] if args else given["tensor"]
            if values.is_meta:
                return values
        return func(*args, **given)


@contextmanager
def without_memory() -> Iterator[None]:
    """Create new tensors in the ``with`` block on the device "meta", without memory: modules have names and shapes."""
    with torch.device("meta"), _Unfilled():
        yield


def upload(values: Any, device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Return ``values`` (numbers, nested lists or a tensor) as a tensor on ``device``, without waiting for the device.

    The values are those of ``torch.as_tensor(values, dtype=dtype, device=device)``.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    if tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def download(*tensors: Tensor) -> list[list[list[Any]]]:
    """Return for each of ``tensors``, [B, n], its values as B lists of n numbers, with one read from the device.

    The tensors have one dtype, one device and the same B; their n may differ. Waits for the device.
    """
    if len(tensors) == 1:
        return [tensors[0].tolist()]
    rows = torch.cat(tensors, 1).tolist()
    ends = [0]
    for tensor in tensors:
        ends.append(ends[-1] + tensor.shape[1])
    return [[row[start:end] for row in rows] for start, end in itertools.pairwise(ends)]


def record_event(device: torch.device | None) -> torch.cuda.Event | None:
    """Return a CUDA event with timing that marks the end of the work submitted to ``device`` so far; does not wait.

    Returns None if ``device`` is None or is not a CUDA device.
    """
    if device is None or device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def is_asynchronous(device: torch.device) -> bool:
    """Return whether work on ``device`` runs in the background, so that reading a tensor waits for it.

    It does on all devices but the CPU.
    """
    return device.type != "cpu"


def device_name(device: torch.device) -> str:
    """Return the name of a CUDA device, else that of the processor with the number of threads, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"
