"""Evaluation of a drafter: agreement, overlap and acceptance on held-out answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.train.batches import TrainingBatch
from specdec.train.student import Teacher


def evaluate(
    teacher: Teacher,
    batches: Iterable[TrainingBatch],
    drafts: Callable[[TrainingBatch], Iterable[tuple[Tensor, Tensor]]],
    steps: int,
) -> dict[str, Any]:
    """Figures of each draft 1 .. ``steps``.

    drafts: for a batch, the estimate of h[N] [B, T, D] and the valid positions, bool [B, T], of each.

    top1: the base's most likely token is the draft's choice. One outside the draft vocabulary and the context counts as
    a miss.
    overlap: 1 - TV of base and draft at temperature 1.
    chain, score: see ``chain_figures``; for greedy decoding along the answers.
    """
    sums = torch.zeros(3, steps, dtype=torch.float64)  # positions, top1, overlap
    lengths: list[int] = []
    for batch in batches:
        teacher.begin(batch)
        known, base = teacher.known(batch), teacher.p.float() * teacher.mass[..., None]
        hits: list[Tensor] = []
        for number, (final, valid) in enumerate(drafts(batch)):
            logits = teacher.logits(final)
            hits.append(teacher.hits(logits) & known & valid)
            overlap = torch.minimum(torch.softmax(logits.float(), -1), base).sum(-1)
            found = valid.sum(), hits[-1].sum(), (overlap * valid).sum()
            sums[:, number] += torch.stack(found).double().cpu()
        lengths += acceptance_lengths(hits, batch.valid)
    top1, overlaps = (sums[1:] / sums[0].clamp_min(1)).tolist()
    figures = {"top1": [round(x, 4) for x in top1], "overlap": [round(x, 4) for x in overlaps]}
    return figures | chain_figures(lengths, steps) | {"positions": int(sums[0, 0])}


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
