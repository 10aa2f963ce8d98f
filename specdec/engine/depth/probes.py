"""What probes may lose: a share of the decode time, saved up for each exit until its probe can pay."""

from __future__ import annotations

import math
from collections.abc import Sequence

PROBES = 0.01  # share of the decode time that probes may lose


class ProbeBudget:
    """Seconds that each exit has saved up. ``probe``: the exit that is probed, if any."""

    def __init__(self, exits: int) -> None:
        self.saved = [0.0] * exits
        self.elapsed = 0.0  # seconds since the last decision
        self.probe: int | None = None

    def save(self, losses: Sequence[float]) -> float:
        """Save for what each exit's probe loses (infinite: it has none); return seconds until one can pay."""
        self.probe, share, wait = None, PROBES / len(losses), math.inf
        for exit, loss in enumerate(losses):
            if loss < math.inf:
                saved = self.saved[exit] = min(self.saved[exit] + share * self.elapsed, loss)
                wait = min(wait, (loss - saved) / share)
                if saved >= loss and self.probe is None:
                    self.probe = exit
        self.elapsed = 0.0
        return wait

    def restart(self) -> None:
        """No decision is taken: there is nothing to draft for."""
        self.probe, self.elapsed = None, 0.0

    def pay(self, exit: int, seconds: float) -> None:
        """A probe lost so many seconds."""
        self.saved[exit] -= seconds
