"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464) of a recurrent layer, without its linear maps.

A state of keys by values decays, and each token corrects the state's value for its key. One token is one update. A
block runs in chunks: within a chunk, the corrections solve a triangular system, so the state is read and written once.
A chunk is as long as the block, up to ``CHUNK``: nothing is padded. Computes what transformers does, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kvcache.recurrent import Adapted, States

CHUNK = 64
CONV, MATRIX = ("conv", 0), ("recurrent", 0)  # the states: last inputs of the convolution, keys by values
UNIT_EPS = 1e-6  # of the norm of queries and keys


class DeltaRule:
    """A layer's mixer between its input and output projections.

    sizes: of the parts of the input projection's result: the convolution's inputs (queries, keys and values), the gate
        of the result, and each head's strength of writing and rate of decay.
    by_heads: whether these parts lie head by head (Qwen3-Next): all parts of a key head before the next head's.
    """

    def __init__(self, mixer: Any) -> None:
        self.k_heads, self.v_heads = int(mixer.num_k_heads), int(mixer.num_v_heads)
        self.k_dim, self.v_dim = int(mixer.head_k_dim), int(mixer.head_v_dim)
        keys, self.values = self.k_heads * self.k_dim, self.v_heads * self.v_dim
        self.sizes = 2 * keys + self.values, self.values, self.v_heads, self.v_heads
        self.inner = 2 * keys, self.values
        self.by_heads = hasattr(mixer, "in_proj_qkvz")
        self.taps = mixer.conv1d.weight.detach()[:, 0].t().contiguous()  # (K, C)
        self.bias = mixer.dt_bias.detach()
        self.rate = -mixer.A_log.detach().float().exp()  # (Hv,)
        self.norm, self.eps = mixer.norm.weight.detach(), float(mixer.norm.variance_epsilon)

    def __call__(self, y: Tensor, states: States, adapted: Adapted) -> tuple[Tensor, States]:
        """The input projection's result [B, T, sum of ``sizes``] and the states before the tokens ({}: none)
        -> the input of the output projection [B, T, Hv dv], and the states after the tokens."""
        (batch, t, _), taps, more = y.shape, self.taps, len(self.taps) - 1
        mixed, gate, write, forget = self._parts(y)
        old = states[CONV] if states else mixed.new_zeros(batch, more, mixed.shape[2])
        window = torch.cat((old, mixed), 1)  # (B, K - 1 + T, C)
        x = window[:, :t] * taps[0]
        for tap in range(1, more + 1):
            x = torch.addcmul(x, window[:, tap : tap + t], taps[tap])
        qk, v = F.silu(x).float().split(self.inner, 2)
        qk = qk.view(batch, t, 2, self.k_heads, self.k_dim)
        qk = qk * torch.rsqrt(qk.square().sum(-1, keepdim=True) + UNIT_EPS)
        if self.k_heads != self.v_heads:
            qk = qk.repeat_interleave(self.v_heads // self.k_heads, 3)
        q, k = qk.permute(2, 0, 3, 1, 4)  # (B, Hv, T, dk) each
        v = v.view(batch, t, self.v_heads, self.v_dim).transpose(1, 2)
        decay = (self.rate * F.softplus(forget.float() + self.bias)).transpose(1, 2)  # (B, Hv, T), a logarithm
        beta = write.sigmoid().float().transpose(1, 2)[..., None]  # (B, Hv, T, 1)
        matrix = states[MATRIX] if states else v.new_zeros(batch, self.v_heads, self.k_dim, self.v_dim)
        parts, q = [], q * self.k_dim**-0.5
        for start in range(0, t, CHUNK):
            part = slice(start, start + CHUNK)
            run = _token if t == 1 else _chunk
            out, matrix = run(q[:, :, part], k[:, :, part], v[:, :, part], decay[..., part], beta[:, :, part], matrix)
            parts.append(out)
        out = (parts[0] if len(parts) == 1 else torch.cat(parts, 2)).transpose(1, 2)  # (B, T, Hv, dv)
        out = self.norm * F.rms_norm(out.to(y.dtype).float(), (self.v_dim,), eps=self.eps).to(y.dtype)
        out = (out * F.silu(gate.float()).view(out.shape)).to(y.dtype)
        return out.reshape(batch, t, self.values), {CONV: window[:, t:].clone(), MATRIX: matrix}

    def _parts(self, y: Tensor) -> Sequence[Tensor]:
        """The parts of the input projection's result, [B, T, size] each."""
        if not self.by_heads:
            return y.split(self.sizes, 2)
        per, heads = self.v_heads // self.k_heads, self.k_heads
        first, last = y.split((self.sizes[0] + self.sizes[1], 2 * self.v_heads), 2)
        sizes = self.k_dim, self.k_dim, per * self.v_dim, per * self.v_dim
        q, k, v, gate = (part.flatten(2) for part in first.unflatten(2, (heads, -1)).split(sizes, 3))
        write, forget = (part.flatten(2) for part in last.unflatten(2, (heads, -1)).split(per, 3))
        return torch.cat((q, k, v), 2), gate, write, forget


def _token(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """One token's output (B, Hv, 1, dv) and the state (B, Hv, dk, dv) after it; both read the state once, together."""
    forget = decay.exp()[..., None]  # (B, Hv, 1, 1)
    values, reads = (torch.cat((k, q), 2) @ matrix).mul(forget).split(1, 2)
    error = (v - values) * beta
    out = reads + (q * k).sum(-1, keepdim=True) * error
    return out, torch.addcmul(matrix * forget, k.transpose(2, 3), error)


def _chunk(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs (B, Hv, T, dv) of up to ``CHUNK`` tokens and the state (B, Hv, dk, dv) after them."""
    t, so_far = q.shape[2], decay.cumsum(2)  # (B, Hv, T)
    later = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
    between = (so_far[..., None] - so_far[..., None, :]).masked_fill(later, float("-inf")).exp()  # (B, Hv, T, T)
    since = so_far.exp()[..., None]  # (B, Hv, T, 1)
    read = torch.cat((k, q), 2) @ torch.cat((k.transpose(2, 3), matrix), 3)  # (B, Hv, 2 T, T + dv)
    system = read[:, :, :t, :t] * between * beta
    targets = (v - read[:, :, :t, t:] * since) * beta
    written = torch.linalg.solve_triangular(system, targets, upper=False, unitriangular=True)  # (B, Hv, T, dv)
    out = read[:, :, t:, t:] * since + (read[:, :, t:, :t] * between) @ written
    left = (so_far[..., -1:] - so_far).exp()[..., None]  # (B, Hv, T, 1)
    return out, matrix * since[:, :, -1:] + (k * left).transpose(2, 3) @ written
