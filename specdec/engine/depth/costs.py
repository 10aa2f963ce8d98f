"""What steps cost: a table for this machine, model and drafter, and what recent steps say of it."""

from __future__ import annotations

import bisect
import functools
import math
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass

from specdec.speculation.trees import MOST_NODES, Prices

RECENT = 15  # steps whose median ratio of measured to expected seconds scales the table
LEVELS, NODES, LATELY = 4.0, 8.0, 0.1  # size of a draft by prices at first; weight of a step in its running mean
LEARNED, EXPONENTS = 0.01, (0.5, 4.0)  # step by which the exponent of drafters' probabilities moves, and its bounds

Known = tuple[tuple[Annotated[float, Field(ge=0, le=1)], PositiveFloat], ...]  # per position: acceptance, observations


@dataclass(frozen=True, config={"allow_inf_nan": False})
class Costs:
    """Seconds: ``score[n]`` of a pass over n tokens (embedding, layers, readout), ``drafts`` of drafting.

    drafts: for each exit, the first drafted token and each further one. accepted: for each exit and position, how often
    the drafted token was accepted in earlier requests, and how many observations that rests on.
    """

    score: dict[int, PositiveFloat]
    drafts: tuple[tuple[NonNegativeFloat, NonNegativeFloat], ...]
    accepted: tuple[Known, ...] = ()

    def scoring(self, tokens: float) -> float:
        """Seconds of a pass over ``tokens``: linear between the sizes in ``score``, and on from half the largest."""
        sizes = sorted(self.score)
        at = min(max(bisect.bisect_left(sizes, tokens), 1), len(sizes) - 1)
        below, above = sizes[at - 1], sizes[at]
        if tokens > above:
            below = sizes[bisect.bisect_right(sizes, above / 2) - 1]
        low, high = self.score[below], self.score[above]
        return low + (tokens - below) / (above - below) * max(high - low, 0.0)

    def drafting(self, depth: float, exit: int = -1) -> float:
        """Seconds of drafting ``depth`` tokens deep."""
        first, further = self.drafts[exit]
        return max(first + (depth - 1) * further, 1e-9) if depth else 0.0


class CostModel:
    """A table of costs, scaled to what recent steps took.

    most: deepest draft. priced: drafts are sized by ``Prices``, so the policy chooses only whether to draft.
    """

    def __init__(self, table: Costs, most: int, priced: bool) -> None:
        self.table, self.most, self.priced = table, most, priced
        self.scoring = functools.lru_cache(table.scoring)
        self._passes = functools.lru_cache(64)(self._passes_of)
        self._drafts = [[table.drafting(n, exit) for n in range(most + 1)] for exit in range(len(table.drafts))]
        self._paces: deque[float] = deque(maxlen=RECENT)  # measured to expected seconds of scoring
        # Of drafting, over that of scoring: by exit and number of rows, as drafting for more of them takes longer.
        self._ratios = defaultdict[tuple[int, int], deque[float]](lambda: deque([1.0], maxlen=RECENT))
        self.width = 1.0  # tokens lately scored per drafted depth: more than 1 in a fixed tree
        self.levels, self.nodes = LEVELS, NODES  # of late drafts by prices: levels drafted, and nodes of a row
        self.exponent = 1.0  # ``Prices.exponent``

    @property
    def pace(self) -> float:
        """Measured to expected seconds of scoring, lately."""
        return _median(self._paces)

    def seconds(self, exit: int, rows: int, plain: int) -> tuple[Sequence[float], Sequence[float]]:
        """Expected seconds of scoring 0, 1, .. drafted tokens beside the roots, and of drafting so many deep."""
        ratio = _median(self._ratios[exit, rows + plain])
        if self.priced:  # a draft is as deep as it likes
            count, never = rows + plain, [math.inf] * (rows * self.most - 1)
            passes = [self.scoring(count), *never, self.scoring(count + rows * self.nodes)]
            return passes, [0.0, *[ratio * self.table.drafting(self.levels, exit)] * self.most]
        return self._passes(rows, plain, round(self.width, 1)), [ratio * seconds for seconds in self._drafts[exit]]

    def _passes_of(self, rows: int, plain: int, width: float) -> list[float]:
        return [self.scoring(rows + plain + n * width) for n in range(rows * self.most + 1)]

    def prices(self, exit: int, rows: int, plain: int, speed: float) -> Prices:
        """What levels, and nodes of all rows together, cost at ``speed`` tokens by a second of the table."""
        count = rows + plain
        nodes = [speed * (self.scoring(count + n) - self.scoring(count)) for n in range(rows * MOST_NODES + 1)]
        level = speed * _median(self._ratios[exit, count]) * self.table.drafts[exit][1]
        return Prices(nodes, level + max(nodes[1], 0.0), self.exponent)

    def scored(self, tokens: int, seconds: float) -> None:
        """A pass over ``tokens`` took so long."""
        self._paces.append(seconds / self.scoring(tokens))

    def drafted(self, exit: int, rows: int, levels: int, seconds: float) -> None:
        """Drafting so many levels took so long, after the pass of the same step was taken in."""
        self._ratios[exit, rows].append(seconds / self.pace / self.table.drafting(levels, exit))

    def sized(self, prices: Prices, levels: int, nodes: float, accepted: float) -> None:
        """A draft by prices had so many levels, and a row so many nodes, of which so many were accepted."""
        self.levels += LATELY * (levels - self.levels)
        self.nodes += LATELY * (nodes - self.nodes)
        if prices.expected is not None:
            low, high = EXPONENTS
            self.exponent = min(max(self.exponent * math.exp(LEARNED * (prices.expected - accepted)), low), high)

    def widened(self, tokens: float) -> None:
        """A draft had so many tokens for each of its depth."""
        self.width = 0.8 * self.width + 0.2 * tokens

    def measured(self, accepted: tuple[Known, ...]) -> Costs:
        """The table as recent steps have it, with what is known of acceptance."""
        pace = self.pace
        scales = [pace * _median(self._ratios[exit, 1]) for exit in range(len(self.table.drafts))]
        drafts = tuple((a * first, a * further) for a, (first, further) in zip(scales, self.table.drafts, strict=True))
        return Costs({n: pace * seconds for n, seconds in self.table.score.items()}, drafts, accepted)


def _median(ratios: Sequence[float]) -> float:
    """The lower median; 1 of none. What else the machine does only ever makes a step longer."""
    return sorted(ratios)[(len(ratios) - 1) // 2] if ratios else 1.0
