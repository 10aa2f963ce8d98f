"""Linear layers as functions from ``x`` [..., in] to [..., out]: those of models, in two layouts, and of drafters.

A *dense* layer is ``F.linear``; only it carries gradients. A *packed* layer has its weight in oneDNN's blocked layout:
``F.linear`` on a CPU rearranges a 16-bit weight on every call, which costs more than the product itself. Layers of
drafters have constant weights, and run in the project's native CPU kernels where these support the machine.
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
    """Return whether oneDNN's blocked weight layout (``packed``) works for ``dtype`` on ``device`` on this machine."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return dtype == torch.float32 or (supported is not None and getattr(torch.ops.mkldnn, supported)())


def dense(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Return the linear layer ``x @ weight.T + bias`` as a function of ``x`` [..., in], with gradients.

    weight: [out, in]. bias: [out]; None: no bias.
    """

    def apply(x: Tensor, linear: Callable[..., Tensor] = F.linear) -> Tensor:
        return linear(x, weight, bias)

    return apply


def packed(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Return the linear layer ``x @ weight.T + bias`` as a function that reads a copy of ``weight`` in oneDNN's layout.

    It is faster than ``F.linear`` on a CPU, and has no gradients. Later changes of ``weight`` have no effect.

    weight: [out, in]. bias: [out]; None: no bias.
    """
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), HINT)
    product = torch.ops.mkldnn._linear_pointwise.default
    bias = None if bias is None else bias.contiguous()  # oneDNN reads it without its strides

    def apply(x: Tensor) -> Tensor:
        return product(x, blocked, bias, "none", [], "")

    return apply


def side_by_side(modules: Sequence[nn.Module]) -> Linear:
    """Return a function of ``x`` that concatenates the outputs of ``modules`` for ``x`` along the last axis."""
    if len(modules) == 1:
        return modules[0]
    return lambda x: torch.cat([module(x) for module in modules], -1)


def low_rank(x: Tensor, outs: int, factors: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return the low-rank (LoRA) term up(down(x)), [..., outs], of ``x`` [..., in].

    outs: number of outputs. factors: weights of down [r, in] and up [outs, r]; None: returns zeros.
    """
    if factors is None:
        return x.new_zeros(*x.shape[:-1], outs)
    down, up = factors
    return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


def fuse(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Concatenate linear layers with the same input to one; return its weight [sum of outs, in], and its bias or None.

    The layers' own parameters become views of the results, so that nothing is stored twice. Layers that were fused
    before are not copied again.
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
    """Return the linear layer ``x @ weight.T + bias`` as a function in the format that is fastest for one input row.

    For drafters only: the result may be quantised, and has no gradients. The weights must not change later.

    weight: [out, in], or quantised blocks of a GGUF file, whose values are kept exactly if the native kernels run on
        this machine, and else are converted to bfloat16.
    bias: [out]; None: no bias.
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
    """A linear layer over several inputs: each input is divided by its root mean square, then all are concatenated.

    For drafters: the weight may be quantised, and there are no gradients. Calling it takes a list of inputs [..., D_i]
    and returns [..., out].

    weight: [out, sum of D_i]. bias: [out]; None: no bias.
    packed: the layer in the native kernels' format; as an attribute, None means that PyTorch computes the layer. As an
        argument, None means that it is made from ``weight`` if the native kernels support it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, packed: linear.Packed | None = None) -> None:
        if packed is None and linear.serves(weight):
            packed = linear.Packed([weight], bias, draft_only=True)
        self.packed, self.linear = packed, None if packed else for_drafting(weight, bias)

    @classmethod
    def making(cls, weight: Tensor, bias: Tensor) -> Generator[None, None, UnitMap]:
        """Make the layer of ``weight`` and ``bias`` in short steps: a generator whose return value is the layer.

        It yields after every 20 ms or so of work, so that other work can run in between. Without native kernels for the
        weight, it does not yield.
        """
        return cls(weight, bias, (yield from linear.packing(weight, bias)) if linear.serves(weight) else None)

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        if self.linear is None:
            assert self.packed is not None
            return self.packed(parts, eps=UNIT_EPS)
        return self.linear(torch.cat([rms_unit(part) for part in parts], -1))
