"""The costs of steps: a table for this machine, model and drafter, scaled to recent steps."""

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

RECENT = 15  # number of steps whose median ratio of measured to expected seconds scales the table
LEVELS, NODES, STEP_WEIGHT = 4.0, 8.0, 0.1  # initial size of a draft by prices; weight of a step in its running mean
EXPONENT_RATE, EXPONENTS = 0.01, (0.5, 4.0)  # learning rate of the exponent of drafters' probabilities, and its range

# Of each position: the acceptance, and the number of observations.
AcceptanceTable = tuple[tuple[Annotated[float, Field(ge=0, le=1)], PositiveFloat], ...]


@dataclass(frozen=True, config={"allow_inf_nan": False})
class Costs:
    """Seconds of scoring and drafting.

    score[n]: a pass over n tokens (embedding, layers, readout).
    drafts: for each exit, the first drafted token and each further one.
    accepted: for each exit, the acceptance of drafted tokens in earlier processes.
    """

    score: dict[int, PositiveFloat]
    drafts: tuple[tuple[NonNegativeFloat, NonNegativeFloat], ...]
    accepted: tuple[AcceptanceTable, ...] = ()

    def scoring(self, tokens: float) -> float:
        """Seconds of a pass over ``tokens``: linear between sizes in ``score``, and from half the largest on."""
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
    """A table of costs, scaled to recent steps.

    max_depth: deepest draft that is considered.
    priced: whether drafts are sized by ``Prices``, so that the policy chooses only whether to draft.
    width: running mean of the scored tokens per drafted level; above 1 in a fixed tree.
    levels, nodes: running means of the levels of drafts by prices, and of a row's nodes.
    usual: running mean of the levels of drafts that cost something.
    exponents: ``Prices.exponent`` and ``Prices.free_exponent``.
    """

    def __init__(self, table: Costs, max_depth: int, priced: bool) -> None:
        self.table, self.max_depth, self.priced = table, max_depth, priced
        self.scoring = functools.lru_cache(table.scoring)
        self._passes = functools.lru_cache(64)(self._seconds_of_passes)
        self._drafts = [[table.drafting(n, exit) for n in range(max_depth + 1)] for exit in range(len(table.drafts))]
        self._scoring_ratios: deque[float] = deque(maxlen=RECENT)  # measured to expected seconds
        # Those of drafting, divided by the one of scoring, by exit and rows: drafting for more rows takes longer.
        self._drafting_ratios = defaultdict[tuple[int, int], deque[float]](lambda: deque([1.0], maxlen=RECENT))
        self.width, self.levels, self.usual, self.nodes = 1.0, LEVELS, LEVELS, NODES
        self.exponents = [1.0, 1.0]

    @property
    def scoring_ratio(self) -> float:
        """Recent ratio of measured to expected seconds of scoring."""
        return _median(self._scoring_ratios)

    def seconds(self, exit: int, rows: int, plain: int) -> tuple[Sequence[float], Sequence[float]]:
        """Expected seconds of scoring 0, 1, .. drafted tokens beside the roots, and of drafting 0, 1, .. levels."""
        ratio = _median(self._drafting_ratios[exit, rows + plain])
        if self.priced:  # a draft is as deep as it likes
            count, never = rows + plain, [math.inf] * (rows * self.max_depth - 1)
            passes = [self.scoring(count), *never, self.scoring(count + rows * self.nodes)]
            return passes, [0.0, *[ratio * self.table.drafting(self.levels, exit)] * self.max_depth]
        return self._passes(rows, plain, round(self.width, 1)), [ratio * seconds for seconds in self._drafts[exit]]

    def _seconds_of_passes(self, rows: int, plain: int, width: float) -> list[float]:
        return [self.scoring(rows + plain + n * width) for n in range(rows * self.max_depth + 1)]

    def prices(self, exit: int, rows: int, plain: int, speed: float) -> Prices:
        """The prices of levels, and of nodes of all rows. speed: tokens per second of the table."""
        count = rows + plain
        nodes = [speed * (self.scoring(count + n) - self.scoring(count)) for n in range(rows * MOST_NODES + 1)]
        level = speed * _median(self._drafting_ratios[exit, count]) * self.table.drafts[exit][1]
        joint, free = self.exponents
        return Prices(nodes, level + max(nodes[1], 0.0), joint, free, round(self.usual))

    def add_scoring(self, tokens: int, seconds: float) -> None:
        """Add the time of a pass over ``tokens``."""
        self._scoring_ratios.append(seconds / self.scoring(tokens))

    def add_drafting(self, exit: int, rows: int, levels: int, seconds: float) -> None:
        """Add the time of drafting, after ``add_scoring`` of the same step."""
        ratio = seconds / self.scoring_ratio / self.table.drafting(levels, exit)
        self._drafting_ratios[exit, rows].append(ratio)

    def add_size(self, levels: int, nodes: float) -> None:
        """Add the size of a draft by prices. nodes: of a row."""
        self.levels += STEP_WEIGHT * (levels - self.levels)
        self.usual += STEP_WEIGHT * (levels - self.usual) if levels else 0.0
        self.nodes += STEP_WEIGHT * (nodes - self.nodes)

    def add_accepted(self, prices: Prices, accepted: float) -> None:
        """Add what was accepted of a draft by prices, in tokens of all rows."""
        if prices.expected is not None:
            low, high = EXPONENTS
            step = math.exp(EXPONENT_RATE * (prices.expected - accepted))
            self.exponents[prices.levels == 0] = min(max(prices.exponent * step, low), high)

    def add_width(self, tokens: float) -> None:
        """Add the number of tokens per level of a draft."""
        self.width = 0.8 * self.width + 0.2 * tokens

    def scaled_table(self, accepted: tuple[AcceptanceTable, ...]) -> Costs:
        """The table, scaled to recent steps, with the acceptance of all requests."""
        scoring = self.scoring_ratio
        scales = [scoring * _median(self._drafting_ratios[exit, 1]) for exit in range(len(self.table.drafts))]
        drafts = tuple((a * first, a * further) for a, (first, further) in zip(scales, self.table.drafts, strict=True))
        return Costs({n: scoring * seconds for n, seconds in self.table.score.items()}, drafts, accepted)


def _median(ratios: Sequence[float]) -> float:
    """The lower median; 1 of none. Other work on the machine makes steps longer, never shorter."""
    return sorted(ratios)[(len(ratios) - 1) // 2] if ratios else 1.0
