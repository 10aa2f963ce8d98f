"""Growing a tree level by level: the likeliest few nodes of each level get children, in one pass.

It serves drafters whose pass costs the same for a few tokens as for one. As in EAGLE-2 (arXiv 2406.16858), the score of
a node is the product of the draft's own probabilities along its path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specdec.base.devices import download, is_asynchronous, upload
from specdec.kvcache.cache import KVCache
from specdec.runtimes.draft_path import DraftPath, DraftRoots, Masks, TreeLimits
from specdec.runtimes.target import Pass, Target
from specdec.speculation.candidates import Candidates, calibrated
from specdec.speculation.constraints import masked

Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def expand_tree(
    root: int,
    vocab: Tensor | None,
    limits: TreeLimits,
    device: torch.device,
    step: Step,
    masks: Masks | None = None,
    table: Sequence[float] | None = None,
) -> Candidates:
    """Return all candidates of a tree after the token ``root`` that is grown level by level within ``limits``.

    vocab: the token ids of the logits, int64 [V']; None: all tokens.
    step: takes the tokens of a level (int64 [1, W]), the indices of their parents in the level before (int64 [W]), and
        which of all U tokens run so far are on their paths (bool [W, U]); returns their logits [W, V'].
    masks: takes the tokens from the root to a node, and returns which may follow (bool [V]; None: none); None: all may.
    table: calibrates probabilities (``calibrated``); None: they count as they are.
    """
    tokens = upload([[root]], device)  # (1, W)
    parents = torch.zeros(1, dtype=torch.long, device=device)  # (W,) each token's parent in the level before
    nodes = torch.zeros(1, dtype=torch.long, device=device)  # (W,) each token's node: 0 is the root, i + 1 candidate i
    paths = torch.ones(1, 1, dtype=torch.bool, device=device)  # (W, U): which tokens run so far lie on a token's path
    scores = torch.zeros(1, device=device)  # (W,) log-probability of each token's path
    found, count, texts = list[Tensor](), 0, list[list[int]]([[]])  # texts: the path of each token, without the root
    for level in range(limits.levels):
        logits = step(tokens, parents, paths).float()
        if masks is not None:
            logits = torch.stack([masked(own, masks(text), vocab) for own, text in zip(logits, texts, strict=True)])
        best, index = logits.log_softmax(-1).topk(min(limits.width, logits.shape[-1]))  # (W, k)
        if masks is not None:
            best = best.nan_to_num(-math.inf, neginf=-math.inf)  # NaN where nothing may follow
        raw = best.exp()
        joint, ids = scores[:, None] + calibrated(raw, table).log(), index if vocab is None else vocab[index]
        # Whole numbers below 2^53 are themselves in float64: everything comes back in one read.
        parts = joint.double(), ids.double(), nodes[:, None].expand_as(ids).double(), raw.double()
        found.append(torch.stack(parts).flatten(1))
        scores, chosen = joint.flatten().topk(min(limits.width, joint.numel()))
        if masks is not None:
            chosen, scores = chosen[scores > -math.inf], scores[scores > -math.inf]
            if not len(chosen):
                break
        if not is_asynchronous(device):
            worth = scores.exp() * limits.rate(level + 1) - limits.node
            if float(worth.clamp(min=0).sum()) < limits.level:
                break
            some = max(int((worth > 0).sum()), 1)
            chosen, scores = chosen[:some], scores[:some]
        parents, nodes = chosen // joint.shape[1], 1 + count + chosen
        tokens, count = ids.flatten()[chosen][None], count + joint.numel()
        if masks is not None:
            [before], [new] = download(parents[None], tokens)
            texts = [[*texts[b], token] for b, token in zip(before, new, strict=True)]
        paths = torch.cat((paths[parents], torch.eye(len(chosen), dtype=torch.bool, device=device)), 1)
    values, drafted, origins, said = torch.cat(found, 1).tolist()
    every = Candidates(values, [int(token) for token in drafted], [int(node) for node in origins], [said])
    return every if masks is None else every.only([node for node, score in enumerate(values) if score > -math.inf])


def candidates_on_path(
    target: Target,
    cache: KVCache,
    roots: DraftRoots,
    path: DraftPath,
    limits: TreeLimits,
    masks: Masks | None = None,
) -> list[Candidates] | None:
    """Return the candidates of each row along the draft path ``path``; arguments are those of ``Target.draft_rows``.

    Drafts in one call if the runtime can, else in one pass for each level, which serves a single greedy row. None:
    neither can be done.
    """
    found = target.draft_rows(cache, roots, path, limits, masks)
    if found is not None:
        return [Candidates(*nodes) for nodes in found]
    one = len(roots.tokens) == 1 and roots.sampled is None
    return [tree_by_passes(target, cache, roots, path, limits, masks)] if one else None


def tree_by_passes(
    target: Target,
    cache: KVCache,
    roots: DraftRoots,
    path: DraftPath,
    limits: TreeLimits,
    masks: Masks | None = None,
) -> Candidates:
    """Return the tree along ``path`` for the one row of ``cache``, with one pass for each level.

    The cache is left as it was. Arguments are those of ``Target.draft_rows``.
    """
    [position] = roots.positions
    final, *carried = (x[:, roots.place : roots.place + 1] for x in (roots.final, *roots.carried))

    def step(tokens: Tensor, parents: Tensor, paths: Tensor) -> Tensor:
        nonlocal final, carried, position
        positions = torch.full_like(tokens, position)
        x, before, projected = target.embed(tokens, positions), final[:, parents], list[Tensor]()
        for projection, state, (lo, hi) in zip(path.projections, carried, path.segments, strict=False):
            projected.append(projection([x, before, state[:, parents]]))
            mask = cache.register(lo, positions, paths)
            x = target.layers(projected[-1], lo, hi, Pass(positions, mask, cache, adapters=path.adapters))
        final = path.projections[-1]([x, before]) if len(path.projections) > len(path.segments) else x
        carried, position = projected, position + 1
        return torch.cat([target.readout(final, head) for head in path.heads], -1)[0]  # (W, V')

    table = None if roots.tables is None else roots.tables[0][0]
    found = expand_tree(roots.tokens[0], path.tokens, limits, cache.device, step, masks, table)
    for lo, hi in path.segments:
        cache.trim(cache.lengths[lo] - cache.committed, lo, hi)
    return found
