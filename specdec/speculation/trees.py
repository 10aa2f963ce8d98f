"""The shape of draft trees: the most expected accepted tokens for a number of nodes, or for the price of scoring."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from specdec.runtimes.draft_path import TreeLimits
from specdec.speculation.candidates import Candidates

MOST_NODES = 24  # maximum nodes of a tree that is sized by prices
TYPICAL_NODES = 2, 6  # number of nodes of a row: the mean price between both is the price of a node of another level
Choice = tuple[int, float, float]  # a token, its raw probability after the tokens before it, and the calibrated one


@dataclass
class Prices:
    """The costs of scoring and drafting, in tokens (seconds times the present speed in tokens per second).

    A *node* is a drafted token that is scored; a *level* is all tokens that a drafter drafts at one depth, in one pass.
    A drafter takes a node, or drafts a level, while the node or level is expected to add more accepted tokens than it
    costs. The nodes of several rows (sequences) compete with each other.

    nodes: nodes[n] is the cost of scoring n nodes, of all rows together, besides the roots.
    level: the cost of drafting another level for all rows.
    first: what the first level costs beyond ``level``.
    rates: rates[b][l] is the probability that level l (from 0 on) has the right token for row b, where no other source
        of candidates (such as n-grams) has it. A row has as many rates as its draft may have levels; a row that does
        not draft has none.
    tables: tables[b][s] has the calibrated probabilities of row b and source s (``Traits.sources``) at the log-odds
        ``KNOTS`` of raw probabilities; zeros in a row that does not draft. Empty: raw probabilities count as they are.
    allowance: expected loss, in tokens, that is accepted when nodes are chosen, as exploration.
    level_allowance: expected loss, in tokens, that is accepted when levels are chosen, as exploration.
    beyond: beyond[b] is what each node of row b costs beyond ``nodes``, because it attends to more cached tokens;
        empty: nothing.
    """

    nodes: Sequence[float]
    level: float = 0.0
    first: float = 0.0
    rates: Sequence[Sequence[float]] = ()
    tables: Sequence[Sequence[Sequence[float]]] = ()
    allowance: float = 0.0
    level_allowance: float = 0.0
    beyond: Sequence[float] = ()

    def of(self, *tables: int) -> Prices:
        """Return a copy with only the calibration tables (raw to calibrated probabilities) of some sources.

        tables: indices of these sources of candidates, in the wanted order.
        """
        return replace(self, tables=[[row[number] for number in tables] for row in self.tables])

    def limits(self, levels: int, width: int) -> TreeLimits:
        """Return limits by which a drafter grows a tree level by level, from these costs and the mean of rows' rates.

        levels: maximum number of levels (depth) of the tree. width: ``TreeLimits.width``, the number of children of a
            node and, with one row, of nodes of a level that get children.
        """
        drafting = [row for row in self.rates if row]
        each = [
            [row[level] for row in drafting if level < len(row)] for level in range(max(map(len, drafting), default=0))
        ]
        rates = [sum(level) / len(level) for level in each]
        some, more = (min(count * max(len(drafting), 1), len(self.nodes) - 1) for count in TYPICAL_NODES)
        node = (self.nodes[more] - self.nodes[some]) / max(more - some, 1)
        return TreeLimits(levels, width, self.level, node, rates)

    def levels(self, without_levels: Sequence[Candidates] = ()) -> int:
        """Return the number of draft levels with the largest expected gain, accepted tokens minus costs; 0: no gain.

        A level, all tokens at one depth, is drafted in one pass of the drafter. It adds a node to each row where the
        node is expected to add more than it costs, or replaces one. A loss up to ``level_allowance`` counts as a gain,
        to explore.

        without_levels: for each row the nodes that would be drafted without any level, as by n-grams; (): there are
            none.
        """
        gain, count = self.best_levels(without_levels)
        return count if gain + self.level_allowance > 0 else 0

    def best_levels(self, without_levels: Sequence[Candidates] = ()) -> tuple[float, int]:
        """Return (gain, count): the largest expected gain of one or more draft levels, and the number of these levels.

        A level is all tokens at one depth, drafted in one pass of the drafter. The gain is accepted tokens minus costs,
        in tokens, and may be negative. (-inf, 0): no row may have levels.

        without_levels: for each row the nodes that would be drafted without any level, as by n-grams; (): there are
            none.
        """
        scored, most = sum(len(own.tokens) for own in without_levels), len(self.nodes) - 1
        expected = [own.by_level() for own in without_levels] or [[] for _ in self.rates]
        # Probability that a row is right up to the level: by the draft without levels; else by so many levels after it
        on, off = [float(len(rates) > 0) for rates in self.rates], [list[float]() for _ in self.rates]
        added, taken, best, count = 0.0, 0, -math.inf, 0

        def price(nodes: int) -> float:
            return self.nodes[min(max(scored, nodes), most)]

        for level in range(max(map(len, self.rates), default=0)):
            chances: list[float] = []
            for row, rates in enumerate(self.rates):
                if level >= len(rates):
                    on[row] = 0.0
                    continue
                here = expected[row][level] if level < len(expected[row]) else 0.0
                ended, on[row] = on[row] - here, here
                before = [ended, *off[row]]
                off[row] = [chance * rate for chance, rate in zip(before, rates[: level + 1], strict=True)]
                chances.append(sum(off[row]))
            node = price(taken + 1) - price(taken)
            worthy = [chance for chance in chances if chance > node]
            added, taken = added + sum(worthy), taken + len(worthy)
            if (gain := added - self.first - (level + 1) * self.level - price(taken) + price(0)) > best:
                best, count = gain, level + 1
            if sum(on) + sum(chances) <= self.level:  # no further level adds more
                break
        return best, count

    def take(self, probabilities: Sequence[float]) -> int:
        """Return the number of nodes with the largest expected gain, accepted tokens minus costs; 0: no gain.

        A loss up to ``allowance`` counts as a gain, to explore.

        probabilities: the calibrated probability that each node's path is accepted, minus what a node of its row costs
            extra (``beyond``), largest first.
        """
        sums = itertools.accumulate(probabilities)
        gains = [tokens - price for tokens, price in zip(sums, self.nodes[1:], strict=False)]
        return gains.index(max(gains)) + 1 if gains and max(gains) + self.allowance > 0 else 0


def likeliest_paths(after: Callable[[Sequence[int]], Iterable[Choice]], budget: int) -> Candidates:
    """Return the tree of at most ``budget`` >= 1 nodes with the most expected accepted tokens, likeliest nodes first.

    after: function from the tokens on the path to a node (none for the root) to the choices after it: (token id, raw
        probability, calibrated probability) each. It is called once for each node that gets children.
    budget: maximum number of nodes.

    A node is accepted if all tokens on its path are right, so with the product of their probabilities, and a tree keeps
    the sum over its nodes (Medusa, arXiv 2401.10774, section 2.3.3). No node beats its parent, hence the ``budget``
    likeliest paths always form a tree, and no other set of as many nodes has a larger sum: it is optimal. Nodes that
    are never right are left out.
    """
    found = Candidates.none()
    # (-value, order, parent, path, raw); ``order`` makes ties fall to the node found first: parents before children.
    heap: list[tuple[float, int, int, list[int], float]] = []
    order = itertools.count()

    def offer(parent: int, path: list[int], reach: float) -> None:
        for token, raw, right in after(path):
            if (value := reach * right) > 0:
                heapq.heappush(heap, (-value, next(order), parent, [*path, token], raw))

    offer(0, [], 1.0)
    while heap and len(found.tokens) < budget:
        negative, _, parent, path, raw = heapq.heappop(heap)
        found.scores.append(math.log(-negative))
        found.tokens.append(path[-1])
        found.parents.append(parent)
        found.raw[0].append(raw)
        if len(found.tokens) < budget:
            offer(len(found.tokens), path, -negative)
    return found
