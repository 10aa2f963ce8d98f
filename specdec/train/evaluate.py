"""Evaluation of a drafter: agreement, overlap and acceptance on held-out answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.m2r2_network import M2R2
from specdec.runtimes.target import Target
from specdec.train.batches import TrainingBatch
from specdec.train.student import Teacher, draft_steps


def evaluate(network: M2R2, target: Target, batches: Iterable[TrainingBatch], steps: int = 4) -> dict[str, Any]:
    """Figures of the last exit per draft step 1 .. ``steps``, over ``batches``.

    top1: the base's most likely token is the draft's choice. One outside the draft vocabulary and the context counts as
    a miss.
    overlap: 1 - TV of base and draft at temperature 1.
    chain, score: see ``chain_figures``; for greedy decoding along the answers.
    exits: top1 of the first step at each earlier exit.
    """
    teacher = Teacher(target, network.draft_vocab)
    earlier = torch.zeros(len(network.path.exits), dtype=torch.float64)
    sums = torch.zeros(3, steps, dtype=torch.float64)  # positions, top1, overlap
    lengths: list[int] = []
    for batch in batches:
        teacher.begin(batch)
        known = teacher.known(batch)
        hits: list[Tensor] = []
        for s, (exits, valid) in enumerate(draft_steps(network, target, batch, steps)):
            for number, (final, _) in enumerate(exits[:-1] if s == 0 else ()):
                right = teacher.hits(teacher.logits(final)) & known & valid
                earlier[number] += right.sum().double().cpu()
            final, _ = exits[-1]
            logits = teacher.logits(final)
            right = teacher.hits(logits) & known & valid
            base = teacher.p.float() * teacher.mass[..., None]
            overlap = torch.minimum(torch.softmax(logits.float(), -1), base).sum(-1)
            sums[:, s] += torch.stack((valid.sum(), right.sum(), (overlap * valid).sum())).double().cpu()
            hits.append(right)
        lengths += acceptance_lengths(hits, batch.valid)
    mean = (sums[1:] / sums[0].clamp_min(1)).tolist()
    result: dict[str, Any] = {
        name: [round(x, 4) for x in row] for name, row in zip(("top1", "overlap"), mean, strict=True)
    }
    result |= chain_figures(lengths, steps)
    if network.path.exits:
        result["exits"] = [round(float(share), 4) for share in earlier / sums[0, 0].clamp_min(1)]
    result["positions"] = int(sums[0, 0])
    return result


def acceptance_lengths(hits: Sequence[Tensor], valid: Tensor) -> list[int]:
    """Tokens of each step of greedy decoding along the windows ``valid`` [B, T].

    hits[s]: bool [B, T], whether draft s is right, by the position before the drafted token. A step that ends outside
    its window is not counted.
    """
    lengths = []
    for row, count in zip(torch.stack(list(hits), 1).tolist(), valid.sum(1).tolist(), strict=True):
        root = 0
        while root + len(row) <= count:
            accepted = 0
            while accepted < len(row) and row[accepted][root + accepted]:
                accepted += 1
            lengths.append(accepted + 1)
            root += accepted + 1
    return lengths


def chain_figures(lengths: Sequence[int], steps: int) -> dict[str, Any]:
    """chain: P(the first i drafts are all accepted), i = 1 .. ``steps``; score: the mean acceptance length.

    lengths: tokens of each step of decoding.
    """
    chain = [round(sum(n > i for n in lengths) / max(len(lengths), 1), 4) for i in range(1, steps + 1)]
    return {"chain": chain, "score": round(1 + sum(chain), 3)}
