"""Drafting a tree level by level: the likeliest few nodes of each level are drafted on from, in one pass.

For one greedy row and drafters whose pass costs the same for a few tokens as for one. As EAGLE-2 (arXiv 2406.16858)
grows its trees: a node is worth the product of the draft's own probabilities along its path. Knows how a tree grows
from logits, not where the logits come from.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specdec.draft import Draft, State

WIDTH = 4  # nodes of a level that are drafted on from: together they cost about what one costs


def draft_beam(
    state: State,
    limit: int,
    budget: int,
    width: int,
    step: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    vocab: Tensor | None = None,
) -> Draft:
    """Draft the ``budget`` likeliest nodes found within ``limit`` levels, of which ``width`` a level are drafted from.

    step: takes tokens and positions (int64 [1, W]), each token's parent as an index into the call before (int64 [W]),
        and bool [W, U]: which of the U tokens given so far, these included, lie on its path; returns the logits
        [1, W, V'] of what follows. Asked first for the root.
    vocab: int64 [V'], the tokens that logits are over; None: all of the target's.
    Ends early once no path stands with a probability of ``state.confidence``.
    """
    tokens, positions = state.roots, state.positions  # (1, W)
    parents = torch.zeros(1, dtype=torch.long)
    paths = torch.ones(1, 1, dtype=torch.bool)  # (W, U)
    scores = torch.zeros(1)  # (W,) log-probability of each token's path
    nodes = torch.zeros(1, dtype=torch.long)  # (W,) each token's node: 0 is the root, then in order of discovery
    found: list[tuple[float, int, int]] = []  # of every candidate: score, token, parent's node
    for depth in range(limit):
        likely = step(tokens, positions, parents, paths)[0].float().log_softmax(-1)  # (W, V')
        best, index = likely.topk(min(width, likely.shape[-1]))  # (W, k)
        joint, ids = scores[:, None] + best.cpu(), (index if vocab is None else vocab[index]).cpu()
        owners, first = nodes[:, None].expand_as(ids), len(found) + 1
        found += zip(joint.flatten().tolist(), ids.flatten().tolist(), owners.flatten().tolist(), strict=True)
        scores, chosen = joint.flatten().topk(width)
        if depth + 1 == limit or float(scores[0].exp()) < state.confidence:
            break
        parents, nodes = chosen // ids.shape[1], first + chosen
        tokens = ids.flatten()[chosen][None].to(state.roots.device)
        positions = (state.positions + depth + 1).expand(1, width).contiguous()
        paths = torch.cat((paths[parents], torch.eye(width, dtype=torch.bool)), 1)
    return _likeliest(found, budget, state.roots.device)


def _likeliest(found: list[tuple[float, int, int]], budget: int, device: torch.device) -> Draft:
    """The tree of the ``budget`` best candidates. A candidate's parent scores at least as well, and comes before it."""
    kept = sorted(sorted(range(len(found)), key=lambda i: (-found[i][0], i))[:budget])
    place = {0: 0} | {node + 1: at for at, node in enumerate(kept, start=1)}
    tokens = torch.tensor([[found[node][1] for node in kept]], dtype=torch.long, device=device)
    return Draft(tokens, tuple(place[found[node][2]] for node in kept))
