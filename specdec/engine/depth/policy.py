"""How much to draft in a step.

Every candidate node has a calibrated probability, whoever proposes it. A node is taken, and a level drafted, while the
tokens that it is expected to add exceed the seconds that it adds times the present speed in tokens per second. What a
step cost and what it accepted corrects the costs and the calibration, and whatever was not chosen is tried in 2 % of
the time.

The policy sets the prices; drafters that have probabilities choose their nodes by them (``Prices``). For the others it
chooses a depth, by what was accepted at each position.
"""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import NamedTuple

from specdec.engine.depth.calibration import MEMORY, History, Seen, rates, table, worth
from specdec.engine.depth.costs import CostModel, Costs
from specdec.speculation.draft import Drafter, Found
from specdec.speculation.trees import MOST_NODES, Prices

MAX_DEPTH, MAX_PRICED_DEPTH = 8, 12  # deepest draft that is considered, without and with probabilities
TRIED = 0.01  # share of the time in which each choice that is not made is tried
FADE = 0.9  # weight of the past per step in the present speed
PLAIN, DRAFT, LEVELS = "plain", "draft", "levels"


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
    tokens: each row's new tokens.
    found: what the draft was chosen from (``Draft.found``).
    """

    rows: Sequence[History]
    drafted: Sequence[int]
    accepted: Sequence[int]
    scored: int
    drafting: float
    other: float
    tokens: Sequence[Sequence[int]] = ()
    found: Found | None = None


def allocate(
    chances: Sequence[Sequence[float]], nodes: Sequence[float], level: float, least: int = 0
) -> tuple[list[int], float]:
    """The depth of each row that brings most beyond its price, of those with ``least`` tokens or more; and how much.

    The likeliest token comes first; as probabilities fall along a row, its tokens come in their order.

    chances: [rows][positions], the probability that a row's draft is accepted up to each of its tokens.
    nodes, level: as in ``Prices``.
    """
    likely = [(chance, b) for step in zip(*chances, strict=True) for b, chance in enumerate(step)]
    likely.sort(key=itemgetter(0), reverse=True)  # of equal ones, earlier positions stay first
    depths, added, best, taken = [0] * len(chances), 0.0, float("-inf") if least else 0.0, 0
    for n, (chance, b) in enumerate(likely, start=1):
        added, depths[b] = added + chance, depths[b] + 1
        gain = added - nodes[min(n, len(nodes) - 1)] - max(depths) * level
        if n >= least and gain > best:
            best, taken = gain, n
    for _, b in likely[taken:]:
        depths[b] -= 1
    return depths, best


class FixedDepth:
    """Always the same depth and exit."""

    plain_seconds: float | None = None

    def __init__(self, depth: int, exit: int | None = None) -> None:
        self.choice = DepthChoice(depth, exit)

    def begin(self) -> History:
        return History(0, 0, 0)

    def choose(self, rows: Sequence[History], plain: int = 0) -> DepthChoice:
        return self.choice

    def follow(self, version: int) -> None:
        pass

    def observe(self, step: StepReport) -> None:
        pass


@dataclass
class AutoDepth:
    """The policy above. One serves all requests of a decoder; each request has a history of its own (``begin``).

    has_probabilities, shares: ``Drafter.has_probabilities`` and ``Drafter.level_share``.
    tables: number of ``Drafter.sources``.
    ratio: of the costs of a pass (``CostModel``).
    earlier: what earlier processes knew.
    passes: expected seconds of a pass of the present rows with 0, 1, .. drafted tokens.
    tokens, spent: of recent steps; spent in tokens that plain decoding yields in that time.
    idle: seconds since each choice was last made.
    """

    has_probabilities: bool = False
    tables: int = 1
    shares: Sequence[float] = (0.1,)
    ratio: float = 0.1
    earlier: Costs | None = None
    passes: Sequence[float] = (1.0,)
    tokens: float = 1.0
    spent: float = 1.0
    choice: DepthChoice = field(default_factory=DepthChoice)
    width: float = 1.0  # nodes of a level, of a drafter without probabilities
    version: int | None = None  # of the drafter
    idle: defaultdict[str | int, float] = field(default_factory=lambda: defaultdict(float))

    def __post_init__(self) -> None:
        self.max_depth = MAX_PRICED_DEPTH if self.has_probabilities else MAX_DEPTH
        self.model = CostModel(self.ratio, self.shares, self.earlier)
        self.size = self.tables if self.has_probabilities else 0, len(self.shares), self.max_depth
        self.common, self.rows = History(*self.size, memory=MEMORY), weakref.WeakSet[History]()
        if self.earlier is not None:
            for tally, hits, trials in zip(self.common.tallies(), self.earlier.hits, self.earlier.trials, strict=False):
                count = min(len(hits), len(trials), len(tally.hits))
                tally.hits[:count], tally.trials[:count] = hits[:count], trials[:count]

    @classmethod
    def of(cls, drafter: Drafter, ratio: float, earlier: Costs | None = None) -> AutoDepth:
        """The policy for ``drafter``."""
        shares = (*drafter.level_share, *drafter.level_share[-1:] * drafter.num_exits)[: drafter.num_exits]
        return cls(drafter.has_probabilities, len(drafter.sources), shares, ratio, earlier)

    def begin(self) -> History:
        """The history of a new request."""
        row = History(*self.size)
        self.rows.add(row)
        return row

    def follow(self, version: int) -> None:
        """Let what was known of another version of the drafter count little."""
        if self.version not in (None, version):
            for row in (self.common, *self.rows):
                for tally in [*row.by_source[-1:], *row.by_position, row.worth]:
                    tally.forget()
            self.idle |= dict.fromkeys((DRAFT, LEVELS, *range(len(self.shares))), float("inf"))
        self.version = version

    @property
    def plain_seconds(self) -> float | None:
        """Expected seconds of a plain step."""
        return self.passes[0] if self.model.known else None

    @property
    def speedup(self) -> float:
        """The present speed over that of plain decoding."""
        return max(self.tokens / self.spent, 1.0)

    def choose(self, rows: Sequence[History], plain: int = 0) -> DepthChoice:
        """What to draft in the next step of ``rows``, beside ``plain`` others that never draft."""
        count = len(rows) + plain
        passes = self.model.passing(count, len(rows) * MOST_NODES)
        self.passes, self.choice = passes, DepthChoice()
        if not rows:
            return self.choice
        speed = self.speedup * count / passes[0]
        prices = Prices([speed * (seconds - passes[0]) for seconds in passes])
        added = sum(worth(row, self.common, count) for row in rows)
        gain = added / speed - self.model.drafting(count)  # in seconds
        if gain > 0:
            taken = not self._due(PLAIN, max(gain, passes[0] * (1 - 1 / self.speedup)))
        else:
            taken = self._due(DRAFT, -gain) or (self.has_probabilities and self._try_levels(count))
        if taken:
            choose = self._by_source if self.has_probabilities else self._by_position
            choice = choose(rows, prices, speed, count)
            self.choice = choice if choice.depth else self.choice
        return self.choice

    def _due(self, what: str | int, loss: float) -> bool:
        """Whether ``what`` has not been tried for so long that it may lose ``loss`` seconds."""
        return TRIED * self.idle[what] >= loss

    def _try_levels(self, count: int) -> bool:
        return self.shares[0] > 0 and self._due(LEVELS, self.model.first(0, count) + self.model.level(0, count))

    def _by_source(self, rows: Sequence[History], prices: Prices, speed: float, count: int) -> DepthChoice:
        """Prices, by which the drafter chooses."""
        level, first = self.model.level(0, count), self.model.first(0, count)
        prices = replace(
            prices,
            level=speed * level,
            first=speed * first,
            rates=[rates(row, self.common, 0) for row in rows],
            tables=[[table(row, self.common, source) for source in range(self.tables)] for row in rows],
            try_levels=self._try_levels(count),
        )
        return DepthChoice(self.max_depth, None, prices, [self.max_depth] * len(rows))

    def _by_position(self, rows: Sequence[History], prices: Prices, speed: float, count: int) -> DepthChoice:
        """The exit and the depths that bring most; or those of an exit that is due."""
        nodes, exits = prices.nodes[:: max(round(self.width), 1)], range(len(self.shares))
        found = list[tuple[float, int, list[int], list[list[float]]]]()
        for exit in exits:
            each = [rates(row, self.common, exit) for row in rows]
            chances = [[*itertools.accumulate(row, lambda a, b: a * b)] for row in each]
            level = speed * self.model.level(exit, count)
            depths, gain = allocate(chances, nodes, level)
            tried, least = allocate(chances, nodes, level, least=1)
            if not any(depths) and self._due(exit, max(-least, 0.0) / speed):
                depths = tried
            found.append((gain, exit, depths, each))
        best = max(found, key=itemgetter(0))
        due = [each for each in found if each is not best and self._due(each[1], (best[0] - each[0]) / speed)]
        _, exit, depths, each = due[0] if due else best
        several = (
            replace(prices, level=speed * self.model.level(exit, count), rates=each)
            if len(rows) == count == 1
            else None
        )
        return DepthChoice(max(depths), exit if len(exits) > 1 else None, several, depths)

    def observe(self, step: StepReport) -> None:
        """Learn from a step that drafted as the last choice says."""
        model, choice, count, found = self.model, self.choice, len(step.rows), step.found
        seconds, accepted, nodes = step.drafting + step.other, sum(step.accepted), step.scored - count
        exit, levels = choice.exit or 0, max(step.drafted, default=0) if found is None else found.levels
        known = model.known
        model.add_pass(step.scored, step.other)
        if not known:  # what a pass costs was not known when the step was chosen
            self.passes = model.passing(count, len(self.passes) - 1)
        self.tokens = FADE * self.tokens + (1 - FADE) * (count + accepted)
        self.spent = FADE * self.spent + (1 - FADE) * count * seconds / self.passes[0]
        for what in (PLAIN, DRAFT, LEVELS, *range(len(self.shares))):
            self.idle[what] += seconds
        if not nodes:
            self.idle[PLAIN] = 0.0
        if not choice.depth:
            return
        model.add_draft(exit, count, levels, step.drafting)
        self.idle[DRAFT] = self.idle[exit] = 0.0
        if levels:
            self.idle[LEVELS] = 0.0
        scoring = self.passes[min(nodes, len(self.passes) - 1)] - self.passes[0]
        drafting = model.first(exit, count) * (levels > 0) + levels * model.level(exit, count)
        price = self.speedup * (scoring + drafting) / self.passes[0]
        for b, (row, right) in enumerate(zip(step.rows, step.accepted, strict=True)):
            if found is None:
                seen = Seen.of_chain(step.drafted[b], right)
            else:
                first = 0 if found.free is None else len(found.free[b].path(step.tokens[b]))
                seen = Seen.of_candidates(found.rows[b], step.tokens[b], first, levels)
            for history in (row, self.common):
                history.add(seen, exit, count, right - price)
        if found is None and levels:
            self.width = 0.8 * self.width + 0.2 * nodes / sum(step.drafted)

    def costs(self) -> Costs:
        """What is known, for later processes."""
        tallies = self.common.tallies()
        hits = [[round(hits, 3) for hits in tally.hits] for tally in tallies]
        trials = [[round(trials, 3) for trials in tally.trials] for tally in tallies]
        return replace(self.model.kept(), hits=hits, trials=trials)


DepthPolicy = FixedDepth | AutoDepth
