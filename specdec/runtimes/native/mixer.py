"""What the kernels need of recurrent layers (gated delta rule): sizes of states, parameters, orders of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.base.errors import SpecDecError
from specdec.kvcache.recurrent import StateShape
from specdec.models.families import Mixer
from specdec.models.gguf.blocks import Blocks
from specdec.runtimes import decoder_layer

MOST_TAPS = 8  # as in delta_rule.c
RATES = "_b", "_a", "_ba"  # ends of the names of the linear layers that compute write strengths and decay rates


def state_shape(mixer: Mixer) -> StateShape | None:
    """Return the sizes of the recurrent states of one sequence; None: the model has no recurrent layers.

    mixer: sizes of the model's recurrent layers.
    Raises SpecDecError for sizes that the kernels do not support.
    """
    if not mixer.layers:
        return None
    bad = mixer.key_dim % 16 or mixer.value_dim % 16 or mixer.value_heads % mixer.key_heads
    if bad or mixer.taps > MOST_TAPS:
        raise SpecDecError(
            "the native runtime takes recurrent heads of 16, 32, ... numbers, equally many for each key head, and "
            f"convolutions over up to {MOST_TAPS} tokens; this model has {mixer}"
        )
    matrices = 4 * mixer.value_heads * mixer.value_dim * mixer.key_dim
    tail = -(-2 * (mixer.taps - 1) * mixer.channels // 64) * 64
    return StateShape(mixer.layers, matrices + tail, mixer.channels + 2 * (-(-mixer.value_heads // 16) * 16))


def slots(layer: Any) -> dict[str, list[tuple[str, nn.Linear]]]:
    """Return the linear layers of a decoder layer that the kernels run, ``{slot: [(module path, module), ...]}``.

    A slot is a field of the kernels' layer structure: linear layers with the same input, run as one. The slots are
    "qkv" and "out" of attention or of the recurrent mixer, and "gate_up" and "down" of the MLP or of the expert that
    all tokens share. A recurrent layer also has "rates", the write strengths and decay rates. Other experts are not
    included.

    layer: the module of the decoder layer.
    """
    found = decoder_layer.modules(layer)
    if hasattr(layer.mlp, "shared_expert"):
        paths = {"gate_up": ["gate_proj", "up_proj"], "down": ["down_proj"]}
        shared = lambda name: (f"mlp.shared_expert.{name}", getattr(layer.mlp.shared_expert, name))  # noqa: E731
        found |= {slot: [shared(name) for name in names] for slot, names in paths.items()}
    if decoder_layer.recurrent(layer):
        rates = [pair for pair in found["qkv"] if pair[0].endswith(RATES)]
        found |= {"qkv": [pair for pair in found["qkv"] if pair not in rates], "rates": rates}
    return found


def row_orders(layer: Any) -> dict[str, Tensor]:
    """Return the order in which the kernels take the weight rows of some linear layers, by module path.

    layer: the module of the decoder layer. Only input projections of recurrent mixers have another order than their
        own.

    Returns ``{module path: int64 [packed rows]}``: for each packed row, the index of the weight's row, or -1 for zeros
    (padding). Linear layers whose order does not change are missing.
    """
    if not decoder_layer.recurrent(layer):
        return {}
    tile: Callable[[Tensor], Tensor] = lambda rows: F.pad(rows.flatten(), (0, -rows.numel() % 16), value=-1)  # noqa: E731
    own, name = layer.linear_attn, "linear_attn.in_proj"
    if not hasattr(own, "in_proj_qkvz"):
        return {f"{name}{part}": tile(torch.arange(own.num_v_heads)) for part in RATES[:2]}
    each = own.num_v_heads // own.num_k_heads  # Qwen3-Next: all parts of a key head come before the next head's
    sizes = own.head_k_dim, own.head_k_dim, each * own.head_v_dim, each * own.head_v_dim
    first, last = (torch.arange(own.num_k_heads * size).view(-1, size) for size in (sum(sizes), 2 * each))
    qkvz, rates = first.split(sizes, 1), last.split(each, 1)
    return {f"{name}_qkvz": torch.cat([part.flatten() for part in qkvz]), f"{name}_ba": torch.cat([*map(tile, rates)])}


def ordered(matrix: Any, rows: Tensor | None) -> Any:
    """Return a matrix with only the given rows, in the given order.

    matrix: a tensor [out, in], or a matrix in GGUF blocks.
    rows: row indices, int [n]; -1: a row of zeros (tensors only). None: the matrix itself is returned.
    """
    if rows is None:
        return matrix
    if isinstance(matrix, Blocks):
        return replace(matrix, rows=(rows if matrix.rows is None else matrix.rows[rows]).int())
    return F.pad(matrix, (0, 0, 0, 1))[rows]


def columns(matrix: Any) -> Any:
    """Return the order in which a matrix's columns are packed for the compiled kernels, as an index.

    matrix: a tensor, or a matrix in GGUF blocks, which may store its columns in another order.
    Returns int64 [in], or a slice of all columns if they are in order.
    """
    return slice(None) if not isinstance(matrix, Blocks) or matrix.columns is None else matrix.columns


def parameters(mixer: Any, eps: float) -> dict[str, Tensor]:
    """Return a recurrent mixer's parameters that are no linear layers, float32, by field name of ``library.Layer``.

    "convolution": the filters, [taps, channels]. "decay": -exp(A_log), and "decay_bias": dt_bias, [value heads] each.
    "norm_mixed": weight of the norm of each head's result, [value_dim].

    mixer: the module of the recurrent mixer.
    eps: epsilon of the model's norms.
    Raises SpecDecError for a convolution with a bias, or a norm with another epsilon.
    """
    if mixer.conv1d.bias is not None or mixer.norm.variance_epsilon != eps:
        raise SpecDecError(
            "the native runtime takes no recurrent layers whose convolutions have a bias or whose norms have another "
            "epsilon than the model's"
        )
    found = {
        "convolution": mixer.conv1d.weight[:, 0].t(),
        "decay": -mixer.A_log.float().exp(),
        "decay_bias": mixer.dt_bias,
        "norm_mixed": mixer.norm.weight,
    }
    return {name: tensor.detach().float().contiguous() for name, tensor in found.items()}
