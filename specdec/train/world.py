"""The processes of a training run, started by ``torchrun`` or ``accelerate launch``. A single process needs no setup.

All processes run the same code on the same batches; each takes its share of the rows, and gradients are averaged. Only
the first process writes to the output folder, which all of them must share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(days=2)  # the first process may answer prompts and compute states for long


@dataclass(frozen=True)
class ProcessGroup:
    """Process ``rank`` of ``size``, which computes on ``device``."""

    rank: int
    size: int
    device: str

    @property
    def first(self) -> bool:
        return self.rank == 0

    @contextmanager
    def first_process_first(self) -> Iterator[None]:
        """The first process runs the body alone; then the others run it and read what it has written."""
        if not self.first:
            self.broadcast(0.0)
        yield
        if self.first:
            self.broadcast(0.0)

    def broadcast(self, value: float) -> float:
        """The value of the first process."""
        if self.size == 1:
            return value
        cell = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(cell, 0)
        return float(cell)

    def broadcast_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with those of the first process."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def weighted_mean(self, tensors: Sequence[Tensor], weight: float) -> tuple[list[Tensor], float]:
        """The weighted means of float32 tensors over the processes, and the sum of the weights, in one message."""
        flat = torch.cat([weight * tensor.flatten() for tensor in tensors] + [tensors[0].new_tensor([weight])])
        dist.all_reduce(flat)
        parts = (flat[:-1] / flat[-1]).split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)], float(flat[-1])


def is_first_process() -> bool:
    """Whether this process is the first of its run."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def join(device: str) -> Iterator[ProcessGroup]:
    """The process group, for the duration of the context. On CUDA each process of a machine takes its own GPU."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if size == 1:
        yield ProcessGroup(0, 1, device)
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    try:
        yield ProcessGroup(rank, size, device)
    finally:
        dist.destroy_process_group()
