"""The gated delta rule, the mixer of recurrent layers: a convolution over time, and a state for each head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kvcache.recurrent import States

CHUNK = 64  # tokens that change a state at once
CONVOLUTION, STATE = ("conv", 0), ("recurrent", 0)


class DeltaRule:
    """The gated delta rule of a recurrent layer, between its first linear layers and its last. own: the module."""

    def __init__(self, own: Any) -> None:
        self.key_heads, self.heads, self.dim, self.value_dim = (
            int(size) for size in (own.num_k_heads, own.num_v_heads, own.head_k_dim, own.head_v_dim)
        )
        self.by_head = hasattr(own, "in_proj_qkvz")  # all parts of a key head come before the next head's
        self.filters, self.bias = own.conv1d.weight.detach(), own.conv1d.bias
        self.rate, self.rate_bias = -own.A_log.detach().float().exp(), own.dt_bias.detach().float()
        self.norm, self.eps = own.norm.weight.detach().float(), float(own.norm.variance_epsilon)

    def __call__(self, x: Tensor, states: States) -> tuple[Tensor, States]:
        """Run T tokens; return the input of the last linear layer, [B, T, ...], and the states after the tokens.

        x: outputs of the first linear layers, [B, T, ...]. states: the layer's states before the tokens, by key.
        """
        (batch, t, _), heads, repeats = x.shape, self.heads, self.heads // self.key_heads
        keys, values, taps = self.key_heads * self.dim, heads * self.value_dim, self.filters.shape[-1]
        if self.by_head:
            sizes = self.dim, self.dim, repeats * self.value_dim, repeats * self.value_dim
            qkvz, ba = x.split((2 * keys + 2 * values, 2 * heads), -1)
            *parts, z = (part.flatten(2) for part in qkvz.view(batch, t, self.key_heads, -1).split(sizes, -1))
            b, a = (part.flatten(2) for part in ba.view(batch, t, self.key_heads, -1).chunk(2, -1))
            channels = torch.cat(parts, -1)
        else:
            channels, z, b, a = x.split((2 * keys + values, values, heads, heads), -1)
        before = states.get(CONVOLUTION)
        before = x.new_zeros(batch, channels.shape[-1], taps - 1) if before is None else before
        seen = torch.cat((before, channels.mT), -1)  # (B, channels, taps - 1 + T)
        mixed = F.silu(F.conv1d(seen, self.filters, self.bias, groups=len(self.filters))).mT.float()
        q, k, v = (part.unflatten(-1, (n, -1)) for part, n in _parts(mixed, keys, values, self.key_heads, heads))
        q, k = (part * torch.rsqrt(part.square().sum(-1, keepdim=True) + 1e-6) for part in (q, k))
        q, k = (part.repeat_interleave(repeats, 2) for part in (q * self.dim**-0.5, k))
        decay = self.rate * F.softplus(a.float() + self.rate_bias)  # logarithms
        out, state = _run(q, k, v, decay, b.float().sigmoid(), states.get(STATE))
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + self.eps) * self.norm
        out = (out.flatten(2) * F.silu(z.float())).to(x.dtype)
        return out, {CONVOLUTION: seen[..., t:], STATE: state}


def _parts(x: Tensor, keys: int, values: int, key_heads: int, heads: int) -> list[tuple[Tensor, int]]:
    """Split ``x`` [..., 2 keys + values] into queries, keys and values, each with its number of heads."""
    return list(zip(x.split((keys, keys, values), -1), (key_heads, key_heads, heads), strict=True))


def _run(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, strength: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the gated delta rule in chunks; return the outputs [B, T, H, dv] and the state after the tokens.

    In a chunk, what each token adds to the state depends on what earlier ones have added: a triangular system.

    q, k: queries and keys, [B, T, H, dk].
    v: values, [B, T, H, dv].
    decay, strength: logarithms of decay rates, and write strengths, [B, T, H].
    state: the state before the tokens, [B, H, dk, dv]; None: zeros.
    """
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    decay, strength = decay.mT, strength.mT[..., None]
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]) if state is None else state
    made = list[Tensor]()
    for q_, k_, v_, decay_, strength_ in zip(*(x.split(CHUNK, 2) for x in (q, k, v, decay, strength)), strict=True):
        total = decay_.cumsum(-1)  # (B, H, C)
        between = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
        grown, scaled = total.exp()[..., None], k_ * strength_
        added = v_ * strength_ - (scaled * grown) @ state
        if total.shape[-1] > 1:
            added = torch.linalg.solve_triangular(scaled @ k_.mT * between, added, upper=False, unitriangular=True)
        made.append((q_ * grown) @ state + (q_ @ k_.mT * between) @ added)
        last = total[..., -1:]
        state = state * last.exp()[..., None] + (k_ * (last - total).exp()[..., None]).mT @ added
    return torch.cat(made, 2).transpose(1, 2), state
