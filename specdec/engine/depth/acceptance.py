"""How often drafted tokens are accepted: in one request, and in all."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.engine.depth.costs import AcceptanceTable

PRIOR, PRIOR_WEIGHT = 0.6, 1.25  # acceptance of an unknown drafter, and the number of observations that it counts as
CARRIED = 8.0  # maximum number of observations that the acceptance of other requests counts as
DECAY, SLOW_DECAY = 0.97, 0.998  # weight of the past per step: within a request, over all requests


class RowHistory:
    """How often the drafted tokens of one row were accepted.

    shares[exit][position]: (acceptance, decayed number of observations, total number of observations).
    idle: steps since it last drafted.
    """

    def __init__(self, exits: int = 0, positions: int = 0) -> None:
        self.shares = [[(0.0, 0.0, 0)] * positions for _ in range(exits)]
        self.idle = 0

    def add(self, exit: int, position: int, accepted: Sequence[bool], decay: float) -> None:
        """Add observations: whether drafted tokens of a position were accepted."""
        share, weight, count = self.shares[exit][position]
        before = decay * weight
        now = before + len(accepted)
        share = (before * share + sum(accepted)) / now if now else share
        self.shares[exit][position] = share, now, count + len(accepted)


class AcceptanceEstimator:
    """Estimates how far each row's draft is accepted, from its own history and that of all rows.

    exits, positions: their numbers.
    earlier: the acceptance in earlier processes, for each exit.
    """

    def __init__(self, exits: int, positions: int, earlier: Sequence[AcceptanceTable] = ()) -> None:
        self.positions, self.common = positions, RowHistory(exits, positions)
        for exit, table in enumerate(earlier[:exits]):
            own = [(share, weight, 0) for share, weight in table[:positions]]
            self.common.shares[exit][: len(own)] = own

    def begin(self) -> RowHistory:
        """The history of a new request."""
        return RowHistory(len(self.common.shares), self.positions)

    def chances(self, row: RowHistory, exit: int) -> list[float]:
        """The probability that a chain of ``row`` is accepted up to each position."""
        share, chance, chances = PRIOR, 1.0, list[float]()
        for (own, weight, count), (common, all_weight, _) in zip(
            row.shares[exit], self.common.shares[exit], strict=True
        ):
            others = min(max(all_weight - count, 0.0), CARRIED)  # the prior of a position is the one before it
            share = (weight * own + others * common + PRIOR_WEIGHT * share) / (weight + others + PRIOR_WEIGHT)
            chance *= share
            chances.append(chance)
        return chances

    def observe(self, exit: int, rows: Sequence[RowHistory], drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """Add a step. drafted, accepted: number of tokens of each row."""
        for row, depth, count in zip(rows, drafted, accepted, strict=True):
            row.idle = 0 if depth else row.idle + 1
            for position in range(min(depth, count + 1, self.positions)):
                row.add(exit, position, [count > position], DECAY)
        for position in range(min(max(drafted), self.positions)):
            # Only rows whose chain was accepted up to here say anything about this position.
            reached = [a > position for d, a in zip(drafted, accepted, strict=True) if d > position <= a]
            self.common.add(exit, position, reached, SLOW_DECAY)

    @property
    def tables(self) -> tuple[AcceptanceTable, ...]:
        """The acceptance of all requests, for later processes."""
        return tuple(tuple((share, weight) for share, weight, _ in shares if weight) for shares in self.common.shares)
