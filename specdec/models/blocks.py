"""Weights that stay in the blocks of a GGUF file: matrices, and the modules of a model that hold them.

A model loaded from such a file has ``BlockLinear`` and ``BlockEmbedding`` modules. Their ``weight`` is dequantised on
every access, as ``gguf`` does it, so nothing is held twice; runtimes pack the blocks themselves. Knows nothing of
files, models or kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gguf
import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")  # of blocks that are kept


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
        chosen = self.data[index].numpy()
        return torch.from_numpy(gguf.quants.dequantize(chosen, gguf.GGMLQuantizationType[self.kind]))


Dequantize = Callable[[Blocks, Tensor | None, torch.dtype], Tensor]


def dequantize(blocks: Blocks, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The matrix, or its rows ``index`` [n], in ``dtype``: [n, in]."""
    return blocks.numbers(index).to(dtype)


class BlockLinear(nn.Linear):
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

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.unpack(self.blocks, None, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class BlockEmbedding(nn.Embedding):
    """An embedding whose table is in blocks. unpack: as ``BlockLinear``'s."""

    def __init__(self, blocks: Blocks, dtype: torch.dtype, unpack: Dequantize = dequantize) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = blocks.shape
        self.blocks, self.dtype, self.unpack = blocks, dtype, unpack
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.unpack(self.blocks, None, self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.unpack(self.blocks, ids.flatten(), self.dtype).view(*ids.shape, -1)
