"""How good a drafter's drafts are on held-out answers, on its own states: agreement, overlap, acceptance.

Knows nothing about training and about time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.m2r2 import M2R2
from specdec.target import Target
from specdec.train.batches import Batch
from specdec.train.student import Judge, passages


@torch.no_grad()
def evaluate(
    network: M2R2,
    target: Target,
    batches: Iterable[Batch],
    steps: int = 4,
) -> dict[str, Any]:
    """Figures per draft step 1 .. ``steps``, over ``batches``.

    ``top1``, ``top3``: the base's most likely token is the draft's choice, or among its three best (False where the
    draft vocabulary, which is the drafter's own and the tokens of the context, lacks it). ``overlap``: 1 - TV of base
    and draft at temperature 1. ``cosine``: of the draft's final state and h[N]. ``chain``: P(the first i drafted tokens
    all stand), and ``score``: mean acceptance length, of greedy decoding along the answers with chains of ``steps``;
    rounds that a window cuts short are left out. All of that is about the last exit; ``exits``: ``top1`` of the first
    step at each exit before it.
    """
    judge = Judge(target, network.draft_vocab)
    own = None if network.draft_vocab is None else set(network.draft_vocab.tolist())
    sooner = torch.zeros(len(network.path.exits), dtype=torch.float64)
    sums = torch.zeros(5, steps, dtype=torch.float64)  # positions, top1, top3, overlap, cosine
    lengths: list[int] = []
    for batch in batches:
        judge.begin(batch)
        known = batch.valid if own is None else known_tokens(batch, own)
        hits: list[Tensor] = []
        for s, (exits, valid) in enumerate(passages(network, target, batch, steps)):
            for number, (final, _) in enumerate(exits[:-1] if s == 0 else ()):
                logits = judge.logits(final)
                right = judge.hits(logits, logits.amax(-1), judge.best) & known & valid
                sooner[number] += right.sum().double().cpu()
            final, _ = exits[-1]
            logits = judge.logits(final)
            at_best = logits.gather(-1, judge.best.clamp_min(0)[..., None])
            rank = (logits > at_best).sum(-1)
            rank.masked_fill_((judge.best < 0) | ~known, logits.shape[-1])
            base = judge.p.float() * judge.mass[..., None]
            overlap = torch.minimum(torch.softmax(logits.float(), -1), base).sum(-1)
            cosine = torch.cosine_similarity(final.float(), batch.hidden[network.num_layers].float(), -1)
            for row, figure in enumerate((torch.ones_like(overlap), rank == 0, rank < 3, overlap, cosine)):
                sums[row, s] += (figure * valid).sum().double().cpu()
            hits.append((rank == 0) & valid)
        for row, count in zip(torch.stack(hits, 1).tolist(), batch.valid.sum(1).tolist(), strict=True):
            lengths += walk(row, count)
    mean = (sums[1:] / sums[0].clamp_min(1)).tolist()
    names = ("top1", "top3", "overlap", "cosine")
    result: dict[str, Any] = {n: [round(x, 4) for x in row] for n, row in zip(names, mean, strict=True)}
    result["chain"] = standing(lengths, steps)
    result["score"] = round(1 + sum(result["chain"]), 3)
    if network.path.exits:
        result["exits"] = [round(float(share), 4) for share in sooner / sums[0, 0].clamp_min(1)]
    result["positions"] = int(sums[0, 0])
    return result


def walk(hits: list[list[bool]], count: int) -> list[int]:
    """Tokens of each round of decoding along a window of ``count`` positions, given hits[step][position]."""
    lengths, root = [], 0
    while root + len(hits) <= count:
        accepted = 0
        while accepted < len(hits) and hits[accepted][root + accepted]:
            accepted += 1
        lengths.append(accepted + 1)
        root += accepted + 1
    return lengths


def standing(lengths: Sequence[int], steps: int) -> list[float]:
    """Share of the rounds, of which the tokens are given, whose first 1 .. ``steps`` drafts all stood."""
    return [round(sum(n > i for n in lengths) / max(len(lengths), 1), 4) for i in range(1, steps + 1)]


def known_tokens(batch: Batch, own: set[int]) -> Tensor:
    """Where the base's choice is in the drafter's vocabulary or in the context so far: bool [B, T]."""
    known = torch.zeros_like(batch.valid)
    for b, text in enumerate(batch.texts):
        ids, start, best = text.tolist(), int(batch.positions[b, 0]), batch.best[b].tolist()
        seen = own | set(ids[:start])
        for i, token in enumerate(ids[start:]):
            seen.add(token)
            known[b, i] = best[i] in seen
    return known
