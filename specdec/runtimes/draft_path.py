"""The arguments and results of ``Target.draft_rows``, which drafts tokens by a few of the target's layers (M2R2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from specdec.runtimes.decoder_layer import Adapters
from specdec.runtimes.torch.linear import UnitMap

KNOTS = range(-4, 7)  # log-odds at which tables of calibrated probabilities have entries (calibrate.h)
WIDTH = 4  # nodes of a level that get children: running them together costs about what one costs
NEAR = 2048  # a drafted token attends to so many tokens before it, and to the first ones, so that its cost has a bound

# Tokens after the root -> the tokens that may follow, bool [V]; None: none may follow.
Masks = Callable[[Sequence[int]], Tensor | None]
# Scores, tokens, parents, and the raw probabilities of each source: as in ``speculation.candidates.Candidates``.
Nodes = tuple[list[float], list[int], list[int], list[list[float]]]


@dataclass(eq=False)
class DraftPath:
    """The projections and layers that turn a token's embedding into the draft logits of the next token (M2R2).

    A token runs through projection 0, the layers of segment 0, projection 1, the layers of segment 1, and so on. A last
    projection, if there is one more than segments, gives the final state; without it, the last segment's output is the
    final state. The final norm and the output heads read the final state.

    projections: linear layers, each of whose inputs is divided by its RMS. Projection s maps [x; final state of the
        token before; input of segment s of the token before] to the input of segment s [D], where x is the token's
        embedding or, for s > 0, the output of segment s - 1. The one after the last segment maps [output of that
        segment; final state of the token before] to the final state [D].
    segments: ranges [lo, hi) of the target's layers that run with ``adapters``.
    adapters: changes of these layers.
    heads: output heads that read the final state; their logits are concatenated. None instead of a head: the target's
        own. The last head may get more outputs later.
    tokens: token id of each logit, int64 [V']; None: logit i is of token i. A new tensor replaces it when heads change.
    made: cache of objects that runtimes derive from the path, under keys that the runtimes choose; {} at first.
    """

    projections: Sequence[UnitMap]
    segments: Sequence[tuple[int, int]]
    adapters: Adapters
    heads: Sequence[nn.Linear | None]
    tokens: Tensor | None
    made: dict[object, Any] = field(default_factory=dict)


class Sampled(NamedTuple):
    """The sampling parameters of one sequence and its noise, with which its draft predicts the target's sampled tokens.

    The target chooses, after temperature, top-k, top-p and min-p, the largest of logits plus Gumbel noise. A draft that
    adds the same noise to its own logits chooses the same token more often. Noise depends on the position in the text.

    seed, stream: unsigned 64-bit integers; with a position and a token id, they determine the noise.
    place: position of the first token to draft: the number of tokens of the text so far, its last one included.
    temperature: divides the logits; 0: decoding is greedy.
    top_k: number of likeliest tokens that can be sampled; 0: all tokens.
    top_p: least total probability of the likeliest tokens that can be sampled; 1: all tokens.
    min_p: least probability of a token that can be sampled, relative to the likeliest one; 0: all tokens.
    noise: function ``noise(position, V, ids)`` that returns the Gumbel noise at a position for the token ids ``ids``
        [n] (None: all V tokens), float32 on the CPU, [n] or [V].
    """

    seed: int
    stream: int
    place: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    noise: Callable[[int, int, Tensor | None], Tensor]


@dataclass(frozen=True)
class TreeLimits:
    """Limits of a draft tree that grows level by level. Level 0 has the children of the root, the text's last token.

    A node is a drafted token. Its path probability is the probability that all tokens up to it are accepted.

    levels: maximum number of levels.
    width: number of children of a node. With one sequence, also the maximum number of nodes of a level that get
        children.
    level: cost of drafting one more level: its time, as the number of tokens that are generated in that time at the
        present speed. Level n >= 1 is drafted while the sum, over the nodes to get children, of max(0, path probability
        * ``rate(n)`` - ``node``) is at least ``level``. 0: drafting is free.
    node: cost of scoring one more node, in the same unit. With one sequence, nodes whose term in that sum is 0 get no
        children.
    rates: for each level from 0 on, the probability that one of its nodes is the token that the target accepts, if the
        path before is accepted. Further levels have the last rate; (): all have 1.
    """

    levels: int
    width: int = WIDTH
    level: float = 0.0
    node: float = 0.0
    rates: Sequence[float] = ()

    def rate(self, level: int) -> float:
        """Return the probability that a level has the token that the target accepts, if the path before is accepted.

        level: index of the level from 0 on. Levels beyond ``rates`` have the last rate; without rates, the result is 1.
        """
        return self.rates[min(level, len(self.rates) - 1)] if self.rates else 1.0


@dataclass
class DraftRoots:
    """Where the drafts of B sequences begin: their roots (last tokens), and the states of the tokens before the roots.

    tokens: token id of each root, [B].
    positions: position of each root in its sequence, [B].
    final: final states (inputs of the final norm) of T recent tokens of each sequence, [B, T, D]; T is 1 if there are
        several sequences. Only those of token ``place`` are read.
    carried: for each segment of the draft path, the inputs of its first layer for the same T tokens, [B, T, D].
    place: index among these T tokens of the token before the root.
    forbidden: outputs of the path's second head that a sequence may not draft, bool [B, outputs]; None: there are none.
    sampled: how each sequence is sampled; None: all are greedy.
    tables: for each sequence, calibration tables as in ``calibrated``, [B][1, or 3 with ``given``][11]; None: no
        calibration. The first is for probabilities by the path's heads. The third is for tokens that only the other
        source has, after a node where the heads have candidates, and the second for all other tokens of that source.
    given: for each sequence, a tree from another source (predictor of tokens), such as n-grams, that the draft extends,
        as lists (scores, tokens, parents, [raw probabilities]) with the meanings of ``LevelNodes``; None: there is no
        other source.
    masks: function from the ids of the drafted tokens after the root to the tokens that may follow, bool [V] (None:
        none may), for a single sequence; None: all may.
    choice: rule by which the device selects the nodes to score, so that the host need not read the candidates first.
        All levels are then drafted. None: the host reads the candidates and selects.
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    final: Tensor
    carried: Sequence[Tensor]
    place: int = 0
    forbidden: Tensor | None = None
    sampled: Sequence[Sampled] | None = None
    tables: Sequence[Sequence[Sequence[float]]] | None = None
    given: Sequence[Nodes] | None = None
    masks: Masks | None = None
    choice: DeviceChoice | None = None


class LevelNodes(NamedTuple):
    """The C candidate tokens of each of B sequences, as tensors on the target's device, parents before children.

    Node i is candidate i; the root, the last token of the text, is no node.

    scores: logarithm of the calibrated probability that the path to the node is accepted, float32 [B, C]; -inf: there
        is no such node.
    tokens: token ids, int64 [B, C]; -1 in nodes that only pad a sequence (``given_of``).
    parents: parent of each node, int64 [B, C]; 0: the root, i + 1: node i, -1: padding.
    raw: probability of each node after its parent, not calibrated, float32 [B, S, C], by each of S sources (predictors
        of tokens); 0: the source does not have the node. S is 1: the draft's output heads. S is 3 if another source's
        tree is included: that source after nodes where the heads have no candidates, that source elsewhere, and the
        heads.
    depths: level of each node, int64 [B, C]; 1 for children of the root.
    """

    scores: Tensor
    tokens: Tensor
    parents: Tensor
    raw: Tensor
    depths: Tensor

    def packed(self) -> Tensor:
        """Return all fields but ``depths`` as one tensor, int64 [B, C (3 + S)], so that one read gets them all.

        For each sequence it has the C scores, tokens and parents, and then the C raw probabilities of each of S sources
        (predictors of tokens). Floating-point values are there as integers with the same 32 bits.
        """
        scores, raw = (part.contiguous().view(torch.int32).long() for part in (self.scores, self.raw.flatten(1)))
        return torch.cat((scores, self.tokens, self.parents, raw), 1)

    def lists(self) -> list[Nodes]:
        """Return the candidates of each sequence as lists (scores, tokens, parents, raw), with one read of the device.

        Scores, tokens and parents have one entry for each candidate; those with score -inf are left out, and parents
        are renumbered. raw[s][i] is the probability of candidate i by source s, before calibration. Waits for the
        device.
        """
        return [self.unpacked(row, self.scores.shape[1]) for row in self.packed().tolist()]

    @staticmethod
    def unpacked(row: Sequence[int], count: int) -> Nodes:
        """Convert one sequence's part of ``packed`` to lists (scores, tokens, parents, raw), as ``lists`` returns them.

        row: the integers of the sequence, [C (3 + S)].
        count: C, the number of candidates. Those with score -inf are left out, and parents are renumbered.
        """
        whole = np.array(row, np.int32)
        scores, _, _, *raw = whole.view(np.float32).reshape(-1, count).tolist()
        tokens, parents = list(row[count : 2 * count]), list(row[2 * count : 3 * count])
        there = [node for node, score in enumerate(scores) if score > -math.inf]
        index = {0: 0} | {node + 1: new for new, node in enumerate(there, start=1)}
        return (
            [scores[node] for node in there],
            [tokens[node] for node in there],
            [index[parents[node]] for node in there],
            [[own[node] for node in there] for own in raw],
        )


class DeviceChoice(NamedTuple):
    """The rule by which a device selects nodes to score from the candidates of B sequences, the likeliest first.

    As many nodes are taken as have the largest expected gain: the sum of their path probabilities (the expected number
    of accepted tokens) less their price. A price is the time that scoring takes, as the number of tokens that are
    generated in that time at the present speed.

    nodes: maximum number of nodes of a sequence, M.
    depths: for each sequence, the maximum depth of its nodes, [B]; 0: it gets none.
    prices: the price of scoring n = 0, 1, .. nodes of all sequences together; the last one also stands for more nodes.
        (): scoring is free, and all nodes within the other limits are taken.
    allowance: if the best number n >= 1 of nodes has an expected loss (negative gain), it is still taken if the loss is
        below this, as exploration; else no nodes are taken.
    beyond: for each sequence, the price of each of its nodes in addition to ``prices``, [B]; (): 0.
    """

    nodes: int
    depths: Sequence[int]
    prices: Sequence[float] = ()
    allowance: float = 0.0
    beyond: Sequence[float] = ()


class DeviceTree(NamedTuple):
    """The at most M nodes to score that a device selected for each of B sequences; the host has not read them yet.

    In dimensions of size 1 + M, entry 0 is the root, and entry i + 1 is node i.

    tokens: token ids, int64 [B, M], parents before children; -1: there is no node.
    depths: depth of each entry, int64 [B, 1 + M]; 0 for the root.
    ancestors: whether entry j is entry i or an ancestor of it, bool [B, 1 + M (i), 1 + M (j)].
    packed: what the host reads, int64 [B, M + C (3 + S)]: for each node its index among the C candidates (-1: there is
        no node), then the candidates as ``LevelNodes.packed`` returns them.
    sources: number of sources S whose raw probabilities the candidates have.
    """

    tokens: Tensor
    depths: Tensor
    ancestors: Tensor
    packed: Tensor
    sources: int


def calibrated(p: Tensor, tables: Tensor | None) -> Tensor:
    """Map raw probabilities, as a drafter's softmax gives them, to the share of such tokens that were accepted so far.

    p: raw probabilities of B sequences, [B, ...].
    tables: for each sequence, the calibrated probability at the log-odds -4, -3, .. 6, [B, 11], between which the
        result is interpolated; None: no calibration, ``p`` is returned.

    Returns probabilities in the shape of ``p``.
    """
    if tables is None:
        return p
    least, last = 1 / (1 + math.exp(-KNOTS[0])), len(KNOTS) - 2
    at = (torch.logit(p.clamp(least, 0.9999)) - KNOTS[0]).clamp(0, last + 1)
    below = at.floor().clamp(max=last)
    index = below.long().reshape(len(p), -1)
    low, high = (tables.gather(1, index + step).view_as(p) for step in (0, 1))
    return torch.where(p <= least, p / least * tables[:, :1].view(-1, *[1] * (p.dim() - 1)), low.lerp(high, at - below))
