"""Evaluation of a drafter on held-out answers: agreement with the base model, overlap and acceptance."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from specdec.train.batches import TrainingBatch
from specdec.train.student import Teacher, agree, split


def evaluate(
    teacher: Teacher,
    batches: Iterable[TrainingBatch],
    drafts: Callable[[TrainingBatch], Iterable[tuple[Tensor, Tensor]]],
    steps: int,
) -> dict[str, Any]:
    """Return the figures of a drafter that drafts ``steps`` tokens per step, as JSON values.

    teacher: gives the base model's distributions. batches: the held-out answers.
    drafts: yields for a batch, per drafted token 1 .. ``steps``, the estimated final state [B, T, D] (before the final
        norm) and the positions that count, bool [B, T]. Entry t of both is of the draft of the token after position t.

    The result has these keys. The first two are lists with an entry for each drafted token:
    top1: share of positions where the draft is the base model's most likely token. A token that is neither in the draft
        vocabulary nor in the text before counts as a miss.
    overlap: 1 - total variation between the distributions of base model and draft, at temperature 1.
    chain: for i = 1 .. ``steps``, the share of steps whose first i drafted tokens are all right, in simulated greedy
        decoding along the answers (``acceptance_lengths``); the product of the first i of ``top1`` if no window has
        room for a step. score: the mean acceptance length, 1 + sum(chain).
    positions: number of positions for the first drafted token.
    """
    sums = torch.zeros(3, steps, dtype=torch.float64)  # positions, top1, overlap
    lengths: list[int] = []
    for batch in batches:
        teacher.begin(batch)
        known, hits = teacher.known(batch), list[Tensor]()
        for number, (final, valid) in enumerate(drafts(batch)):
            agrees, overlap = _compare(teacher, final[valid], teacher.best[valid], teacher.row[valid])
            hits.append(torch.zeros_like(valid).masked_scatter(valid, agrees) & known)
            sums[:, number] += torch.stack((valid.sum(), hits[-1].sum(), overlap)).double().cpu()
        lengths += acceptance_lengths(hits, batch.valid)
    top1, overlaps = (sums[1:] / sums[0].clamp_min(1)).tolist()
    figures = {"top1": [round(x, 4) for x in top1], "overlap": [round(x, 4) for x in overlaps]}
    return figures | chain_figures(lengths, top1) | {"positions": int(sums[0, 0])}


def _compare(teacher: Teacher, final: Tensor, best: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether drafts are the base model's choice, bool [n], and their overlap with its distributions, summed.

    final: estimated final states of n positions [n, D]. best, row: those of ``teacher``, [n] each.
    """
    agrees, total = list[Tensor](), torch.zeros((), dtype=torch.float64, device=final.device)
    for at, _, logits in teacher.read_out(final, teacher.draft_head):
        for few, x in split(at, logits):
            agrees.append(agree(x[:, None], best[few, None])[:, 0])
            base = teacher.p[row[few]].float() * teacher.mass[row[few], None]
            total += torch.minimum(torch.softmax(x, -1, dtype=torch.float32), base).sum()
    return torch.cat([*agrees, best[:0] > 0]), total


def acceptance_lengths(hits: Sequence[Tensor], valid: Tensor) -> list[int]:
    """Simulate greedy speculative decoding along windows and return the number of tokens of each step.

    A step begins at a position of a window, its root; the next one begins so many positions later as it has tokens.

    hits: for each drafted token 0, 1, ... of a step, bool [B, T]: whether the draft of the token after position t is
    right. valid: bool [B, T], the positions of the windows; False for padding at the end. A step whose draft would end
    outside its window is left out. The numbers count the bonus token, so they are at least 1.
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


def chain_figures(lengths: Sequence[int], top1: Sequence[float]) -> dict[str, Any]:
    """Return ``chain`` and ``score`` as ``evaluate`` does.

    lengths: number of tokens of each simulated step, the bonus token included. top1: as ``evaluate`` returns it.
    """
    shares: Iterable[float] = accumulate(top1, operator.mul)
    if lengths:
        shares = (sum(n > i for n in lengths) / len(lengths) for i in range(1, len(top1) + 1))
    chain = [round(x, 4) for x in shares]
    return {"chain": chain, "score": round(1 + sum(chain), 3)}
