"""Whether and how much to prefetch: from measured times, as with drafting depth. Knows no models and no predictors."""

from __future__ import annotations

import time

from specdec.experts.store import ExpertStore

WINDOW = 4  # passes through the model that are timed together
MOST_TOKENS = 16  # passes over more tokens (prompts) are not compared
LONGEST = 64  # windows between two probes of the side that loses
SMOOTH = 0.3


class Controller:
    """Turns prefetching off where passes are slower with it, and estimates what a prefetch can load in time.

    Passes with and without prefetching are timed in windows, the first two with either. The faster side runs; the other
    is probed again after 8, 16, ... ``LONGEST`` windows, so that probing costs little. adaptive: False keeps it on.
    """

    def __init__(self, adaptive: bool = True) -> None:
        self.adaptive, self.on = adaptive, True
        self.seconds: dict[bool, float | None] = {True: None, False: None}  # per layer visited, smoothed
        self.pause, self.left = 4, 1  # windows until the other side is probed
        self.probing = False
        self.visits = self.rows = 0
        self.spent = self.busy = 0.0
        self.last: float | None = None
        self.layer_seconds = 0.0  # computing of one layer, without stalls
        self._stalled = 0.0

    def visit(self, row: int, tokens: int, store: ExpertStore) -> None:
        """Called at each MoE layer of each pass."""
        now, stalled = time.perf_counter(), store.counters.stall_seconds
        self.rows = max(self.rows, row + 1)
        if tokens > MOST_TOKENS:
            self.last = None
            return
        if self.last is not None and now - self.last < 1.0:  # else: the model has rested in between
            spent, computing = now - self.last, now - self.last - (stalled - self._stalled)
            self.spent, self.visits = self.spent + spent, self.visits + 1
            weight = 0.05 if self.layer_seconds else 1.0
            self.layer_seconds += weight * (max(computing, 0.0) - self.layer_seconds)
            if row == 0 and self.visits >= WINDOW * self.rows:
                self._window(self.spent / self.visits)
        self.last, self._stalled = now, stalled

    def bytes_within(self, ahead: float, store: ExpertStore) -> float:
        """Bytes, beyond those already requested, that can be loaded while ``ahead`` layers compute."""
        count = store.counters
        if count.load_seconds <= 0:
            return float("inf")
        speed = count.bytes / count.load_seconds
        return ahead * self.layer_seconds * speed - store.backlog

    def _window(self, seconds: float) -> None:
        self.spent, self.visits = 0.0, 0
        old = self.seconds[self.on]
        self.seconds[self.on] = seconds if old is None else old + SMOOTH * (seconds - old)
        if not self.adaptive:
            return
        self.left -= 1
        with_, without = self.seconds[True], self.seconds[False]
        if self.probing or self.left <= 0:
            if self.probing and with_ is not None and without is not None:
                better = with_ <= without
                self.probing, self.pause = False, min(2 * self.pause, LONGEST)
                self.on, self.left = better, self.pause
            else:
                self.probing, self.on, self.left = True, not self.on, 1
