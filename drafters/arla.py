"""ARLA, the router of M2R2: the probability that the token at an exit is the full model's (arXiv 2502.02040).

Accelerated residual latent attention: the residual p of each layer is projected to a small latent, and the exit attends
over them. Only the paper's abstract was at hand. Our addition: the log-odds of the draft's own softmax are added, and
an untrained router returns them alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Router(nn.Module):
    """P(the draft's best token is the full model's), from the residuals of the layers run and the draft logits.

    count: number of residuals; the last is the exit's.
    size: D.
    width: size of the latents.
    """

    def __init__(self, count: int, size: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.latent = nn.Parameter(torch.randn(count, size, width) * size**-0.5)
        self.place = nn.Parameter(torch.zeros(count, width))
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.mix = nn.Linear(2 * width, width)
        self.out = nn.Linear(width, 1)
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, residuals: Sequence[Tensor], logits: Tensor) -> Tensor:
        """Residuals [B, T, D] and draft logits [B, T, V'] -> the log-odds [B, T], float32."""
        unit = F.rms_norm(torch.stack(tuple(residuals), 2), residuals[0].shape[-1:], eps=1e-6)  # (B, T, L, D)
        z = torch.einsum("btld,ldw->btlw", unit, self.latent) + self.place
        exit_ = z[..., -1:, :]  # (B, T, 1, w)
        weight = (self.query(exit_) @ self.key(z).transpose(-1, -2) * self.width**-0.5).softmax(-1)  # (B, T, 1, L)
        both = torch.cat((exit_, weight @ z), -1)[..., 0, :]
        learned = self.out(F.silu(self.mix(both)))[..., 0].float()
        x = logits.detach().float()
        best, total = x.amax(-1), x.logsumexp(-1)
        # log p - log(1 - p) of the draft's best token.
        odds = best - total - torch.log(-torch.expm1((best - total).clamp_max(-1e-6)))
        return learned + self.scale.float() * odds
