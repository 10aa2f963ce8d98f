"""Drafting a tree level by level: the likeliest few nodes of each level are drafted on from, in one pass.

For one greedy row and residuals whose pass costs the same for a few tokens as for one. As EAGLE-2 (arXiv 2406.16858)
grows its trees: a node is worth the product of the draft's own probabilities along its path. Runtimes may have a way
of their own to grow (``Target.grow``); this one is made of their other parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from specdec.base.devices import download, upload, waits
from specdec.kvcache.cache import KVCache
from specdec.runtimes.adapters import Adapters
from specdec.runtimes.layer_pass import Pass
from specdec.runtimes.linear_maps import UnitMap

WIDTH = 4  # nodes of a level that are drafted on from: together they cost about what one costs


@dataclass(frozen=True, eq=False)
class DraftPath:
    """How a drafting residual gets from a token's embedding to the logits of what follows.

    Projection s maps [residual; previous final state; previous state at ``lo``], each divided by its RMS, to the input
    of layers [lo, hi) = ``segments[s]``, which run with ``adapters``. A further projection maps [residual; previous
    final state] to the final state. ``heads`` read it out, one beside the other (None: the model's own): outputs stand
    for ``tokens``, int64 [V'] (None: for themselves). made: what runtimes make of it once.
    """

    projections: Sequence[UnitMap]
    segments: Sequence[tuple[int, int]]
    adapters: Adapters
    heads: Sequence[nn.Linear | None]
    tokens: Tensor | None
    made: dict[object, Any] = field(default_factory=dict)


@dataclass
class Seed:
    """What drafts grow from: the root token of each row, its position, and the states of the token before it.

    final: [B, T, D]. carried: for each segment of the path, the states where it begins [B, T, D]. place: of these T,
    the token before the root; of several rows, T is 1. hidden: bool [B, outputs of the second head], those that a row
    may not draft; None: there are none.
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    final: Tensor
    carried: Sequence[Tensor]
    place: int = 0
    hidden: Tensor | None = None


class Candidates(NamedTuple):
    """Nodes as they were found: log-probability of the path, token, and parent (0: the root, i + 1: node i)."""

    scores: list[float]
    tokens: list[int]
    parents: list[int]

    def levels(self) -> int:
        """How many levels were drafted."""
        deep, parent = 1, self.parents[-1] if self.parents else 0
        while parent:
            deep, parent = deep + 1, self.parents[parent - 1]
        return deep

    def best(self, count: int) -> Candidates:
        """The ``count`` best: a parent scores at least as well, and comes before its children."""
        if len(self.tokens) <= count:
            return self
        return self.only(sorted(sorted(range(len(self.tokens)), key=lambda i: (-self.scores[i], i))[:count]))

    def possible(self) -> Candidates:
        """Those with a probability."""
        return self.only([node for node, score in enumerate(self.scores) if score > -math.inf])

    def only(self, kept: Sequence[int]) -> Candidates:
        """Those with the numbers ``kept``, which rise; a node is there with its parent alone."""
        place = {0: 0} | {node + 1: at for at, node in enumerate(kept, start=1)}
        scores, tokens = [self.scores[node] for node in kept], [self.tokens[node] for node in kept]
        return Candidates(scores, tokens, [place[self.parents[node]] for node in kept])


@dataclass(frozen=True)
class Bounds:
    """How far to grow: levels; nodes of a level that are drafted on from, and children of each; the probability that
    the likeliest path must have for another level."""

    levels: int
    width: int = WIDTH
    confidence: float = 0.0


class Layers(Protocol):
    """What drafting needs of a target (``specdec.runtimes.target.Target``)."""

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor: ...

    def layers(self, x: Tensor, lo: int, hi: int, given: Pass) -> Tensor: ...

    def readout(self, x: Tensor, head: nn.Linear | None = None) -> Tensor: ...


Step = Callable[[Tensor, Tensor, Tensor], Tensor]
Masks = Callable[[Sequence[int]], Tensor | None]  # which tokens may follow those after the root, bool [V]; None: none


def by_levels(
    root: int, vocab: Tensor | None, bounds: Bounds, device: torch.device, step: Step, masks: Masks | None = None
) -> Candidates:
    """All candidates within ``bounds`` after the token ``root``.

    step: runs the tokens of a level, int64 [1, W], and returns the logits [W, V'] after each, over ``vocab``. It also
    gets each one's parent in the level before, int64 [W], and which tokens run so far lie on its path, bool [W, U].
    masks: what may be drafted; None: anything.
    """
    tokens = upload([[root]], device)  # (1, W)
    parents = torch.zeros(1, dtype=torch.long, device=device)  # (W,) each token's parent in the level before
    nodes = torch.zeros(1, dtype=torch.long, device=device)  # (W,) each token's node: 0 is the root, i + 1 candidate i
    paths = torch.ones(1, 1, dtype=torch.bool, device=device)  # (W, U): which tokens run so far lie on a token's path
    scores = torch.zeros(1, device=device)  # (W,) log-probability of each token's path
    found, count, texts = list[Tensor](), 0, list[list[int]]([[]])  # texts: of each token, from behind the root on
    for _ in range(bounds.levels):
        logits = step(tokens, parents, paths).float()
        if masks is not None:
            logits = _masked(logits, vocab, [masks(text) for text in texts])
        best, index = logits.log_softmax(-1).topk(min(bounds.width, logits.shape[-1]))  # (W, k)
        if masks is not None:
            best = best.nan_to_num(-math.inf, neginf=-math.inf)  # NaN where nothing may follow
        joint, ids = scores[:, None] + best, index if vocab is None else vocab[index]
        # Whole numbers below 2^53 are themselves in float64: everything comes back in one read.
        found.append(torch.stack((joint.double(), ids.double(), nodes[:, None].expand_as(ids).double())).flatten(1))
        scores, chosen = joint.flatten().topk(min(bounds.width, joint.numel()))
        if masks is not None:
            chosen, scores = chosen[scores > -math.inf], scores[scores > -math.inf]
            if not len(chosen):
                break
        if not waits(device) and float(scores[0].exp()) < bounds.confidence:
            break
        parents, nodes = chosen // joint.shape[1], 1 + count + chosen
        tokens, count = ids.flatten()[chosen][None], count + joint.numel()
        if masks is not None:
            [before], [new] = download(parents[None], tokens)
            texts = [[*texts[b], token] for b, token in zip(before, new, strict=True)]
        paths = torch.cat((paths[parents], torch.eye(len(chosen), dtype=torch.bool, device=device)), 1)
    values, drafted, origins = torch.cat(found, 1).tolist()
    every = Candidates(values, [int(token) for token in drafted], [int(node) for node in origins])
    return every if masks is None else every.possible()


def _masked(logits: Tensor, vocab: Tensor | None, masks: Sequence[Tensor | None]) -> Tensor:
    """``logits`` [W, V'] over ``vocab``, without what the mask of each row rules out."""
    out = torch.full_like(logits, -math.inf)
    for row, mask in enumerate(masks):
        if mask is not None:
            allowed = (mask[: logits.shape[1]] if vocab is None else mask[vocab.cpu()]).to(logits.device)
            out[row] = logits[row].masked_fill(~allowed, -math.inf)
    return out


def grow(
    target: Layers, cache: KVCache, seed: Seed, path: DraftPath, bounds: Bounds, masks: Masks | None = None
) -> Candidates:
    """All candidates within ``bounds``, for the one row of ``cache``, which is left as it was."""
    [position] = seed.positions
    final, *carried = (x[:, seed.place : seed.place + 1] for x in (seed.final, *seed.carried))

    def step(tokens: Tensor, parents: Tensor, paths: Tensor) -> Tensor:
        nonlocal final, carried, position
        positions = torch.full_like(tokens, position)
        x, before, projected = target.embed(tokens, positions), final[:, parents], list[Tensor]()
        for projection, state, (lo, hi) in zip(path.projections, carried, path.segments, strict=False):
            projected.append(projection([x, before, state[:, parents]]))
            mask = cache.mask(lo, positions, paths)
            x = target.layers(projected[-1], lo, hi, Pass(positions, mask, cache, adapters=path.adapters))
        final = path.projections[-1]([x, before]) if len(path.projections) > len(path.segments) else x
        carried, position = projected, position + 1
        return torch.cat([target.readout(final, head) for head in path.heads], -1)[0]  # (W, V')

    found = by_levels(seed.tokens[0], path.tokens, bounds, cache.device, step, masks)
    for lo, hi in path.segments:
        cache.trim(cache.lengths[lo] - cache.committed, lo, hi)
    return found
