"""How deep to draft, and to which exit: fixed, or chosen by expected tokens per second.

``AutoDepth`` takes the exit and depth (0: plain decoding) with the most expected tokens per second, from the costs of
steps (``CostModel``) and the acceptance of drafted tokens (``AcceptanceEstimator``). What it does not take (drafting
where plain decoding is faster, another exit, one token deeper) it probes in 1 % of the decode time (``ProbeBudget``).
The tokens of a step go to the rows where they are likeliest to be accepted (``allocate``).

A drafter with probabilities of its own gets prices instead of a depth: the costs of a node and of a level, in tokens at
the recent speed. For it, the policy chooses only between drafting and plain decoding, by the average yield and cost of
its recent drafts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

from specdec.engine.depth.acceptance import AcceptanceEstimator, RowHistory
from specdec.engine.depth.costs import CostModel, Costs
from specdec.speculation.trees import Prices

MAX_DEPTH, MAX_PRICED_DEPTH = 8, 12  # deepest draft that is considered, without and with prices
PROBES = 0.01  # share of the decode time that probes may lose
MAX_DRAFTING = 4.0  # number of passes that the drafting of a probe counts as at most
MAX_HOLD = 15  # maximum number of plain steps without a decision


class DepthChoice(NamedTuple):
    """What to draft in a step.

    depth: maximum tokens for each row; 0 is a plain step.
    exit, prices: as in ``State``.
    depths: maximum tokens for each row, where they differ.
    """

    depth: int = 0
    exit: int | None = None
    prices: Prices | None = None
    depths: Sequence[int] | None = None


@dataclass
class StepReport:
    """The result of a step.

    rows: their histories.
    drafted: depth of each row's draft.
    accepted: number of each row's accepted drafted tokens.
    scored: number of tokens of the pass.
    drafting, other: seconds.
    """

    rows: Sequence[RowHistory]
    drafted: Sequence[int]
    accepted: Sequence[int]
    scored: int
    drafting: float
    other: float


class Allocation(NamedTuple):
    """The depth of each row's draft, the tokens that the step is expected to yield, and its expected seconds."""

    depths: list[int]
    tokens: float
    seconds: float


def allocate(
    chances: Sequence[Sequence[float]],
    passes: Sequence[float],
    drafting: Sequence[float],
    least: int = 0,
    plain: int = 0,
) -> Allocation:
    """The depths with the most expected tokens per second, of those that draft ``least`` tokens or more.

    The likeliest token comes first; as probabilities fall along a row, its tokens come in their order.

    chances: [rows][positions], the probability that a row's draft is accepted up to each of its tokens.
    passes, drafting: seconds of scoring 0, 1, .. drafted tokens beside the roots, and of drafting 0, 1, .. levels.
    plain: number of further rows, which do not draft.
    """
    likely = [(chance, b) for level in zip(*chances, strict=True) for b, chance in enumerate(level)]
    likely.sort(key=itemgetter(0), reverse=True)  # of equal ones, earlier positions stay first
    tokens, deepest, depths = float(len(chances) + plain), 0, [0] * len(chances)
    best, taken = Allocation([], tokens, passes[0]), 0
    speed = 0.0 if least else tokens / passes[0]
    for n, (chance, b) in enumerate(likely, start=1):
        tokens += chance
        depths[b] += 1
        deepest = max(deepest, depths[b])
        seconds = passes[n] + drafting[deepest]
        if n >= least and tokens / seconds > speed:
            best, taken, speed = Allocation([], tokens, seconds), n, tokens / seconds
    for _, b in likely[taken:]:
        depths[b] -= 1
    return best._replace(depths=depths)


class ProbeBudget:
    """Seconds that each exit has saved up for its next probe.

    elapsed: seconds since the last decision.
    probe: the exit that is probed, if any.
    """

    def __init__(self, exits: int) -> None:
        self.saved = [0.0] * exits
        self.elapsed = 0.0
        self.probe: int | None = None

    def save(self, losses: Sequence[float]) -> float:
        """Save for each exit's probe and choose one that can be paid; return the seconds until one can.

        losses: seconds that the probes lose; infinite if there is none.
        """
        self.probe, share, wait = None, PROBES / len(losses), math.inf
        for exit, loss in enumerate(losses):
            if loss < math.inf:
                saved = self.saved[exit] = min(self.saved[exit] + share * self.elapsed, loss)
                wait = min(wait, (loss - saved) / share)
                if saved >= loss and self.probe is None:
                    self.probe = exit
        self.elapsed = 0.0
        return wait


class FixedDepth:
    """Always the same depth and exit."""

    def __init__(self, depth: int, exit: int | None = None) -> None:
        self.choice = DepthChoice(depth, exit)

    def begin(self) -> RowHistory:
        return RowHistory()

    def choose(self, rows: Sequence[RowHistory], plain: int = 0) -> DepthChoice:
        return self.choice

    def observe(self, step: StepReport) -> None:
        pass


class AutoDepth:
    """The policy above. One serves all requests of a decoder; each request has a history of its own (``begin``).

    has_probabilities: as of the drafter.
    rows: numbers of rows that may draft, and of others, at the last decision.
    choice, speed: the last decision, and its expected tokens per second.
    hold: number of plain steps until the next decision.
    """

    def __init__(self, table: Costs, has_probabilities: bool = False) -> None:
        self.exits, self.has_probabilities = range(len(table.drafts)), has_probabilities
        self.max_depth = MAX_PRICED_DEPTH if has_probabilities else MAX_DEPTH
        self.model = CostModel(table, self.max_depth, has_probabilities)
        self.acceptance = AcceptanceEstimator(len(self.exits), self.max_depth, table.accepted)
        self.budget = ProbeBudget(len(self.exits))
        self.rows, self.hold = (0, 0), 0
        self.choice, self.speed = DepthChoice(), 0.0

    def begin(self) -> RowHistory:
        """The history of a new request."""
        self.hold = 0
        return self.acceptance.begin()

    def choose(self, rows: Sequence[RowHistory], plain: int = 0) -> DepthChoice:
        """What to draft in the next step of ``rows``, beside ``plain`` others that never draft."""
        if self.hold and self.rows == (len(rows), plain):
            self.hold -= 1
            return self.choice
        self.rows, self.hold, self.choice = (len(rows), plain), 0, DepthChoice()
        if not rows:
            self.budget.probe, self.budget.elapsed = None, 0.0
            return self.choice
        # The fastest exit and depths
        ratio = self.model.scoring_ratio
        chances = [[self.acceptance.chances(row, exit) for row in rows] for exit in self.exits]
        costs = [self.model.seconds(exit, *self.rows) for exit in self.exits]
        found = [allocate(chances[exit], *costs[exit], plain=plain) for exit in self.exits]
        exit = max(self.exits, key=lambda exit: found[exit].tokens / found[exit].seconds)
        best, probes = found[exit], list[Allocation | None]()
        self.speed = best.tokens / (ratio * best.seconds)
        # The probe of each exit
        for other in self.exits:
            if not any(found[other].depths):
                probes.append(allocate(chances[other], *costs[other], least=1, plain=plain))
            elif other == exit:
                probes.append(self._one_more(rows, best, chances[exit], *costs[exit]))
            else:
                probes.append(found[other])
        losses = [ratio * probe.seconds - probe.tokens / self.speed if probe else math.inf for probe in probes]
        wait, depths = self.budget.save(losses), best.depths
        if self.budget.probe is not None and (probe := probes[self.budget.probe]):
            exit, depths = self.budget.probe, probe.depths
        # The choice
        if not any(depths):
            self.hold = int(min(wait / (ratio * best.seconds), MAX_HOLD))
            return self.choice
        priced = self.has_probabilities or self.rows == (1, 0)
        prices = self.model.prices(exit, *self.rows, best.tokens / best.seconds) if priced else None
        self.choice = DepthChoice(max(depths), exit if len(self.exits) > 1 else None, prices, depths)
        return self.choice

    def _one_more(
        self,
        rows: Sequence[RowHistory],
        best: Allocation,
        chances: Sequence[Sequence[float]],
        passes: Sequence[float],
        drafting: Sequence[float],
    ) -> Allocation | None:
        """One token more, of the row that has not drafted for the longest time; of equal ones, the likeliest token."""
        open_rows = [b for b, depth in enumerate(best.depths) if depth < self.max_depth]
        if not open_rows:
            return None
        b = max(open_rows, key=lambda b: (rows[b].idle, chances[b][best.depths[b]]))
        depths = [depth + (b == at) for at, depth in enumerate(best.depths)]
        seconds = passes[sum(depths)] + drafting[max(depths)]
        return Allocation(depths, best.tokens + chances[b][best.depths[b]], seconds)

    def observe(self, step: StepReport) -> None:
        """Learn from a step that drafted as the last choice says."""
        model, prices, count = self.model, self.choice.prices or Prices(()), len(step.rows)
        drafted, exit = step.drafted, self.choice.exit or 0
        deepest = max(drafted) if prices.levels is None else prices.levels
        self.budget.elapsed += step.drafting + step.other
        model.add_scoring(step.scored, step.other)
        model.add_accepted(prices, sum(step.accepted))
        if not (deepest or max(drafted)):
            return
        nodes = step.scored - count
        if self.has_probabilities and self.choice.prices is not None:
            model.add_size(deepest, nodes / count)
            drafted = [self.max_depth] * count  # it was free to draft as deep
        model.add_width(nodes / sum(drafted) if prices.expected is None else 1.0)
        if deepest:
            model.add_drafting(exit, count, deepest, step.drafting)
        self.acceptance.observe(exit, step.rows, drafted, step.accepted)
        if self.budget.probe is not None:
            # Drafting counts as measured, up to a limit: a step may be slow for any reason.
            scoring = model.scoring_ratio * model.scoring(step.scored)
            seconds = min(step.drafting, MAX_DRAFTING * scoring) + scoring
            self.budget.saved[exit] -= seconds - (count + sum(step.accepted)) / self.speed

    def costs(self) -> Costs:
        """The table, scaled to recent steps, with the acceptance of all requests."""
        return self.model.scaled_table(self.acceptance.tables)


DepthPolicy = FixedDepth | AutoDepth
