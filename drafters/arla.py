"""ARLA, the router of M2R2: how likely the token at an exit is the full model's (arXiv 2502.02040).

Accelerated residual latent attention: the residual p of every layer passed is projected to a small latent, and the exit
attends over them. Only the paper's abstract was at hand; what the drafter's own softmax says enters beside them, as our
addition, and untrained it is all there is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Router(nn.Module):
    """P(the draft's best token is the full model's), from the residuals of the layers passed and the draft logits.

    count: residuals passed, the exit's the last. size: D. width: of the latents.
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

    def forward(self, passed: Sequence[Tensor], logits: Tensor) -> Tensor:
        """Residuals [B, T, D] and draft logits [B, T, V'] -> the log-odds [B, T], float32."""
        unit = F.rms_norm(torch.stack(tuple(passed), 2), passed[0].shape[-1:], eps=1e-6)  # (B, T, L, D)
        z = torch.einsum("btld,ldw->btlw", unit, self.latent) + self.place
        exit_ = z[..., -1:, :]  # (B, T, 1, w)
        weight = (self.query(exit_) @ self.key(z).transpose(-1, -2) * self.width**-0.5).softmax(-1)  # (B, T, 1, L)
        both = torch.cat((exit_, weight @ z), -1)[..., 0, :]
        learned = self.out(F.silu(self.mix(both)))[..., 0].float()
        x = logits.detach().float()
        top, rest = x.amax(-1), x.logsumexp(-1)
        # log p - log(1 - p) of the draft's best token.
        odds = top - rest - torch.log(-torch.expm1((top - rest).clamp_max(-1e-6)))
        return learned + self.scale.float() * odds
