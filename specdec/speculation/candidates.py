"""From candidates with probabilities to a draft: as many of the likeliest nodes as pay for their scoring.

Knows prices and trees, not where candidates come from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from operator import itemgetter

from specdec.runtimes.tree_drafting import Candidates
from specdec.speculation.draft import Draft, State
from specdec.speculation.trees import MOST_NODES


def finish(rows: Sequence[Candidates], limit: int, nodes: int | None, state: State, levels: int) -> Draft:
    """The draft of each row's best candidates: ``nodes`` of them; None: those worth their price, or ``limit``.

    levels: how many were drafted to find them.
    """
    prices, counts = state.prices, [limit if nodes is None else nodes] * len(rows)
    if prices is not None:
        prices.levels = levels
        every = [(score, row) for row, found in enumerate(rows) for score in sorted(found.scores)[-MOST_NODES:]]
        every.sort(key=itemgetter(0), reverse=True)
        likely = prices.calibrated([score for score, _ in every])
        taken = Counter(row for _, row in every[: prices.take(likely, exactly=None if nodes is None else sum(counts))])
        counts = [taken[row] for row in range(len(rows))]
    return joined([found.best(count) for found, count in zip(rows, counts, strict=True)], state)


def joined(rows: Sequence[Candidates], state: State) -> Draft:
    """One shape for all rows: a node is the child of that rank of its parent; rows that lack it have -1 there."""
    parents: list[int] = []
    slots: dict[tuple[int, int], int] = {}  # (parent, rank among its children) -> block index
    table: list[dict[int, int]] = []
    for found in rows:
        places, ranks, own = [0], dict[int, int](), dict[int, int]()
        for token, parent in zip(found.tokens, found.parents, strict=True):
            place = places[parent]
            slot = place, ranks.get(place, 0)
            ranks[place] = slot[1] + 1
            if slot not in slots:
                parents.append(place)
                slots[slot] = len(parents)
            places.append(slots[slot])
            own[slots[slot]] = token
        table.append(own)
    tokens = [[own.get(node, -1) for node in range(1, len(parents) + 1)] for own in table]
    return Draft(tokens, tuple(parents), device=state.cache.device)
