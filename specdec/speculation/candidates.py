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
from specdec.speculation.trie import in_one_shape


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
    best = [found.best(count) for found, count in zip(rows, counts, strict=True)]
    return in_one_shape([(found.tokens, found.parents) for found in best], state.cache.device)[0]
