"""Map tensors of GGUF and safetensors files into memory, by descriptions that both formats have in common."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True)
class TensorInfo:
    """The description of a tensor in a GGUF or safetensors file.

    kind: name of the element type, such as "BF16", as safetensors or GGUF call it; in GGUF also a quantization type
        ("Q4_K").
    shape: sizes in PyTorch's order.
    offset: position of the tensor's first byte, in bytes from the start of its file.
    nbytes: size in bytes.
    part: index in ``TensorFile.paths`` of the file that has the tensor.
    """

    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int = 0


@dataclass(frozen=True)
class TensorFile:
    """A GGUF or safetensors file with descriptions of its tensors, or all files of a model that is split into several.

    paths: the files in order.
    state: sizes, times and inodes of ``paths`` (``packed.stamp``) before they were read, by which a change is noticed.
    tensors: descriptions of the tensors by name.
    """

    paths: tuple[Path, ...]
    state: tuple[int, ...]
    tensors: dict[str, TensorInfo]

    @functools.cached_property
    def maps(self) -> tuple[Tensor, ...]:
        """Return the bytes of each file in ``paths``, uint8 [size], mapped privately into memory at the first access.

        Bytes are read from the file when they are used. The mappings live as long as a tensor of them does.
        """
        sizes = [path.stat().st_size for path in self.paths]
        pairs = zip(self.paths, sizes, strict=True)
        return tuple(torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8) for path, size in pairs)

    def data(self, info: TensorInfo) -> Tensor:
        """Return the bytes of the described tensor, uint8 [nbytes]: a view of ``maps``, not a copy."""
        return self.maps[info.part][info.offset : info.offset + info.nbytes]
