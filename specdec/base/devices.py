"""Small tensors between the host and a device.

A GPU works behind the host: who reads from it waits until all of its work is done, and so does who writes to it from
memory that the system may move. So a step reads once, and writes from pinned memory.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.base.machine import processor_name


def upload(values: Any, device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """``torch.tensor(values, dtype=dtype, device=device)`` without a wait."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def download(*tensors: Tensor) -> list[list[list[Any]]]:
    """Each of ``tensors`` [B, n] of one dtype and device as lists, in one read."""
    if len(tensors) == 1:
        return [tensors[0].tolist()]
    rows = torch.cat(tensors, 1).tolist()
    ends = [0]
    for tensor in tensors:
        ends.append(ends[-1] + tensor.shape[1])
    return [[row[start:end] for row in rows] for start, end in itertools.pairwise(ends)]


class DeviceEvent(Protocol):
    """A point in a device's work, with its time once the device has reached it."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds to ``end``; both must have been reached."""


def record_event(device: torch.device | None) -> DeviceEvent | None:
    """A stamp behind the work that ``device`` has been given so far; None where the host waits for it anyway."""
    if device is None or device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def is_asynchronous(device: torch.device) -> bool:
    """Whether reading a tensor's numbers waits for the device."""
    return device.type != "cpu"


def device_name(device: torch.device) -> str:
    """What people call the device: a GPU's name, or the processor's with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"
