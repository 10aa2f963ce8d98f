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
SPREAD = 0.25  # assumed error of the formula, as a logarithm
NOISE, DRIFT = 0.1, 0.01  # of a step's time, and of the machine's speed from step to step, likewise
LEAST = 0.03  # error of a correction that always remains, likewise
FIXED = 0.02  # assumed cost of a draft without levels, in passes
OUTLIER = 0.5  # errors beyond this count less
LEVEL, DRAFT = "level", "draft"


@dataclass(frozen=True, config={"allow_inf_nan": False})
class Costs:
    """What is known about costs, for later processes.

    passes: by number of rows, the corrections (logarithms) at 1, 2, 4, .. tokens.
    drafts: the corrections of ``LEVEL exit rows`` and ``DRAFT 0 rows``.
    seconds: of a pass over one token, as a logarithm.
    hits, trials: of ``History.tallies``, over all rows.
    """

    seconds: float | None = None
    passes: dict[int, list[float]] = Field(default_factory=dict)
    drafts: dict[str, float] = Field(default_factory=dict)
    hits: list[list[float]] = Field(default_factory=list)
    trials: list[list[float]] = Field(default_factory=list)


class Correction:
    """Errors of the formula, as logarithms, and their variances."""

    def __init__(self, errors: Floats) -> None:
        self.errors, self.variances = errors, np.full(len(errors), SPREAD**2)


class CostModel:
    """Seconds of passes over tokens of several rows, and of drafting.

    The weights of a pass are read once, and each token multiplies them: sqrt(1 + (tokens * ratio)^2), in passes over no
    token. A level costs its share of a pass. One scale, the machine's present speed, and a correction for each kind of
    cost are estimated together from the times of steps (a Kalman filter of the logarithms).

    ratio: seconds of multiplying a token over those of reading the weights.
    shares: of a pass that drafting a level costs, by exit.
    """

    def __init__(self, ratio: float, shares: Sequence[float], earlier: Costs | None = None) -> None:
        earlier = earlier or Costs()
        tokens = np.arange(MOST_TOKENS + 1, dtype=float)
        self.formula: Floats = 0.5 * (np.log1p((tokens * ratio) ** 2) - math.log1p(ratio**2))  # over a pass of one token
        at = np.log2(np.maximum(tokens, 1))
        self.below = at.astype(int)
        self.beyond: Floats = at - self.below
        self.sizes = int(self.below[-1]) + 2
        self.shares = [max(share, 1e-4) for share in shares]
        self.scale, self.variance = earlier.seconds or 0.0, 4.0  # of the machine, as a logarithm
        self.known = earlier.seconds is not None
        self.passes = {rows: Correction(np.resize(np.array(own), self.sizes)) for rows, own in earlier.passes.items() if own}
        self.drafts = {key: Correction(np.array([own])) for key, own in earlier.drafts.items()}
        self.seen = set[str]()

    def passing(self, rows: int, most: int) -> list[float]:
        """Seconds of passes over ``rows`` roots and 0, 1, .. ``most`` drafted tokens."""
        own, to = self._pass(rows).errors, slice(min(rows, MOST_TOKENS), min(rows + most, MOST_TOKENS) + 1)
        below, share = self.below[to], self.beyond[to]
        errors = (1 - share) * own[below] + share * own[below + 1]
        found: list[float] = np.exp(self.scale + self.formula[to] + errors).tolist()
        return np.maximum.accumulate(found).tolist()  # more tokens take no less

    def level(self, exit: int, rows: int) -> float:
        """Seconds of drafting a level for ``rows``."""
        return math.exp(self.scale + math.log(self.shares[exit]) + float(self._draft(LEVEL, exit, rows).errors[0]))

    def drafting(self, rows: int) -> float:
        """Seconds of a draft beside its levels."""
        return math.exp(self.scale + math.log(FIXED) + float(self._draft(DRAFT, 0, rows).errors[0]))

    def add_pass(self, rows: int, tokens: int, seconds: float) -> None:
        """Add the time of a pass over ``tokens``, roots included."""
        tokens = min(tokens, MOST_TOKENS)
        below, share = int(self.below[tokens]), float(self.beyond[tokens])
        weights = np.zeros(self.sizes)
        weights[below], weights[below + 1] = 1 - share, share
        self._add(self._pass(rows), weights, float(self.formula[tokens]), seconds)

    def add_draft(self, exit: int, rows: int, levels: int, seconds: float) -> None:
        """Add the time of drafting ``levels``."""
        kind = LEVEL if levels else DRAFT
        if (name := f"{kind} {exit} {rows}") not in self.seen:  # what the first one makes is there afterwards
            self.seen.add(name)
        elif levels:
            each = max(seconds - self.drafting(rows), 0.1 * seconds) / levels
            self._add(self._draft(LEVEL, exit, rows), np.ones(1), math.log(self.shares[exit]), each)
        else:
            self._add(self._draft(DRAFT, 0, rows), np.ones(1), math.log(FIXED), seconds)

    def _pass(self, rows: int) -> Correction:
        if rows not in self.passes:
            self.passes[rows] = Correction(np.zeros(self.sizes))
        return self.passes[rows]

    def _draft(self, kind: str, exit: int, rows: int) -> Correction:
        key = f"{kind} {exit} {rows}"
        if key not in self.drafts:
            self.drafts[key] = Correction(np.zeros(1))
        return self.drafts[key]

    def _add(self, own: Correction, weights: Floats, formula: float, seconds: float) -> None:
        """Correct the scale and the errors that an observation depends on, each by its share of the uncertainty."""
        seen = math.log(max(seconds, 1e-7)) - formula - float(weights @ own.errors)
        if not self.known:
            self.scale, self.known = seen, True
        error = seen - self.scale
        gains = weights * own.variances
        total = self.variance + float(weights @ gains) + NOISE**2 * max(abs(error) / OUTLIER, 1.0)
        step = error / total
        self.scale += self.variance * step
        own.errors = own.errors + gains * step
        own.variances = np.maximum(own.variances - gains**2 / total, LEAST**2)
        self.variance += DRIFT**2 - self.variance**2 / total

    def kept(self) -> Costs:
        """What later processes begin with, without ``hits`` and ``trials``."""
        passes = {rows: own.errors.round(4).tolist() for rows, own in self.passes.items()}
        drafts = {key: round(float(own.errors[0]), 4) for key, own in self.drafts.items()}
        return Costs(self.scale if self.known else None, passes, drafts)
