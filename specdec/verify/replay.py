"""Compute the model's logits at the positions of generated tokens in one forward pass, and judge differences by them.

In float32 two correct decoders agree token for token. In bfloat16 a pass over one token and a pass over several round
differently, so tokens whose logits nearly tie may flip. The recomputed logits distinguish such a near-tie from a fault.
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
def replay(
    target: Target, prompt: list[int], tokens: list[int], sampler: Sampler | None = None, raised: float = 0.0
) -> Tensor:
    """Run ``target`` once over ``prompt`` and n ``tokens``; return the logits with which it chooses each of the tokens.

    The result is float32 [n, V]: entry i is for the position of ``tokens[i]``.
    sampler: a sampler for one row. Its processors and the noise by which it samples are applied, so that the largest
    value is at the token that it chooses. None: the raw logits.
    raised: a number that is added to the logit of the last of ``tokens`` before the sampler's processors.
    """
    ids = torch.tensor([prompt + tokens], device=target.device)
    positions = torch.arange(ids.shape[1], device=target.device)[None]
    cache = target.new_cache()
    given = Pass(positions, cache.register(0, positions), cache, ids=ids)
    x = target.layers(target.embed(ids, positions), 0, target.num_layers, given)
    logits = target.readout(x[:, len(prompt) - 1 : -1]).float()  # (1, n, V)
    logits[0, -1, tokens[-1]] += raised
    if sampler is None:
        return logits[0]
    scores = sampler.scores(logits, lambda: [[prompt + tokens[:i] for i in range(len(tokens))]])
    return sampler.perturb(scores, [range(len(prompt), len(prompt) + len(tokens))], scores.shape[-1])[0]


def margins(target: Target, prompt: list[int], tokens: list[int], sampler: Sampler | None = None) -> Tensor:
    """Return the best logit minus the logit of each of n ``tokens`` after ``prompt``, [n]; 0: the token is the best.

    target: the model. sampler: a sampler for one row, whose processors and noise are applied to the logits; None: raw
    logits.
    """
    logits = replay(target, prompt, tokens, sampler)
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    return logits.amax(-1) - logits.gather(1, chosen)[:, 0]


def is_near_tie(
    target: Target, prompt: list[int], tokens: list[int], gap: float, sampler: Sampler | None = None
) -> bool:
    """Return whether rounding explains the gap between the best logit and the logit of the last of ``tokens``.

    target: the model.
    prompt: the token ids before ``tokens``. tokens: new token ids up to the one in question.
    gap: the best logit minus that of the token at its position, as ``margins`` returns it: of raw logits in greedy
        decoding, and with a sampler of logits after its processors (temperature and filters, among others) and plus its
        noise. Infinite if top-k, top-p or min-p removed the token; these filters are then applied again with a logit
        that is larger by the rounding error.
    sampler: a sampler for one row, which chose the tokens; None: greedy decoding.
    """
    limit = NEAR_TIE[target.dtype]
    if sampler is not None and sampler.rows[0].warpers and math.isinf(gap):
        scores = replay(target, prompt, tokens, sampler, limit)[-1]
        gap = float(scores.max() - scores[tokens[-1]])
    temperature = 0.0 if sampler is None else sampler.rows[0].params.temperature
    return gap <= limit * max(1.0 / (temperature or 1.0), 1.0)  # differences of logits grow by the factor


@dataclass(frozen=True)
class Difference:
    """The first difference between tokens decoded with drafts and tokens of plain decoding.

    index: position of the difference among the new tokens.
    ours: token id decoded with drafts; None: this output has ended.
    plain: token id of plain decoding; None: this output has ended.
    margin: the larger of the two tokens' distances to the best logit; infinite if one output has ended.
    near_tie: whether rounding explains the difference; if not, it is a fault.
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
    """Compare the new tokens of two outputs for one prompt; return their first difference, None if they are equal.

    target: the model. ours: token ids decoded with drafts. plain: token ids of plain decoding. sampler: a sampler for
    one row, which chose the tokens; None: greedy decoding. A difference in length alone is a fault with an infinite
    margin.
    """
    if ours == plain:
        return None
    common = min(len(ours), len(plain))
    index = next((i for i in range(common) if ours[i] != plain[i]), common)
    if index == common:
        ends = [row[index] if len(row) > common else None for row in (ours, plain)]
        return Difference(index, ends[0], ends[1], float("inf"), False)
    logits, pair = replay(target, prompt, plain[: index + 1], sampler)[index], (ours[index], plain[index])
    # Both must be near the top: two equally unlikely tokens are no tie.
    gaps = [float(logits.max() - logits[token]) for token in pair]
    near = [
        is_near_tie(target, prompt, [*plain[:index], token], gap, sampler)
        for token, gap in zip(pair, gaps, strict=True)
    ]
    return Difference(index, *pair, max(gaps), all(near))
