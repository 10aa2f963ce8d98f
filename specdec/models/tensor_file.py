"""Tensors in files that are mapped into memory: what GGUF and safetensors files have in common."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file.

    kind: one of ``PLAIN``, another type of safetensors files, or a ``gguf.GGMLQuantizationType``.
    shape: in PyTorch's order.
    offset: of its first byte in its part.
    part: the number of the part that has it, from 0 on.
    """

    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int = 0


@dataclass(frozen=True)
class TensorFile:
    """paths: all parts of a split file, or the file itself. state: ``packed.stamp`` of them before they were read."""

    paths: tuple[Path, ...]
    state: tuple[int, ...]
    tensors: dict[str, TensorInfo]

    @functools.cached_property
    def maps(self) -> tuple[Tensor, ...]:
        """The bytes of each part, uint8, mapped into memory."""
        sizes = [path.stat().st_size for path in self.paths]
        pairs = zip(self.paths, sizes, strict=True)
        return tuple(torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8) for path, size in pairs)

    def data(self, info: TensorInfo) -> Tensor:
        """The bytes of a tensor."""
        return self.maps[info.part][info.offset : info.offset + info.nbytes]
