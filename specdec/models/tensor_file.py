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
    """The description of a tensor in a ``TensorFile``.

    kind: name of the type: one of ``PLAIN``, another type of safetensors, or a ``gguf.GGMLQuantizationType``.
    shape: sizes in PyTorch's order.
    offset: position of the first byte in its part of the file.
    nbytes: size in bytes.
    part: index of the part of a split file that holds the tensor.
    """

    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int = 0


@dataclass(frozen=True)
class TensorFile:
    """A GGUF or safetensors file, or all parts of a split one.

    paths: the parts, or the one file. state: ``packed.stamp`` of ``paths`` before they were read.
    tensors: descriptions of the tensors by name.
    """

    paths: tuple[Path, ...]
    state: tuple[int, ...]
    tensors: dict[str, TensorInfo]

    @functools.cached_property
    def maps(self) -> tuple[Tensor, ...]:
        """Return the bytes of each part, uint8, mapped into memory."""
        sizes = [path.stat().st_size for path in self.paths]
        pairs = zip(self.paths, sizes, strict=True)
        return tuple(torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8) for path, size in pairs)

    def data(self, info: TensorInfo) -> Tensor:
        """Return the bytes of a tensor, uint8 [nbytes], mapped into memory."""
        return self.maps[info.part][info.offset : info.offset + info.nbytes]
