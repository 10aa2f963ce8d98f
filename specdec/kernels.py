"""Linear maps as plain callables, in the storage that is fastest for the device, dtype and row count.

``rows [R, in] -> [R, out]``. A *dense* map is ``F.linear``; it alone carries gradients. A *packed* map holds its weight
in oneDNN's blocked layout: ``F.linear`` on a CPU rearranges a 16-bit weight on every call, which costs more than
the product itself. Knows nothing about layers or models.

Measured on two Sapphire Rapids cores (AMX bf16), all 30 layers of the default model, ms:

    rows                1     2     3     4     5     8    16    32
    bf16 dense       16.4  16.6  16.4  17.0  16.4  16.6  16.7  17.6
    bf16 packed      10.6  10.9  10.9  11.0  10.8  10.7  11.0  12.8
    fp16 dense       21.8  23.3  23.8  23.5  24.6  26.9  31.1  39.2
    fp16 packed      16.9  17.4  17.8  17.8  18.7  20.7  24.9  35.0
    fp32 dense       17.2  17.1  18.3  29.0  30.1  34.7  39.7  47.3
    fp32 packed      20.3  21.0  20.9  20.9  21.8  24.4  30.1  40.1

Padding rows, transposed dense weights and 2-D against 3-D inputs made no difference above 3 %.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Linear = Callable[[Tensor], Tensor]

LAYER_HINT, HEAD_HINT = 16, 1  # row counts whose blocked layout was fastest at all of 1..16 rows
_NEVER = 1 << 30


def packed_from(dtype: torch.dtype, device: torch.device) -> int:
    """The row count from which packed maps are faster than dense ones (see the table above)."""
    ops = torch.ops.mkldnn
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return _NEVER
    if dtype == torch.float32:
        return 4
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return 1 if supported and getattr(ops, supported)() else _NEVER


def dense(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """``x @ weight.T + bias`` with weight [out, in]."""

    def apply(x: Tensor, linear: Callable[..., Tensor] = F.linear) -> Tensor:
        return linear(x, weight, bias)

    return apply


def packed(weight: Tensor, bias: Tensor | None = None, hint: int = LAYER_HINT) -> Linear:
    """As ``dense``, from a blocked copy of ``weight``. No gradients. ``hint``: the row count to lay it out for."""
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), hint)
    product = torch.ops.mkldnn._linear_pointwise.default

    def apply(x: Tensor) -> Tensor:
        return product(x, blocked, bias, "none", [], "")

    return apply


def gated(gate_up: Linear, act: Callable[[Tensor], Tensor]) -> Linear:
    """``act(gate) * up``, both from one map."""

    def apply(x: Tensor) -> Tensor:
        gate, up = gate_up(x).chunk(2, -1)
        return act(gate) * up

    return apply


def packed_silu_gated(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """``silu(gate) * up`` with the activation and the product inside packed maps (two calls instead of six)."""
    gate, up = (torch.ops.mkldnn._reorder_linear_weight(w.contiguous(), LAYER_HINT) for w in weight.detach().chunk(2))
    gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
    unary, binary = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise.binary

    def apply(x: Tensor) -> Tensor:
        return binary(x, unary(x, gate, gate_bias, "swish", [], ""), up, up_bias, "mul")

    return apply


def fuse(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """One weight [sum of outs, in] (and bias) for linear maps of one input.

    Their parameters become views of it, so the model keeps its values and nothing is held twice.
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

    parts: ``(down [r, in], up [out, r], first output row)`` of each adapter. outs: output width of the map.
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

    def beside(self, linear: Linear, batch: int, adapted: int | None) -> Linear:
        """``linear`` over rows [B * T, in], with the terms added on the last ``adapted`` tokens (None: all)."""
        down, up = self.down, self.up

        def whole(x: Tensor) -> Tensor:
            return torch.addmm(linear(x), x @ down, up)

        def trailing(x: Tensor) -> Tensor:
            assert adapted is not None
            y = linear(x).view(batch, -1, up.shape[1])  # (B, T, out)
            delta = (x.view(batch, -1, x.shape[1])[:, -adapted:] @ down) @ up  # (B, adapted, out)
            return torch.cat((y[:, :-adapted], y[:, -adapted:] + delta), 1).view(-1, y.shape[2])

        return whole if adapted is None else trailing
