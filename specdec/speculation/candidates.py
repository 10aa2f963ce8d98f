"""Nodes that may be drafted, with the probabilities that their paths are accepted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

KNOTS = range(-4, 7)  # log-odds at which tables of calibrated probabilities have entries (calibrate.h)


class Candidates(NamedTuple):
    """Nodes in the order in which they were found.

    scores: logarithm of the calibrated probability that the path to each node is accepted.
    parents: 0: the root, i + 1: node i.
    raw: for each source, the probability that it gives each node after its parent; 0: it does not have the node.
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

    def within(self, most: int) -> Candidates:
        """The nodes of the first ``most`` levels."""
        depths = self.depths()
        deep = max(depths, default=0) > most
        return self.only([node for node, depth in enumerate(depths) if depth <= most]) if deep else self

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

    def only(self, indices: Sequence[int]) -> Candidates:
        """The nodes with the (rising) ``indices``, which include each node's parent."""
        place = {0: 0} | {node + 1: at for at, node in enumerate(indices, start=1)}
        scores, tokens = [self.scores[node] for node in indices], [self.tokens[node] for node in indices]
        raw = [[said[node] for node in indices] for said in self.raw]
        return Candidates(scores, tokens, [place[self.parents[node]] for node in indices], raw)


def calibrated(p: Tensor, table: Sequence[float] | None) -> Tensor:
    """The calibrated probabilities of what a source gives ``p``, by its ``table`` at ``KNOTS`` (calibrate.h)."""
    if table is None:
        return p
    knots, least = p.new_tensor(table), 1 / (1 + math.exp(-KNOTS[0]))
    at = (torch.logit(p.clamp(least, 0.9999)) - KNOTS[0]).clamp(0, len(KNOTS) - 1)
    below = at.floor().clamp(max=len(KNOTS) - 2)
    inside = torch.lerp(knots[below.long()], knots[below.long() + 1], at - below)
    return torch.where(p <= least, p / least * knots[0], inside)
