"""The arguments of ``Target.draft_rows``, by which a runtime drafts along a path of layers, and its result."""

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
    """The layers and projections that a draft runs from a token's embedding to the logits of the next token (M2R2).

    projections: linear layers. Number s maps [residual; previous final state; previous input of segment s], each
        divided by its RMS, to the input of segment s. The last one maps [residual; previous final state] to the final
        state. "Previous" is the token before.
    segments: ranges of layers [lo, hi) that run with ``adapters``.
    adapters: changes of these layers.
    heads: output heads for the final state, whose outputs are joined; None: the model's own. The last one may grow.
    tokens: token id of each output, int64 [V']; None: the outputs are the token ids. It is replaced if heads change.
    made: cache of objects that runtimes make of the path.
    """

    projections: Sequence[UnitMap]
    segments: Sequence[tuple[int, int]]
    adapters: Adapters
    heads: Sequence[nn.Linear | None]
    tokens: Tensor | None
    made: dict[object, Any] = field(default_factory=dict)


class Sampled(NamedTuple):
    """How the tokens of a row are sampled, so that drafts use the same noise.

    seed, stream: key of the row's noise.
    place: position of the token after the root, which is the length of the text.
    temperature: 0: greedy. top_k: 0: all tokens. top_p, min_p: as in ``SamplingParams``.
    noise: returns the noise of tokens, float32 on the CPU, given a position, V, and the tokens' ids (None: all V).
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
    """How far to grow a draft tree.

    levels: maximum number of levels.
    width: number of children of a node; with one row, also the maximum number of nodes of a level that get children.
    level: cost of drafting a level, in accepted tokens. Another level is drafted while its expected gain is at least
        ``level``: the sum of max(0, probability of the node's path * rate of the level - ``node``) over the nodes.
    node: cost of a node, in accepted tokens. With one row, nodes whose term is 0 get no children.
    rates: acceptance rate of each level after accepted levels; (): 1 for all. The last one holds for further levels.
    """

    levels: int
    width: int = WIDTH
    level: float = 0.0
    node: float = 0.0
    rates: Sequence[float] = ()

    def rate(self, level: int) -> float:
        """Return the probability that a token of ``level``, from 0 on, is accepted after an accepted path."""
        return self.rates[min(level, len(self.rates) - 1)] if self.rates else 1.0


@dataclass
class DraftRoots:
    """The root token of each of B rows, and the states of the token before it.

    tokens: token ids of the roots. positions: their positions.
    final: final states of the last T tokens [B, T, D]. T is 1 for several rows.
    carried: for each segment of the path, its input states of these tokens [B, T, D].
    place: index of the token before the root among the T tokens.
    forbidden: outputs of the second head that a row may not draft, bool [B, outputs]; None: there are none.
    sampled: seed, position and filters of each row's sampling; None: all rows are greedy.
    tables: for each row, three calibration tables (``calibrated``): for probabilities by the path's heads, by the other
        source where the heads have no candidates, and by the other source elsewhere. None: no calibration.
    given: for each row, the tree of another source, such as n-grams, which the draft extends; None: there is none.
    masks: the tokens that a single row may draft; None: all.
    choice: which nodes the device takes itself, so that the host need not read them before they are scored. Then all
        levels are drafted. None: the host reads the candidates.
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
    """The C candidate tokens of each of B rows, as tensors on the target's device, parents before children.

    scores: float32 [B, C], as in ``speculation.candidates.Candidates``; -inf: there is no such node.
    tokens: token ids, int64 [B, C]. parents: 0: the root, i + 1: node i, int64 [B, C]. -1 in nodes that pad a row.
    raw: raw probabilities of each of S sources, float32 [B, S, C]. With another source's tree these are that source
        where the heads have no candidates, that source elsewhere, and the heads; else the heads.
    depths: level of each node, int64 [B, C]; the root's children have 1.
    """

    scores: Tensor
    tokens: Tensor
    parents: Tensor
    raw: Tensor
    depths: Tensor

    def packed(self) -> Tensor:
        """Return all fields but ``depths`` as one tensor, int64 [B, C (3 + S)], so that one read gets all of them.

        Of floating-point numbers it has the 32 bits.
        """
        scores, raw = (part.contiguous().view(torch.int32).long() for part in (self.scores, self.raw.flatten(1)))
        return torch.cat((scores, self.tokens, self.parents, raw), 1)

    def lists(self) -> list[Nodes]:
        """Return the nodes of each row as lists, with one read of the device."""
        return [self.unpacked(row, self.scores.shape[1]) for row in self.packed().tolist()]

    @staticmethod
    def unpacked(row: Sequence[int], count: int) -> Nodes:
        """Convert a row of ``packed``, as a list, to lists of scores, tokens, parents and raw. count: C."""
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
    """The rule by which a device selects nodes from each row's candidates, the likeliest first.

    nodes: maximum number for a row, M.
    depths: for each row, the maximum depth of its nodes; 0: none.
    prices: the price of scoring n = 0, 1, .. nodes of all rows, in tokens: nodes that are not worth it are not taken;
        (): all are worth it.
    allowance: expected loss, in tokens, that is still accepted, to explore.
    beyond: what a node of each row costs beyond ``prices``; (): nothing.
    """

    nodes: int
    depths: Sequence[int]
    prices: Sequence[float] = ()
    allowance: float = 0.0
    beyond: Sequence[float] = ()


class DeviceTree(NamedTuple):
    """The M selected nodes of each of B rows on a device; the host knows them after it has read ``packed``.

    tokens: int64 [B, M], parents before children; -1: there is no node.
    depths: depth of the root (0) and of each node, int64 [B, 1 + M].
    ancestors: which of the root and the nodes are on a node's path, bool [B, 1 + M, 1 + M].
    packed: int64 [B, M + C (3 + S)]: indices of the nodes among the candidates (-1: none), and the candidates as in
        ``LevelNodes.packed``.
    sources: S.
    """

    tokens: Tensor
    depths: Tensor
    ancestors: Tensor
    packed: Tensor
    sources: int


def calibrated(p: Tensor, tables: Tensor | None) -> Tensor:
    """Return calibrated probabilities of raw probabilities ``p`` [B, ...], interpolated in each row's table.

    tables: for each row, the calibrated probability at each of the log-odds ``KNOTS``, [B, 11]; None: ``p`` is
        returned.
    """
    if tables is None:
        return p
    least, last = 1 / (1 + math.exp(-KNOTS[0])), len(KNOTS) - 2
    at = (torch.logit(p.clamp(least, 0.9999)) - KNOTS[0]).clamp(0, last + 1)
    below = at.floor().clamp(max=last)
    index = below.long().reshape(len(p), -1)
    low, high = (tables.gather(1, index + step).view_as(p) for step in (0, 1))
    return torch.where(p <= least, p / least * tables[:, :1].view(-1, *[1] * (p.dim() - 1)), low.lerp(high, at - below))
