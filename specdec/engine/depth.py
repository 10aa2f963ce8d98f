"""How deep to draft, and to which exit: fixed, or chosen by expected tokens per second.

``AutoDepth`` takes the exit and depth (0: plain decoding) with the most expected tokens per second, by a table of step
costs, scaled to what recent steps took, and a running estimate of how often each drafted position is accepted. What it
does not take (drafting where plain decoding is faster, another exit, one token deeper) it probes in 1 % of the decode
time: each exit saves up its part of that, and is tried when it pays for the expected loss. The acceptance of other
requests, before it and beside it, counts in a row's estimate as much as ``CARRIED`` observations of its own.

A drafter with probabilities of its own (``estimates``) gets prices instead of a depth: what a node and a level cost, in
tokens at the recent speed. For it, ``AutoDepth`` chooses only between drafting and plain decoding, by what its recent
drafts yielded and cost on average.

Each row has a running estimate of its own, and the tokens of a step go to those where they are likeliest to be
accepted, as long as they pay for the larger pass (``divide``): one row is the same case as many. The token more that is
probed is of the row that has not drafted for the longest time; where none drafts, all probe together, as drafting for
one row costs about what it costs for all. What drafts took counts for steps of as many rows.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Annotated, NamedTuple

from pydantic import Field, NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass

from specdec.engine.division import Division, divide
from specdec.speculation.trees import MOST_NODES, Prices

MOST, DEEPEST = 8, 12  # deepest draft considered, and deepest that prices may end
PROBES = 0.01  # share of the decode time that probes may lose
DEBT = 4.0  # passes that the drafting of a probe counts as at most
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

    known[exit][position]: how often its drafted token was accepted, of so many observations, of which old ones fade,
    and observations in all. idle: steps since it last drafted.
    """

    def __init__(self, exits: int = 0, positions: int = 0) -> None:
        self.known = [[(0.0, 0.0, 0)] * positions for _ in range(exits)]
        self.idle = 0


class FixedDepth:
    """Always the same depth and exit."""

    def __init__(self, depth: int, exit: int | None = None) -> None:
        self.choice = Choice(depth, exit)

    def begin(self) -> Row:
        return Row()

    def choose(self, rows: Sequence[Row], plain: int = 0) -> Choice:
        return self.choice

    def observe(
        self,
        rows: Sequence[Row],
        drafted: Sequence[int],
        accepted: Sequence[int],
        scored: int,
        draft: float,
        rest: float,
    ) -> None:
        pass


class AutoDepth:
    """The policy above. One serves all requests of a decoder; each has a ``Row`` of its own (``begin``).

    estimates: of the drafter (``Drafter.estimates``).
    """

    def __init__(self, costs: Costs, estimates: bool = False) -> None:
        self.table, self.estimates, exits = costs, estimates, len(costs.drafts)
        self.most = DEEPEST if estimates else MOST
        self.passes = functools.lru_cache(64)(self._passes)
        self.scoring = functools.lru_cache(costs.scoring)
        self.beside = [self.scoring(1 + n) - self.scoring(1) for n in range(MOST_NODES + 1)]  # of a row's nodes
        self.drafting = [[costs.drafting(depth, exit) for depth in range(self.most + 1)] for exit in range(exits)]
        self.all = Row(exits, self.most)  # what is known of all rows
        for exit, carried in enumerate(costs.accepted[:exits]):
            own = [(share, seen, 0) for share, seen in carried[: self.most]]
            self.all.known[exit][: len(own)] = own
        self.paces: deque[float] = deque(maxlen=RECENT)  # measured to expected seconds of scoring
        # Of drafting, over that of scoring: by exit and number of rows, as drafting for more of them takes longer.
        self.ratios = defaultdict[tuple[int, int], deque[float]](lambda: deque([1.0], maxlen=RECENT))
        self.width = 1.0  # tokens lately scored per drafted depth: more than 1 in a fixed tree
        self.levels, self.nodes = LEVELS, NODES  # of late drafts by prices: levels drafted, and nodes of a row
        self.exponent = 1.0  # ``Prices.exponent``
        self.budgets = [0.0] * exits  # seconds that each exit has saved up for a probe
        self.batch, self.elapsed = (0, 0), 0.0  # rows that may draft, and others; seconds since the last decision
        self.hold = 0  # plain steps to go without a decision
        self.choice, self.speed = Choice(), 0.0  # of the last decision; the best expected speed
        self.probe: int | None = None  # the exit that it probes

    def begin(self) -> Row:
        """A new request."""
        self.hold = 0
        return Row(len(self.drafting), self.most)

    def choose(self, rows: Sequence[Row], plain: int = 0) -> Choice:
        """What to draft in the next step of ``rows``, beside ``plain`` others that never draft."""
        if self.hold and self.batch == (len(rows), plain):
            self.hold -= 1
            return self.choice
        self.batch, self.hold = (len(rows), plain), 0
        if not rows:
            self.choice, self.probe, self.elapsed = Choice(), None, 0.0
            return self.choice
        pace, exits = _median(self.paces), range(len(self.drafting))
        chances = [[self._chances(row, exit) for row in rows] for exit in exits]
        costs = [self._seconds(exit) for exit in exits]
        found = [divide(chances[exit], *costs[exit], plain=plain) for exit in exits]
        exit = max(exits, key=lambda exit: found[exit].tokens / found[exit].seconds)
        best, others = found[exit], list[Division | None]()
        self.speed = best.tokens / (pace * best.seconds)
        for other in exits:
            if not any(found[other].depths):
                others.append(divide(chances[other], *costs[other], least=1, plain=plain))
            elif other == exit:
                others.append(self._one_more(rows, best, chances[exit], *costs[exit]))
            else:
                others.append(found[other])
        wait = self._save([pace * more.seconds - more.tokens / self.speed if more else math.inf for more in others])
        depths, prices = best.depths, None
        if self.probe is not None and (more := others[self.probe]):
            exit, depths = self.probe, more.depths
        if not any(depths):
            self.hold, self.choice = int(min(wait / (pace * best.seconds), HOLD)), Choice()
            return self.choice
        if self.batch == (1, 0):
            prices = self._prices(exit, best.tokens / best.seconds)
        self.choice = Choice(max(depths), exit if len(exits) > 1 else None, prices, depths)
        return self.choice

    def _one_more(
        self,
        rows: Sequence[Row],
        best: Division,
        chances: Sequence[Sequence[float]],
        passes: Sequence[float],
        drafting: Sequence[float],
    ) -> Division | None:
        """One token more, of the row that has not drafted for the longest time; of others the likeliest one."""
        open_rows = [b for b, depth in enumerate(best.depths) if depth < self.most]
        if not open_rows:
            return None
        b = max(open_rows, key=lambda b: (rows[b].idle, chances[b][best.depths[b]]))
        depths = [depth + (b == at) for at, depth in enumerate(best.depths)]
        took = passes[sum(depths)] + drafting[max(depths)]
        return Division(depths, best.tokens + chances[b][best.depths[b]], took)

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
        rows: Sequence[Row],
        drafted: Sequence[int],
        accepted: Sequence[int],
        scored: int,
        draft: float,
        rest: float,
    ) -> None:
        """A step: drafted depth and accepted tokens of each row, tokens scored, seconds of drafting and of the rest."""
        prices = self.choice.prices or Prices(())
        deepest = prices.levels or max(drafted)
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
        self.ratios[exit, len(drafted)].append(draft / pace / expected)
        for row, depth, count in zip(rows, drafted, accepted, strict=True):
            row.idle = 0 if depth else row.idle + 1
            for position in range(min(depth, count + 1, self.most)):
                _observed(row.known[exit], position, [count > position], MEMORY)
        for position in range(min(max(drafted), self.most)):
            # Only rows whose chain was accepted up to here say anything about this position.
            right = [a > position for d, a in zip(drafted, accepted, strict=True) if d > position <= a]
            _observed(self.all.known[exit], position, right, LONG_MEMORY)
        if self.probe is not None:  # drafting counts as it was, within bounds, as a step may be slow for any reason
            took = min(draft, DEBT * pace * self.scoring(scored)) + pace * self.scoring(scored)
            self.budgets[exit] -= took - (len(accepted) + sum(accepted)) / self.speed

    def _chances(self, row: Row, exit: int) -> list[float]:
        """The probability that a chain of ``row`` is accepted up to each position."""
        share, chance, chances = PRIOR, 1.0, list[float]()
        for (own, seen, count), (common, all_seen, _) in zip(row.known[exit], self.all.known[exit], strict=True):
            others = min(max(all_seen - count, 0.0), CARRIED)  # each is assumed to be like the one before
            share = (seen * own + others * common + WEIGHT * share) / (seen + others + WEIGHT)
            chance *= share
            chances.append(chance)
        return chances

    def _seconds(self, exit: int) -> tuple[Sequence[float], Sequence[float]]:
        """By the table: of passes over 0, 1, .. drafted tokens beside the roots, and of drafting so deep."""
        ratio = _median(self.ratios[exit, sum(self.batch)])
        if self.estimates and self.batch == (1, 0):  # a draft is as deep as it likes
            never = [math.inf] * (self.most - 1)
            passes = [self.scoring(1), *never, self.scoring(1 + self.nodes)]
            return passes, [0.0, *[ratio * self.table.drafting(self.levels, exit)] * self.most]
        return self.passes(*self.batch, round(self.width, 1)), [ratio * seconds for seconds in self.drafting[exit]]

    def _passes(self, rows: int, plain: int, width: float) -> list[float]:
        return [self.scoring(rows + plain + n * width) for n in range(rows * self.most + 1)]

    def costs(self) -> Costs:
        """The table as recent steps have it, and what is known of acceptance."""
        pace = _median(self.paces)
        scales = [pace * _median(self.ratios[exit, 1]) for exit in range(len(self.drafting))]
        drafts = tuple((a * first, a * further) for a, (first, further) in zip(scales, self.table.drafts, strict=True))
        accepted = tuple(tuple((share, seen) for share, seen, _ in known if seen) for known in self.all.known)
        return Costs({n: pace * seconds for n, seconds in self.table.score.items()}, drafts, accepted)

    def _prices(self, exit: int, speed: float) -> Prices:
        """What levels and nodes of one row cost, at ``speed`` tokens by a second of the table."""
        nodes = [speed * seconds for seconds in self.beside]
        level = speed * _median(self.ratios[exit, 1]) * self.table.drafts[exit][1]
        return Prices(nodes, level + max(nodes[1], 0.0), self.exponent)


DepthPolicy = FixedDepth | AutoDepth


def _observed(known: list[tuple[float, float, int]], position: int, right: Sequence[bool], memory: float) -> None:
    """Take in how often the drafted token of a position was accepted."""
    share, seen, count = known[position]
    before = memory * seen
    now = before + len(right)
    known[position] = (before * share + sum(right)) / now if now else share, now, count + len(right)


def _median(ratios: Sequence[float]) -> float:
    """The lower median; 1 of none. What else the machine does only ever makes a step longer."""
    return sorted(ratios)[(len(ratios) - 1) // 2] if ratios else 1.0
