"""How often drafted tokens are accepted: in one request, and in all."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.engine.depth.costs import Known

PRIOR, WEIGHT = 0.6, 1.25  # acceptance of an unknown drafter, and how many observations this guess is worth
CARRIED = 8.0  # observations that the acceptance of other requests is worth
MEMORY, LONG_MEMORY = 0.97, 0.998  # weight of the past per step: within a request, over requests


class RowHistory:
    """What was accepted in one row.

    shares[exit][position]: how often its drafted token was accepted, of so many observations, of which old ones fade,
    and observations in all. idle: steps since it last drafted.
    """

    def __init__(self, exits: int = 0, positions: int = 0) -> None:
        self.shares = [[(0.0, 0.0, 0)] * positions for _ in range(exits)]
        self.idle = 0

    def add(self, exit: int, position: int, right: Sequence[bool], memory: float) -> None:
        """Take in whether drafted tokens of a position were accepted."""
        share, seen, count = self.shares[exit][position]
        before = memory * seen
        now = before + len(right)
        self.shares[exit][position] = (before * share + sum(right)) / now if now else share, now, count + len(right)


class AcceptanceEstimator:
    """Estimates for each row how far its draft is accepted, from its own history and that of all rows.

    exits, positions: their numbers. known: acceptance in earlier requests.
    """

    def __init__(self, exits: int, positions: int, known: Sequence[Known] = ()) -> None:
        self.positions, self.all = positions, RowHistory(exits, positions)
        for exit, carried in enumerate(known[:exits]):
            own = [(share, seen, 0) for share, seen in carried[:positions]]
            self.all.shares[exit][: len(own)] = own

    def begin(self) -> RowHistory:
        """The history of a new request."""
        return RowHistory(len(self.all.shares), self.positions)

    def chances(self, row: RowHistory, exit: int) -> list[float]:
        """The probability that a chain of ``row`` is accepted up to each position."""
        share, chance, chances = PRIOR, 1.0, list[float]()
        for (own, seen, count), (common, all_seen, _) in zip(row.shares[exit], self.all.shares[exit], strict=True):
            others = min(max(all_seen - count, 0.0), CARRIED)  # each is assumed to be like the one before
            share = (seen * own + others * common + WEIGHT * share) / (seen + others + WEIGHT)
            chance *= share
            chances.append(chance)
        return chances

    def observe(self, exit: int, rows: Sequence[RowHistory], drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """The rows drafted so deep, and so many tokens were accepted."""
        for row, depth, count in zip(rows, drafted, accepted, strict=True):
            row.idle = 0 if depth else row.idle + 1
            for position in range(min(depth, count + 1, self.positions)):
                row.add(exit, position, [count > position], MEMORY)
        for position in range(min(max(drafted), self.positions)):
            # Only rows whose chain was accepted up to here say anything about this position.
            right = [a > position for d, a in zip(drafted, accepted, strict=True) if d > position <= a]
            self.all.add(exit, position, right, LONG_MEMORY)

    @property
    def known(self) -> tuple[Known, ...]:
        """What later processes may begin with."""
        return tuple(tuple((share, seen) for share, seen, _ in shares if seen) for shares in self.all.shares)
