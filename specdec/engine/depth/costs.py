"""What passes and drafts cost: a formula, corrected by the times of real steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydantic import Field
from pydantic.dataclasses import dataclass

Floats = npt.NDArray[np.float64]
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
        tokens = np.arange(MOST_TOKENS + 1, dtype=float)
        self.formula: Floats = 0.5 * (
            np.log1p((tokens * ratio) ** 2) - math.log1p(ratio**2)
        )  # over a pass of one token
        at = np.log2(np.maximum(tokens, 1))
        self.below = at.astype(int)
        self.beyond: Floats = at - self.below
        self.shares = [max(share, 1e-4) for share in shares]
        size = int(self.below[-1]) + 2
        steps = np.arange(size, dtype=float)
        # The state: the speed, which is the error at one token, and the errors at 2, 4, .. over it.
        self.state, self.known = np.zeros(size), False
        self.covariance: Floats = SPREAD**2 * np.minimum.outer(steps, steps)
        self.covariance[0, 0] = 1.0
        self.others: dict[tuple[str, int], dict[int, list[float]]] = {}  # by rows, errors and their variances
        self.seen = set[tuple[str, int]]()
        if earlier is not None and earlier.passes:
            self.state, self.known = np.resize(np.array(earlier.passes), size), True
            self.covariance[0, 0] = OTHER_SPREAD**2
            for name, error in earlier.others.items():
                kind, exit, rows = name.split(" ")
                self.others.setdefault((kind, int(exit)), {})[int(rows)] = [error, OTHER_SPREAD**2 / 4]

    @property
    def speed(self) -> float:
        """Seconds of a pass over one token, as a logarithm."""
        return float(self.state[0])

    def passing(self, rows: int, most: int) -> list[float]:
        """Seconds of passes over ``rows`` roots and 0, 1, .. ``most`` drafted tokens."""
        to = slice(min(rows, MOST_TOKENS), min(rows + most, MOST_TOKENS) + 1)
        errors, below, share = self.state.copy(), self.below[to], self.beyond[to]
        errors[0] = 0.0
        found = np.exp(self.speed + self.formula[to] + (1 - share) * errors[below] + share * errors[below + 1])
        seconds: list[float] = np.maximum.accumulate(found).tolist()  # more tokens take no less
        return seconds

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
        below, share = int(self.below[tokens]), float(self.beyond[tokens])
        weights = np.zeros(len(self.state))
        weights[below], weights[below + 1] = 1 - share, share
        weights[0] = 1.0
        seen = math.log(max(seconds, 1e-7)) - float(self.formula[tokens])
        if not self.known:
            self.state[0], self.known = seen, True
        error, gains = seen - float(weights @ self.state), self.covariance @ weights
        total = float(weights @ gains) + NOISE**2 * max(abs(error) / OUTLIER, 1.0)
        self.state = self.state + gains * (error / total)
        self.covariance = self.covariance - np.outer(gains, gains) / total
        self.covariance[np.diag_indices_from(self.covariance)] += DRIFT**2 / 10
        self.covariance[0, 0] += DRIFT**2

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
        return Costs(self.state.round(4).tolist() if self.known else [], others)
