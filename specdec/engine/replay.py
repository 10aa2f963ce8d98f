"""Replay: the target's own logits at the positions of generated tokens, all in one pass.

In float32 two correct decoders agree token for token. In bfloat16 a pass over one row and a pass over several rows
round differently, so tokens whose logits nearly tie may flip; replay distinguishes such a near-tie from a fault.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.runtimes.target import Pass, Target
from specdec.speculation.sampling import Sampler

# Largest gap between the best logit and a token's logit (natural-log units) that rounding explains, by dtype. Measured
# on a 135M model: bfloat16 logits lie 0.1 from the float32 ones on average and up to 1.1; winners within 0.25.
NEAR_TIE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.06}


@torch.inference_mode()
def replay(target: Target, prompt: list[int], tokens: list[int], sampler: Sampler | None = None) -> Tensor:
    """Teacher-forced logits, float32 [n, V]: row i is what the target predicts in place of ``tokens[i]`` (n tokens).

    sampler: of one row; it processes and perturbs the logits, so that the argmax is the token it chooses.
    """
    ids = torch.tensor([prompt + tokens], device=target.device)
    positions = torch.arange(ids.shape[1], device=target.device)[None]
    cache = target.new_cache()
    x = target.embed(ids, positions)
    x = target.layers(x, 0, target.num_layers, Pass(positions, cache.mask(0, positions), cache))
    logits = target.readout(x[:, len(prompt) - 1 : -1])  # (1, n, V)
    if sampler is None:
        return logits[0].float()
    scores = sampler.scores(logits, lambda: [[prompt + tokens[:i] for i in range(len(tokens))]])
    return sampler.perturb(scores, [range(len(prompt), len(prompt) + len(tokens))], scores.shape[-1])[0]


def margins(target: Target, prompt: list[int], tokens: list[int], sampler: Sampler | None = None) -> Tensor:
    """Best logit minus the logit of each token under replay, [n]; 0 where the token is the choice."""
    logits = replay(target, prompt, tokens, sampler)
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    return logits.amax(-1) - logits.gather(1, chosen)[:, 0]


@dataclass(frozen=True)
class Difference:
    """The first position where two outputs differ, and the gap between the two tokens' logits there.

    An infinite gap between sampled tokens is the edge of top-k, top-p or min-p, which rounding moves.
    """

    index: int
    ours: int | None
    plain: int | None
    margin: float
    near_tie: bool

    def __str__(self) -> str:
        kind = "near-tie" if self.near_tie else "FAULT"
        return f"first difference at token {self.index}: {kind}, logit gap {self.margin:.3g}"


def first_difference(
    target: Target, prompt: list[int], ours: list[int], plain: list[int], sampler: Sampler | None = None
) -> Difference | None:
    """Compare two outputs of one request, greedy or sampled by ``sampler``; None if they are equal.

    A difference in length alone is a fault (infinite gap).
    """
    if ours == plain:
        return None
    common = min(len(ours), len(plain))
    index = next((i for i in range(common) if ours[i] != plain[i]), common)
    if index == common:
        ends = [row[index] if len(row) > common else None for row in (ours, plain)]
        return Difference(index, ends[0], ends[1], float("inf"), False)
    logits = replay(target, prompt, plain[: index + 1], sampler)[index]
    pair = logits[[ours[index], plain[index]]]
    # Both must be near the top: two equally unlikely tokens are no tie.
    margin = float(logits.max() - pair.min())
    filtered = sampler is not None and sampler.filters and math.isinf(margin)
    limit = NEAR_TIE[target.dtype] * (1.0 if sampler is None else sampler.sharpness)
    return Difference(index, ours[index], plain[index], margin, margin <= limit or filtered)
