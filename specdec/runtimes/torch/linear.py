"""Linear maps as plain callables ``x [..., in] -> [..., out]``: those of models, in two layouts, and of drafters.

A *dense* map is ``F.linear``; only it carries gradients. A *packed* map has its weight in oneDNN's blocked layout:
``F.linear`` on a CPU rearranges a 16-bit weight on every call, which costs more than the product itself. Maps of
drafters have constant weights, and run in the native kernels where these serve.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.models.gguf import blocks
from specdec.models.gguf.blocks import Blocks
from specdec.runtimes.native import linear

Linear = Callable[[Tensor], Tensor]

HINT = 16  # a row count whose blocked layout is fast at all of 1..16 rows
UNIT_EPS = 1e-6  # of ``rms_unit``


def packable(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether ``packed`` supports this dtype on this machine."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return dtype == torch.float32 or (supported is not None and getattr(torch.ops.mkldnn, supported)())


def dense(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Return the function ``x @ weight.T + bias`` with weight [out, in]."""

    def apply(x: Tensor, linear: Callable[..., Tensor] = F.linear) -> Tensor:
        return linear(x, weight, bias)

    return apply


def packed(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Return the same function as ``dense``, which reads a blocked copy of ``weight`` and has no gradients."""
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), HINT)
    product = torch.ops.mkldnn._linear_pointwise.default
    bias = None if bias is None else bias.contiguous()  # oneDNN reads it without its strides

    def apply(x: Tensor) -> Tensor:
        return product(x, blocked, bias, "none", [], "")

    return apply


def side_by_side(modules: Sequence[nn.Module]) -> Linear:
    """Return a function that concatenates the outputs of ``modules`` for one input."""
    if len(modules) == 1:
        return modules[0]
    return lambda x: torch.cat([module(x) for module in modules], -1)


def low_rank(x: Tensor, outs: int, factors: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return the low-rank term up(down(x)), [..., outs], of ``x`` [..., in].

    factors: down [r, in] and up [outs, r]; None: the term is zero.
    """
    if factors is None:
        return x.new_zeros(*x.shape[:-1], outs)
    down, up = factors
    return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


def fuse(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Concatenate linear layers with the same input; return one weight [sum of outs, in], and the bias or None.

    The layers' parameters become views of the result, so that nothing is stored twice.
    """
    weight = _stack([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears]
    return weight, None if biases[0] is None else _stack(biases)


def _stack(parts: Sequence[Tensor]) -> Tensor:
    first, rows = parts[0].detach(), sum(p.shape[0] for p in parts)
    if len(parts) == 1:
        return first
    end, adjacent = first.data_ptr(), True
    for p in parts:
        adjacent = adjacent and p.is_contiguous() and p.data_ptr() == end
        end = p.data_ptr() + p.numel() * p.element_size()
    if adjacent and end <= first.untyped_storage().data_ptr() + first.untyped_storage().nbytes():
        return first.as_strided((rows, *first.shape[1:]), first.stride())  # fused by an earlier runtime
    whole = torch.cat([p.detach() for p in parts])
    for p, view in zip(parts, whole.split([p.shape[0] for p in parts]), strict=True):
        p.data = view
    return whole


def for_drafting(weight: Tensor | Blocks, bias: Tensor | None = None) -> Linear:
    """Return the same function as ``dense`` for a drafter, in the format that is fastest for one row.

    The format may be quantised. The weights must not change. Weights in blocks, which are of models in bfloat16 on a
    CPU, keep their bits if the native kernels run here.
    """
    if isinstance(weight, Blocks):
        if linear.runs() and not weight.inputs % 32:
            return linear.Packed([weight], bias)
        weight = blocks.dequantize(weight, None, torch.bfloat16)
    if linear.serves(weight):
        return linear.Packed([weight], bias, draft_only=True)
    return (packed if packable(weight.dtype, weight.device) else dense)(weight.detach(), bias)


def rms_unit(x: Tensor) -> Tensor:
    """Return ``x`` divided by its root mean square over the last axis, in the shape and dtype of ``x``."""
    return F.rms_norm(x, x.shape[-1:], eps=UNIT_EPS)


class UnitMap:
    """A linear layer of several inputs, each divided by its RMS, then concatenated. Made as ``for_drafting`` does.

    packed: the layer in the compiled kernels' format; None: PyTorch computes it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, packed: linear.Packed | None = None) -> None:
        if packed is None and linear.serves(weight):
            packed = linear.Packed([weight], bias, draft_only=True)
        self.packed, self.linear = packed, None if packed else for_drafting(weight, bias)

    @classmethod
    def making(cls, weight: Tensor, bias: Tensor) -> Generator[None, None, UnitMap]:
        """Pack ``weight`` and ``bias``, and return the layer; yield after every few milliseconds."""
        return cls(weight, bias, (yield from linear.packing(weight, bias)) if linear.serves(weight) else None)

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        if self.linear is None:
            assert self.packed is not None
            return self.packed(parts, eps=UNIT_EPS)
        return self.linear(torch.cat([rms_unit(part) for part in parts], -1))
