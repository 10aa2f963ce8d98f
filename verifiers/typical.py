"""Typical acceptance (Medusa, Cai et al. 2024, arXiv 2401.10774, section 2.3.1): keep what the model finds plausible.

Lossy: a drafted token x is accepted if p(x) > min(epsilon, delta exp(-H(p))), p being the model's distribution after
its prefix and H its entropy in nats: where the model is sure, only likely tokens pass; where it is not, many do. The
output is typical text of the model, not a sample from it. Of a tree, the longest path of tokens that pass is accepted.

At temperature 0 p is a point mass, H is 0, and only the likeliest token passes: the rule is then the exact one. After
the path the next token is drawn from p (the paper takes the likeliest), so that a step that accepts nothing samples.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from specdec.base.settings import Number, checked
from specdec.speculation.draft import Draft
from specdec.speculation.verifier import Acceptance, Verifier


class TypicalVerifier(Verifier):
    """Accepts the longest path of plausible tokens, the likeliest of several.

    A token is plausible if the model gives it a larger probability than min(epsilon, delta exp(-H)), where H is the
    entropy of the model's distribution in nats. The defaults are those of the Medusa paper (arXiv 2401.10774).
    Greedy decoding accepts as the exact verifier does. Raises SpecDecError for values out of range.

    epsilon: probability in (0, 1).
    delta: factor > 0.
    """

    name: ClassVar[str] = "typical"
    lossless: ClassVar[bool] = False
    needs_probabilities: ClassVar[bool] = True

    @checked
    def __init__(
        self,
        epsilon: Annotated[Number, Field(gt=0, lt=1)] = 0.09,
        delta: Annotated[Number, Field(gt=0)] = 0.3,
    ) -> None:
        self.epsilon, self.delta = epsilon, delta

    @property
    def label(self) -> str:
        """The verifier's name and options, as results show them."""
        return f"{self.name}, epsilon {self.epsilon:g}, delta {self.delta:g}"

    def verify(self, draft: Draft, chosen: list[list[int]], p: Tensor | None) -> Acceptance:
        if p is None:
            return super().verify(draft, chosen, p)
        entropy = -torch.special.xlogy(p, p).sum(-1)  # (B, 1 + M)
        least = (self.delta * torch.exp(-entropy)).clamp_max(self.epsilon)
        before = torch.tensor(draft.parents, dtype=torch.long, device=p.device)
        chance = p[:, before].gather(2, draft.tokens.clamp_min(0)[..., None])[..., 0]  # (B, M): p(x)
        plausible = (chance > least[:, before]) & (draft.tokens >= 0)
        paths = []
        for passes, logs in zip(plausible.tolist(), chance.log().tolist(), strict=True):
            ends: list[tuple[list[int], float]] = [([0], 0.0)]  # per block token: its path and log p, if it passes
            best = ends[0]
            for node, parent in enumerate(draft.parents):
                path, log = ends[parent]
                on = passes[node] and path
                ends.append(([*path, node + 1], log + logs[node]) if on else ([], 0.0))
                if on and (len(ends[-1][0]), ends[-1][1]) > (len(best[0]), best[1]):
                    best = ends[-1]
            paths.append(best[0])
        return Acceptance(paths, [row[path[-1]] for row, path in zip(chosen, paths, strict=True)])
