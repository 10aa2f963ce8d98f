"""Whether to prefetch, from measured times. Knows no models, stores and predictors."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque

WINDOW = 5  # passes through the model on one side; the first, in which caches and forecasts change over, is not counted
RECENT = 7  # comparisons of two sides whose median is believed
SHARE = 0.02  # of the time that trying the side which loses may cost
LONGEST = 64  # most windows until it is tried again
MOST_TOKENS = 16  # passes over more tokens (prompts) are not compared


class Controller:
    """Turns prefetching off where passes are slower with it, and measures how long a layer computes.

    Passes are timed in windows. Where prefetching is turned on or off between two windows, these are compared: what
    slows the machine down slows both. The side that wins by the median of the last comparisons runs; the other is tried
    again for one window after as many as pay for it. Before there are comparisons, what the cache alone would have
    waited for is reckoned, and believed where it speaks for prefetching. adaptive: False keeps prefetching on.
    """

    def __init__(self, adaptive: bool = True) -> None:
        self.adaptive, self.on = adaptive, True
        self.ratios: deque[float] = deque(maxlen=RECENT)  # time with prefetching over that without
        self.left = 0  # windows until the other side is tried
        self.passes: list[tuple[float, float]] = []  # seconds per layer visited, in this window; saved, as reckoned
        self.before: tuple[bool, float] | None = None  # the window before: its side, and the median of its passes
        self.visits = self.rows = 0
        self.spent = self.saved = 0.0
        self.last: float | None = None
        self.layer_seconds = 0.0  # computing of one layer, without waiting for experts
        self._waited = self._alone = 0.0

    def visit(self, row: int, tokens: int, waited: float, alone: float = 0.0) -> None:
        """Called at each MoE layer of each pass.

        waited: seconds for experts so far. alone: those that, as reckoned, had been waited without prefetching, less
        those that predicting took.
        """
        now = time.perf_counter()
        self.rows = max(self.rows, row + 1)
        if tokens > MOST_TOKENS:
            self.last = None
            return
        if self.last is not None and now - self.last < 1.0:  # else: the model has rested in between
            spent = now - self.last
            self.spent, self.visits = self.spent + spent, self.visits + 1
            self.saved += (alone - self._alone) - (waited - self._waited)
            weight = 0.05 if self.layer_seconds else 1.0
            self.layer_seconds += weight * (max(spent - (waited - self._waited), 0.0) - self.layer_seconds)
            if row == 0 and self.visits >= self.rows:
                self.passes.append((self.spent / self.visits, self.saved / self.visits))
                self.spent, self.saved, self.visits = 0.0, 0.0, 0
                if self.adaptive and len(self.passes) == WINDOW:
                    seconds, saved = map(statistics.median, zip(*self.passes[1:], strict=True))
                    self._choose(seconds, seconds / max(seconds + saved, 1e-9))
                    self.passes.clear()
        self.last, self._waited, self._alone = now, waited, alone

    def _choose(self, seconds: float, reckoned: float) -> None:
        """What the next window does, after one that took ``seconds`` per layer visited.

        reckoned: of the time without prefetching, where it was on.
        """
        first, compared = self.before is None, self.before is not None and self.before[0] != self.on
        if self.before is not None and compared:
            self.ratios.append(seconds / self.before[1] if self.on else self.before[1] / seconds)
        self.before = self.on, seconds
        if len(self.ratios) >= 2:
            believed = statistics.median(self.ratios)
        elif self.on and reckoned < 1:
            believed = reckoned
        else:
            self.on = not self.on
            return
        best, lost = believed <= 1, max(believed, 1 / believed) - 1
        if first or compared:
            self.on, self.left = best, min(math.ceil(lost / SHARE), LONGEST)
        else:
            self.left -= 1
            if self.left <= 0:
                self.on = not best
