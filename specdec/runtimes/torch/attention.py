"""Multi-head attention of a decoder layer, between its linear layers: norms, rotary positions, attention, sinks, gates.

The linear layers before it (query, key and value weights) and after it (output weight) are applied by the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kvcache.mask import Mask
from specdec.models.families import Family

Norm = Callable[[Tensor], Tensor]
Rotary = tuple[Tensor, Tensor]  # cosines, and sines of which the first half is negative, [B, T, 1, rotated]

# Sums over keys run in vectors of 16 on a CPU: with a rounded number of keys, a token's attention is the same bits
# however many tokens are scored with it. Kernels of GPUs take masks of such sizes, too.
MULTIPLE = 16


def norm_of(module: Any, family: Family, weight: Tensor | None = None) -> Norm:
    """Return the RMS norm of a model's norm module as a function of a tensor, which normalizes over the last axis.

    module: the norm module; it has ``weight`` [D], and ``eps`` or ``variance_epsilon``.
    family: the model family, which decides how the norm rounds, and whether the weight is stored as an offset from 1.
    weight: weights [..., D] to use in place of the module's own, such as [H, D] for one norm per head; None: the
        module's own.
    """
    weight = module.weight.detach() if weight is None else weight
    shape, eps = weight.shape[-1:], float(module.eps if hasattr(module, "eps") else module.variance_epsilon)
    if family.around_zero:
        one_more = 1 + weight.float()
        return lambda x: (torch.rms_norm(x.float(), shape, None, eps) * one_more).to(x.dtype)
    if weight.dim() > 1 and family.round_after_weight:
        return lambda x: (torch.rms_norm(x.float(), shape, None, eps) * weight.float()).to(x.dtype)
    if weight.dim() == 1 and (family.round_after_weight or weight.dtype == torch.float32):
        return lambda x: torch.rms_norm(x, shape, weight, eps)
    return lambda x: torch.rms_norm(x, shape, None, eps) * weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` by rotary position embeddings (RoPE), and return the result in the shape and dtype of ``x``.

    x: queries or keys, [B, T, heads, d].
    cos, sin: cosines and sines at the tokens' positions, [B, T, 1, r] with r <= d. The first half of ``sin`` is negated
        already. Elements i and i + r / 2 of a head form a rotated pair; elements from r on stay as they are.
    """
    size = cos.shape[-1]
    part = (x if size == x.shape[-1] else x[..., :size]).to(cos.dtype)  # tables of OLMo 2 are in float32
    made = torch.addcmul(part * cos, part.roll(size // 2, -1), sin).to(x.dtype)
    return made if size == x.shape[-1] else torch.cat((made, x[..., size:]), -1)


def additive(
    mask: Mask, window: int | None, groups: int, dtype: torch.dtype, multiple: int = MULTIPLE, filled: int | None = None
) -> Tensor | None:
    """Return an attention mask as a float tensor to add to attention scores; None: every query sees every key.

    The result is [B, 1, T G, S'] with 0 for visible keys and a large negative number for others. S' is the number S of
    keys, rounded up to ``multiple``. It is cached in ``mask.memo``, because many layers use the same one.

    mask: which of S keys each of T queries of B rows may attend to.
    window: attention window in tokens; None: no limit.
    groups: G, number of query heads that share a key head. Each query is repeated G times in the result.
    dtype: dtype of the result.
    filled: number of uncommitted (drafted) tokens of each row whose keys are stored; later slots are masked. None: all
        are stored.
    """
    key = "additive", window, groups, dtype, multiple, filled
    if key not in mask.memo:
        visible, (batch, t), length = mask.bool_mask(window), mask.query.shape, mask.length
        if filled is not None:
            there = mask.filled(filled)
            visible = there if visible is None else visible & there
        padding, term = -length % multiple, None
        if visible is not None or padding:
            # Finite, so that a query that sees nothing (padding) stays finite.
            hidden = torch.finfo(dtype).min / 2
            term = torch.zeros(batch, 1, t, length + padding, dtype=dtype, device=mask.query.device)
            term[..., length:].fill_(hidden)
            if visible is not None:
                term[..., :length].masked_fill_(~visible, hidden)
            term = term.repeat_interleave(groups, 2) if groups > 1 else term
        mask.memo[key] = term
    return mask.memo[key]


class Attention:
    """Computes the attention of one decoder layer, except for its linear layers.

    The G query heads that share a key head are passed to PyTorch's ``scaled_dot_product_attention`` (SDPA) as G times
    as many queries of one head. In 16 bits this is several times as fast as its option ``enable_gqa``, and never
    slower.

    own: the model's attention module, from which sizes, norms and sinks are read.
    family: the model family, which says what norms and gates the attention has.
    cap: soft cap of attention scores, cap * tanh(score / cap); 0: there is none.
    source: the attention of an earlier layer whose keys and values this layer reads from the KV cache; None: the layer
        makes its own.
    """

    def __init__(self, own: Any, family: Family, cap: float, source: Attention | None = None) -> None:
        self.size, self.scale, self.cap, self.gated = int(own.head_dim), float(own.scaling), cap, family.gated
        self.heads = own.o_proj.in_features // self.size
        if source is None:
            joined = family.joined and (own.qkv_proj.out_features - own.o_proj.in_features) // 2
            self.new_heads = self.kv_heads = (joined or own.k_proj.out_features) // self.size
        else:
            self.new_heads, self.kv_heads = 0, source.kv_heads
        self.groups = self.heads // self.kv_heads
        self.sinks = own.sinks.detach() if hasattr(own, "sinks") else None
        self.norms = [norm_of(each, family) for each in (own.q_norm, own.k_norm)] if family.norm_over_heads else []
        self.norm: Norm | None = None
        self.value_eps = float(own.q_norm.eps) if family.norm_values else None
        if family.norm_by_head:
            pairs = [(own.q_norm, self.heads), *([(own.k_norm, self.kv_heads)] if source is None else ())]
            self.norm = norm_of(own.q_norm, family, torch.cat([m.weight.detach().expand(n, -1) for m, n in pairs]))

    def project(self, x: Tensor, tables: tuple[Rotary, Rotary] | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Split outputs ``x`` [B, T, ...] of the query-key-value layer into heads; apply norms and rotary positions.

        Returns a tuple of four tensors: queries [B, Hkv, T G, d], new keys and new values [B, Hkv, T, d] each, and
        output gates [B, T, H d] before the sigmoid (None: the layer has no gates). Hkv is the number of key heads, G
        the number of query heads that share one, H = Hkv G, and d the size of a head. Query t G + g is of token t. A
        layer that reads another layer's keys and values makes none: [B, 0, T, d].

        tables: (cosines, sines) [B, T, 1, rotated size] at the tokens' positions, once for queries and once for keys;
            None: no rotation.
        """
        (batch, t, _), d, heads, kv_heads, gate = x.shape, self.size, self.heads, self.new_heads, None
        if self.gated or self.norms:
            q, k, _ = x.split((heads * d * (1 + self.gated), kv_heads * d, kv_heads * d), -1)
            if self.gated:
                q, gate = q.view(batch, t, heads, 2 * d).chunk(2, -1)
                gate = gate.flatten(2)
            q, k = (norm(part) for norm, part in zip(self.norms, (q, k), strict=True)) if self.norms else (q, k)
            both = torch.cat((q.reshape(batch, t, heads, d), k.view(batch, t, kv_heads, d)), 2)
        else:
            both = x[..., : (heads + kv_heads) * d].view(batch, t, -1, d)
        both = both if self.norm is None else self.norm(both)
        if tables is None or tables[0] is tables[1]:
            q, k = (both if tables is None else rotated(both, *tables[0])).split((heads, kv_heads), 2)
        else:
            parts = both.split((heads, kv_heads), 2)
            q, k = (rotated(part, *table) for part, table in zip(parts, tables, strict=True))
        q = q.reshape(batch, t, self.kv_heads, self.groups, d).transpose(1, 2).reshape(batch, self.kv_heads, -1, d)
        v = x[..., x.shape[2] - kv_heads * d :].view(batch, t, kv_heads, d)
        v = v if self.value_eps is None else torch.rms_norm(v, (d,), None, self.value_eps)
        return q, k.transpose(1, 2), v.transpose(1, 2), gate

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, term: Tensor | None, gate: Tensor | None) -> Tensor:
        """Attend, and return the input of the layer's output projection, [B, T, H d].

        H is the number of query heads, Hkv that of key heads, G = H / Hkv, and S the number of cached tokens.

        q: queries [B, Hkv, T G, d], as ``project`` returns them.
        k, v: all cached keys and values with the new ones, [B, Hkv, S, d] each.
        term: float mask [B, 1, T G, S] to add to attention scores; None: every query sees every key.
        gate: gates [B, T, H d] before the sigmoid, which multiply the result; None: there are none.
        """
        if self.cap or self.sinks is not None:
            mixed = self._mix(q, k, v, term)
        elif q.requires_grad and q.device.type == "cpu":
            # With gradients, SDPA takes 2.6 to 3 times as long in bfloat16, and as long in float32 (64 queries a row).
            scores = (q * self.scale) @ k.mT
            mixed = (scores if term is None else scores + term).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, term, scale=self.scale)
        mixed = mixed.unflatten(2, (-1, self.groups)).transpose(1, 2).flatten(2)
        return mixed if gate is None else mixed * gate.sigmoid()

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, term: Tensor | None) -> Tensor:
        """Return attention outputs [B, Hkv, T G, d] with a soft cap and sinks, which PyTorch's fused attention lacks.

        A sink is a learned score that takes part in the softmax and belongs to no value. Hkv is the number of key
        heads, and G the number of query heads that share one.

        q, k, v: queries [B, Hkv, T G, d], keys and values [B, Hkv, S, d].
        term: float mask [B, 1, T G, S] to add to scores; None: no mask.
        """
        scores = (q @ k.mT).float() * self.scale
        scores = self.cap * torch.tanh(scores / self.cap) if self.cap else scores
        scores = scores if term is None else scores + term
        count = scores.shape[-1]
        if self.sinks is not None:
            sinks = self.sinks.float().view(self.kv_heads, 1, self.groups).expand(-1, q.shape[2] // self.groups, -1)
            scores = torch.cat((scores, sinks.reshape(1, self.kv_heads, -1, 1).expand(len(q), -1, -1, -1)), -1)
        return scores.softmax(-1)[..., :count].to(v.dtype) @ v
