"""How deep to draft, and to which exit: fixed, or chosen by expected tokens per second.

``AutoDepth`` takes the exit and depth (0: plain decoding) with the most expected tokens per second, from the costs of
steps (``CostModel``) and what drafts yielded (``YieldEstimator``). What it does not take (drafting where plain decoding
is faster and the reverse, another exit, one token deeper) it probes in 1 % of the decode time (``ProbeBudget``).
The tokens of a step go to the rows where they are likeliest to be accepted (``allocate``).

A drafter with probabilities of its own gets prices instead of a depth: the costs of a node and of a level, in tokens at
the recent speed. For it, the policy chooses only whether to draft, by what its drafts yielded and cost in the row. If
it has two sources, exit 0 is the free one alone and exit 1 both; it takes both where the levels of the learned one pay
(``Prices.learned_pays``). What they add is compared with what was expected of them, and probed if they never pay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

from specdec.engine.depth.acceptance import LASTING, SLOW, RowHistory, YieldEstimator
from specdec.engine.depth.costs import CostModel, Costs
from specdec.speculation.trees import Prices

MAX_DEPTH, MAX_PRICED_DEPTH = 8, 12  # deepest draft that is considered, without and with prices
PROBES = 0.01  # share of the decode time that probes may lose
MAX_DRAFTING = 4.0  # number of passes that the drafting of a probe counts as at most
MAX_HOLD = 15  # maximum number of plain steps without a decision
FIRST = 1.5  # accepted tokens of a step with an unknown drafter that has probabilities


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

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


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
    """Seconds that each choice (an exit, or plain decoding) has saved up for its next probe.

    elapsed: seconds since the last decision.
    probe: the choice that is probed, if any.
    """

    def __init__(self, choices: int) -> None:
        self.saved = [0.0] * choices
        self.elapsed = 0.0
        self.probe: int | None = None

    def save(self, losses: Sequence[float]) -> float:
        """Save for each choice's probe and take one that can be paid; return the seconds until one can.

        losses: seconds that the probes lose; infinite if there is none.
        """
        self.probe, wait = None, math.inf
        share = PROBES / max(sum(loss < math.inf for loss in losses), 1)
        for number, loss in enumerate(losses):
            if loss < math.inf:
                saved = self.saved[number] = min(self.saved[number] + share * self.elapsed, loss)
                wait = min(wait, (loss - saved) / share)
                if saved >= loss and self.probe is None:
                    self.probe = number
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

    def follow(self, version: int) -> None:
        pass

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
        self.model = CostModel(table, self.max_depth)
        self.yields = YieldEstimator(len(self.exits), 7 if has_probabilities else self.max_depth, table.yields)
        self.budget = ProbeBudget(len(self.exits) + 1)
        self.rows, self.hold = (0, 0), 0
        self.choice, self.speed = DepthChoice(), 0.0
        self.version: int | None = None  # of the drafter

    def begin(self) -> RowHistory:
        """The history of a new request."""
        self.hold = 0
        return self.yields.begin()

    def follow(self, version: int) -> None:
        """Forget what was known of another version of the drafter."""
        if self.version not in (None, version):
            self.forget()
        self.version = version

    def forget(self, exit: int = -1) -> None:
        """The drafter has changed: what its drafts to ``exit`` yielded counts little from now on."""
        self.hold, self.model.exponents[exit] = 0, 1.0
        for known in {0, exit} if self.has_probabilities else {exit}:
            self.yields.forget(known)

    def choose(self, rows: Sequence[RowHistory], plain: int = 0) -> DepthChoice:
        """What to draft in the next step of ``rows``, beside ``plain`` others that never draft."""
        if self.hold and self.rows == (len(rows), plain):
            self.hold -= 1
            return self.choice
        self.rows, self.hold, self.choice = (len(rows), plain), 0, DepthChoice()
        if not rows:
            self.budget.probe, self.budget.elapsed = None, 0.0
            return self.choice
        # The fastest choice, and the probe of each other one
        model, count = self.model, len(rows) + plain
        none = Allocation([0] * len(rows), count, model.passes(count, 0)[0])
        found = self._by_yield(rows, none) if self.has_probabilities else self._by_position(rows, none)
        taken = [each for each, _ in found]
        best = max(none, *taken, key=lambda each: each.speed)
        exit = max(self.exits, key=lambda exit: taken[exit].speed)
        probes = [more if each is best else each if any(each.depths) else more for each, more in found]
        probes.append(None if best is none else none)
        self.speed, ratio = best.speed / model.ratio, model.ratio
        losses = [ratio * probe.seconds - probe.tokens / self.speed if probe else math.inf for probe in probes]
        wait, depths = self.budget.save(losses), best.depths
        if (number := self.budget.probe) is not None and (probe := probes[number]):
            exit, depths = min(number, self.exits[-1]), probe.depths
        # The choice
        if not any(depths):
            self.hold = int(min(wait / (ratio * best.seconds), MAX_HOLD)) if depths is best.depths else 0
            return self.choice
        prices = None
        if self.has_probabilities or self.rows == (1, 0):
            exit = self.exits[-1] if self.has_probabilities else exit
            prices = model.prices(exit, len(rows), count, best.speed, self._trust(rows))
        free = len(self.exits) == 1 or (self.has_probabilities and number != self.exits[-1])
        self.choice = DepthChoice(max(depths), None if free else exit, prices, depths)
        return self.choice

    def _by_yield(self, rows: Sequence[RowHistory], none: Allocation) -> list[tuple[Allocation, Allocation | None]]:
        """Drafts by prices, beside ``none``; of two sources, also a draft of both, which is probed as if it failed."""
        model, count, depths = self.model, int(none.tokens), [self.max_depth] * len(rows)
        beyond = model.beyond(count) / none.seconds
        tokens, cost, first = float(count), 0.0, model.cost(-1, count, len(rows), 1)
        for row in rows:
            expected, own, scored = self.yields.means(row, 0, [FIRST, first, 1.0])
            accepted, of = self.yields.means(row, 0, [1.0, 1.0], 3, LASTING)
            tokens += expected * accepted / of
            cost += own + beyond * scored
        found = [Allocation(depths, tokens, none.seconds * (1 + cost / len(rows)))]
        for exit in self.exits[1:]:
            found.append(Allocation(depths, float(count), none.seconds + model.drafting(exit, count)[1]))
        return [(each, None) for each in found]

    def _trust(self, rows: Sequence[RowHistory]) -> float:
        """``Prices.trust``: at most 1, as a draft that goes deeper than planned adds more than was expected."""
        if not self.has_probabilities:
            return 1.0
        means = [self.yields.means(row, self.exits[-1], [1.0, 1.0], 5, SLOW) for row in rows]
        return min(sum(added for added, _ in means) / sum(expected for _, expected in means), 1.0)

    def _by_position(self, rows: Sequence[RowHistory], none: Allocation) -> list[tuple[Allocation, Allocation | None]]:
        """For each exit: the fastest depths, and others to probe beside them."""
        found, plain = list[tuple[Allocation, Allocation | None]](), int(none.tokens) - len(rows)
        passes = self.model.passes(int(none.tokens), len(rows) * self.max_depth, self.model.width)
        for exit in self.exits:
            chances = [self.yields.chances(row, exit) for row in rows]
            costs = passes, self.model.drafting(exit, int(none.tokens))
            best = allocate(chances, *costs, plain=plain)
            if any(best.depths):
                found.append((best, self._one_more(rows, best, chances, *costs)))
            else:
                found.append((best, allocate(chances, *costs, least=1, plain=plain)))
        return found

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
        drafted, tokens, exit = step.drafted, step.scored - count, self.choice.exit or 0
        priced = self.has_probabilities and self.choice.prices is not None
        levels = max(drafted) if prices.levels is None else max(prices.levels, 1)
        exit = exit if not priced else 0 if prices.levels == 0 else self.exits[-1]
        self.budget.elapsed += step.drafting + step.other
        model.add_step(exit if levels else -1, count, tokens, levels, step.drafting, step.other)
        if levels and priced:
            cost, scored = model.cost(exit, count, tokens, levels), float(tokens > 0)
            expected = (prices.expected or 0.0) / count
            free, added = prices.free / count, prices.added / count
            yields = [
                (expected, cost, scored, accepted, expected, accepted - free, added) for accepted in step.accepted
            ]
            for number in {0, exit}:
                self.yields.observe(number, step.rows, yields)
            model.add_accepted(exit, prices, sum(step.accepted))
        elif levels:
            each = zip(drafted, step.accepted, strict=True)
            seen = [[float(at < accepted) for at in range(min(depth, accepted + 1))] for depth, accepted in each]
            self.yields.observe(exit, step.rows, [values[: self.max_depth] for values in seen])
            model.add_width(tokens / sum(drafted) if prices.expected is None else 1.0)
        for row, depth in zip(step.rows, drafted, strict=True):
            row.idle = 0 if depth or (priced and levels) else row.idle + 1
        if (probe := self.budget.probe) is not None:
            # Drafting counts as measured, up to a limit: a step may be slow for any reason.
            scoring = model.ratio * model.passes(count, tokens)[-1]
            seconds = min(step.drafting, MAX_DRAFTING * scoring) + scoring
            self.budget.saved[probe] -= seconds - (count + sum(step.accepted)) / self.speed

    def costs(self) -> Costs:
        """The table, scaled to recent steps, with what all requests' drafts yielded."""
        return self.model.scaled_table(self.yields.tables)


DepthPolicy = FixedDepth | AutoDepth
