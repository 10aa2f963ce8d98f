"""Which draft tree to score: the one that is expected to keep the most tokens, for a number of nodes or for its price.

Knows accuracies, prices and shapes, not tokens or models.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MOST_NODES = 24  # most nodes of a tree that is sized by prices


@dataclass
class Prices:
    """What a draft costs, in accepted tokens: what the engine yields in the seconds that it takes.

    Nodes are taken in order of the probability that they are accepted, as many as bring the most tokens beyond the
    price of scoring them. Another level is drafted while the likeliest path so far is worth it. A drafter's own
    probability p counts as p ** ``exponent``, which is learned from what is accepted. Of several rows, the nodes of
    all are taken together.

    nodes: of scoring n = 0, 1, .. nodes beside the roots. level: of drafting another level for all rows.
    expected, levels: what became of it: the tokens expected of the nodes taken, and the levels that were drafted.
    """

    nodes: Sequence[float]
    level: float = 0.0
    exponent: float = 1.0
    expected: float | None = None
    levels: int = 0

    @property
    def bar(self) -> float:
        """The drafter's own probability that a path must have for another level."""
        return min(self.level, 1.0) ** (1 / self.exponent)

    def take(self, probabilities: Sequence[float], least: int = 0, exactly: int | None = None, rows: int = 1) -> int:
        """How many nodes to score: ``exactly`` so many if they are given, else ``least`` or more.

        probabilities: calibrated, of the nodes in the order in which they are taken; where each is one of ``rows``
        nodes, their mean.
        """
        nodes = self.nodes[::rows]
        most = min(len(probabilities), max(len(nodes) - 1, least))
        sums = [0.0, *itertools.accumulate(rows * probability for probability in probabilities)]
        if exactly is not None:
            count = min(exactly, len(probabilities))
        else:
            gains = [tokens - price for tokens, price in zip(sums[least : most + 1], nodes[least:], strict=False)]
            count = least + gains.index(max(gains)) if gains else most
        self.expected = sums[count]
        return count

    def calibrated(self, logs: Sequence[float]) -> list[float]:
        """The probabilities that a drafter's log-probabilities stand for."""
        return [math.exp(self.exponent * log) for log in logs]


class Tree(NamedTuple):
    """A shape. Node i (block index i + 1) is the candidate of rank ``ranks[i]`` after its parent ``parents[i]``.

    parents: block indices, 0 = root, in topological order.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def first(self, count: int) -> Tree:
        """Its first ``count`` nodes."""
        return Tree(self.parents[:count], self.ranks[:count])

    def paths(self) -> list[tuple[int, ...]]:
        """The ranks on the path to each node, its own last."""
        out: list[tuple[int, ...]] = [()]
        for parent, rank in zip(self.parents, self.ranks, strict=True):
            out.append((*out[parent], rank))
        return out[1:]

    def depths(self) -> list[int]:
        """The position that each node is a candidate for: 0 right after the root."""
        out: list[int] = []
        for parent in self.parents:
            out.append(out[parent - 1] + 1 if parent else 0)
        return out


def best_tree(accuracy: Sequence[Sequence[float]], budget: int, chain: bool = False) -> Tree:
    """The tree of at most ``budget`` >= 1 nodes with the most accepted tokens, where positions err independently.

    See ``best_first``.
    """
    return best_first(accuracy, budget, chain)[0]


def best_first(accuracy: Sequence[Sequence[float]], budget: int, chain: bool = False) -> tuple[Tree, list[float]]:
    """The tree of at most ``budget`` >= 1 nodes with the most accepted tokens, and how often each node is, best first.

    accuracy[depth][rank]: probability in [0, 1] that the candidate of that rank is the right token at that depth.
    chain: only first choices are drafted on from, so that the others stand beside a chain.
    """
    return grown(lambda path: accuracy[len(path)] if len(path) < len(accuracy) else (), budget, chain)


def grown(
    after: Callable[[tuple[int, ...]], Sequence[float]], budget: int, chain: bool = False
) -> tuple[Tree, list[float]]:
    """``best_first`` where what is right at a depth depends on what comes before.

    after: takes the ranks on the path to a node, () for the root. Returns the probabilities of the candidates after
    that node; none where there are none. Called once for each node that is drafted on from.
    A node is accepted if all candidates on its path are right, so with probability a(path) = prod accuracy[d][r_d], and
    a tree keeps sum_nodes a(path) tokens (Medusa, arXiv 2401.10774, section 2.3.3). No node beats its parent, hence the
    ``budget`` likeliest paths always form a tree, and no other set of as many nodes has a larger sum: it is optimal.
    Nodes that are never right are left out.
    """
    parents, ranks, values = list[int](), list[int](), list[float]()
    # (-a, order, parent, path); ``order`` makes ties fall to the node found first: parents before children.
    heap: list[tuple[float, int, int, tuple[int, ...]]] = []
    order = itertools.count()

    def offer(parent: int, path: tuple[int, ...], reach: float) -> None:
        for rank, right in enumerate(after(path)):
            if (value := reach * right) > 0:
                heapq.heappush(heap, (-value, next(order), parent, (*path, rank)))

    offer(0, (), 1.0)
    while heap and len(parents) < budget:
        negative, _, parent, path = heapq.heappop(heap)
        parents.append(parent)
        ranks.append(path[-1])
        values.append(-negative)
        if len(parents) < budget and (path[-1] == 0 or not chain):
            offer(len(parents), path, -negative)
    return Tree(tuple(parents), tuple(ranks)), values
