"""What drafts yield: in one request, and in all."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

from specdec.engine.depth.costs import YieldTable

PRIOR = 0.6  # acceptance of an unknown drafter
DECAY, COMMON_DECAY = 0.97, 0.998  # weight of the past per step: within a request, over all requests


Mean = tuple[float, float, int]  # and its decayed number of observations, and their number


class Shrink(NamedTuple):
    """The number of observations that the prior counts as, and those of other requests at most."""

    prior: float
    common: float

    def mean(self, row: Mean, common: Mean, prior: float) -> float:
        """The mean of a row, from what was seen in it and in all requests. prior: that of an unknown drafter."""
        own, weight, seen = row
        others = min(max(common[1] - seen, 0.0), self.common)
        return (weight * own + others * common[0] + self.prior * prior) / (weight + others + self.prior)


RECENT, LASTING, SLOW = Shrink(1.25, 8.0), Shrink(3.0, 20.0), Shrink(5.0, 60.0)
KEPT = 3.0  # number of observations that what is known about a changed drafter counts as at most


class RowHistory:
    """What the drafts of one row have yielded.

    means[exit][number]: of a drafter without probabilities, the acceptance at each position; of one with, a step's
        expected tokens, cost in passes, and whether anything was scored; accepted tokens, and expected ones again;
        tokens that a learned drafter added to a free draft, and those that it was expected to add.
    idle: steps since it last drafted.
    """

    def __init__(self, exits: int = 0, numbers: int = 0) -> None:
        self.means: list[list[Mean]] = [[(0.0, 0.0, 0)] * numbers for _ in range(exits)]
        self.idle = 0

    def add(self, exit: int, number: int, seen: Sequence[float], decay: float) -> None:
        """Add the observations of a step."""
        mean, weight, count = self.means[exit][number]
        before = decay * weight
        now = before + len(seen)
        mean = (before * mean + sum(seen)) / now if now else mean
        self.means[exit][number] = mean, now, count + len(seen)


class YieldEstimator:
    """Estimates what a row's draft yields, from its own history and that of all rows.

    exits, numbers: their numbers (``RowHistory``).
    earlier: the means of earlier processes, for each exit.
    """

    def __init__(self, exits: int, numbers: int, earlier: Sequence[YieldTable] = ()) -> None:
        self.numbers, self.common = numbers, RowHistory(exits, numbers)
        self.rows = weakref.WeakSet[RowHistory]()
        for exit, table in enumerate(earlier[:exits]):
            self.common.means[exit][: len(table)] = [(mean, weight, 0) for mean, weight in table[:numbers]]

    def begin(self) -> RowHistory:
        """The history of a new request."""
        row = RowHistory(len(self.common.means), self.numbers)
        self.rows.add(row)
        return row

    def forget(self, exit: int) -> None:
        """What is known about an exit counts little from now on."""
        for row in (self.common, *self.rows):
            row.means[exit] = [(mean, min(weight, KEPT), 0) for mean, weight, _ in row.means[exit]]

    def means(
        self, row: RowHistory, exit: int, priors: Sequence[float], start: int = 0, shrink: Shrink = RECENT
    ) -> list[float]:
        """The means of ``row`` from number ``start`` on, one for each prior."""
        own, common = row.means[exit], self.common.means[exit]
        return [shrink.mean(own[n], common[n], prior) for n, prior in enumerate(priors, start)]

    def chances(self, row: RowHistory, exit: int) -> list[float]:
        """The probability that a chain of ``row`` is accepted up to each position."""
        share, chance, chances = PRIOR, 1.0, list[float]()
        for own, common in zip(row.means[exit], self.common.means[exit], strict=True):
            share = RECENT.mean(own, common, share)  # the prior of a position is the one before it
            chance *= share
            chances.append(chance)
        return chances

    def observe(self, exit: int, rows: Sequence[RowHistory], seen: Sequence[Sequence[float]]) -> None:
        """Add a step: an observation of each of the first means of each row."""
        for row, values in zip(rows, seen, strict=True):
            for number, value in enumerate(values):
                row.add(exit, number, [value], DECAY)
        for number in range(max(map(len, seen))):
            self.common.add(exit, number, [values[number] for values in seen if len(values) > number], COMMON_DECAY)

    @property
    def tables(self) -> tuple[YieldTable, ...]:
        """The means of all requests, for later processes."""
        return tuple(tuple((mean, weight) for mean, weight, _ in means if weight) for means in self.common.means)
