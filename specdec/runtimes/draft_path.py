"""What a runtime takes to draft along a path, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from specdec.runtimes.decoder_layer import Adapters
from specdec.runtimes.torch.linear import UnitMap

WIDTH = 4  # nodes of a level that get children: together they cost about what one costs

Masks = Callable[[Sequence[int]], Tensor | None]  # tokens behind the root -> allowed next ones, bool [V]; None: none
# Scores, tokens, parents, and of each source what it says: as in ``speculation.candidates.Candidates``.
Nodes = tuple[list[float], list[int], list[int], list[list[float]]]


@dataclass(eq=False)
class DraftPath:
    """The way of a drafting residual from a token's embedding to the logits of the next token.

    projections: number s maps [residual; previous final state; previous state at ``lo``], each divided by its RMS, to
        the input of segment s; a further one maps [residual; previous final state] to the final state.
    segments: layers [lo, hi), which run with ``adapters``.
    heads: read out the final state, one behind the other (None: the model's own); they grow with the context.
    tokens: the tokens of the heads' outputs, int64 [V'] (None: the outputs are the tokens); another
        tensor for other heads.
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
        """How likely that level, from 0 on, has the right token after a right path of levels."""
        return self.rates[min(level, len(self.rates) - 1)] if self.rates else 1.0


@dataclass
class DraftRoots:
    """The root token of each row, and the states of the token before it.

    final: final states [B, T, D].
    carried: for each segment of the path, its input states [B, T, D].
    place: index of the token before the root among these T; T is 1 for several rows.
    forbidden: outputs of the second head that a row may not draft, bool [B, outputs]; None: there are none.
    sampled: how each row is sampled; None: all are greedy.
    tables: for each row, calibrated probabilities (calibrate.h) of three things: what the path's heads say, what the
        other source says where they have no candidates, and what it says where they have some. None: not calibrated.
    given: for each row, the tree of another source; a runtime may also draft behind its nodes. None: there is none.
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
