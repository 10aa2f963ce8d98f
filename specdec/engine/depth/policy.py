"""How deep to draft, and to which exit: fixed, or chosen by expected tokens per second.

``AutoDepth`` takes the exit and depth (0: plain decoding) with the most expected tokens per second, by what steps cost
(``CostModel``) and how often drafted tokens are accepted (``AcceptanceEstimator``). What it does not take (drafting
where plain decoding is faster, another exit, one token deeper) it probes in 1 % of the decode time (``ProbeBudget``).
The tokens of a step go to the rows where they are likeliest to be accepted (``divide``): one row is the same case as
many.

A drafter with probabilities of its own gets prices instead of a depth: what a node and a level cost, in tokens at the
recent speed. For it, the policy chooses only between drafting and plain decoding, by what its recent drafts yielded and
cost on average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from specdec.engine.depth.acceptance import AcceptanceEstimator, RowHistory
from specdec.engine.depth.costs import CostModel, Costs
from specdec.engine.depth.division import Division, divide
from specdec.engine.depth.probes import ProbeBudget
from specdec.speculation.trees import Prices

MOST, DEEPEST = 8, 12  # deepest draft considered, and deepest that prices may end
DEBT = 4.0  # passes that the drafting of a probe counts as at most
HOLD = 15  # most plain steps without a decision


class DepthChoice(NamedTuple):
    """What to draft in a step.

    depth: most tokens for each row; 0 is a plain step. exit, prices: as in ``State``. depths: most tokens for each row,
    where they differ.
    """

    depth: int = 0
    exit: int | None = None
    prices: Prices | None = None
    depths: Sequence[int] | None = None


@dataclass
class StepReport:
    """What a step did.

    rows: their histories. drafted: how deep each row's draft was. accepted: drafted tokens of each row that were
    accepted. scored: tokens of the pass. drafting, rest: seconds.
    """

    rows: Sequence[RowHistory]
    drafted: Sequence[int]
    accepted: Sequence[int]
    scored: int
    drafting: float
    rest: float


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
    """The policy above. One serves all requests of a decoder; each has a history of its own (``begin``).

    estimates: of the drafter (``Drafter.estimates``).
    """

    def __init__(self, table: Costs, estimates: bool = False) -> None:
        self.exits, self.most, self.estimates = range(len(table.drafts)), DEEPEST if estimates else MOST, estimates
        self.model = CostModel(table, self.most, estimates)
        self.acceptance = AcceptanceEstimator(len(self.exits), self.most, table.accepted)
        self.budget = ProbeBudget(len(self.exits))
        self.batch, self.hold = (0, 0), 0  # rows that may draft, and others; plain steps to go without a decision
        self.choice, self.speed = DepthChoice(), 0.0  # of the last decision; the best expected speed

    def begin(self) -> RowHistory:
        """A new request."""
        self.hold = 0
        return self.acceptance.begin()

    def choose(self, rows: Sequence[RowHistory], plain: int = 0) -> DepthChoice:
        """What to draft in the next step of ``rows``, beside ``plain`` others that never draft."""
        if self.hold and self.batch == (len(rows), plain):
            self.hold -= 1
            return self.choice
        self.batch, self.hold, self.choice = (len(rows), plain), 0, DepthChoice()
        if not rows:
            self.budget.restart()
            return self.choice
        pace = self.model.pace
        chances = [[self.acceptance.chances(row, exit) for row in rows] for exit in self.exits]
        costs = [self.model.seconds(exit, *self.batch) for exit in self.exits]
        found = [divide(chances[exit], *costs[exit], plain=plain) for exit in self.exits]
        exit = max(self.exits, key=lambda exit: found[exit].tokens / found[exit].seconds)
        best, others = found[exit], list[Division | None]()
        self.speed = best.tokens / (pace * best.seconds)
        for other in self.exits:
            if not any(found[other].depths):
                others.append(divide(chances[other], *costs[other], least=1, plain=plain))
            elif other == exit:
                others.append(self._one_more(rows, best, chances[exit], *costs[exit]))
            else:
                others.append(found[other])
        losses = [pace * more.seconds - more.tokens / self.speed if more else math.inf for more in others]
        wait, depths = self.budget.save(losses), best.depths
        if self.budget.probe is not None and (more := others[self.budget.probe]):
            exit, depths = self.budget.probe, more.depths
        if not any(depths):
            self.hold = int(min(wait / (pace * best.seconds), HOLD))
            return self.choice
        sized = self.estimates or self.batch == (1, 0)
        prices = self.model.prices(exit, *self.batch, best.tokens / best.seconds) if sized else None
        self.choice = DepthChoice(max(depths), exit if len(self.exits) > 1 else None, prices, depths)
        return self.choice

    def _one_more(
        self,
        rows: Sequence[RowHistory],
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

    def observe(self, step: StepReport) -> None:
        """Learn from a step that drafted as the last choice says."""
        model, prices, count = self.model, self.choice.prices or Prices(()), len(step.rows)
        drafted, deepest, exit = step.drafted, prices.levels or max(step.drafted), self.choice.exit or 0
        self.budget.elapsed += step.drafting + step.rest
        model.scored(step.scored, step.rest)
        if not deepest:
            return
        nodes = step.scored - count
        if self.estimates and self.choice.prices is not None:
            model.sized(prices, deepest, nodes / count, sum(step.accepted))
            drafted = [self.most] * count  # it was free to draft as deep
        model.widened(nodes / sum(drafted) if prices.expected is None else 1.0)
        model.drafted(exit, count, deepest, step.drafting)
        self.acceptance.observe(exit, step.rows, drafted, step.accepted)
        if self.budget.probe is not None:  # drafting counts as it was, within bounds: a step may be slow for any reason
            scoring = model.pace * model.scoring(step.scored)
            took = min(step.drafting, DEBT * scoring) + scoring
            self.budget.pay(exit, took - (count + sum(step.accepted)) / self.speed)

    def costs(self) -> Costs:
        """The table as recent steps have it, and what is known of acceptance."""
        return self.model.measured(self.acceptance.known)


DepthPolicy = FixedDepth | AutoDepth
