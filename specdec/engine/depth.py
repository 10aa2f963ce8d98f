"""How deep to draft, and to which exit: fixed, or chosen by expected tokens per second.

``AutoDepth`` takes the exit and depth (0: plain decoding) with the most expected tokens per second, by a table of step
costs, scaled to what recent steps took, and a running estimate of how often each drafted position is accepted. What it
does not take (drafting where plain decoding is faster, another exit, one token deeper) it probes in 1 % of the decode
time: each exit saves up its part of that, and is tried when it pays for the expected loss. A request starts from the
acceptance of earlier ones, worth five observations.

A drafter with probabilities of its own (``estimates``) gets prices instead of a depth: what a node and a level cost, in
tokens at the recent speed. For it, ``AutoDepth`` chooses only between drafting and plain decoding, by what its recent
drafts yielded and cost on average.

Of several rows, each has a running estimate of its own, and the tokens of a step go to those where they are likeliest
to be accepted, as long as they pay for the larger pass (``divide``).
"""

from __future__ import annotations

import bisect
import functools
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass

from specdec.engine.division import Division, divide
from specdec.speculation.trees import MOST_NODES, Prices

MOST, DEEPEST = 8, 12  # deepest draft considered, and deepest that prices may end
PROBES = 0.01  # share of the decode time that probes may lose
PRIOR, WEIGHT = 0.6, 1.25  # acceptance of an unknown drafter, and how many observations this guess is worth
CARRIED = 5.0  # observations that the acceptance of earlier requests is worth
MEMORY, LONG_MEMORY = 0.97, 0.998  # weight of the past per step: within a request, over requests
RECENT = 15  # steps whose median ratio of measured to expected seconds scales the table
HOLD = 15  # most plain steps without a decision
LEVELS, NODES, LATELY = 4.0, 8.0, 0.1  # size of a draft by prices at first; weight of a step in its running mean
LEARNED, EXPONENTS = 0.01, (0.5, 4.0)  # step by which the exponent of drafters' probabilities moves, and its bounds

Known = tuple[tuple[Annotated[float, Field(ge=0, le=1)], PositiveFloat], ...]  # per position: acceptance, observations


@dataclass(frozen=True, config={"allow_inf_nan": False})
class Costs:
    """Seconds: ``score[n]`` of a pass over n tokens (embedding, layers, readout), ``drafts`` of drafting.

    drafts: for each exit, the first drafted token and each further one. accepted: for each exit and position, how often
    the drafted token was accepted in earlier requests, and how many observations that rests on.
    """

    score: dict[int, PositiveFloat]
    drafts: tuple[tuple[NonNegativeFloat, NonNegativeFloat], ...]
    accepted: tuple[Known, ...] = ()

    def scoring(self, tokens: float) -> float:
        """Seconds of a pass over ``tokens``: linear between the sizes in ``score``, and on from half the largest."""
        sizes = sorted(self.score)
        at = min(max(bisect.bisect_left(sizes, tokens), 1), len(sizes) - 1)
        below, above = sizes[at - 1], sizes[at]
        if tokens > above:
            below = sizes[bisect.bisect_right(sizes, above / 2) - 1]
        low, high = self.score[below], self.score[above]
        return low + (tokens - below) / (above - below) * max(high - low, 0.0)

    def drafting(self, depth: float, exit: int = -1) -> float:
        """Seconds of drafting ``depth`` tokens deep."""
        first, further = self.drafts[exit]
        return max(first + (depth - 1) * further, 1e-9) if depth else 0.0


class Choice(NamedTuple):
    """What to draft in a step.

    depth: most tokens for each row; 0 is a plain step. exit, prices: as in ``State``. depths: most tokens for each row,
    where they differ.
    """

    depth: int = 0
    exit: int | None = None
    prices: Prices | None = None
    depths: Sequence[int] | None = None


class Row:
    """What is known of one row. accepted: for each exit, as ``Costs.accepted``. budget: seconds saved for a probe."""

    def __init__(self, accepted: Sequence[Sequence[tuple[float, float]]] = ()) -> None:
        self.accepted, self.budget = [list(known) for known in accepted], 0.0


class FixedDepth:
    """Always the same depth and exit."""

    def __init__(self, depth: int, exit: int | None = None) -> None:
        self.choice = Choice(depth, exit)

    def begin(self) -> Row:
        return Row()

    def choose(self, batch: int, rows: Sequence[Row] = ()) -> Choice:
        return self.choice

    def observe(
        self,
        drafted: Sequence[int],
        accepted: Sequence[int],
        scored: int,
        draft: float,
        rest: float,
        rows: Sequence[Row] = (),
    ) -> None:
        pass


class AutoDepth:
    """The policy above. One serves all requests of a decoder; each has a ``Row`` of its own (``begin``).

    estimates: of the drafter (``Drafter.estimates``).
    """

    def __init__(self, costs: Costs, estimates: bool = False) -> None:
        self.table, self.estimates, exits = costs, estimates, range(len(costs.drafts))
        self.most = DEEPEST if estimates else MOST
        self.scoring = functools.lru_cache(costs.scoring)
        self.drafting = np.array([[costs.drafting(depth, exit) for depth in range(self.most + 1)] for exit in exits])
        known = [*costs.accepted, *[()] * len(exits)]
        self.all = [[*known[exit], *[(0.0, 0.0)] * self.most][: self.most] for exit in exits]  # as ``Costs.accepted``
        self.paces: deque[float] = deque(maxlen=RECENT)  # measured to expected seconds of scoring
        self.ratios = [deque([1.0], maxlen=RECENT) for _ in exits]  # of drafting, over that of scoring
        self.width = 1.0  # tokens lately scored per drafted depth: more than 1 in a fixed tree
        self.levels, self.nodes = LEVELS, NODES  # of late drafts by prices: levels drafted, and nodes of a row
        self.exponent = 1.0  # ``Prices.exponent``
        self.budgets = np.zeros(len(exits))  # seconds that each exit has saved up for a probe
        self.batch, self.elapsed = 0, 0.0  # seconds since the last decision
        self.choice, self.probe, self.speed = Choice(), False, 0.0  # of the last decision; the best expected speed
        self.begin()

    def begin(self) -> Row:
        """A new request."""
        self.hold = 0  # plain steps to go without a decision
        self.row = Row([[(share, min(seen, CARRIED)) for share, seen in known] for known in self.all])
        return self.row

    def choose(self, batch: int, rows: Sequence[Row] = ()) -> Choice:
        """What to draft in the next step of ``batch`` rows."""
        if self.hold and batch == self.batch:
            self.hold -= 1
            return self.choice
        self.batch, self.probe = batch, False
        if len(rows) > 1:
            return self._divided(rows)
        self.row = rows[0] if rows else self.row
        tokens, seconds = self.steps()
        speeds = tokens / seconds
        exit, depth = chosen = divmod(int(speeds.argmax()), self.most + 1)
        self.speed, share, wait = float(speeds[chosen]), PROBES / len(speeds), HOLD * seconds[chosen]
        for other, budget in enumerate(self.budgets):
            further = depth + 1 if depth and other == exit else 1 + int(speeds[other, 1:].argmax())
            if further > self.most:
                continue
            loss = seconds[other, further] - tokens[other, further] / self.speed
            self.budgets[other] = budget = min(budget + share * self.elapsed, loss)
            wait = min(wait, (loss - budget) / share)
            if budget >= loss and not self.probe:
                chosen, self.probe = (other, further), True
        self.elapsed = 0.0
        self.choice = self._choice(*chosen)
        self.hold = 0 if self.choice.depth else int(wait / seconds[chosen])
        return self.choice

    def observe(
        self,
        drafted: Sequence[int],
        accepted: Sequence[int],
        scored: int,
        draft: float,
        rest: float,
        rows: Sequence[Row] = (),
    ) -> None:
        """A step: drafted depth and accepted tokens of each row, tokens scored, seconds of drafting and of the rest."""
        rows = rows or [self.row] * len(drafted)
        prices = self.choice.prices or Prices(())
        deepest = max(*drafted, prices.levels)
        self.elapsed += draft + rest
        self.paces.append(rest / self.scoring(scored))
        if not deepest:
            return
        exit, nodes = self.choice.exit or 0, scored - len(drafted)
        if self.estimates and self.choice.prices is not None:
            self.levels += LATELY * (deepest - self.levels)
            self.nodes += LATELY * (nodes / len(drafted) - self.nodes)
            drafted = [self.most] * len(drafted)  # it was free to draft as deep
            if prices.expected is not None:
                surplus = prices.expected - sum(accepted) / len(accepted)
                low, high = EXPONENTS
                self.exponent = min(max(self.exponent * math.exp(LEARNED * surplus), low), high)
        self.width = 0.8 * self.width + 0.2 * (nodes / sum(drafted) if prices.expected is None else 1.0)
        pace, expected = _median(self.paces), self.table.drafting(deepest, exit)
        self.ratios[exit].append(draft / pace / expected)
        for position in range(min(max(drafted), self.most)):
            # Only rows whose chain was accepted up to here say anything about this position.
            reached = [(a, row) for d, a, row in zip(drafted, accepted, rows, strict=True) if d > position <= a]
            _observed(self.all[exit], position, [a > position for a, _ in reached], LONG_MEMORY)
            for a, row in reached:
                _observed(row.accepted[exit], position, [a > position], MEMORY)
        if self.probe and len(rows) == 1:  # what it took by the median, as a single step may be slow for any reason
            took = pace * (_median(self.ratios[exit]) * expected + self.scoring(scored))
            self.budgets[exit] -= took - (1 + sum(accepted) / len(accepted)) / self.speed

    def steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Expected tokens of each row, and seconds, of a step to each exit (first axis) and depth from 0 on."""
        tokens, pace = np.array([_tokens(known) for known in self.row.accepted]), _median(self.paces)
        ratios = np.array([[_median(known)] for known in self.ratios])
        if self.estimates:  # a draft is as deep as it likes
            seconds = np.full(tokens.shape, np.inf)
            seconds[:, 0] = pace * self.scoring(self.batch)
            drafting = [self.table.drafting(self.levels, exit) for exit in range(len(ratios))]
            seconds[:, self.most] = pace * (ratios[:, 0] * drafting + self.scoring(self.batch * (1 + self.nodes)))
            return tokens, seconds
        scoring = [self.scoring(self.batch * (1 + depth * self.width)) for depth in range(self.most + 1)]
        return tokens, pace * (ratios * self.drafting + scoring)

    def _divided(self, rows: Sequence[Row]) -> Choice:
        """The same decision for several rows: the step's tokens go to those where they are likeliest to be accepted."""
        pace, best = _median(self.paces), Division([], 0.0, 0.0)
        exit = 0
        for other in range(len(self.ratios)):
            found = divide(self._chances(rows, other), self._seconds(other))
            if not best.seconds or found.tokens / found.seconds > best.tokens / best.seconds:
                best, exit = found, other
        self.speed, depths = best.tokens / (pace * best.seconds), best.depths
        idle = [b for b, depth in enumerate(depths) if not depth]
        for b in idle:
            rows[b].budget += PROBES / len(idle) * self.elapsed
        if idle:  # one token of the row that has saved up most, once that pays for the expected loss
            b = max(idle, key=lambda b: rows[b].budget)
            further = [max(depth, int(at == b)) for at, depth in enumerate(depths)]
            loss = pace * self._seconds(exit)(len(rows) + sum(further), max(further)) - (
                (best.tokens + self._chances(rows, exit)[b][0]) / self.speed
            )
            if rows[b].budget >= loss:
                rows[b].budget, depths, self.probe = 0.0, further, True
        self.elapsed, self.hold = 0.0, 0
        several = exit if len(self.ratios) > 1 else None
        self.choice = Choice(max(depths), several, depths=depths) if any(depths) else Choice()
        return self.choice

    def _chances(self, rows: Sequence[Row], exit: int) -> list[list[float]]:
        """For each row, the probability that its chain to an exit is accepted up to each position."""
        return [np.diff(_tokens(row.accepted[exit])).tolist() for row in rows]

    def _seconds(self, exit: int) -> Callable[[int, int], float]:
        """By the table: of a step that scores so many tokens and drafts so deep."""
        ratio = _median(self.ratios[exit])

        def seconds(tokens: int, depth: int) -> float:
            return self.scoring(self.batch + (tokens - self.batch) * self.width) + ratio * self.drafting[exit][depth]

        return seconds

    def costs(self) -> Costs:
        """The table as recent steps have it, and what is known of acceptance."""
        pace = _median(self.paces)
        scales = [pace * _median(known) for known in self.ratios]
        drafts = tuple((a * first, a * further) for a, (first, further) in zip(scales, self.table.drafts, strict=True))
        accepted = tuple(tuple(position for position in known if position[1]) for known in self.all)
        return Costs({n: pace * seconds for n, seconds in self.table.score.items()}, drafts, accepted)

    def _choice(self, exit: int, depth: int) -> Choice:
        """That step, and what levels and nodes cost in it: the seconds they take, at the best speed expected."""
        if not depth:
            return Choice()
        second = self.speed * _median(self.paces)  # tokens of a row, by a second of the table
        nodes = [
            second * (self.scoring(self.batch * (1 + n)) - self.scoring(self.batch)) for n in range(MOST_NODES + 1)
        ]
        level = second * _median(self.ratios[exit]) * self.table.drafts[exit][1]
        prices = Prices(nodes, level + max(nodes[1], 0.0), self.exponent)
        return Choice(depth, exit if len(self.ratios) > 1 else None, prices)


DepthPolicy = FixedDepth | AutoDepth


def _observed(known: list[tuple[float, float]], position: int, right: Sequence[bool], memory: float) -> None:
    """Take in how often the drafted token of a position was accepted."""
    share, seen = known[position]
    before, now = memory * seen, memory * seen + len(right)
    known[position] = ((before * share + sum(right)) / now if now else share, now)


def _tokens(known: Sequence[tuple[float, float]]) -> list[float]:
    """Expected tokens of a step at depth 0, 1, ..., by the share of acceptance and observations of each."""
    share, chain, tokens = PRIOR, 1.0, [1.0]
    for observed, seen in known:
        share = (seen * observed + WEIGHT * share) / (seen + WEIGHT)  # a position is assumed to be like the one before
        chain *= share
        tokens.append(tokens[-1] + chain)
    return tokens


def _median(ratios: Sequence[float]) -> float:
    """The lower median; 1 of none. What else the machine does only ever makes a step longer."""
    return sorted(ratios)[(len(ratios) - 1) // 2] if ratios else 1.0
