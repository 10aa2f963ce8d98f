"""Drafting a tree level by level: the likeliest few nodes of each level get children, in one pass.

For drafters whose pass costs the same for a few tokens as for one. As in EAGLE-2 (arXiv 2406.16858), a node is worth
the product of the draft's own probabilities along its path.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from specdec.base.devices import download, is_asynchronous, upload
from specdec.runtimes.decoder_layer import Adapters
from specdec.runtimes.draft_maps import UnitMap

WIDTH = 4  # nodes of a level that get children: together they cost about what one costs
KNOTS = range(-4, 7)  # log-odds at which tables of calibrated probabilities have entries (calibrate.h)


@dataclass(frozen=True, eq=False)
class DraftPath:
    """The way of a drafting residual from a token's embedding to the logits of the next token.

    projections: number s maps [residual; previous final state; previous state at ``lo``], each divided by its RMS, to
        the input of segment s; a further one maps [residual; previous final state] to the final state.
    segments: layers [lo, hi), which run with ``adapters``.
    heads: read out the final state, one behind the other (None: the model's own).
    tokens: the tokens of the heads' outputs, int64 [V'] (None: the outputs are the tokens).
    made: objects that runtimes derive from the path.
    """

    projections: Sequence[UnitMap]
    segments: Sequence[tuple[int, int]]
    adapters: Adapters
    heads: Sequence[nn.Linear | None]
    tokens: Tensor | None
    made: dict[object, Any] = field(default_factory=dict)


class Sampled(NamedTuple):
    """How a row's tokens are sampled (``SamplingParams``), and the noise that decides.

    seed, stream: the row's noise depends on them. place: the length of its text, which is the position of the token
        after the root.
    temperature: 0: greedy.
    top_k: 0: all.
    """

    seed: int
    stream: int
    place: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float


@dataclass
class DraftRoots:
    """The root token of each row, and the states of the token before it.

    final: final states [B, T, D].
    carried: for each segment of the path, its input states [B, T, D].
    place: index of the token before the root among these T; T is 1 for several rows.
    forbidden: outputs of the second head that a row may not draft, bool [B, outputs]; None: there are none.
    sampled: how each row is sampled; None: all are greedy.
    tables: of each row, the calibrated probabilities at ``KNOTS`` of what the path's heads say, then of what the other
        source says where they have no other candidates, and where they have. None: what they say counts.
    given: of each row, the tree of another source. A runtime may draft behind its nodes, too. None: there is none.
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    final: Tensor
    carried: Sequence[Tensor]
    place: int = 0
    forbidden: Tensor | None = None
    sampled: Sequence[Sampled] | None = None
    tables: Sequence[Sequence[Sequence[float]]] | None = None
    given: Sequence[Candidates] | None = None


class Candidates(NamedTuple):
    """Nodes in the order in which they were found.

    scores: logarithm of the calibrated probability that the path to each node is accepted.
    parents: 0: the root, i + 1: node i.
    raw: of each source, what it says: the probability of each node after its parent; 0: it does not have the node.
    """

    scores: list[float]
    tokens: list[int]
    parents: list[int]
    raw: list[list[float]]

    @classmethod
    def none(cls, sources: int = 1) -> Candidates:
        """No candidates of any of ``sources``."""
        return cls([], [], [], [[] for _ in range(sources)])

    @classmethod
    def chain(cls, rates: Sequence[float]) -> Candidates:
        """A chain of unknown tokens, each of them right with its rate if those before it are."""
        scores = itertools.accumulate(math.log(rate) for rate in rates)
        return cls([*scores], [-1] * len(rates), [*range(len(rates))], [])

    def levels(self) -> int:
        """The number of levels that were drafted."""
        return max(self.depths(), default=1)

    def depths(self) -> list[int]:
        """The level of each node; 1 is the first."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return depths[1:]

    def path(self, tokens: Sequence[int]) -> list[int]:
        """The nodes of the first of ``tokens`` behind the root that are a path."""
        places = {own: node for node, own in enumerate(zip(self.parents, self.tokens, strict=True))}
        found = list[int]()
        for token in tokens:
            if (node := places.get((found[-1] + 1 if found else 0, token))) is None:
                break
            found.append(node)
        return found

    def source(self, node: int) -> int:
        """The number of the source that gives a node most."""
        said = [each[node] for each in self.raw]
        return said.index(max(said))

    def by_level(self) -> list[float]:
        """Expected accepted tokens of each level."""
        depths = self.depths()
        found = [0.0] * max(depths, default=0)
        for depth, score in zip(depths, self.scores, strict=True):
            found[depth - 1] += math.exp(score)
        return found

    def best(self, count: int) -> Candidates:
        """The ``count`` best nodes. A parent scores at least as well as its children, and comes before them."""
        if len(self.tokens) <= count:
            return self
        return self.only(sorted(sorted(range(len(self.tokens)), key=lambda i: (-self.scores[i], i))[:count]))

    def possible(self) -> Candidates:
        """The nodes with a probability above 0."""
        return self.only([node for node, score in enumerate(self.scores) if score > -math.inf])

    def only(self, indices: Sequence[int]) -> Candidates:
        """The nodes with the (rising) ``indices``, which include each node's parent."""
        place = {0: 0} | {node + 1: at for at, node in enumerate(indices, start=1)}
        scores, tokens = [self.scores[node] for node in indices], [self.tokens[node] for node in indices]
        raw = [[said[node] for node in indices] for said in self.raw]
        return Candidates(scores, tokens, [place[self.parents[node]] for node in indices], raw)


@dataclass(frozen=True)
class TreeLimits:
    """How far to grow a tree.

    levels: maximum number of levels.
    width: number of children of a node, and in the tree of a single row of the nodes of a level that get any.
    level, node, rates: another level is drafted while it brings ``level`` tokens or more: the sum, over the nodes that
        get children, of their probability times its entry of ``rates``, as far as it exceeds ``node``. In the tree of a
        single row, the nodes that do not exceed it get none.
    """

    levels: int
    width: int = WIDTH
    level: float = 0.0
    node: float = 0.0
    rates: Sequence[float] = ()

    def rate(self, level: int) -> float:
        """How likely that level, from 0 on, has the right token after a right path."""
        return self.rates[min(level, len(self.rates) - 1)] if self.rates else 1.0


def calibrated(p: Tensor, table: Sequence[float] | None) -> Tensor:
    """The calibrated probabilities of what a source gives ``p``, by its ``table`` at ``KNOTS`` (calibrate.h)."""
    if table is None:
        return p
    knots, least = p.new_tensor(table), 1 / (1 + math.exp(-KNOTS[0]))
    at = (torch.logit(p.clamp(least, 0.9999)) - KNOTS[0]).clamp(0, len(KNOTS) - 1)
    below = at.floor().clamp(max=len(KNOTS) - 2)
    inside = torch.lerp(knots[below.long()], knots[below.long() + 1], at - below)
    return torch.where(p <= least, p / least * knots[0], inside)


Step = Callable[[Tensor, Tensor, Tensor], Tensor]
Masks = Callable[[Sequence[int]], Tensor | None]  # tokens behind the root -> allowed next ones, bool [V]; None: none


def by_levels(
    root: int,
    vocab: Tensor | None,
    limits: TreeLimits,
    device: torch.device,
    step: Step,
    masks: Masks | None = None,
    table: Sequence[float] | None = None,
) -> Candidates:
    """All candidates within ``limits`` after the token ``root``, calibrated by ``table``.

    step: takes the tokens of a level (int64 [1, W]), their parents' indices in the level before (int64 [W]), and which
        of all tokens run so far are on their paths (bool [W, U]); returns their logits [W, V'] over ``vocab``.
    masks: the tokens that may be drafted; None: all.
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
            logits = _masked(logits, vocab, [masks(text) for text in texts])
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
    return every if masks is None else every.possible()


def _masked(logits: Tensor, vocab: Tensor | None, masks: Sequence[Tensor | None]) -> Tensor:
    """``logits`` [W, V'] over ``vocab``; -inf where the mask of the row is False."""
    out = torch.full_like(logits, -math.inf)
    for row, mask in enumerate(masks):
        if mask is not None:
            allowed = (mask[: logits.shape[1]] if vocab is None else mask[vocab.cpu()]).to(logits.device)
            out[row] = logits[row].masked_fill(~allowed, -math.inf)
    return out
