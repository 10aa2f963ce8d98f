"""Candidates: tokens that may be drafted, with the probabilities that the paths to them are accepted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Candidates(NamedTuple):
    """A tree of candidate tokens after the root of one row (sequence), parents before children.

    The root is the last token of the text. It is no node of the tree; its children are at level (depth) 1. All lists
    have one entry for each node.

    scores: natural logarithm of the calibrated probability that all tokens from the root to the node are accepted.
    tokens: the token ids.
    parents: the parent of each node; 0: the root, i + 1: node i.
    raw: raw[s][i] is the probability, not calibrated, that source s (such as n-grams) gives node i after its parent; 0:
        the source does not have the node.
    """

    scores: list[float]
    tokens: list[int]
    parents: list[int]
    raw: list[list[float]]

    @classmethod
    def none(cls, sources: int = 1) -> Candidates:
        """Return a tree without nodes.

        sources: number of sources that give tokens probabilities (such as n-grams), which is the length of ``raw``.
        """
        return cls([], [], [], [[] for _ in range(sources)])

    @classmethod
    def chain(cls, rates: Sequence[float]) -> Candidates:
        """Return a chain of unknown tokens (id -1), one for each of ``rates``, without raw probabilities.

        rates: the probability of each token to be accepted if those before it are, in (0, 1].
        """
        scores = itertools.accumulate(math.log(rate) for rate in rates)
        return cls([*scores], [-1] * len(rates), [*range(len(rates))], [])

    def levels(self) -> int:
        """Return the depth of the deepest node; 1 for an empty tree."""
        return max(self.depths(), default=1)

    def depths(self) -> list[int]:
        """Return the depth of each node; children of the root have depth 1. The root is not listed."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return depths[1:]

    def within(self, most: int) -> Candidates:
        """Return the tree of the nodes whose depth is at most ``most``; 0: an empty tree. It may be this object."""
        depths = self.depths()
        deep = max(depths, default=0) > most
        return self.only([node for node, depth in enumerate(depths) if depth <= most]) if deep else self

    def path(self, tokens: Sequence[int]) -> list[int]:
        """Return the indices of the nodes along ``tokens`` from the root, up to the first token that the tree lacks.

        tokens: token ids that follow the root.
        """
        nodes = {own: node for node, own in enumerate(zip(self.parents, self.tokens, strict=True))}
        found: list[int] = []
        for token in tokens:
            if (node := nodes.get((found[-1] + 1 if found else 0, token))) is None:
                break
            found.append(node)
        return found

    def source(self, node: int) -> int:
        """Return the index in ``raw`` of the source that gives node ``node`` (0: the first) the largest probability."""
        raw = [each[node] for each in self.raw]
        return raw.index(max(raw))

    def by_level(self) -> list[float]:
        """Return, for depths 1, 2, .. up to the deepest node, the expected number of accepted tokens at that depth.

        It is the sum of the probabilities that the paths to the nodes at the depth are accepted.
        """
        depths = self.depths()
        found = [0.0] * max(depths, default=0)
        for depth, score in zip(depths, self.scores, strict=True):
            found[depth - 1] += math.exp(score)
        return found

    def best(self, count: int) -> Candidates:
        """Return the tree of the ``count`` nodes with the best scores; of equal scores, the first nodes.

        It is a tree, because no node scores better than its parent.
        """
        if len(self.tokens) <= count:
            return self
        return self.only(sorted(sorted(range(len(self.tokens)), key=lambda i: (-self.scores[i], i))[:count]))

    def only(self, indices: Sequence[int]) -> Candidates:
        """Return a new tree of the nodes ``indices`` alone, renumbered in this order.

        indices: indices of nodes, rising, with each node's parent.
        """
        index = {0: 0} | {node + 1: new for new, node in enumerate(indices, start=1)}
        scores, tokens = [self.scores[node] for node in indices], [self.tokens[node] for node in indices]
        raw = [[own[node] for node in indices] for own in self.raw]
        return Candidates(scores, tokens, [index[self.parents[node]] for node in indices], raw)


@dataclass
class CandidateSet:
    """The candidates of all rows (sequences) of a batch that a draft was chosen from.

    rows: the candidates of each row.
    levels: number of draft levels (depths of the tree), each one forward pass of the drafter; 0: the candidates needed
        no such pass, as with n-grams.
    without_levels: for each row the nodes that would have been drafted without any such pass, as by the n-grams of
        ngram+X; None: there is no such draft.
    skipped: the rows that the levels have no candidates for, such as texts longer than a draft model's context.
    """

    rows: Sequence[Candidates]
    levels: int = 0
    without_levels: Sequence[Candidates] | None = None
    skipped: Collection[int] = ()
