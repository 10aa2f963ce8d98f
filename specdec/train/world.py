"""The processes of one training run, started by ``torchrun`` or ``accelerate launch``. Alone, none of this acts.

All run the same code on the same batches, of which each takes its share of rows; gradients are summed. The first one
writes: everything that lies in the output folder is its work, and the others find it there (so they must share it).
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

PATIENCE = timedelta(days=2)  # the others wait while the first one answers prompts and computes teacher states


@dataclass(frozen=True)
class World:
    """``rank`` of ``size`` processes; ``device``: where this one computes."""

    rank: int
    size: int
    device: str

    @property
    def first(self) -> bool:
        return self.rank == 0

    @contextmanager
    def after_the_first(self) -> Iterator[None]:
        """The first process runs the body alone; then the others do, and find what it has written."""
        if not self.first:
            self.share(0.0)
        yield
        if self.first:
            self.share(0.0)

    def share(self, value: float) -> float:
        """The first process's value, in all of them."""
        if self.size == 1:
            return value
        cell = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(cell, 0)
        return float(cell)

    def copy(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors by the first process's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def mean(self, tensors: Sequence[Tensor], weight: float) -> tuple[list[Tensor], float]:
        """Means of float32 tensors over the processes, each with its ``weight``, and the weights' sum; one message."""
        flat = torch.cat([weight * tensor.flatten() for tensor in tensors] + [tensors[0].new_tensor([weight])])
        dist.all_reduce(flat)
        parts = (flat[:-1] / flat[-1]).split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)], float(flat[-1])


def leads() -> bool:
    """Whether this process is the first of its run, or alone: the one that speaks."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def join(device: str) -> Iterator[World]:
    """The run's world, for the time of the context; on CUDA, each process of a machine takes its own GPU."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if size == 1:
        yield World(0, 1, device)
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()
