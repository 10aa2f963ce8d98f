"""What passes and drafts cost: formulas, corrected by the times of real steps.

A pass over n tokens takes

    seconds = speed * error(n) * sqrt((1 + read * c)^2 + (multiply * n + attend * a)^2) / sqrt(1 + multiply^2)

with c cached tokens in all rows, and a pairs of a token and a cached token of its row. The first square is the time of
reading the weights (which is 1) and the cached tokens, the second one that of multiplying the tokens by both
(``TokenCosts``). The root at the end makes the formula 1 for one token and an empty cache, so that speed is the seconds
of such a pass. error(n) is what the formula does not know: 1 for one token, a value of its own for 2, 4, 8, .. tokens,
and interpolated for other numbers.

Drafting takes

    seconds = draft + first(exit) + levels * level(exit)

where a draft without levels has the first part only, and

    part = (share of a pass * speed + overhead) * error(part, number of rows)

The speed and the errors are estimated from the times of steps, as logarithms: the logarithm of a pass's time is the sum
of theirs and of the formula's. A Kalman filter keeps the mean and the covariance of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from operator import mul
from typing import NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from specdec.runtimes.draft_path import NEAR
from specdec.runtimes.target import TokenCosts

MOST_TOKENS = 1024  # tokens of the largest pass that has a cost of its own
TYPICAL_TOKENS = 4  # tokens that a step drafts
# Standard deviations, of logarithms.
SPREAD = 0.15  # of error(2 n) from error(n), before any time is known
OTHER_SPREAD = 0.5  # of the error of a part of drafting, and of a speed that an earlier process has measured
NOISE = 0.1  # of the time of a pass from its expectation
DRAFT_NOISE = 0.3  # of the time of drafting from its expectation, above it
LEAST_DRAFT_NOISE = 0.2  # below it
DRIFT = 0.01  # of the machine's speed, from step to step
OUTLIER = 0.5  # errors of passes beyond this count less
MOST_ERROR = 4.0  # of the logarithm of a part's error
MOST_DEVIATIONS = 6.0  # standard deviations that an error of drafts counts as at most
SURE = 2.5  # standard deviations by which a time can be too short by chance
# Assumed costs of drafting.
FIXED = 0.02  # of a draft without its levels, and of the first level beyond a further one, in passes
OVERHEAD = 0.00015  # of the first level beyond that, in seconds
LEVEL, FIRST, DRAFT = "level", "first", "draft"  # the parts of drafting


@dataclass(frozen=True, config={"allow_inf_nan": False})
class Costs:
    """Estimated costs and acceptance counts, as stored for later processes. Empty fields: nothing was measured.

    An error is a factor: measured seconds divided by the formula's seconds. Logarithms are natural.

    passes: logarithms: of the seconds of a pass over one token, then of the errors of passes over 2, 4, 8, .. tokens.
    others: logarithms of the errors of drafting, by a text of three words, such as "level 0 1": the part of drafting,
        the index of the exit (layer at which drafted tokens leave the model), and the number of rows (sequences). The
        parts are "draft" (a draft without levels), "first" (what its first level takes beyond a further one) and
        "level" (each level: the tokens at one depth).
    hits, trials: numbers of accepted and of all drafted tokens in each bin of each counter, in the order of
        ``History.all_counts``; they are not whole, since old counts fade.
    """

    passes: list[float] = Field(default_factory=list)
    others: dict[str, float] = Field(default_factory=dict)
    hits: list[list[float]] = Field(default_factory=list)
    trials: list[list[float]] = Field(default_factory=list)


class LogError(NamedTuple):
    """An estimate of the natural logarithm of measured seconds divided by the formula's seconds.

    mean: the estimate. variance: how uncertain it is: the square of its standard deviation.
    """

    mean: float
    variance: float


class CostModel:
    """Estimates the seconds of passes over tokens of several rows, and of drafting, from those that were measured.

    An estimate is a formula's value times a correction, the *error*, which is learned; the module has the formulas. A
    *level* is all tokens of a draft at one depth, drafted in one pass of the drafter. An *exit* is a layer of the model
    at which drafted tokens leave it. Logarithms are natural.

    costs: the formula's constants ``multiply``, ``read`` and ``attend``: a token's times, each divided by the time of
        reading all weights.
    shares: for each exit, cost of drafting one level as a share of a pass.
    places: for each number of tokens n, (whole part, fraction) of log2(n); entry 0 is that of n = 1.
    state: logarithms: of the seconds of a pass over one token (``speed``), then of the errors of passes over 2, 4,
        8, .. tokens, up to the largest pass that was measured.
    covariance: covariance matrix of the uncertainty of ``state``.
    known: whether a pass has been measured, so that ``speed`` is an estimate.
    others: estimates of the errors of drafting by (part, exit), and then by number of rows. The parts are "draft"
        (a draft without levels), "first" (what its first level takes beyond a further one) and "level" (each level).
    seen: the (part, exit) that have been timed once; the first time does not count.
    """

    def __init__(self, costs: TokenCosts, shares: Sequence[float], earlier: Costs | None = None) -> None:
        """Begin with the formulas, or with the costs that an earlier process has stored.

        costs: the target's estimated costs of a token (``Target.token_costs``).
        shares: for each exit, the bytes that drafting one level reads, as a share of those of a pass of the model.
        earlier: the stored costs; None: there are none.
        """
        self.costs = costs
        self.shares = [max(share, 1e-4) for share in shares]
        self.places = [(int(math.log2(n)), math.log2(n) % 1) for n in (1, *range(1, MOST_TOKENS + 1))]
        self.state = [0.0]
        self.covariance = [[1.0]]
        self.known = False
        self.others: dict[tuple[str, int], dict[int, LogError]] = {}
        self.seen = set[tuple[str, int]]()
        if earlier is not None and earlier.passes:
            self._restore(earlier)

    # -- passes -------------------------------------------------------------------------------------------------------

    @property
    def speed(self) -> float:
        """Natural logarithm of the seconds of a pass over one token with an empty cache; 0.0 before one was timed."""
        return self.state[0]

    def passing(self, contexts: Sequence[int], most: int) -> list[float]:
        """Return the seconds of passes over the root of each row and n = 0, 1, .. drafted tokens, a rising list.

        Entry n counts all n drafted tokens as tokens of the row with the fewest cached tokens; ``beyond`` has what
        those of other rows take more. The list ends at ``most``, or where a pass has ``MOST_TOKENS`` (1024) tokens.

        contexts: number of cached tokens of each row, at least one row. most: maximum number of drafted tokens of all
            rows together.
        """
        rows, cached, least = len(contexts), sum(contexts), min(contexts)
        multiply, read, attend = self.costs
        reading, unit = 1 + read * cached, math.exp(self.speed) / math.hypot(1, multiply)
        errors = [0.0, *self.state[1:]]
        errors += [errors[-1]] * (2 + self.places[-1][0] - len(errors))  # of larger passes than any so far
        first, last = min(rows, MOST_TOKENS), min(rows + most, MOST_TOKENS)
        seconds = [
            unit
            * math.hypot(reading, multiply * tokens + attend * (cached + (tokens - rows) * least))
            * math.exp((1 - share) * errors[below] + share * errors[below + 1])
            for tokens, (below, share) in enumerate(self.places[first : last + 1], first)
        ]
        return [*itertools.accumulate(seconds, max)]  # more tokens take no less

    def beyond(self, contexts: Sequence[int]) -> list[float]:
        """Return, for each row, how many more seconds each of its drafted tokens takes because of its longer text.

        That is, more than a drafted token of the row with the fewest cached tokens, as ``passing`` counts it.

        contexts: number of cached tokens of each row.
        """
        rows, cached, least, some = len(contexts), sum(contexts), min(contexts), TYPICAL_TOKENS
        if max(contexts) == least:
            return [0.0] * rows
        pairs = [cached + some * own for own in (least, *contexts)]
        base, *seconds = (math.exp(self.speed + self.formula(rows + some, cached, each)) for each in pairs)
        return [(own - base) / some for own in seconds]

    def formula(self, tokens: int, cached: int, attended: int) -> float:
        """Return the natural logarithm of a pass's cost by the formula alone, without the errors that were learned.

        The unit of the cost is a pass over one token with an empty cache.

        tokens: number of tokens of the pass. cached: number of cached tokens of all rows.
        attended: number of pairs of a token of the pass and a cached token of its row.
        """
        multiply, read, attend = self.costs
        cost = (1 + read * cached) ** 2 + (multiply * tokens + attend * attended) ** 2
        return 0.5 * (math.log(cost) - math.log1p(multiply**2))

    def add_pass(self, tokens: int, seconds: float, cached: int = 0, attended: int = 0) -> None:
        """Update the estimates with the measured ``seconds`` of a pass.

        tokens: number of tokens of the pass. cached: number of cached tokens of all rows.
        attended: number of pairs of a token of the pass and a cached token of its row.
        """
        tokens = min(tokens, MOST_TOKENS)
        measured = math.log(max(seconds, 1e-7)) - self.formula(tokens, cached, attended)
        if not self.known:
            self.state[0] = measured
            self.known = True
        # The measured value is a sum of entries of the state, times weights, and of noise.
        place, share = self.places[tokens]
        self._reach(math.ceil(place + share))
        weights = [0.0] * len(self.state)
        if share:
            weights[place + 1] = share
        weights[place] = 1 - share
        weights[0] = 1.0
        error = measured - _dot(weights, self.state)
        covariances = [_dot(weights, row) for row in self.covariance]
        variance = _dot(weights, covariances)
        noise = NOISE**2 * max(error / OUTLIER, 1.0)
        faster = _doubt(error, variance, noise)  # how much faster the machine may have become
        self.covariance[0][0] += faster
        covariances[0] += faster
        total = variance + faster + noise
        self.state = [own + each * error / total for own, each in zip(self.state, covariances, strict=True)]
        for n, (row, each) in enumerate(zip(self.covariance, covariances, strict=True)):
            row[:] = [own - each / total * other for own, other in zip(row, covariances, strict=True)]
            row[n] += DRIFT**2 / (10 if n else 1)

    def _reach(self, number: int) -> None:
        """Extend ``state`` and ``covariance`` up to entry ``number``, the error of passes over 2 ** ``number`` tokens.

        New errors begin with the value of the last one, and a larger variance. No effect if the entry is there.
        """
        while len(self.state) <= number:
            first = len(self.state) == 1  # there is no error at one token
            self.state.append(0.0 if first else self.state[-1])
            self.covariance.append([0.0] * len(self.covariance) if first else [*self.covariance[-1]])
            last = self.covariance[-1]
            for row, new in zip(self.covariance, [*last, last[-1] + SPREAD**2], strict=True):
                row.append(new)

    # -- drafts -------------------------------------------------------------------------------------------------------

    def level(self, exit: int, contexts: Sequence[int]) -> float:
        """Return the expected seconds of drafting one level (the tokens at one more depth) for all rows together.

        exit: index of the exit (layer at which drafted tokens leave the model) to which it is drafted.
        contexts: number of cached tokens of each row.
        """
        return self._part(LEVEL, exit, contexts)

    def first(self, exit: int, contexts: Sequence[int]) -> float:
        """Return how many seconds the first level of a draft is expected to take beyond a later one, for all rows.

        exit: index of the exit (layer at which drafted tokens leave the model) to which it is drafted.
        contexts: number of cached tokens of each row.
        """
        return self._part(FIRST, exit, contexts)

    def drafting(self, contexts: Sequence[int]) -> float:
        """Return the expected seconds of a draft for all rows that do not depend on its number of levels.

        contexts: number of cached tokens of each row.
        """
        return self._part(DRAFT, 0, contexts)

    def _part(self, kind: str, exit: int, contexts: Sequence[int]) -> float:
        """Return the estimated seconds of a part of drafting for all rows together, corrected by its learned error.

        kind: the part: ``LEVEL`` ("level": each level, the tokens at one depth), ``FIRST`` ("first": what the first
            level takes beyond a later one) or ``DRAFT`` ("draft": what does not depend on levels).
        exit: index of the exit (layer at which drafted tokens leave the model) to which it is drafted; 0 for ``DRAFT``.
        contexts: number of cached tokens of each row.
        """
        share, overhead = self.shares[exit] if kind == LEVEL else FIXED, OVERHEAD * (kind == FIRST)
        if kind == LEVEL:
            share *= 1 + self.costs.read * sum(min(own, NEAR) for own in contexts)
        return (share * math.exp(self.speed) + overhead) * math.exp(self._error(kind, exit, len(contexts)).mean)

    def _error(self, kind: str, exit: int, rows: int) -> LogError:
        """Return the estimated error of a part of drafting: mean and variance of log(measured / expected seconds).

        For a number of rows that was not measured, the mean is that of the nearest one that was (0.0 if there is none),
        with the variance of an assumption. The object is immutable; ``add_draft`` replaces the stored ones.

        kind: the part: ``LEVEL`` ("level": each level, the tokens at one depth), ``FIRST`` ("first": what the first
            level takes beyond a later one) or ``DRAFT`` ("draft": what does not depend on levels).
        exit: index of the exit (layer at which drafted tokens leave the model); 0 for ``DRAFT``.
        rows: number of rows (sequences) of the step.
        """
        known = self.others.get((kind, exit), {})
        if rows in known:
            return known[rows]
        nearest = min(known, key=lambda other: abs(math.log(other / rows)), default=None)
        return LogError(0.0 if nearest is None else known[nearest].mean, OTHER_SPREAD**2)

    def add_draft(self, exit: int, contexts: Sequence[int], levels: int, seconds: float) -> None:
        """Update the errors of the parts of drafting with the measured ``seconds`` of a draft for all rows.

        The larger a part's share of the expected time, the more its error changes. A time that has a part for the first
        time is ignored, since it includes what is made only once.

        exit: index of the exit (layer at which drafted tokens leave the model) to which it was drafted.
        contexts: number of cached tokens of each row.
        levels: number of drafted levels (depths); 0: a draft without levels, as by n-grams.
        seconds: time of the whole draft.
        """
        parts = {(DRAFT, 0): 1.0} | ({(FIRST, exit): 1.0, (LEVEL, exit): float(levels)} if levels else {})
        if not self.seen.issuperset(parts):  # what the first one makes is there afterwards
            self.seen.update(parts)
            return
        rows = len(contexts)
        each = {part: number * self._part(*part, contexts) for part, number in parts.items()}
        expected = sum(each.values())
        # An error of a part changes the logarithm of the sum by the part's share of the sum.
        shares = {part: own / expected for part, own in each.items()}
        errors = {part: self._error(*part, rows) for part in parts}
        covariances = {part: errors[part].variance * share for part, share in shares.items()}
        variance = sum(covariances[part] * share for part, share in shares.items())
        error = math.log(max(seconds, 1e-9) / expected)
        noise = (DRAFT_NOISE if error > 0 else LEAST_DRAFT_NOISE) ** 2
        doubt = 1 + _doubt(error, variance, noise) / variance
        total = doubt * variance + noise
        error = min(error, MOST_DEVIATIONS * math.sqrt(total))
        for part, own in errors.items():
            covariance = doubt * covariances[part]
            gain = min(covariance / total, 1.0)  # a part is not corrected by more than the whole
            grown = own.variance * (1 + (doubt - 1) * shares[part])  # a part that took no time is not in doubt
            left = min(max(grown - covariance**2 / total + DRIFT**2, DRIFT**2), OTHER_SPREAD**2)
            self.others.setdefault(part, {})[rows] = LogError(_bounded(own.mean + gain * error), left)

    # -- other processes ----------------------------------------------------------------------------------------------

    def kept(self) -> Costs:
        """Return the estimates to store for later processes: ``passes`` ([] before any is known) and ``others``."""
        each = ((*key, rows, error.mean) for key, known in self.others.items() for rows, error in known.items())
        others = {f"{kind} {exit} {rows}": round(error, 4) for kind, exit, rows, error in each}
        return Costs([round(error, 4) for error in self.state] if self.known else [], others)

    def _restore(self, earlier: Costs) -> None:
        """Set the estimates to the costs of an earlier process, of which ``passes`` must not be empty.

        The logarithms of errors are halved: what a busy machine made look dear would not be tried, and so not be
        corrected.
        """
        speed, *errors = earlier.passes[: int(math.log2(MOST_TOKENS)) + 1]
        self._reach(len(errors))
        self.state[:] = [speed, *(error / 2 for error in errors)]
        self.covariance[0][0] = OTHER_SPREAD**2
        self.known = True
        for name, error in earlier.others.items():
            kind, exit, rows = name.split(" ")
            self.others.setdefault((kind, int(exit)), {})[int(rows)] = LogError(
                _bounded(error / 2), OTHER_SPREAD**2 / 4
            )


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the sum of the products of the elements of ``a`` and ``b``, which are equally many."""
    return sum(map(mul, a, b))


def _bounded(error: float) -> float:
    """Return the logarithm of an error between -``MOST_ERROR`` and ``MOST_ERROR``."""
    return min(max(error, -MOST_ERROR), MOST_ERROR)


def _doubt(error: float, variance: float, noise: float) -> float:
    """Return the variance to add to an estimate after a time that was much shorter than expected; 0.0 after others.

    Other work can make a step slow, but nothing makes it fast, so the estimate must be wrong.

    error: natural logarithm of measured over expected time.
    variance, noise: variances of the estimated logarithm and of a measured one.
    """
    return max((error / SURE) ** 2 - variance - noise, 0.0) if error < 0 else 0.0
