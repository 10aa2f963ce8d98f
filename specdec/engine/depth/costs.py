"""The costs of steps: a table for this machine, model and drafter, scaled to recent steps."""

from __future__ import annotations

import bisect
import functools
import math
from collections import defaultdict, deque
from collections.abc import Sequence

from pydantic import NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass

from specdec.speculation.trees import MOST_NODES, Prices

RECENT = 15  # number of steps whose median corrects a cost
EXPONENT_RATE, EXPONENTS = 0.01, (0.5, 4.0)  # learning rate of the exponent of drafters' probabilities, and its range

# The means of ``RowHistory``, and their numbers of observations.
YieldTable = tuple[tuple[float, PositiveFloat], ...]


@dataclass(frozen=True, config={"allow_inf_nan": False})
class Costs:
    """Seconds of scoring and drafting.

    score[n]: a pass over n tokens (embedding, layers, readout).
    drafts: for each exit, the first drafted token and each further one.
    yields: for each exit, what its drafts yielded in earlier processes.
    """

    score: dict[int, PositiveFloat]
    drafts: tuple[tuple[NonNegativeFloat, NonNegativeFloat], ...]
    yields: tuple[YieldTable, ...] = ()

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

    Recent steps scale all figures alike. What a pass with drafted tokens takes beyond the table, as against one
    without, is seen where the two come one right after the other: the speed of the machine is then the same.

    width: running mean of the scored tokens per drafted level; above 1 in a fixed tree.
    exponents: of the probabilities of each exit (``Prices.exponent``).
    """

    def __init__(self, table: Costs, max_depth: int) -> None:
        exits = range(len(table.drafts))
        self.table, self.width = table, 1.0
        self.scoring = functools.lru_cache(table.scoring)
        self._passes = functools.lru_cache(64)(self._seconds_of_passes)
        self._levels = [[table.drafting(n, exit) for n in range(max_depth + 1)] for exit in exits]
        self._ratios: deque[float] = deque(maxlen=RECENT)  # measured to expected seconds of passes
        # Those of drafting, divided by the one of passes, by exit and rows: drafting for more rows takes longer.
        self._drafting_ratios = defaultdict[tuple[int, int], deque[float]](lambda: deque([1.0], maxlen=RECENT))
        self._beyond = defaultdict[int, deque[float]](lambda: deque([0.0] * 2, maxlen=RECENT))  # by rows
        self._before = 0, 0, 0.0, -1  # of the last step: rows, drafted tokens, seconds of the pass, exit that drafted
        self.exponents = [1.0 for _ in exits]

    @property
    def ratio(self) -> float:
        """Recent ratio of measured to expected seconds."""
        return _median(self._ratios)

    def drafting(self, exit: int, rows: int) -> list[float]:
        """Expected seconds of drafting 0, 1, .. levels for ``rows``."""
        ratio = _median(self._drafting_ratios[exit, rows])
        return [ratio * seconds for seconds in self._levels[exit]]

    def beyond(self, rows: int) -> float:
        """Seconds that a pass with drafted tokens takes beyond those of the table."""
        return _median(self._beyond[rows])

    def passes(self, rows: int, most: int, width: float = 1.0) -> list[float]:
        """Expected seconds of passes over ``rows`` roots and 0, 1, .. ``most`` times ``width`` drafted tokens."""
        return self._passes(rows, most, round(width, 1), self.beyond(rows))

    def _seconds_of_passes(self, rows: int, most: int, width: float, beyond: float) -> list[float]:
        plain = self.scoring(rows)
        return [plain, *(max(self.scoring(rows + n * width) + beyond, plain) for n in range(1, most + 1))]

    def cost(self, exit: int, rows: int, tokens: int, levels: int) -> float:
        """The cost of drafting ``levels`` and scoring ``tokens`` in passes over ``rows`` roots, without ``beyond``."""
        plain = self.scoring(rows)
        return (self.scoring(rows + tokens) + self.drafting(exit, rows)[levels]) / plain - 1

    def prices(self, exit: int, drafting: int, rows: int, speed: float, trust: float) -> Prices:
        """The prices of levels, and of nodes of the ``drafting`` ones of ``rows``. speed: tokens per second."""
        passes = self.passes(rows, drafting * MOST_NODES)
        _, one, two, *_ = self.drafting(exit, rows)
        level, node = speed * (two - one), speed * max(passes[2 * drafting] - passes[drafting], 0.0) / drafting
        nodes = [speed * (seconds - passes[0]) for seconds in passes]
        return Prices(nodes, level, node, self.exponents[exit], self.exponents[0], trust)

    def add_step(self, exit: int, rows: int, tokens: int, levels: int, drafting: float, other: float) -> None:
        """Add a step over ``rows`` roots and drafted ``tokens``. exit: -1 if nothing is drafted. Times: seconds."""
        self._ratios.append(other / self.passes(rows, tokens)[-1])
        before_rows, before_tokens, before, before_exit = self._before
        if before_rows == rows and bool(before_tokens) != bool(tokens):
            drafted, plain, count = (other, before, tokens) if tokens else (before, other, before_tokens)
            self._beyond[rows].append(drafted / plain * self.scoring(rows) - self.scoring(rows + count))
        if exit >= 0:
            ratio, known = drafting / self.ratio / self._levels[exit][levels], self._drafting_ratios[exit, rows]
            if exit == before_exit or ratio < _median(known):  # the first draft after others takes longer
                known.append(ratio)
        self._before = rows, tokens, other, exit

    def add_accepted(self, exit: int, prices: Prices, accepted: float) -> None:
        """Add what was accepted of a draft by prices, in tokens of all rows."""
        if prices.expected is not None:
            low, high = EXPONENTS
            step = math.exp(EXPONENT_RATE * (prices.expected - accepted))
            self.exponents[exit] = min(max(self.exponents[exit] * step, low), high)

    def add_width(self, tokens: float) -> None:
        """Add the number of tokens per level of a draft."""
        self.width = 0.8 * self.width + 0.2 * tokens

    def scaled_table(self, yields: tuple[YieldTable, ...]) -> Costs:
        """The table, scaled to recent steps, with what all requests' drafts yielded."""
        scales = [self.ratio * _median(self._drafting_ratios[exit, 1]) for exit in range(len(self.table.drafts))]
        drafts = tuple((a * first, a * further) for a, (first, further) in zip(scales, self.table.drafts, strict=True))
        return Costs({n: self.ratio * self.passes(1, n - 1)[-1] for n in self.table.score}, drafts, yields)


def _median(ratios: Sequence[float]) -> float:
    """The lower median; 1 of none. Other work on the machine makes steps longer, never shorter."""
    return sorted(ratios)[(len(ratios) - 1) // 2] if ratios else 1.0
