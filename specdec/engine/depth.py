"""How deep to draft, and to which exit: fixed, or chosen by expected tokens per second.

``AutoDepth`` takes the exit and depth (0: plain decoding) with the most expected tokens per second, by a table of step
costs, scaled to what recent steps took, and a running estimate of how often each drafted position is accepted. What it
does not take (drafting where plain decoding is faster, another exit, one token deeper) it probes in 1 % of the decode
time: each exit saves up its part of that, and is tried when it pays for the expected loss. The acceptance of other
requests, before it and beside it, counts in a row's estimate as much as ``CARRIED`` observations of its own.

A drafter with probabilities of its own (``estimates``) gets prices instead of a depth: what a node and a level cost, in
tokens at the recent speed. For it, ``AutoDepth`` chooses only between drafting and plain decoding, by what its recent
drafts yielded and cost on average.

Of several rows, each has a running estimate of its own, and the tokens of a step go to those where they are likeliest
to be accepted, as long as they pay for the larger pass (``divide``). A row that does not draft saves up for a probe,
too; where none does, all probe together, as drafting for one row costs about what it costs for all.
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
CARRIED = 8.0  # observations that the acceptance of other requests is worth
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
    """What is known of one row.

    accepted: [exits, positions, 2], how often its drafted token was accepted, and observations, of which old ones fade.
    count: [exits, positions], observations in all. budget: seconds saved for a probe.
    """

    def __init__(self, exits: int = 0, positions: int = 0) -> None:
        self.accepted, self.count, self.budget = np.zeros((exits, positions, 2)), np.zeros((exits, positions)), 0.0


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
        self.passes = functools.lru_cache(64)(self._passes)
        self.drafting = np.array([[costs.drafting(depth, exit) for depth in range(self.most + 1)] for exit in exits])
        self.all = np.zeros((len(exits), self.most, 2))  # as ``Row.accepted``, of all rows
        for known, carried in zip(self.all, costs.accepted, strict=False):
            known[: len(carried)] = np.array(carried[: self.most]).reshape(-1, 2)
        self.paces: deque[float] = deque(maxlen=RECENT)  # measured to expected seconds of scoring
        self.ratios = [deque([1.0], maxlen=RECENT) for _ in exits]  # of drafting, over that of scoring
        self.width = 1.0  # tokens lately scored per drafted depth: more than 1 in a fixed tree
        self.levels, self.nodes = LEVELS, NODES  # of late drafts by prices: levels drafted, and nodes of a row
        self.exponent = 1.0  # ``Prices.exponent``
        self.budgets = np.zeros(len(exits))  # seconds that each exit has saved up for a probe
        self.batch, self.elapsed = 0, 0.0  # seconds since the last decision
        self.choice, self.speed = Choice(), 0.0  # of the last decision; the best expected speed
        self.probe: int | None = None  # the exit that it probes
        self.begin()

    def begin(self) -> Row:
        """A new request."""
        self.hold = 0  # plain steps to go without a decision
        self.row = Row(*self.all.shape[:2])
        return self.row

    def choose(self, batch: int, rows: Sequence[Row] = ()) -> Choice:
        """What to draft in the next step of ``batch`` rows."""
        if self.hold and batch == self.batch:
            self.hold -= 1
            return self.choice
        self.batch = batch
        if len(rows) > 1:
            return self._divided(rows)
        self.row = rows[0] if rows else self.row
        tokens, seconds = self.steps()
        speeds = tokens / seconds
        exit, depth = chosen = divmod(int(speeds.argmax()), self.most + 1)
        self.speed, others = float(speeds[chosen]), list[tuple[float, int]]()
        for other in range(len(speeds)):
            further = depth + 1 if depth and other == exit else 1 + int(speeds[other, 1:].argmax())
            loss = seconds[other, further] - tokens[other, further] / self.speed if further <= self.most else math.inf
            others.append((loss, further))
        wait = self._save([loss for loss, _ in others])
        if self.probe is not None:
            chosen = self.probe, others[self.probe][1]
        self.choice = self._choice(*chosen)
        self.hold = 0 if self.choice.depth else int(min(wait / seconds[chosen], HOLD))
        return self.choice

    def _save(self, losses: Sequence[float]) -> float:
        """Each exit saves for what its probe loses; the ``probe`` is one that can pay. Return seconds until then."""
        self.probe, share, wait = None, PROBES / len(losses), math.inf
        for exit, loss in enumerate(losses):
            if loss < math.inf:
                budget = self.budgets[exit] = min(self.budgets[exit] + share * self.elapsed, loss)
                wait = min(wait, (loss - budget) / share)
                if budget >= loss and self.probe is None:
                    self.probe = exit
        self.elapsed = 0.0
        return wait

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
                row.count[exit, position] += 1
        if self.probe is not None:  # what it took by the median, as a single step may be slow for any reason
            took = pace * (_median(self.ratios[exit]) * expected + self.scoring(scored))
            self.budgets[exit] -= took - (len(accepted) + sum(accepted)) / self.speed

    def steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Expected tokens of each row, and seconds, of a step to each exit (first axis) and depth from 0 on."""
        chances, pace = self._chances([self.row])[:, 0], _median(self.paces)
        tokens = 1 + np.pad(chances.cumsum(1), ((0, 0), (1, 0)))
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
        pace, chances, exits = _median(self.paces), self._chances(rows), range(len(self.ratios))
        found = [divide(chances[exit], self._seconds(exit)) for exit in exits]
        exit = max(exits, key=lambda exit: found[exit].tokens / found[exit].seconds)
        best, losses = found[exit], [math.inf] * len(found)
        self.speed = best.tokens / (pace * best.seconds)
        for other in exits:
            if other != exit or not any(best.depths):
                found[other] = divide(chances[other], self._seconds(other), least=1)
                losses[other] = pace * found[other].seconds - found[other].tokens / self.speed
        elapsed = self.elapsed
        wait = self._save(losses)
        if self.probe is not None:
            exit, best = self.probe, found[self.probe]
        elif any(best.depths):
            self._probe_idle(rows, best, exit, chances[exit, :, 0], elapsed)
        self.choice = Choice()
        self.hold = 0
        if any(best.depths):
            self.choice = Choice(max(best.depths), exit if len(exits) > 1 else None, depths=best.depths)
        else:
            self.hold = int(min(wait / (pace * best.seconds), HOLD))
        return self.choice

    def _probe_idle(self, rows: Sequence[Row], best: Division, exit: int, first: np.ndarray, elapsed: float) -> None:
        """Beside others that draft, one token of the idle row that has saved up most, once that pays for the loss."""
        idle = [b for b, depth in enumerate(best.depths) if not depth]
        for b in idle:
            rows[b].budget += PROBES / len(idle) * elapsed
        if idle:
            b = max(idle, key=lambda b: rows[b].budget)
            tokens = len(rows) + sum(best.depths)
            longer, pace = self._seconds(exit)(np.array([tokens, tokens + 1]), max(best.depths)), _median(self.paces)
            if rows[b].budget >= pace * (longer[1] - longer[0]) - first[b] / self.speed:
                rows[b].budget, best.depths[b] = 0.0, 1

    def _chances(self, rows: Sequence[Row]) -> np.ndarray:
        """The probability that a chain is accepted up to each position: [exits, rows, positions]."""
        accepted, seen = np.moveaxis(np.stack([row.accepted for row in rows], 1), -1, 0)
        common, all_seen = np.moveaxis(self.all[:, None], -1, 0)
        others = np.clip(all_seen - np.stack([row.count for row in rows], 1), 0, CARRIED)
        known, total = seen * accepted + others * common, seen + others + WEIGHT
        shares, share = np.empty_like(known), np.full(known.shape[:2], PRIOR)
        for position in range(self.most):  # each is assumed to be like the one before
            share = (known[..., position] + WEIGHT * share) / total[..., position]
            shares[..., position] = share
        return shares.cumprod(-1)

    def _seconds(self, exit: int) -> Callable[[np.ndarray, np.ndarray | int], np.ndarray]:
        """By the table: of steps that score so many tokens and draft so deep."""
        drafting = _median(self.ratios[exit]) * self.drafting[exit]
        passes = self.passes(self.batch, round(self.width, 1))
        return lambda tokens, depth: passes[tokens - self.batch] + drafting[depth]

    def _passes(self, batch: int, width: float) -> np.ndarray:
        """By the table: seconds of passes that score 0, 1, ... drafted tokens beside ``batch`` roots."""
        return np.array([self.scoring(batch + n * width) for n in range(batch * self.most + 1)])

    def costs(self) -> Costs:
        """The table as recent steps have it, and what is known of acceptance."""
        pace = _median(self.paces)
        scales = [pace * _median(known) for known in self.ratios]
        drafts = tuple((a * first, a * further) for a, (first, further) in zip(scales, self.table.drafts, strict=True))
        accepted = tuple(tuple((share, seen) for share, seen in known if seen) for known in self.all.tolist())
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


def _observed(known: np.ndarray, position: int, right: Sequence[bool], memory: float) -> None:
    """Take in how often the drafted token of a position was accepted."""
    share, seen = known[position].tolist()
    before, now = memory * seen, memory * seen + len(right)
    known[position] = (before * share + sum(right)) / now if now else share, now


def _median(ratios: Sequence[float]) -> float:
    """The lower median; 1 of none. What else the machine does only ever makes a step longer."""
    return sorted(ratios)[(len(ratios) - 1) // 2] if ratios else 1.0
