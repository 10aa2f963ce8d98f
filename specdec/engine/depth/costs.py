"""What passes and drafts cost: a formula, corrected by the times of real steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from operator import mul

from pydantic import Field
from pydantic.dataclasses import dataclass

from specdec.runtimes.draft_path import NEAR
from specdec.runtimes.target import TokenCosts

MOST_TOKENS = 1024  # of the largest pass that has a cost of its own
TYPICAL_TOKENS = 4  # that a step drafts
# Errors of the formula, as logarithms: from one number of tokens to its double, and of other figures.
SPREAD, OTHER_SPREAD = 0.15, 0.5
NOISE, DRAFT_NOISE = 0.1, 0.3  # of the times of passes and of drafts, likewise
DRIFT = 0.01  # of the machine's speed, from step to step
OUTLIER = 0.5  # errors of passes beyond this count less
MOST_DEVIATIONS = 6.0  # standard deviations that an error of drafts counts as at most
SURE = 2.5  # standard deviations by which a time can be too short by chance
FIXED = 0.02  # assumed cost of a draft beside its levels, and of the first level beyond a further one, in passes
OVERHEAD = 0.00015  # seconds that the first level is assumed to cost beyond that
LEVEL, FIRST, DRAFT = "level", "first", "draft"


@dataclass(frozen=True, config={"allow_inf_nan": False})
class Costs:
    """Estimated costs and acceptance counts, as stored for later processes.

    passes: logarithms of the seconds of a pass over one token, and of the cost formula's errors at 2, 4, 8, .. tokens.
    others: logarithms of the errors of drafting costs, by name.
    hits, trials: counts of accepted and of all drafted tokens in each bin, for each counter of ``History``.
    """

    passes: list[float] = Field(default_factory=list)
    others: dict[str, float] = Field(default_factory=dict)
    hits: list[list[float]] = Field(default_factory=list)
    trials: list[list[float]] = Field(default_factory=list)


class CostModel:
    """Seconds of passes over tokens of several rows, and of drafting.

    A pass reads the weights and the cached tokens once, and multiplies each of its tokens by both: for n tokens of one
    row with c cached ones it takes sqrt((1 + c * read)^2 + (n * (multiply + c * attend))^2), in passes over no token
    with an empty cache (``TokenCosts``). A level costs its share of a pass. The machine's present speed and the errors
    of the formula are estimated together from the times of steps, by a Kalman filter of the logarithms. The errors of
    two numbers of tokens are the more alike, the nearer they are.

    costs: the constants ``multiply``, ``read`` and ``attend`` of the formula.
    shares: for each exit, cost of drafting one level as a share of a pass.
    earlier: costs from an earlier process; None: there are none.
    """

    def __init__(self, costs: TokenCosts, shares: Sequence[float], earlier: Costs | None = None) -> None:
        self.costs = costs
        self.shares = [max(share, 1e-4) for share in shares]
        # Of each number of tokens: its place among 1, 2, 4, ..
        self.place = [(int(math.log2(n)), math.log2(n) % 1) for n in (1, *range(1, MOST_TOKENS + 1))]
        self.state = [0.0]  # the speed, which is the error at one token, and the errors at 2, 4, .. over it, if known
        self.covariance = [[1.0]]  # of the state
        self.known = False  # whether the speed is
        self.others: dict[tuple[str, int], dict[int, list[float]]] = {}  # by rows, errors and their variances
        self.seen = set[tuple[str, int]]()
        if earlier is not None and earlier.passes:
            # Errors count half: what a busy machine made look dear would not be tried, and so not be corrected.
            speed, *errors = earlier.passes[: int(math.log2(MOST_TOKENS)) + 1]
            self._reach(len(errors))
            self.state[:] = [speed, *(error / 2 for error in errors)]
            self.covariance[0][0], self.known = OTHER_SPREAD**2, True
            for name, error in earlier.others.items():
                kind, exit, rows = name.split(" ")
                self.others.setdefault((kind, int(exit)), {})[int(rows)] = [error / 2, OTHER_SPREAD**2 / 4]

    @property
    def speed(self) -> float:
        """Logarithm of the seconds of a pass over one token with an empty cache."""
        return self.state[0]

    def formula(self, tokens: int, cached: int, attended: int) -> float:
        """Return the logarithm of a pass's cost by the formula, in passes over one token with an empty cache.

        tokens: number of tokens of the pass. cached: number of cached tokens of all rows.
        attended: number of pairs of a token of the pass and a cached token of its row.
        """
        multiply, read, attend = self.costs
        cost = (1 + read * cached) ** 2 + (multiply * tokens + attend * attended) ** 2
        return 0.5 * (math.log(cost) - math.log1p(multiply**2))

    def passing(self, contexts: Sequence[int], most: int) -> list[float]:
        """Return the seconds of passes over the root of each row and 0, 1, .. ``most`` drafted tokens.

        contexts: number of cached tokens of each row. Drafted tokens are of the row with the fewest (``beyond``).
        """
        rows, cached, least = len(contexts), sum(contexts), min(contexts)
        multiply, read, attend = self.costs
        reading, unit = 1 + read * cached, math.exp(self.speed) / math.hypot(1, multiply)
        errors = [0.0, *self.state[1:]]
        errors += [errors[-1]] * (2 + self.place[-1][0] - len(errors))  # beyond the known ones
        first, last = min(rows, MOST_TOKENS), min(rows + most, MOST_TOKENS)
        seconds = [
            unit
            * math.hypot(reading, multiply * tokens + attend * (cached + (tokens - rows) * least))
            * math.exp((1 - share) * errors[below] + share * errors[below + 1])
            for tokens, (below, share) in enumerate(self.place[first : last + 1], first)
        ]
        return [*itertools.accumulate(seconds, max)]  # more tokens take no less

    def beyond(self, contexts: Sequence[int]) -> list[float]:
        """Return the seconds of a drafted token of each row beyond those of the row with the fewest cached tokens."""
        rows, cached, least, some = len(contexts), sum(contexts), min(contexts), TYPICAL_TOKENS
        if max(contexts) == least:
            return [0.0] * rows
        pairs = [cached + some * own for own in (least, *contexts)]
        base, *seconds = (math.exp(self.speed + self.formula(rows + some, cached, each)) for each in pairs)
        return [(own - base) / some for own in seconds]

    def level(self, exit: int, contexts: Sequence[int]) -> float:
        """Return the seconds of drafting one level to exit ``exit``. contexts: number of cached tokens of each row."""
        return self._other(LEVEL, exit, contexts)

    def first(self, exit: int, contexts: Sequence[int]) -> float:
        """Return how many seconds a draft's first level takes beyond a later one. Arguments: as in ``level``."""
        return self._other(FIRST, exit, contexts)

    def drafting(self, contexts: Sequence[int]) -> float:
        """Return the seconds of drafting that do not depend on the number of levels."""
        return self._other(DRAFT, 0, contexts)

    def add_pass(self, tokens: int, seconds: float, cached: int = 0, attended: int = 0) -> None:
        """Update the estimates with the ``seconds`` of a pass; its sizes ``tokens``, ... are as in ``formula``."""
        tokens = min(tokens, MOST_TOKENS)
        seen = math.log(max(seconds, 1e-7)) - self.formula(tokens, cached, attended)
        if not self.known:
            self.state[0], self.known = seen, True
        place, share = self.place[tokens]
        self._reach(math.ceil(place + share))
        weights = [0.0] * len(self.state)
        if share:
            weights[place + 1] = share
        weights[place] = 1 - share
        weights[0] = 1.0
        error = seen - _dot(weights, self.state)
        gains = [_dot(weights, row) for row in self.covariance]
        variance, noise = _dot(weights, gains), NOISE**2 * max(error / OUTLIER, 1.0)
        more = _doubt(error, variance, noise)  # the machine has become faster
        self.covariance[0][0] += more
        gains[0] += more
        total = variance + more + noise
        self.state = [own + gain * error / total for own, gain in zip(self.state, gains, strict=True)]
        for n, (row, gain) in enumerate(zip(self.covariance, gains, strict=True)):
            row[:] = [own - gain / total * other for own, other in zip(row, gains, strict=True)]
            row[n] += DRIFT**2 / (10 if n else 1)

    def _reach(self, number: int) -> None:
        """Extend the filter's state to error ``number``; new errors begin at the last one, with a larger variance."""
        while len(self.state) <= number:
            first = len(self.state) == 1  # there is no error at one token
            self.state.append(0.0 if first else self.state[-1])
            self.covariance.append([0.0] * len(self.covariance) if first else [*self.covariance[-1]])
            last = self.covariance[-1]
            for row, new in zip(self.covariance, [*last, last[-1] + SPREAD**2], strict=True):
                row.append(new)

    def add_draft(self, exit: int, contexts: Sequence[int], levels: int, seconds: float) -> None:
        """Update the estimates with the time of drafting ``levels`` levels; uncertain and large parts change most."""
        parts = {(DRAFT, 0): 1.0} | ({(FIRST, exit): 1.0, (LEVEL, exit): float(levels)} if levels else {})
        if not self.seen.issuperset(parts):  # what the first one makes is there afterwards
            self.seen.update(parts)
            return
        each = {part: number * self._other(*part, contexts) for part, number in parts.items()}
        rows, expected = len(contexts), sum(each.values())
        errors = {part: self._error(*part, rows) for part in parts}
        gains = {part: errors[part][1] * own / expected for part, own in each.items()}
        error = math.log(max(seconds, 1e-9) / expected)
        variance = sum(gains[part] * own / expected for part, own in each.items())
        doubt = 1 + _doubt(error, variance, DRAFT_NOISE**2) / variance
        total = doubt * variance + DRAFT_NOISE**2
        error = min(error, MOST_DEVIATIONS * math.sqrt(total))
        for part, (own, variance) in errors.items():
            gain = doubt * gains[part]
            left = doubt * variance - gain**2 / total + DRIFT**2
            self.others.setdefault(part, {})[rows] = [own + gain * error / total, left]

    def _other(self, kind: str, exit: int, contexts: Sequence[int]) -> float:
        """Return the estimated seconds of a part of drafting. kind: name of the part, such as "level"."""
        share, overhead = self.shares[exit] if kind == LEVEL else FIXED, OVERHEAD * (kind == FIRST)
        if kind == LEVEL:
            share *= 1 + self.costs.read * sum(min(own, NEAR) for own in contexts)
        return (share * math.exp(self.speed) + overhead) * math.exp(self._error(kind, exit, len(contexts))[0])

    def _error(self, kind: str, exit: int, rows: int) -> list[float]:
        """Return a drafting cost's [logarithm of measured over formula, variance], from the nearest number of rows."""
        known = self.others.get((kind, exit), {})
        if rows in known:
            return known[rows]
        nearest = min(known, key=lambda other: abs(math.log(other / rows)), default=rows)
        return [known.get(nearest, [0.0])[0], OTHER_SPREAD**2]

    def kept(self) -> Costs:
        """Return the estimates to store for later processes, without ``hits`` and ``trials``."""
        each = ((*key, rows, error) for key, known in self.others.items() for rows, (error, _) in known.items())
        others = {f"{kind} {exit} {rows}": round(error, 4) for kind, exit, rows, error in each}
        return Costs([round(error, 4) for error in self.state] if self.known else [], others)


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the sum of the products of the elements of ``a`` and ``b``, which are equally many."""
    return sum(map(mul, a, b))


def _doubt(error: float, variance: float, noise: float) -> float:
    """Return the variance to add to an estimate after a time that was much shorter than expected.

    Other work can make a step slow, but nothing makes it fast, so the estimate must be wrong.
    error: logarithm of measured over expected time. variance, noise: variances of the estimate and of a measurement.
    """
    return max((error / SURE) ** 2 - variance - noise, 0.0) if error < 0 else 0.0
