"""Whether to prefetch, from measured times. Knows no models, stores or predictors."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque

WINDOW = 5  # passes with one choice; the first one, while caches and forecasts change, is not counted
RECENT = 7  # number of comparisons whose median decides
SHARE = 0.02  # share of the time that trying the slower choice may cost
LONGEST = 64  # maximum number of windows until it is tried again
MOST_TOKENS = 16  # passes over more tokens (prompts) are not compared


class Controller:
    """Turns prefetching off where passes are slower with it.

    Two neighbouring windows of passes, with and without prefetching, make one comparison: other load on the machine
    slows both. The faster choice by the median of recent comparisons runs. The other is tried again for one window as
    often as ``SHARE`` of the time pays for.

    adaptive: False keeps prefetching on.
    on: whether to prefetch now.
    ratios: time with prefetching over time without.
    left: number of windows until the other choice is tried.
    passes: seconds per layer of the passes in this window; ``layers``: of the layers in this pass.
    before: the choice of the last window, and the median of its passes.
    """

    def __init__(self, adaptive: bool = True) -> None:
        self.adaptive, self.on = adaptive, True
        self.ratios: deque[float] = deque(maxlen=RECENT)
        self.left = 0
        self.passes, self.layers = list[float](), list[float]()
        self.before: tuple[bool, float] | None = None
        self.rows = 0
        self.last: float | None = None

    def enter(self, row: int, tokens: int) -> None:
        """A pass over so many tokens enters a mixture-of-experts layer."""
        now = time.perf_counter()
        self.rows = max(self.rows, row + 1)
        last, self.last = self.last, now if tokens <= MOST_TOKENS else None
        if last is None or self.last is None or now - last > 1.0:  # after a prompt, or a pause
            return
        self.layers.append(now - last)
        if row == 0 and len(self.layers) >= self.rows:
            self.passes.append(statistics.mean(self.layers))
            self.layers.clear()
            if self.adaptive and len(self.passes) == WINDOW:
                self._choose(statistics.median(self.passes[1:]))
                self.passes.clear()

    def _choose(self, seconds: float) -> None:
        """Choose for the next window, after one that took ``seconds`` per layer."""
        compared = self.before is not None and self.before[0] != self.on
        if self.before is not None and compared:
            self.ratios.append(seconds / self.before[1] if self.on else self.before[1] / seconds)
        self.before = self.on, seconds
        if len(self.ratios) < 2:
            self.on = not self.on
            return
        ratio = statistics.median(self.ratios)
        faster, lost = ratio <= 1, max(ratio, 1 / ratio) - 1
        if compared:
            self.on, self.left = faster, min(math.ceil(lost / SHARE), LONGEST)
        else:
            self.left -= 1
            if self.left <= 0:
                self.on = not faster
