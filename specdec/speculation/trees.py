"""Which draft tree to score: the one that is expected to keep the most tokens, for a number of nodes.

Knows accuracies and shapes, not tokens or models.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import NamedTuple


class Tree(NamedTuple):
    """A shape. Node i (block index i + 1) is the candidate of rank ``ranks[i]`` after its parent ``parents[i]``.

    parents: block indices, 0 = root, in topological order.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def depths(self) -> list[int]:
        """The position that each node is a candidate for: 0 right after the root."""
        out: list[int] = []
        for parent in self.parents:
            out.append(out[parent - 1] + 1 if parent else 0)
        return out


def best_tree(accuracy: Sequence[Sequence[float]], budget: int, chain: bool = False) -> Tree:
    """The tree of at most ``budget`` >= 1 nodes with the most accepted tokens, where positions err independently.

    chain: only first choices are drafted on from, so that the others stand beside a chain.
    accuracy[depth][rank]: probability in [0, 1] that the candidate of that rank is the right token at that depth.
    A node is accepted if all candidates on its path are right, so with probability a(path) = prod accuracy[d][r_d], and
    a tree keeps sum_nodes a(path) tokens (Medusa, arXiv 2401.10774, section 2.3.3). No node beats its parent, hence the
    ``budget`` likeliest paths always form a tree, and no other set of as many nodes has a larger sum: it is optimal.
    Nodes that are never right are left out.
    """
    parents, ranks = list[int](), list[int]()
    # (-a, order, parent, depth, rank); ``order`` makes ties fall to the node found first: parents before children.
    heap: list[tuple[float, int, int, int, int]] = []
    order = itertools.count()

    def offer(parent: int, depth: int, reach: float) -> None:
        for rank, right in enumerate(accuracy[depth] if depth < len(accuracy) else ()):
            if reach * right > 0:
                heapq.heappush(heap, (-reach * right, next(order), parent, depth, rank))

    offer(0, 0, 1.0)
    while heap and len(parents) < budget:
        negative, _, parent, depth, rank = heapq.heappop(heap)
        parents.append(parent)
        ranks.append(rank)
        if rank == 0 or not chain:
            offer(len(parents), depth + 1, -negative)
    return Tree(tuple(parents), tuple(ranks))
