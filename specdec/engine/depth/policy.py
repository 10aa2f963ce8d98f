"""How much to draft in a step.

Every candidate node has a calibrated probability, whoever proposes it. A node is taken, and a level drafted, while the
tokens that it is expected to add exceed the seconds that it adds times the present speed in tokens per second. What a
step cost and what it accepted corrects the costs and the calibration. Each choice that is not made is tried now and
then (``EXPLORATION_SHARE``).

A *level* is a step of drafting, which adds tokens at one depth. An *exit* is a place where drafted tokens leave the
model; most drafters have one. Expected accepted tokens minus costs in tokens are a *gain*.

The policy sets the prices, by which drafters choose their nodes (``Prices``). Tokens of a drafter that has no
probabilities have those of their positions.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import NamedTuple

from specdec.engine.depth.calibration import MEMORY, History, Outcome, expected_gain, rates, table
from specdec.engine.depth.costs import CostModel, Costs
from specdec.runtimes.draft_path import KNOTS
from specdec.runtimes.target import TokenCosts
from specdec.speculation.candidates import Candidates, CandidateSet
from specdec.speculation.drafter import Drafter
from specdec.speculation.tree_builder import worth_scoring
from specdec.speculation.trees import MOST_NODES, Prices

MAX_DEPTH, MAX_PRICED_DEPTH = 8, 12  # deepest draft that is considered, without and with probabilities
MAX_FIXED_DEPTH = 128  # attention in the native runtime relies on drafts of less than LATE = 256 levels
EXPLORATION_SHARE = 0.008  # share of the time that may be lost by exploring each choice that seems worse
FADE = 0.9  # weight of the past per step in the present speed
ASSUMED = TokenCosts(0.1)
PLAIN, DRAFT, NODES = "plain", "draft", "nodes"  # choices, beside the levels of each exit
NEVER = [0.0] * len(KNOTS)  # the table of a row that does not draft


class DepthChoice(NamedTuple):
    """The policy's choice for one step.

    depths: maximum depth of each row's draft; 0: the row does not draft.
    exit: index of the last exit (layer at which drafted tokens leave the model) that drafted tokens may run to; None:
        any.
    prices: what scoring nodes and drafting levels costs, in accepted tokens, by which a drafter with probabilities
        sizes its trees; None: each row drafts to its depth.
    """

    depths: Sequence[int] = ()
    exit: int | None = None
    prices: Prices | None = None

    @property
    def depth(self) -> int:
        """The largest of ``depths``; 0: nothing is drafted."""
        return max(self.depths, default=0)


@dataclass
class StepReport:
    """The result of one step, from which the policy learns. Lists have one entry per row (sequence) of the batch.

    rows: the histories of the rows, as ``begin`` of the policy returned them.
    drafted: depth of each row's draft; 0: nothing was drafted.
    accepted: number of each row's accepted drafted tokens.
    scored: number of tokens of the scoring pass, the root of each row included.
    drafting, other: seconds of drafting, and of scoring, accepting and committing.
    tokens: ids of each row's new tokens: the accepted ones, and the model's own after them; (): unknown.
    found: the candidates that the draft was chosen from (``Draft.found``); None: the drafter has no probabilities.
    nodes: number of scored draft nodes of each row; (): unknown, and attention to cached tokens then counts as free.
    """

    rows: Sequence[History]
    drafted: Sequence[int]
    accepted: Sequence[int]
    scored: int
    drafting: float
    other: float
    tokens: Sequence[Sequence[int]] = ()
    found: CandidateSet | None = None
    nodes: Sequence[int] = ()


class FixedDepth:
    """Depth policy that always drafts to the same depth.

    depth: maximum number of drafted tokens on a path; 0: nothing is drafted. Above ``MAX_FIXED_DEPTH`` (128) it counts
        as that.
    plain_seconds: seconds of a step without drafts, which this policy never knows: always None.
    """

    plain_seconds: float | None = None

    def __init__(self, depth: int) -> None:
        self.depth = min(depth, MAX_FIXED_DEPTH)

    def begin(self) -> History:
        """Return an empty history: this policy keeps none."""
        return History(0, 0, 0)

    def choose(self, rows: Sequence[History], caps: Sequence[int], contexts: Sequence[int] = ()) -> DepthChoice:
        """Return the depth for each row, at most its entry in ``caps``, without prices. rows, contexts: not used."""
        return DepthChoice([min(self.depth, cap) for cap in caps])

    def follow(self, version: int) -> None:
        """Do nothing: the depth does not depend on the drafter."""
        pass

    def observe(self, step: StepReport) -> None:
        """Do nothing: the depth does not depend on results."""
        pass


@dataclass
class AutoDepth:
    """Depth policy that drafts as deep as pays, by measured costs and acceptance. All requests of a decoder share one.

    Each step calls ``choose``, and then ``observe`` with its result. A *level* is all tokens of a draft at one depth.
    An *exit* is a layer of the model at which drafted tokens leave it; most drafters have one.

    has_probabilities: whether the drafter knows probabilities of its tokens, and sizes its trees by prices.
    tables: number of the drafter's sources of candidates (``Traits.sources``), each of which is calibrated.
    shares: for each exit, the cost of drafting a level as a share of a pass of the model (``Traits.level_shares``).
    token: constants of the cost of a token in a pass.
    earlier: costs and counts from an earlier process; None: there are none.
    contexts: number of cached tokens of each row of the batch.
    passes: expected seconds of a pass of these rows with 0, 1, .. drafted tokens.
    tokens: decayed number of tokens of recent steps.
    spent: decayed number of tokens that plain decoding would have yielded in the same time.
    choice: the last choice, which the next ``observe`` is about.
    since_tried: seconds since each choice (an exit, or a kind of draft) was last made.
    """

    has_probabilities: bool = False
    tables: int = 1
    shares: Sequence[float] = (0.1,)
    token: TokenCosts = ASSUMED
    earlier: Costs | None = None
    contexts: Sequence[int] = (0,)
    passes: Sequence[float] = (1.0,)
    tokens: float = 1.0
    spent: float = 1.0
    choice: DepthChoice = field(default_factory=DepthChoice)
    width: float = 1.0  # nodes of a level, of a drafter without probabilities
    version: int | None = None  # of the drafter
    warm: bool = False  # whether the last step drafted levels
    since_tried: defaultdict[str | int, float] = field(default_factory=lambda: defaultdict(float))

    def __post_init__(self) -> None:
        self.max_depth = MAX_PRICED_DEPTH if self.has_probabilities else MAX_DEPTH
        self.exits = range(len(self.shares))
        self.model = CostModel(self.token, self.shares, self.earlier)
        self.size = self.tables if self.has_probabilities else 0, len(self.shares), self.max_depth
        self.common = History(*self.size, memory=MEMORY)
        self.rows = weakref.WeakSet[History]()
        if self.earlier is not None:
            earlier = self.earlier.hits, self.earlier.trials
            for counts, hits, trials in zip(self.common.all_counts(), *earlier, strict=False):
                count = min(len(hits), len(trials), len(counts.hits))
                counts.hits[:count], counts.trials[:count] = hits[:count], trials[:count]
                counts.forget()  # of other texts, and perhaps of a busy machine

    @classmethod
    def of(cls, drafter: Drafter, token: TokenCosts, earlier: Costs | None = None) -> AutoDepth:
        """Return a new policy for a drafter, with no requests yet.

        drafter: a drafter whose ``bind`` has attached it to its model; only its ``traits`` are read.
        token: estimated costs of a token in a pass of the target (``Target.token_costs``), in multiples of the time
            that reading all weights takes. Times of real steps correct what they predict.
        earlier: costs and acceptance counts that an earlier process has stored, with which the policy begins (they are
            copied); None: there are none.
        """
        traits = drafter.traits
        return cls(traits.has_probabilities, len(traits.sources), traits.level_shares, token, earlier)

    def begin(self) -> History:
        """Return an empty history for a new request, which the caller keeps, and gives to ``choose`` and ``observe``.

        The policy holds only a weak reference to it.
        """
        row = History(*self.size)
        self.rows.add(row)
        return row

    def follow(self, version: int) -> None:
        """Scale down the counts of accepted tokens if the drafter's weights have changed since the last call.

        Called before ``choose``. version: ``Learner.version`` of the drafter, which changes when training replaces its
            weights.
        """
        if self.version not in (None, version):
            for row in (self.common, *self.rows):
                for counts in [*row.by_source[-1:], *row.by_position, row.gains]:
                    counts.forget()
            self.since_tried |= dict.fromkeys((DRAFT, NODES, *self.exits), float("inf"))
        self.version = version

    @property
    def plain_seconds(self) -> float | None:
        """Expected seconds of a step, without drafts, of the batch that ``choose`` was last called for.

        None: unknown, since no step was timed yet and no earlier process has stored costs.
        """
        return self.passes[0] if self.model.known else None

    @property
    def speedup(self) -> float:
        """The speed of recent steps divided by the expected speed of plain decoding, at least 1."""
        return max(self.tokens / self.spent, 1.0)

    def choose(self, rows: Sequence[History], caps: Sequence[int], contexts: Sequence[int] = ()) -> DepthChoice:
        """Choose draft depths, the exit and the prices for the next step; ``observe`` then gets its result.

        The exit is the last layer at which drafted tokens may leave the model. Where no gain is expected, nothing is
        drafted (all depths are 0), except now and then to explore.

        The prices are the costs of scoring a node and of drafting a level, in tokens: seconds times the present speed
        in tokens per second. With them drafters take a node or draft a level while it is expected to add more accepted
        tokens than it costs. Without probabilities, a row's depth is chosen here, by the same comparison.

        rows: the histories of all rows of the batch. caps: maximum draft depth of each row; 0: the row does not draft.
        contexts: number of cached tokens of each row; empty: they count as none.
        """
        self.contexts = contexts = contexts or [0] * len(rows)
        count, drafting = len(rows), [row for row, cap in zip(rows, caps, strict=True) if cap]
        self.choice = DepthChoice([0] * count)
        passes = self.passes = self.model.passing(contexts, 0)
        if not drafting:
            return self.choice
        speed = self.speedup * count / passes[0]
        added = sum(expected_gain(row, self.common, count) for row in drafting)
        gain = added / speed - self.model.drafting(contexts)  # in seconds
        if gain > 0:
            drafts = not self._explores(PLAIN, max(gain, passes[0] * (1 - 1 / self.speedup)))
        else:
            drafts = self._explores(DRAFT, -gain)
        if drafts:
            self.passes = self.model.passing(contexts, len(drafting) * MOST_NODES)
            self.choice = self._best(rows, caps, speed)
        return self.choice

    def _explores(self, what: str | int, loss: float) -> bool:
        """Return whether to make choice ``what`` now to explore it, at an expected loss of ``loss`` seconds.

        It is so once the loss is at most 0.8 % of the time since that choice was last made.

        what: ``PLAIN`` (a step without a draft), ``DRAFT`` (one with a draft), or the index of an exit.
        """
        return EXPLORATION_SHARE * self.since_tried[what] >= loss

    def _best(self, rows: Sequence[History], caps: Sequence[int], speed: float) -> DepthChoice:
        """Return draft depths and prices for the exit with the largest expected gain, or for an exit that is explored.

        Prices are what scoring nodes and drafting levels costs: seconds times ``speed``. The depths are those of
        ``caps``, at most ``max_depth``, if the drafter has probabilities, and else what pays by acceptance rates.

        An exit is explored if its expected loss against the best one is small enough (``_explores``). With a single
        exit there is no choice: the gain is not computed, and ``DepthChoice.exit`` is None.

        rows: the histories of all rows. caps: maximum draft depth of each row; 0: the row does not draft.
        speed: present speed of all rows together, in tokens per second.
        """
        sources, beyond = range(self.size[0]), [speed * seconds for seconds in self.model.beyond(self.contexts)]
        tables = [
            [table(row, self.common, source) if cap else NEVER for source in sources]
            for row, cap in zip(rows, caps, strict=True)
        ]
        every = list[tuple[float, int, Prices]]()
        for exit in self.exits:
            prices = Prices(
                [speed * (seconds - self.passes[0]) for seconds in self.passes],
                beyond=beyond,
                level=speed * self.model.level(exit, self.contexts),
                first=speed * self.model.first(exit, self.contexts),
                rates=[rates(row, self.common, exit)[:cap] for row, cap in zip(rows, caps, strict=True)],
                tables=tables if self.has_probabilities else (),
                allowance=speed * EXPLORATION_SHARE * self.since_tried[NODES],
                level_allowance=speed * EXPLORATION_SHARE * self.since_tried[exit],
            )
            every.append((max(prices.best_levels()[0], 0.0) if len(self.exits) > 1 else 0.0, exit, prices))
        best = max(every, key=itemgetter(0))
        others = [own for own in every if own is not best and own[2].levels()]
        explored = [own for own in others if self._explores(own[1], (best[0] - own[0]) / speed)]
        _, exit, prices = explored[0] if explored else best
        depths = [min(self.max_depth, cap) for cap in caps] if self.has_probabilities else self._depths(prices)
        return DepthChoice(depths, exit if len(self.exits) > 1 else None, prices)

    def _depths(self, prices: Prices) -> list[int]:
        """Return each row's draft depth for a drafter without probabilities, by the acceptance rates per position.

        If every depth would be 0, though ``prices.levels()`` is not, each row with rates gets depth 1.

        prices: the costs, and ``rates``: for each row, the probability of each further token to be accepted; a row
            without rates gets depth 0.
        """
        prices = replace(prices, nodes=prices.nodes[:: max(round(self.width), 1)])
        levels = prices.levels()
        chains = [Candidates.chain(row[:levels]) for row in prices.rates]
        depths = [len(found.tokens) for found in worth_scoring(chains, levels, None, prices)]
        return depths if any(depths) else [min(levels, len(row), 1) for row in prices.rates]

    def observe(self, step: StepReport) -> None:
        """Update the costs, and the histories ``step.rows``, from a step that drafted what ``choose`` returned last."""
        model, choice, count, found = self.model, self.choice, len(step.rows), step.found
        contexts = self.contexts
        seconds, accepted, nodes = step.drafting + step.other, sum(step.accepted), step.scored - count
        exit, levels = choice.exit or 0, max(step.drafted, default=0) if found is None else found.levels
        known = model.known
        attended = sum((1 + own) * cached for own, cached in zip(step.nodes, contexts, strict=False))
        model.add_pass(step.scored, step.other, sum(contexts), attended)
        if not known:  # what a pass costs was not known when the step was chosen
            self.passes = model.passing(contexts, len(self.passes) - 1)
        self.tokens = FADE * self.tokens + (1 - FADE) * (count + accepted)
        self.spent = FADE * self.spent + (1 - FADE) * count * seconds / self.passes[0]
        # After a pause, a draft also does what it has missed, so levels are explored in two steps, one after the other.
        made = [NODES if nodes else PLAIN] + [DRAFT] * (choice.depth > 0) + [exit] * (levels > 0 and self.warm)
        self.warm = levels > 0
        for what in (PLAIN, DRAFT, NODES, *self.exits):
            self.since_tried[what] = 0.0 if what in made else self.since_tried[what] + seconds
        if not choice.depth:
            return
        model.add_draft(exit, contexts, levels, step.drafting)
        scoring = self.passes[min(nodes, len(self.passes) - 1)] - self.passes[0]
        drafting = model.first(exit, contexts) * (levels > 0) + levels * model.level(exit, contexts)
        rows = sum(depth > 0 for depth in choice.depths)  # that drafted, and share the price
        price = self.speedup * count / rows * (scoring + drafting) / self.passes[0]
        for b, (row, right, most) in enumerate(zip(step.rows, step.accepted, choice.depths, strict=True)):
            if not most:
                continue
            if found is None:
                outcome = Outcome.of(right, step.drafted[b])
            else:
                first = 0 if found.without_levels is None else len(found.without_levels[b].path(step.tokens[b]))
                outcome = Outcome.of(right, min(levels, most), first, found.rows[b], step.tokens[b])
            own = found is not None and b in found.skipped  # no other row is to expect what this one lacks
            for history in (row,) if own else (row, self.common):
                history.add(outcome, exit, count, right - price)
        if found is None and levels:
            self.width = 0.8 * self.width + 0.2 * nodes / (rows * levels)

    def costs(self) -> Costs:
        """Return the costs and counts so far, for later processes, which give them to ``of`` as ``earlier``."""
        all_counts = self.common.all_counts()
        hits = [[round(hits, 3) for hits in counts.hits] for counts in all_counts]
        trials = [[round(trials, 3) for trials in counts.trials] for counts in all_counts]
        return replace(self.model.kept(), hits=hits, trials=trials)


DepthPolicy = FixedDepth | AutoDepth
