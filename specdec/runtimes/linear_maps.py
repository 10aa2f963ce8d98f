"""Linear maps as plain callables ``x [..., in] -> [..., out]``, in two layouts.

A *dense* map is ``F.linear``; only it carries gradients. A *packed* map has its weight in oneDNN's blocked layout:
``F.linear`` on a CPU rearranges a 16-bit weight on every call, which costs more than the product itself. Packed maps
are used where oneDNN supports the dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Linear = Callable[[Tensor], Tensor]

HINT = 16  # a row count whose blocked layout is fast at all of 1..16 rows
UNIT_EPS = 1e-6  # of ``rms_unit``


def packable(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are packed maps for this dtype on this machine."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return dtype == torch.float32 or (supported is not None and getattr(torch.ops.mkldnn, supported)())


def dense(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """``x @ weight.T + bias`` with weight [out, in]."""

    def apply(x: Tensor, linear: Callable[..., Tensor] = F.linear) -> Tensor:
        return linear(x, weight, bias)

    return apply


def packed(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """As ``dense``, from a blocked copy of ``weight``, without gradients."""
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), HINT)
    product = torch.ops.mkldnn._linear_pointwise.default
    bias = None if bias is None else bias.contiguous()  # oneDNN reads it without its strides

    def apply(x: Tensor) -> Tensor:
        return product(x, blocked, bias, "none", [], "")

    return apply


def rms_unit(x: Tensor) -> Tensor:
    """x / rms(x) over the last axis, in x's dtype."""
    return F.rms_norm(x, x.shape[-1:], eps=UNIT_EPS)


def fuse(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """One weight [sum of outs, in] (and bias) for linear maps of one input.

    Their parameters become views of it: the model keeps its values, and nothing is stored twice.
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
