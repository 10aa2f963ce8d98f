"""A forward pass of a native model in plain PyTorch, which the kernels are checked against.

It computes what a layer's modules say, one layer at a time, without a cache, and releases the pages of mapped weights.
A test compares it with transformers' model for every family.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.base import memory
from specdec.models import families
from specdec.models.families import Family
from specdec.models.gguf.blocks import Blocks, expert, named_weights, weight_rows
from specdec.models.native_model import NativeModel
from specdec.runtimes.decoder_layer import has_experts, recurrent, router

Choose = Callable[[int, Tensor], Tensor]


@torch.inference_mode()
def logits_of(model: NativeModel, ids: Tensor, windows: list[Any], choose: Choose | None = None) -> Tensor:
    """The token ids [T] of one text -> logits [T, V].

    windows: the attention window of each layer; None: full attention.
    choose: the experts [T, k] that tokens take, by layer and its router's logits [T, E]; None: those with the largest.
    """
    config, decoder = model.config, model.model
    family, numbers = families.FAMILIES[config.model_type], families.numbers_of(config)
    x = weight_rows(decoder.embed_tokens, ids) * numbers.embeddings
    rotations = families.rotations(config)
    tables = {each: each.tables(decoder.rotary_emb, len(ids), x.dtype) for pair in rotations if pair for each in pair}
    for n, layer in enumerate(decoder.layers):
        places = zip(("in", "attended", "mlp", "out"), family.norms, strict=True)
        norms: dict[str, Any] = {place: getattr(layer, name) if name else nn.Identity() for place, name in places}
        h = norms["in"](x)
        if recurrent(layer):
            h = _delta_rule(layer.linear_attn, h)
        else:
            rotation = None if (pair := rotations[n]) is None else (tables[pair[0]], tables[pair[1]])
            h = _attention(layer.self_attn, h, rotation, windows[n], family, numbers.scores_cap)
        x = x + norms["attended"](h) * numbers.results
        h = norms["mlp"](x)
        if has_experts(layer):
            h = _mixture(layer.mlp, h, config, None if choose is None else partial(choose, n))
        else:
            h = layer.mlp(h)  # type: ignore[operator]
        x = x + norms["out"](h) * numbers.results
        _release(layer)
    logits: Tensor = model.lm_head(decoder.norm(x)) * numbers.logits
    _release(model.lm_head, decoder.embed_tokens)
    return numbers.logits_cap * torch.tanh(logits / numbers.logits_cap) if numbers.logits_cap else logits


def _attention(
    own: Any, x: Tensor, rotation: tuple[Tensor, Tensor] | None, window: int | None, family: Family, cap: float
) -> Tensor:
    """rotation: rotary tables [T, 2, rotated / 2] of queries and of keys. cap: soft cap of scores; 0: there is none."""
    count, size, gate = len(x), own.head_dim, None
    if family.joined:
        rows = own.o_proj.in_features
        others = (own.qkv_proj.out_features - rows) // 2
        q, k, v = own.qkv_proj(x).split((rows, others, others), -1)
    else:
        q, k, v = own.q_proj(x), own.k_proj(x), own.v_proj(x)
    if family.gated:
        q, gate = q.view(count, -1, 2 * size).chunk(2, -1)
    if family.norm_over_heads:
        q, k = own.q_norm(q), own.k_norm(k)
    q, k, v = (each.reshape(count, -1, size) for each in (q, k, v))
    if family.norm_by_head:
        q, k = own.q_norm(q), own.k_norm(k)
    if rotation is not None:
        q, k = _rotated(q, rotation[0]), _rotated(k, rotation[1])
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * own.scaling
    scores = cap * torch.tanh(scores / cap) if cap else scores
    behind = torch.arange(count)[:, None] - torch.arange(count)
    hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if hasattr(own, "sinks"):
        scores = torch.cat((scores, own.sinks.float().view(-1, 1, 1).expand(-1, count, 1)), -1)
    mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :count], v.float()).to(x.dtype)
    mixed = mixed if gate is None else mixed * gate.sigmoid()
    found: Tensor = own.o_proj(mixed.flatten(1))
    return found


def _rotated(x: Tensor, table: Tensor) -> Tensor:
    """``x`` [T, heads, d], of which the first elements rotate in pairs, each with the one half of them further on."""
    cos, sin = table[:, None].unbind(2)  # (T, 1, rotated / 2)
    first, second, rest = x.float().split((cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1).to(x.dtype)


def _mixture(mlp: Any, x: Tensor, config: Any, choose: Callable[[Tensor], Tensor] | None) -> Tensor:
    mixture, numbers, own = families.mixture_of(config), families.numbers_of(config), router(mlp)
    logits = F.linear(x, own.weight, getattr(own, "bias", None)).float()
    largest = logits.softmax(-1).topk(mixture.taken)
    shares = largest.values / largest.values.sum(-1, keepdim=True) if mixture.share else largest.values
    taken = largest.indices if choose is None else choose(logits)
    out = torch.zeros(x.shape)
    for number in taken.unique().tolist():
        rows, places = (taken == number).nonzero(as_tuple=True)
        gate_up, down, *biases = expert(mlp.experts, number)
        *first, last = (
            mlp.experts.unpack(each, None, x.dtype) if isinstance(each, Blocks) else each for each in (*gate_up, down)
        )
        inner = F.linear(x[rows], torch.cat(first), _like(biases[0], x))
        gate, up = inner.chunk(2, -1)
        if numbers.limit:
            gate, up = gate.clamp(max=numbers.limit), up.clamp(-numbers.limit, numbers.limit)
            inner = gate * torch.sigmoid(gate * numbers.alpha) * (up + 1)
        else:
            inner = F.silu(gate) * up
        found = F.linear(inner, last, _like(biases[1], x))
        out.index_add_(0, rows, found.float() * shares[rows, places, None])
        memory.release(*(each.data for each in (*gate_up, down)))
    if hasattr(mlp, "shared_expert"):
        out += mlp.shared_expert_gate(x).sigmoid() * mlp.shared_expert(x)
    return out.to(x.dtype)


def _delta_rule(own: Any, x: Tensor) -> Tensor:
    """A recurrent layer, token by token."""
    count, keys, heads = len(x), own.num_k_heads * own.head_k_dim, (own.num_k_heads, own.num_v_heads)
    if hasattr(own, "in_proj_qkvz"):  # all parts of a key head come before the next head's
        each = heads[1] // heads[0] * own.head_v_dim
        parts = own.in_proj_qkvz(x).view(count, heads[0], -1).split((own.head_k_dim, own.head_k_dim, each, each), -1)
        *mixed, z = (part.flatten(1) for part in parts)
        channels = torch.cat(mixed, -1)
        b, a = (part.flatten(1) for part in own.in_proj_ba(x).view(count, heads[0], -1).chunk(2, -1))
    else:
        channels, z, b, a = (getattr(own, f"in_proj_{part}")(x) for part in ("qkv", "z", "b", "a"))
    taps = own.conv1d.weight
    padded = F.pad(channels.t(), (taps.shape[-1] - 1, 0))[None]
    channels = F.silu(F.conv1d(padded, taps, groups=len(taps)))[0].t().float()
    q, k, v = channels.split((keys, keys, channels.shape[1] - 2 * keys), -1)
    q, k = (each.view(count, heads[0], -1) for each in (q, k))
    q, k = (each * torch.rsqrt(each.square().sum(-1, keepdim=True) + 1e-6) for each in (q, k))
    q, k = (each.repeat_interleave(heads[1] // heads[0], 1) for each in (q * own.head_k_dim**-0.5, k))
    v, strength = v.view(count, heads[1], -1), b.float().sigmoid()
    decay = (-own.A_log.float().exp() * F.softplus(a.float() + own.dt_bias.float())).exp()
    state, mixed = torch.zeros(heads[1], own.head_k_dim, own.head_v_dim), list[Tensor]()
    for t in range(count):
        state = state * decay[t, :, None, None]
        change = (v[t] - torch.einsum("hkv,hk->hv", state, k[t])) * strength[t, :, None]
        state = state + k[t, :, :, None] * change[:, None]
        mixed.append(torch.einsum("hkv,hk->hv", state, q[t]))
    out = torch.stack(mixed)
    normed = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + own.norm.eps)
    gated = own.norm.weight.float() * normed * F.silu(z.float().view(out.shape))
    found: Tensor = own.out_proj(gated.flatten(1).to(x.dtype))
    return found


def _like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def _release(*modules: nn.Module) -> None:
    """Let the pages of weights in mapped files go."""
    for module in modules:
        memory.release(*(each.data for _, each in named_weights(module)))
