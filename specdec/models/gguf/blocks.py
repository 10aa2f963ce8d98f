"""Weights that stay in the blocks of a GGUF file: matrices, and the modules of a model that hold them.

A model loaded from such a file has ``BlockLinear`` and ``BlockEmbedding`` modules. Their ``weight`` is dequantised on
every access, as ``gguf`` does it, so nothing is held twice; runtimes pack the blocks themselves. Knows nothing of
files, models or kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gguf
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.base import memory
from specdec.base.errors import SpecDecError

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")  # of blocks that are kept
CHUNK = 1 << 20  # numbers that are dequantised at a time


@dataclass(frozen=True)
class Blocks:
    """A matrix [out, in] in GGUF blocks along its inputs.

    data: uint8 [out, bytes of a row], usually mapped from a file. kind: of ``KINDS``. rows: int32 [out], the row of
    ``data`` that each row of the matrix is in; None: in order.
    """

    data: Tensor
    kind: str
    inputs: int
    rows: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.data.shape[0], self.inputs))

    def numbers(self, index: Tensor | None = None) -> Tensor:
        """The matrix, or its rows ``index`` [n], in float32 [n, in], as ``gguf`` dequantises them."""
        if index is None:
            index = torch.arange(self.data.shape[0])
        if self.rows is not None:
            index = self.rows[index].long()
        return numbers(self.data[index], self.kind)

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Single numbers of the matrix, by their row and column [n], in float32 [n]."""
        if self.rows is not None:
            rows = self.rows[rows].long()
        size, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        places = (columns // size * width)[:, None] + torch.arange(width)  # [n, bytes of a block]
        found = numbers(self.data[rows[:, None], places].view(1, -1), self.kind).view(-1, size)
        return found[torch.arange(len(rows)), columns % size]

    def __deepcopy__(self, memo: Any) -> Blocks:
        return self


def numbers(data: Tensor, kind: str) -> Tensor:
    """Rows of blocks, uint8 [n, bytes], in float32 [n, in], as ``gguf`` dequantises them."""
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))


def bits(kind: str) -> int:
    """Bits of a code in blocks of ``kind``."""
    return int(kind[1])


Dequantize = Callable[[Blocks, Tensor | None, torch.dtype], Tensor]


def dequantize(blocks: Blocks, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The matrix, or its rows ``index`` [n], in ``dtype``: [n, in]."""
    count = blocks.shape[0] if index is None else len(index)
    step, out = max(1, CHUNK // blocks.inputs), torch.empty(count, blocks.inputs, dtype=dtype)
    for start in range(0, count, step):
        stop = min(start + step, count)
        out[start:stop] = blocks.numbers(torch.arange(start, stop) if index is None else index[start:stop])
    return out


class _InBlocks(nn.Module):
    """A module whose weight is in blocks, as numbers of ``dtype``. Moving it changes the dtype; blocks stay."""

    blocks: Blocks
    dtype: torch.dtype
    unpack: Dequantize

    @property
    def weight(self) -> Tensor:
        values = self.unpack(self.blocks, None, self.dtype)
        memory.release(self.blocks.data)  # the pages come again from the file
        return values

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        like = fn(torch.empty(0, dtype=self.dtype))
        if like.device.type != "cpu":
            raise SpecDecError("weights in GGUF blocks stay on the CPU; load the model on the device it is to run on")
        self.dtype = like.dtype
        return super()._apply(fn, recurse)


class BlockLinear(_InBlocks, nn.Linear):  # type: ignore[override, misc]
    """A linear map whose weight is in blocks. No gradients.

    unpack: makes the numbers; a runtime may set a faster one that gives the same.
    """

    def __init__(
        self, blocks: Blocks, bias: Tensor | None, dtype: torch.dtype, unpack: Dequantize = dequantize
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = blocks.shape
        self.blocks, self.dtype, self.unpack = blocks, dtype, unpack
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        step, parts = max(1, CHUNK // self.in_features), list[Tensor]()
        for rows in torch.arange(self.out_features).split(step):  # the whole weight may be large
            bias = None if self.bias is None else self.bias[rows]
            parts.append(F.linear(x, self.unpack(self.blocks, rows, self.dtype), bias))
        return torch.cat(parts, -1)


class BlockEmbedding(_InBlocks, nn.Embedding):  # type: ignore[override, misc]
    """An embedding whose table is in blocks. unpack: as ``BlockLinear``'s."""

    def __init__(self, blocks: Blocks, dtype: torch.dtype, unpack: Dequantize = dequantize) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = blocks.shape
        self.blocks, self.dtype, self.unpack = blocks, dtype, unpack
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False

    def forward(self, ids: Tensor) -> Tensor:
        return self.unpack(self.blocks, ids.flatten(), self.dtype).view(*ids.shape, -1)


def quantize_linear(module: nn.Linear, kind: str) -> BlockLinear:
    """The linear map with its weight rounded to blocks of ``kind``: Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0.

    Raises SpecDecError if its inputs are not whole blocks.
    """
    if module.in_features % 32:
        raise SpecDecError(f"{kind} blocks take multiples of 32 inputs; a linear map has {module.in_features}")
    values = module.weight.detach().float().numpy()
    data = torch.from_numpy(gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]))
    return BlockLinear(Blocks(data, kind, module.in_features), module.bias, module.weight.dtype)


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor | Blocks]]:
    """The parameters of a model, those in blocks too. Shared ones come under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _InBlocks):
            yield f"{name}.weight", module.blocks


def weight_storage(module: Any) -> Tensor:
    """What the weight of ``module`` lies in, row by row: its parameter or the data of its blocks."""
    data: Tensor = module.blocks.data if isinstance(module, _InBlocks) else module.weight.detach()
    return data


def weight_rows(module: Any, index: Tensor) -> Tensor:
    """Rows ``index`` [n] of the weight of ``module``: [n, in]."""
    if isinstance(module, _InBlocks):
        return module.unpack(module.blocks, index, module.dtype)
    chosen: Tensor = module.weight.detach()[index]
    return chosen


def densify(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace the modules in blocks by ordinary ones of the same numbers, in place. dtype: of the whole model then."""
    weights: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, _InBlocks):
            blocks = module.blocks
            if id(blocks) not in weights:
                values = module.unpack(blocks, None, dtype or module.dtype)  # rounded once
                weights[id(blocks)] = nn.Parameter(values, requires_grad=False)
                memory.release(blocks.data)
            model.set_submodule(name, _dense(module, weights[id(blocks)]))
    if dtype is not None:
        model.to(dtype)


def _dense(module: nn.Module, weight: nn.Parameter) -> nn.Module:
    """The ordinary module of these numbers."""
    made: Any
    with torch.device("meta"):
        if isinstance(module, BlockEmbedding):
            made = nn.Embedding(*weight.shape)
        else:
            made = nn.Linear(weight.shape[1], weight.shape[0])
            made.bias = module.bias
    made.weight = weight
    return made.train(module.training)


@contextmanager
def temporarily_dense(model: nn.Module) -> Iterator[None]:
    """Meanwhile the modules in blocks are ordinary ones: for what calls the model's own ``forward`` many times."""
    kept = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, _InBlocks)]
    densify(model)
    try:
        yield
    finally:
        for name, module in kept:
            model.set_submodule(name, module)
        if kept:
            memory.trim_heap()
