"""The gated delta rule of recurrent (Gated DeltaNet) layers: a short convolution, and a matrix state per head."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kvcache.recurrent import States

CHUNK = 64  # tokens that change a state at once
CONVOLUTION, STATE = ("conv", 0), ("recurrent", 0)


class DeltaRule:
    """Runs the gated delta rule of one recurrent layer, without the linear layers before and after it.

    H is the number of value heads, dk the size of a key head, and dv that of a value head.

    own: the model's module of the layer, from which sizes, convolution filters and decay rates are read.
    kinds: shape (without the batch axis) and dtype of each state of a row (sequence), by the keys ("conv", 0) for the
        last inputs of the convolution and ("recurrent", 0) for the matrix states [H, dk, dv].
    """

    def __init__(self, own: Any) -> None:
        self.key_heads, self.heads, self.dim, self.value_dim = (
            int(size) for size in (own.num_k_heads, own.num_v_heads, own.head_k_dim, own.head_v_dim)
        )
        self.by_head = hasattr(own, "in_proj_qkvz")  # all parts of a key head come before the next head's
        self.filters, self.bias = own.conv1d.weight.detach(), own.conv1d.bias
        self.rate, self.rate_bias = -own.A_log.detach().float().exp(), own.dt_bias.detach().float()
        self.norm, self.eps = own.norm.weight.detach().float(), float(own.norm.variance_epsilon)
        channels, _, taps = self.filters.shape
        convolution, state = (channels, taps - 1), (self.heads, self.dim, self.value_dim)
        self.kinds = {CONVOLUTION: (convolution, self.filters.dtype), STATE: (state, torch.float32)}

    def __call__(
        self, x: Tensor, states: States, paths: Tensor | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, States]:
        """Run T tokens; return the input of the layer's output projection, [B, T, H dv], and the new states.

        H is the number of value heads, and dv their size.

        x: outputs of the layer's input projections, concatenated, [B, T, ...].
        states: the layer's states before the tokens, by the keys of ``kinds``, each [B, ...]; a missing one counts as
            zeros. The new states have the same keys.
        paths: paths[b, i, j]: whether token j is an ancestor of token i in a draft tree, or token i itself; bool [B, T,
            T], parents before children. None: a chain, in which all earlier tokens are ancestors.
        kept: the tokens that the new states include, which form one path, bool [B, T]; None: all. ``paths`` and
            ``kept`` are given together.
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
        if paths is None or kept is None:
            mixed, after = F.conv1d(seen, self.filters, self.bias, groups=len(self.filters)), seen[..., t:]
        else:
            windows = _windows(seen, torch.cat((paths, kept[:, None]), 1), taps)  # (B, channels, T + 1, taps)
            mixed, after = (windows[:, :, :t].float() * self.filters.float()).sum(-1), windows[:, :, t, 1:]
            mixed = (mixed if self.bias is None else mixed + self.bias[:, None].float()).to(x.dtype)
        mixed = F.silu(mixed).mT.float()
        q, k, v = (part.unflatten(-1, (n, -1)) for part, n in _parts(mixed, keys, values, self.key_heads, heads))
        q, k = (part * torch.rsqrt(part.square().sum(-1, keepdim=True) + 1e-6) for part in (q, k))
        q, k = (part.repeat_interleave(repeats, 2) for part in (q * self.dim**-0.5, k))
        decay = self.rate * F.softplus(a.float() + self.rate_bias)  # logarithms
        out, state = _run(q, k, v, decay, b.float().sigmoid(), states.get(STATE), paths, kept)
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + self.eps) * self.norm
        out = (out.flatten(2) * F.silu(z.float())).to(x.dtype)
        return out, {CONVOLUTION: after, STATE: state}


def _windows(seen: Tensor, paths: Tensor, taps: int) -> Tensor:
    """Return the last ``taps`` convolution inputs on each of P paths through a draft tree, [B, channels, P, taps].

    seen: inputs of the taps - 1 tokens before the tree, then of its T tokens, [B, channels, taps - 1 + T].
    paths: which of the T tokens each path has, bool [B, P, T], parents before children.
    taps: number of inputs that the convolution's filter covers.
    """
    place = paths.cumsum(-1) * paths + taps - 2  # (B, P, T), of each token in its path, after the inputs before
    wanted = paths.sum(-1)[..., None] + torch.arange(-1, taps - 1, device=seen.device)  # (B, P, taps)
    found = ((place[:, :, None] == wanted[..., None]) & paths[:, :, None]).int().argmax(-1) + taps - 1
    index = torch.where(wanted < taps - 1, wanted.clamp(min=0), found)
    return seen.gather(2, index.flatten(1)[:, None].expand(-1, seen.shape[1], -1)).unflatten(2, index.shape[1:])


def _parts(x: Tensor, keys: int, values: int, key_heads: int, heads: int) -> list[tuple[Tensor, int]]:
    """Split ``x`` [..., 2 keys + values]; return queries, keys and values, each as a pair (tensor, number of heads).

    keys: total size of all key heads, which is also that of the queries. values: total size of all value heads.
    key_heads: number of heads of queries and keys. heads: number of heads of values.
    """
    return list(zip(x.split((keys, keys, values), -1), (key_heads, key_heads, heads), strict=True))


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    strength: Tensor,
    state: Tensor | None,
    paths: Tensor | None,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the gated delta rule; return the outputs [B, T, H, dv] and the state after the tokens, [B, H, dk, dv].

    Tokens run in chunks. Within a chunk, the change of the state by a token depends on the changes by earlier tokens,
    so the changes of all tokens solve one triangular system. H is the number of value heads (keys are repeated for
    them), dk the size of a key head, and dv that of a value head.

    q, k: queries and keys, [B, T, H, dk].
    v: values, [B, T, H, dv].
    decay: logarithm of the factor by which each token shrinks the state, [B, T, H].
    strength: factor from 0 to 1 with which each token writes into the state, [B, T, H].
    state: the state before the tokens, [B, H, dk, dv]; None: zeros.
    paths: whether token j is token i or an ancestor of it in a draft tree, bool [B, T, T]; None: a chain. With
        ``paths``, all tokens are one chunk.
    kept: the tokens that the returned state includes, bool [B, T]; None: all.
    """
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    decay, strength = decay.mT, strength.mT[..., None]
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]) if state is None else state
    made = list[Tensor]()
    size = CHUNK if paths is None else q.shape[2]
    for q_, k_, v_, decay_, strength_ in zip(*(x.split(size, 2) for x in (q, k, v, decay, strength)), strict=True):
        every = torch.ones(decay_.shape[-1], decay_.shape[-1], dtype=torch.bool, device=q.device).tril()
        path = every if paths is None else paths[:, None]
        total = (path.float() @ decay_[..., None])[..., 0]  # (B, H, C), on the path to each token
        between = (total[..., :, None] - total[..., None, :]).masked_fill(~path, -math.inf).exp()
        grown, scaled = total.exp()[..., None], k_ * strength_
        added = v_ * strength_ - (scaled * grown) @ state
        if total.shape[-1] > 1:
            added = torch.linalg.solve_triangular(scaled @ k_.mT * between, added, upper=False, unitriangular=True)
        made.append((q_ * grown) @ state + (q_ @ k_.mT * between) @ added)
        own = every[-1] if kept is None else kept[:, None]
        last = (decay_ * own).sum(-1, keepdim=True)
        after = (last - total).masked_fill(~own, -math.inf).exp()[..., None]
        state = state * last.exp()[..., None] + (k_ * after).mT @ added
    return torch.cat(made, 2).transpose(1, 2), state
