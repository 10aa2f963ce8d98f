"""The shape of a draft tree: the most expected accepted tokens for a number of nodes, or for the price of scoring them.

Knows accuracies, prices and shapes, not tokens or models.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MOST_NODES = 24  # maximum nodes of a tree that is sized by prices
LEARNED = 0.8  # how often a learned drafter is right at a level, if it was before


@dataclass
class Prices:
    """The costs of a draft, in accepted tokens: what the engine yields in the seconds that it takes.

    Nodes are taken in order of the probability that they are accepted, as many as bring the most tokens beyond the
    price of scoring them. Another level is drafted while the rows' likeliest paths so far are worth it together
    (``pays``). A drafter's own probability p counts as p ** ``exponent``, which is learned. Of several rows, the nodes
    of all are taken together.

    nodes: price of scoring n = 0, 1, .. nodes beside the roots.
    level: price of drafting another level for all rows, before its nodes are scored.
    node: price of scoring a node of that level.
    free_exponent: ``exponent`` of drafts that cost nothing, such as those of n-grams beside a learned drafter.
    trust: how many times what is expected of a learned drafter's levels they add.
    free, added: the result: expected tokens of the free draft, and those that a learned one is expected to add.
    expected, levels: the result: expected tokens of the nodes taken, and number of levels that were drafted (0: the
        draft cost nothing; None: as many as the draft has).
    """

    nodes: Sequence[float]
    level: float = 0.0
    node: float = 0.0
    exponent: float = 1.0
    free_exponent: float = 1.0
    trust: float = 1.0
    free: float = 0.0
    added: float = 0.0
    expected: float | None = None
    levels: int | None = None

    @property
    def bar(self) -> tuple[float, float, float]:
        """What ``TreeLimits`` has of them: the prices of a level and of a node, and the exponent."""
        return self.level, self.node, self.exponent

    def pays(self, likeliest: Sequence[float]) -> bool:
        """Whether another level is worth its price: the next node of a row is accepted at most as often as its path.

        likeliest: calibrated probability of each row's likeliest path.
        """
        return sum(max(probability - self.node, 0.0) for probability in likeliest) >= self.level

    def learned_pays(self, right: Sequence[float], scored: int, rows: int) -> bool:
        """Whether levels of a learned drafter are expected to add more to the free draft than they cost.

        A level is right if the free draft is, or if the learned drafter is; each goes on independently. It adds a node
        to each of ``rows``. right: expected tokens of the free draft at each level, of all rows; scored: its nodes.
        """
        reach, before, added, best, most = 1.0, float(rows), 0.0, -math.inf, len(self.nodes) - 1
        for level, free in enumerate(right, start=1):
            reach *= 1 - (1 - free / before if before else 1.0) * (1 - LEARNED)
            added, before = added + rows * reach - free, free
            scoring = self.nodes[min(scored + level * rows, most)] - self.nodes[min(scored, most)]
            gain = self.trust * added - level * self.level - scoring
            if gain > best:
                best, self.added = gain, added
        self.free = sum(right)
        return best > 0

    def take(self, probabilities: Sequence[float], least: int = 0, exactly: int | None = None, rows: int = 1) -> int:
        """The number of nodes to score: ``exactly`` as many as given, else ``least`` or more.

        probabilities: calibrated, of the nodes in the order in which they are taken; if each stands for one node of
            each of ``rows``, their mean.
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

    def calibrated(self, logs: Sequence[float], free: bool = False) -> list[float]:
        """Probabilities of acceptance, from a drafter's log-probabilities. free: of a draft that cost nothing."""
        exponent = self.free_exponent if free else self.exponent
        return [math.exp(exponent * log) for log in logs]


class TreeShape(NamedTuple):
    """Node i (block index i + 1) is the candidate of rank ``ranks[i]`` after its parent.

    parents: block index of each node's parent (0: the root), in topological order.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def first(self, count: int) -> TreeShape:
        """Its first ``count`` nodes."""
        return TreeShape(self.parents[:count], self.ranks[:count])

    def paths(self) -> list[tuple[int, ...]]:
        """The ranks on the path from the root to each node."""
        out: list[tuple[int, ...]] = [()]
        for parent, rank in zip(self.parents, self.ranks, strict=True):
            out.append((*out[parent], rank))
        return out[1:]

    def depths(self) -> list[int]:
        """The position of each node; 0 is right after the root."""
        out: list[int] = []
        for parent in self.parents:
            out.append(out[parent - 1] + 1 if parent else 0)
        return out


def best_first(accuracy: Sequence[Sequence[float]], budget: int, chain: bool = False) -> tuple[TreeShape, list[float]]:
    """The tree of at most ``budget`` >= 1 nodes with the most expected accepted tokens, and each node's probability.

    Positions err independently. Nodes come in order of their probability.

    accuracy[depth][rank]: probability in [0, 1] that the candidate of that rank is the right token at that depth.
    chain: whether only first choices have children, so that the others are siblings beside a chain.
    """
    return grow_best_first(lambda path: accuracy[len(path)] if len(path) < len(accuracy) else (), budget, chain)


def grow_best_first(
    after: Callable[[tuple[int, ...]], Sequence[float]], budget: int, chain: bool = False
) -> tuple[TreeShape, list[float]]:
    """``best_first`` for candidates that depend on the path before them.

    after: takes the ranks on the path to a node, () for the root; returns the probabilities of the candidates after it.
        Called once for each node that gets children.

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
    return TreeShape(tuple(parents), tuple(ranks)), values
