"""Linear maps as plain callables ``rows [R, in] -> [R, out]``, in two layouts.

A *dense* map is ``F.linear``; it alone carries gradients. A *packed* map has its weight in oneDNN's blocked layout:
``F.linear`` on a CPU rearranges a 16-bit weight on every call, which costs more than the product itself. Packed maps
are used where oneDNN supports the dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Linear = Callable[[Tensor], Tensor]

LAYER_HINT, HEAD_HINT = 16, 1  # row counts whose blocked layout is fastest at all of 1..16 rows
TRAINED_HINT = 1024  # rows of a training batch
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


def packed(weight: Tensor, bias: Tensor | None = None, hint: int = LAYER_HINT) -> Linear:
    """As ``dense``, from a blocked copy of ``weight``, without gradients. hint: the row count of the layout."""
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), hint)
    product = torch.ops.mkldnn._linear_pointwise.default
    bias = None if bias is None else bias.contiguous()  # oneDNN reads it without its strides

    def apply(x: Tensor) -> Tensor:
        return product(x, blocked, bias, "none", [], "")

    return apply


class _Through(torch.autograd.Function):
    """``x @ weight.T + bias`` by packed products, in both directions: the gradient reaches ``x`` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Linear, back: Linear) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, None, None]:
        return ctx.back(gradient[0]), None, None


def through(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """As ``dense`` with gradients to ``x``, for a constant weight: packed once for both directions."""
    there, back = packed(weight, bias, TRAINED_HINT), packed(weight.detach().t(), None, TRAINED_HINT)

    def apply(x: Tensor) -> Tensor:
        return _Through.apply(x, there, back)  # type: ignore[no-any-return]

    return apply


class Gated:
    """``act(gate) * up``, both from one map."""

    def __init__(self, gate_up: Linear, act: Callable[[Tensor], Tensor]) -> None:
        self.gate_up, self.act = gate_up, act

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.act(gate) * up


def packed_silu_gated(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """``silu(gate) * up`` with the activation and the product inside packed maps: two calls instead of six."""
    gate, up = (torch.ops.mkldnn._reorder_linear_weight(w.contiguous(), LAYER_HINT) for w in weight.detach().chunk(2))
    gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
    unary, binary = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise.binary

    def apply(x: Tensor) -> Tensor:
        return binary(x, unary(x, gate, gate_bias, "swish", [], ""), up, up_bias, "mul")

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


class LowRank:
    """The low-rank terms beside one (fused) linear map: ``y += up(down(x))``, in ``x``'s dtype.

    parts: ``(down [r, in], up [out, r], first output row)`` of each adapter.
    outs: output width of the map.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor, int]], outs: int, dtype: torch.dtype) -> None:
        rank, before = sum(down.shape[0] for down, _, _ in parts), 0
        ups = []
        for down, up, start in parts:
            r = down.shape[0]
            ups.append(F.pad(up, (before, rank - before - r, start, outs - start - up.shape[0])))
            before += r
        self.down = torch.cat([down for down, _, _ in parts]).to(dtype).t()  # (in, R)
        self.up = torch.stack(ups).sum(0).to(dtype).t()  # (R, out)

    def merged(self, weight: Tensor) -> Tensor:
        """``weight`` [out, in] with the terms added, rounded once."""
        return (weight.float() + self.up.t().float() @ self.down.t().float()).to(weight.dtype)

    def add_to(self, linear: Linear, batch: int, adapted: int | None) -> Linear:
        """``linear`` over rows [B * T, in], with the terms added on the last ``adapted`` tokens (None: all)."""
        down, up = self.down, self.up

        def all_tokens(x: Tensor) -> Tensor:
            return torch.addmm(linear(x), x @ down, up)

        def trailing(x: Tensor) -> Tensor:
            assert adapted is not None
            y = linear(x).view(batch, -1, up.shape[1])  # (B, T, out)
            delta = (x.view(batch, -1, x.shape[1])[:, -adapted:] @ down) @ up  # (B, adapted, out)
            return torch.cat((y[:, :-adapted], y[:, -adapted:] + delta), 1).view(-1, y.shape[2])

        return all_tokens if adapted is None else trailing
