"""Candidates: tokens that may be drafted, with the probabilities that the paths to them are accepted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Candidates(NamedTuple):
    """A tree of candidate tokens after the root of one row, parents before children; lists have an entry for each node.

    The root is the last token of the text. It is no node, and no level is counted for it: its children are level 1.

    scores: for each node, the logarithm of the calibrated probability that the path to the node is accepted.
    tokens: the token id of each node.
    parents: the parent of each node; 0: the root, i + 1: node i.
    raw: for each source (``Traits.sources``), the raw probability that the source gives each node after the node's
        parent, not calibrated; 0: the source does not have the node.
    """

    scores: list[float]
    tokens: list[int]
    parents: list[int]
    raw: list[list[float]]

    @classmethod
    def none(cls, sources: int = 1) -> Candidates:
        """Return an empty tree. sources: number of sources, so the length of ``raw``."""
        return cls([], [], [], [[] for _ in range(sources)])

    @classmethod
    def chain(cls, rates: Sequence[float]) -> Candidates:
        """Return a chain of unknown tokens (-1), one for each of ``rates``, without raw probabilities.

        rates: the probability of each token to be accepted if the ones before are, in (0, 1].
        """
        scores = itertools.accumulate(math.log(rate) for rate in rates)
        return cls([*scores], [-1] * len(rates), [*range(len(rates))], [])

    def levels(self) -> int:
        """Return the number of the tree's levels, the root's not counted; 1 for an empty tree."""
        return max(self.depths(), default=1)

    def depths(self) -> list[int]:
        """Return the level of each node, [n]; children of the root are at level 1, the root is not listed."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return depths[1:]

    def within(self, most: int) -> Candidates:
        """Return the tree without the nodes below level ``most`` (0: without any)."""
        depths = self.depths()
        deep = max(depths, default=0) > most
        return self.only([node for node, depth in enumerate(depths) if depth <= most]) if deep else self

    def path(self, tokens: Sequence[int]) -> list[int]:
        """Return the indices of the nodes along ``tokens`` from the root, up to the first token that the tree lacks.

        tokens: the ids of the tokens that follow the root.
        """
        nodes = {own: node for node, own in enumerate(zip(self.parents, self.tokens, strict=True))}
        found: list[int] = []
        for token in tokens:
            if (node := nodes.get((found[-1] + 1 if found else 0, token))) is None:
                break
            found.append(node)
        return found

    def source(self, node: int) -> int:
        """Return the index in ``raw`` of the source that gives the node of index ``node`` the largest probability."""
        raw = [each[node] for each in self.raw]
        return raw.index(max(raw))

    def by_level(self) -> list[float]:
        """Return, for levels 1, 2, .., the expected number of accepted tokens: the sum of the nodes' probabilities."""
        depths = self.depths()
        found = [0.0] * max(depths, default=0)
        for depth, score in zip(depths, self.scores, strict=True):
            found[depth - 1] += math.exp(score)
        return found

    def best(self, count: int) -> Candidates:
        """Return the tree of the ``count`` nodes with the best scores; a parent never scores less than its children."""
        if len(self.tokens) <= count:
            return self
        return self.only(sorted(sorted(range(len(self.tokens)), key=lambda i: (-self.scores[i], i))[:count]))

    def only(self, indices: Sequence[int]) -> Candidates:
        """Return the tree of the nodes with the sorted ``indices``, which must include the parent of each node."""
        index = {0: 0} | {node + 1: new for new, node in enumerate(indices, start=1)}
        scores, tokens = [self.scores[node] for node in indices], [self.tokens[node] for node in indices]
        raw = [[own[node] for node in indices] for own in self.raw]
        return Candidates(scores, tokens, [index[self.parents[node]] for node in indices], raw)


@dataclass
class CandidateSet:
    """The candidates that a draft was chosen from.

    rows: the candidates of each row.
    levels: the number of levels that were drafted one after the other; 0: none, as by n-grams.
    without_levels: the nodes of each row that would be drafted without levels; None: there is no such draft.
    """

    rows: Sequence[Candidates]
    levels: int = 0
    without_levels: Sequence[Candidates] | None = None
