"""The shape of a draft tree: the most expected accepted tokens for a number of nodes, or for the price of scoring them.

Knows accuracies, prices and shapes, not tokens or models.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from specdec.runtimes.draft_path import TreeLimits
from specdec.speculation.candidates import Candidates

MOST_NODES = 24  # maximum nodes of a tree that is sized by prices
USUAL = 2, 6  # nodes of a row between which the mean price of one counts for another level


@dataclass
class Prices:
    """What scoring and drafting cost, in tokens (seconds times the present speed), and how likely drafts are accepted.

    A node is taken, and a level drafted, while the tokens that it is expected to add exceed its price. Of several rows,
    the nodes of all are taken together.

    nodes: price of scoring n = 0, 1, .. nodes beside the roots.
    level: price of drafting another level for all rows. first: what the first one costs beyond that.
    rates: [rows][levels], how likely the first, second, .. level has the right token where no other source has it.
    tables: [rows][tables], calibrated probabilities at the log-odds ``KNOTS`` (``Drafter.sources``); none: what
        sources say counts.
    try_levels: whether levels are drafted where they are not expected to pay, to learn whether they do.
    """

    nodes: Sequence[float]
    level: float = 0.0
    first: float = 0.0
    rates: Sequence[Sequence[float]] = ()
    tables: Sequence[Sequence[Sequence[float]]] = ()
    try_levels: bool = False

    def of(self, *tables: int) -> Prices:
        """The same with some of the tables."""
        return replace(self, tables=[[row[number] for number in tables] for row in self.tables])

    def limits(self, levels: int, width: int) -> TreeLimits:
        """How far levels are drafted (``TreeLimits``)."""
        rates = [sum(level) / len(level) for level in zip(*self.rates, strict=True)]
        some, more = (min(count * max(len(self.rates), 1), len(self.nodes) - 1) for count in USUAL)
        node = (self.nodes[more] - self.nodes[some]) / max(more - some, 1)
        return TreeLimits(levels, width, self.level, node, rates)

    def levels(self, free: Sequence[Candidates] = ()) -> int:
        """The number of levels that are expected to add most beyond their price; 0: they do not pay.

        free: of each row, the nodes of a draft without levels. A level adds one to each row where
            that is worth it, or takes the place of one.
        """
        return self.best_levels(free)[1] or int(self.try_levels)

    def best_levels(self, free: Sequence[Candidates] = ()) -> tuple[float, int]:
        """The most that levels are expected to add beyond their price, in tokens, and their number."""
        scored, most = sum(len(own.tokens) for own in free), len(self.nodes) - 1
        expected = [own.by_level() for own in free] or [[] for _ in self.rates]
        # Probability that a row is right up to the level: by the free draft; else by each number of levels behind it
        on, off = [1.0] * len(self.rates), [list[float]() for _ in self.rates]
        added, taken, best, count = 0.0, 0, 0.0, 0

        def price(nodes: int) -> float:
            return self.nodes[min(max(scored, nodes), most)]

        for level in range(min(map(len, self.rates), default=0)):
            chances = list[float]()
            for row, rates in enumerate(self.rates):
                here = expected[row][level] if level < len(expected[row]) else 0.0
                ended, on[row] = on[row] - here, here
                off[row] = [chance * rate for chance, rate in zip([ended, *off[row]], rates, strict=False)]
                chances.append(sum(off[row]))
            node = price(taken + 1) - price(taken)
            worthy = [chance for chance in chances if chance > node]
            added, taken = added + sum(worthy), taken + len(worthy)
            if (gain := added - self.first - (level + 1) * self.level - price(taken) + price(0)) > best:
                best, count = gain, level + 1
            if sum(on) + sum(chances) <= self.level:  # no further level adds more
                break
        return best, count

    def take(self, probabilities: Sequence[float], least: int = 0, exactly: int | None = None, rows: int = 1) -> int:
        """The number of nodes to score: ``exactly`` as many as given, else ``least`` or more.

        probabilities: calibrated, of the nodes in the order in which they are taken; if each stands for one node of
            each of ``rows``, their mean.
        """
        nodes = self.nodes[::rows]
        most = min(len(probabilities), max(len(nodes) - 1, least))
        if exactly is not None:
            return min(exactly, len(probabilities))
        sums = [0.0, *itertools.accumulate(rows * probability for probability in probabilities)]
        gains = [tokens - price for tokens, price in zip(sums[least : most + 1], nodes[least:], strict=False)]
        return least + gains.index(max(gains)) if gains else most


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


def best_first(accuracy: Sequence[Sequence[float]], budget: int) -> tuple[TreeShape, list[float]]:
    """The tree of at most ``budget`` >= 1 nodes with the most expected accepted tokens, and each node's probability.

    Positions err independently. Nodes come in order of their probability.

    accuracy[depth][rank]: probability in [0, 1] that the candidate of that rank is the right token at that depth.
    """
    return grow_best_first(lambda path: accuracy[len(path)] if len(path) < len(accuracy) else (), budget)


def grow_best_first(after: Callable[[tuple[int, ...]], Sequence[float]], budget: int) -> tuple[TreeShape, list[float]]:
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
        if len(parents) < budget:
            offer(len(parents), path, -negative)
    return TreeShape(tuple(parents), tuple(ranks)), values
