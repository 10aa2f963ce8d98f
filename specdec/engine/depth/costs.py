"""What passes and drafts cost: a formula, corrected by the times of real steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from pydantic import Field
from pydantic.dataclasses import dataclass

MOST_TOKENS = 1024  # of a pass whose cost is told apart
# Errors of the formula, as logarithms: from one number of tokens to its double, and of other figures.
SPREAD, OTHER_SPREAD = 0.15, 0.5
NOISE, DRIFT = 0.1, 0.01  # of a step's time, and of the machine's speed from step to step, likewise
OUTLIER = 0.5  # errors beyond this count less
FIXED = 0.02  # assumed cost of a draft beside its levels, and of the first level beyond a further one, in passes
LEVEL, FIRST, DRAFT = "level", "first", "draft"


@dataclass(frozen=True, config={"allow_inf_nan": False})
class Costs:
    """What is known about costs, for later processes.

    passes: seconds of a pass over one token, and errors of the formula at 2, 4, 8, .. tokens, as logarithms.
    others: the errors of other figures, by their names.
    hits, trials: of ``History.tallies``, over all rows.
    """

    passes: list[float] = Field(default_factory=list)
    others: dict[str, float] = Field(default_factory=dict)
    hits: list[list[float]] = Field(default_factory=list)
    trials: list[list[float]] = Field(default_factory=list)


class CostModel:
    """Seconds of passes over tokens of several rows, and of drafting.

    The weights of a pass are read once, and each token multiplies them: sqrt(1 + (tokens * ratio)^2), in passes over no
    token. A level costs its share of a pass. The machine's present speed and the errors of the formula are estimated
    together from the times of steps, by a Kalman filter of the logarithms. The errors of two numbers of tokens are the
    more alike, the nearer they are.

    ratio: seconds of multiplying a token over those of reading the weights.
    shares: of a pass that drafting a level costs, by exit.
    """

    def __init__(self, ratio: float, shares: Sequence[float], earlier: Costs | None = None) -> None:
        self.shares = [max(share, 1e-4) for share in shares]
        # Of each number of tokens: the formula, over a pass of one token; its place among 1, 2, 4, ..
        self.formula = [0.5 * (math.log1p((n * ratio) ** 2) - math.log1p(ratio**2)) for n in range(MOST_TOKENS + 1)]
        self.place = [divmod(math.log2(max(n, 1)), 1.0) for n in range(MOST_TOKENS + 1)]
        # The state: the speed, which is the error at one token, and the errors at 2, 4, .. over it.
        numbers = range(int(math.log2(MOST_TOKENS)) + 2)
        self.state, self.known = [0.0 for _ in numbers], False
        self.covariance = [[SPREAD**2 * min(i, j) for j in numbers] for i in numbers]
        self.covariance[0][0] = 1.0
        self.others: dict[tuple[str, int], dict[int, list[float]]] = {}  # by rows, errors and their variances
        self.seen = set[tuple[str, int]]()
        if earlier is not None and earlier.passes:
            # Errors count half: what a busy machine made look dear would not be tried, and so not be corrected.
            speed, *errors = earlier.passes
            halves = [speed, *(error / 2 for error in errors), *self.state]
            self.state, self.known = halves[: len(self.state)], True
            self.covariance[0][0] = OTHER_SPREAD**2
            for name, error in earlier.others.items():
                kind, exit, rows = name.split(" ")
                self.others.setdefault((kind, int(exit)), {})[int(rows)] = [error / 2, OTHER_SPREAD**2 / 4]

    @property
    def speed(self) -> float:
        """Seconds of a pass over one token, as a logarithm."""
        return self.state[0]

    def passing(self, rows: int, most: int) -> list[float]:
        """Seconds of passes over ``rows`` roots and 0, 1, .. ``most`` drafted tokens."""
        to = slice(min(rows, MOST_TOKENS), min(rows + most, MOST_TOKENS) + 1)
        errors, seconds = [0.0, *self.state[1:]], list[float]()
        for formula, (below, share) in zip(self.formula[to], self.place[to], strict=True):
            error = (1 - share) * errors[int(below)] + share * errors[int(below) + 1]
            seconds.append(math.exp(self.speed + formula + error))
        return [*itertools.accumulate(seconds, max)]  # more tokens take no less

    def level(self, exit: int, rows: int) -> float:
        """Seconds of drafting a level for ``rows``."""
        return self._other(LEVEL, exit, rows)

    def first(self, exit: int, rows: int) -> float:
        """Seconds that the first level takes beyond that."""
        return self._other(FIRST, exit, rows)

    def drafting(self, rows: int) -> float:
        """Seconds of a draft beside its levels."""
        return self._other(DRAFT, 0, rows)

    def add_pass(self, tokens: int, seconds: float) -> None:
        """Add the time of a pass over ``tokens``, roots included."""
        tokens = min(tokens, MOST_TOKENS)
        seen = math.log(max(seconds, 1e-7)) - self.formula[tokens]
        if not self.known:
            self.state[0], self.known = seen, True
        place, share = self.place[tokens]
        weights = {int(place): 1 - share, int(place) + 1: share, 0: 1.0}
        error = seen - sum(weight * self.state[n] for n, weight in weights.items())
        gains = [sum(weight * row[n] for n, weight in weights.items()) for row in self.covariance]
        total = sum(weight * gains[n] for n, weight in weights.items()) + NOISE**2 * max(abs(error) / OUTLIER, 1.0)
        self.state = [own + gain * error / total for own, gain in zip(self.state, gains, strict=True)]
        for n, (row, gain) in enumerate(zip(self.covariance, gains, strict=True)):
            row[:] = [own - gain / total * other for own, other in zip(row, gains, strict=True)]
            row[n] += DRIFT**2 / (10 if n else 1)

    def add_draft(self, exit: int, rows: int, levels: int, seconds: float) -> None:
        """Add the time of drafting ``levels``."""
        kind = LEVEL if levels > 1 else FIRST if levels else DRAFT
        exit = exit if levels else 0
        rest = seconds - (self.drafting(rows) if levels else 0.0)
        if levels > 1:
            rest = (rest - self.first(exit, rows)) / levels
        elif levels:
            rest -= self.level(exit, rows)
        if (kind, exit) not in self.seen:  # what the first one makes is there afterwards
            self.seen.add((kind, exit))
            return
        expected, own = self._other(kind, exit, rows), self._error(kind, exit, rows)
        error = math.log(max(rest, 0.1 * expected) / expected)
        gain = own[1] / (own[1] + NOISE**2 * max(abs(error) / OUTLIER, 1.0))
        self.others.setdefault((kind, exit), {})[rows] = [own[0] + gain * error, max((1 - gain) * own[1], DRIFT**2)]

    def _other(self, kind: str, exit: int, rows: int) -> float:
        """Seconds of such a part of a draft: a share of a pass over one token, as far as is known."""
        share = self.shares[exit] if kind == LEVEL else FIXED
        return share * math.exp(self.speed + self._error(kind, exit, rows)[0])

    def _error(self, kind: str, exit: int, rows: int) -> list[float]:
        """The error of that share, as a logarithm, and its variance: those of the nearest number of rows."""
        known = self.others.get((kind, exit), {})
        if rows in known:
            return known[rows]
        nearest = min(known, key=lambda other: abs(math.log(other / rows)), default=rows)
        return [known.get(nearest, [0.0])[0], OTHER_SPREAD**2]

    def kept(self) -> Costs:
        """What later processes begin with, without ``hits`` and ``trials``."""
        each = ((*key, rows, error) for key, known in self.others.items() for rows, (error, _) in known.items())
        others = {f"{kind} {exit} {rows}": round(error, 4) for kind, exit, rows, error in each}
        return Costs([round(error, 4) for error in self.state] if self.known else [], others)
