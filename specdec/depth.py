"""How deep to draft, and to which exit: fixed, or chosen from measured costs and running acceptance.

Speculation pays when the tokens a round is expected to yield, per second, beat one token per plain step. ``AutoDepth``
estimates both sides as it goes, picks the best depth and exit, decodes plainly when all lose, and probes what it did
not pick at intervals whose cost it bounds. Knows nothing about models: seconds and counts in, a depth out.
"""

from __future__ import annotations

import bisect
import itertools
import operator
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol


class DepthPolicy(Protocol):
    """Asked for a depth before each round, told what the round took and yielded after it."""

    exit: int | None  # what ``State.exit`` is in the round whose depth was asked for last

    def depth(self, batch: int) -> int:
        """Most tokens to draft for each of ``batch`` rows in the next round; 0 is a plain decoding step."""

    def confidence(self) -> float:
        """A drafter may stop early once the probability that its whole chain stands falls below this."""

    def spare(self, batch: int, depth: int) -> int:
        """Nodes beside a chain of ``depth``, per row, that are worth scoring although they are not drafted along."""

    def observe(self, drafted: Sequence[int], accepted: Sequence[int], rows: int, draft: float, rest: float) -> None:
        """One round: drafted depth and accepted tokens of each row, tokens scored, seconds drafting and not."""


class FixedDepth:
    """Always ``depth``, and the same ``exit``."""

    def __init__(self, depth: int, exit: int | None = None) -> None:
        self._depth, self.exit = depth, exit

    def depth(self, batch: int) -> int:
        return self._depth

    def confidence(self) -> float:
        return 0.0

    def spare(self, batch: int, depth: int) -> int:
        return 0

    def observe(self, drafted: Sequence[int], accepted: Sequence[int], rows: int, draft: float, rest: float) -> None:
        pass


class _Exit:
    """What is known of drafts whose tokens go to one exit at most.

    first, further: seconds for the first drafted depth and for each after it, as measured. accepted: of each position,
    how often it stood in earlier requests, and how many times that was seen.
    """

    def __init__(self, first: float, further: float, accepted: Sequence[tuple[float, float]]) -> None:
        most = AutoDepth.MOST
        self.first, self.further = max(first, 1e-9), max(further, 1e-9)  # one that did not draft is followed, too
        # Measured over ``first`` and ``further``, on a machine as fast as ``score`` says: what slows drafting slows
        # scoring, too.
        self.ratios: deque[float] = deque([1.0], maxlen=AutoDepth.RECENT)
        self.scale = 1.0  # what these and the machine's drift come to now
        # Of all requests, and of this one: how often a position was offered and stood.
        self.all_offered, self.all_stood = [0.0] * most, [0.0] * most
        for position, (share, seen) in enumerate(accepted[:most]):
            self.all_offered[position], self.all_stood[position] = seen, share * seen
        self.begin()

    def begin(self) -> None:
        """A new request: texts differ, so what earlier ones accepted is a belief that few observations outweigh."""
        most, more = AutoDepth.MOST, AutoDepth.MORE
        self.offered, self.stood = [0.0] * most, [0.0] * most
        self.belief_weight = [AutoDepth.WEIGHT + more * min(n / AutoDepth.ENOUGH, 1.0) for n in self.all_offered]

    def cost(self, depth: int) -> float:
        """Seconds of drafting so deep."""
        return self.scale * (self.first + (depth - 1) * self.further) if depth else 0.0

    def beliefs(self) -> list[float]:
        """Acceptance of each position given the ones before. One is believed to be like the one before it."""
        found, belief, weight = [], AutoDepth.PRIOR, AutoDepth.WEIGHT
        for position, own in enumerate(self.belief_weight):
            belief = (self.all_stood[position] + weight * belief) / (self.all_offered[position] + weight)
            belief = (self.stood[position] + own * belief) / (self.offered[position] + own)
            found.append(belief)
        return found

    def see(self, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        for position in range(min(max(drafted), AutoDepth.MOST)):
            # Only rows whose chain stood up to here say anything about this position.
            reached = [a for d, a in zip(drafted, accepted, strict=True) if d > position and a >= position]
            if reached:
                share = sum(a > position for a in reached) / len(reached)
                memory, long = AutoDepth.MEMORY, AutoDepth.LONG
                self.stood[position] = memory * self.stood[position] + share
                self.offered[position] = memory * self.offered[position] + 1
                self.belief_weight[position] *= memory
                self.all_stood[position] = long * self.all_stood[position] + share
                self.all_offered[position] = long * self.all_offered[position] + 1


class AutoDepth:
    """Maximises expected tokens per second over exits and depths k:

        (1 + sum_i prod_{j <= i} a_j) / (d(k) + s(B + B k w))

    a_j: running acceptance of the j-th drafted token given the ones before; d(k): seconds of drafting k deep, both of
    an exit; s(n): those of a round that scores n tokens, without drafting; B: rows of the batch; w: tokens lately
    scored per drafted depth (1 for chains, and for trees no larger than ``spare`` has room for). ``score`` gives s at
    some sizes and ``drafts``, for each exit, seconds of the first drafted depth and of each further one, as measured on
    this machine; all are followed as rounds go by, by running medians: a slow round (another process, a growing buffer)
    swings nothing, and figures from a busy hour are mended by the first rounds that disagree. ``accepted``: for each
    exit, what an earlier policy knew (``known``), to begin with. ``begin`` says that another request does.

    Estimates may be wrong, so two accounts, in tokens that what is best would have yielded, bound what is lost:
    ``trust`` bears the failure of any draft, and rounds that gain restore it; ``credit`` grows by ``SHARE`` in rounds
    that do not draft, or could draft otherwise, and bears what probes really took.
    """

    MOST = 8  # deepest draft considered
    MEMORY = 0.96  # weight of the past in running figures, per round
    PRIOR, WEIGHT = 0.6, 3.0  # acceptance assumed before anything was seen; how many observations a belief is worth
    MORE, ENOUGH = 4.0, 30.0  # and a belief that rests on so many earlier observations
    LONG = 0.997  # as ``MEMORY``, over requests
    SIBLING, SIBLINGS = 0.03, 8  # tokens that a node beside the chain is taken to add to a round; most such nodes
    SHARE = 0.006  # of the time that drafting which does not pay may cost
    CREDIT = 0.3  # tokens' worth of time that a first probe may cost at once
    DEAREST = 8.0  # tokens' worth of time that a probe is believed to have cost at most: the machine may have slept
    TRUST, MOST_TRUST = 1.2, 16.0  # tokens' worth of time that drafting may have lost, at first and after successes
    RECENT = 15  # rounds whose median is believed
    REST = 15  # most plain rounds until the next decision: they change little, and deciding costs time, too

    def __init__(
        self,
        score: Mapping[int, float],
        drafts: Sequence[tuple[float, float]],
        accepted: Sequence[Sequence[tuple[float, float]]] = (),
    ) -> None:
        self.score, self.sizes = dict(score), sorted(score)
        earlier = [*accepted, *[()] * len(drafts)]
        self.exits = [_Exit(*draft, known) for draft, known in zip(drafts, earlier, strict=False)]
        self.exit: int | None = None if len(self.exits) == 1 else 0
        self.batch, self.width = 1, 1.0
        self.ratios: deque[float] = deque(maxlen=self.RECENT)  # measured seconds of a round over what ``score`` says
        self.drift = 1.0  # what these come to now
        self.credit, self.trust = self.CREDIT, self.TRUST  # what a probe, and any draft, may lose by now, in tokens
        self.probing = False
        self.room = 0  # nodes of a row that count as a chain this round
        self.rest = 0  # plain rounds to go before anything is decided
        self._speeds: list[list[float]] = []  # of this round

    def begin(self) -> None:
        """Forget what is the last request's alone."""
        self.rest, self.trust = 0, max(self.trust, self.TRUST)
        for known in self.exits:
            known.begin()

    def depth(self, batch: int) -> int:
        if self.rest and batch == self.batch:
            self.rest -= 1
            return 0
        self.batch, self._speeds, self.rest, self.room = batch, [], 0, 0
        self._settle()
        speeds = self.speeds()
        ways = [(exit, max(range(1, self.MOST + 1), key=known.__getitem__)) for exit, known in enumerate(speeds)]
        ways.sort(key=lambda way: -speeds[way[0]][way[1]])  # each exit with its best depth, the best one first
        at, depth = ways[0]
        pays = speeds[at][depth] > speeds[0][0]
        others, self.probing = ways[1:] if pays else ways, False
        if others:
            probe, deep = others[0]
            # It costs this much more than yielding its tokens in the best way would.
            excess = self.expected(probe)[deep] * (self.most() / speeds[probe][deep] - 1)
            self.probing = excess <= self.credit and (not pays or self.loss(deep, probe) <= self.trust)
            if self.probing:
                at, depth = probe, deep
            elif not pays:  # until it can be paid for
                self.rest = int(min((excess - self.credit) / self.SHARE, self.REST))
                return 0
        if self.exit is not None:
            self.exit = at
        return max((k for k in range(depth + 1) if self.loss(k, at) <= self.trust), default=0) if pays else depth

    def loss(self, depth: int, exit: int = 0) -> float:
        """What a round of this depth loses if nothing of it stands: tokens that plain decoding yields in the time."""
        rows = self.batch * (1 + depth * self.width)
        return (self.exits[exit].cost(depth) + self.seconds(rows)) / self.seconds(self.batch) - 1

    def confidence(self) -> float:
        """Drafting one token more pays if P(chain stands) x seconds per token exceeds what that token costs."""
        known, scored = self.exits[self.exit or 0], self.seconds(2 * self.batch) - self.seconds(self.batch)
        one_more = known.scale * known.further + max(scored, 0.0)
        return min(one_more * self.most(), 1.0)

    def spare(self, batch: int, depth: int) -> int:
        """The most that cost less than the tokens they are taken to add, by the measured price of scoring them."""
        worth = self.SIBLING / self.speeds()[self.exit or 0][min(depth, self.MOST)]  # seconds
        chain = self.seconds(batch * (1 + depth))
        prices = ((m, self.seconds(batch * (1 + depth + m)) - chain) for m in range(1, self.SIBLINGS + 1))
        found = max((m for m, price in prices if price <= m * worth), default=0) if depth else 0
        self.room = depth + found
        return found

    def expected(self, exit: int = 0) -> list[float]:
        """Tokens a round of each depth is expected to yield."""
        reach = itertools.accumulate(self.exits[exit].beliefs(), operator.mul)
        return list(itertools.accumulate(reach, initial=1.0))

    def seconds(self, rows: float) -> float:
        """Seconds of a round that scores ``rows`` tokens, without drafting: linear between and beyond known sizes."""
        at = min(max(bisect.bisect_left(self.sizes, rows), 1), len(self.sizes) - 1)
        below, above = self.sizes[at - 1], self.sizes[at]
        low, high = self.score[below], self.score[above]
        return self.drift * (low + (rows - below) / (above - below) * max(high - low, 0.0))

    def speeds(self) -> list[list[float]]:
        """For each exit, expected tokens per second when drafting so many tokens a round: 0, 1, .. ``MOST``."""
        if not self._speeds:
            rows = [self.seconds(self.batch * (1 + depth * self.width)) for depth in range(self.MOST + 1)]
            self._speeds = [
                [n / (known.cost(k) + s) for k, (n, s) in enumerate(zip(self.expected(at), rows, strict=True))]
                for at, known in enumerate(self.exits)
            ]
        return self._speeds

    def most(self) -> float:
        """The best of ``speeds``."""
        return max(map(max, self.speeds()))

    def known(self) -> list[list[tuple[float, float]]]:
        """For each exit, of each position that was drafted: how often it stood, and how many times that was seen."""
        pairs = (zip(known.all_stood, known.all_offered, strict=True) for known in self.exits)
        return [[(stood / seen, seen) for stood, seen in positions if seen >= 1] for positions in pairs]

    def observe(self, drafted: Sequence[int], accepted: Sequence[int], rows: int, draft: float, rest: float) -> None:
        deepest = max(drafted)
        self.ratios.append(rest * self.drift / self.seconds(rows))
        if not deepest:
            self.trust = min(self.trust + self.SHARE, self.MOST_TRUST)
            self.credit += self.SHARE
            return
        best, used = self.most(), self.exits[self.exit or 0]
        nodes = rows / len(drafted) - 1
        # Siblings pay for themselves, at another depth others: they say nothing of what deeper drafts would score.
        self.width = 0.8 * self.width + 0.2 * (1.0 if nodes <= self.room else nodes / deepest)
        used.ratios.append(draft / self._settle() / (used.first + (deepest - 1) * used.further))
        self._settle()
        usual, got = used.cost(deepest) + self.seconds(rows), 1 + sum(accepted) / len(accepted)
        self.trust = min(self.trust + got - usual / self.seconds(len(drafted)), self.MOST_TRUST)
        if self.probing:  # what it really took: a drafter that was not asked for long may have to catch up
            self.credit -= min(max((draft + rest) * best - got, 0.0), self.DEAREST)
        elif len(self.exits) > 1:
            self.credit += self.SHARE
        used.see(drafted, accepted)

    def _settle(self) -> float:
        """Take what the last rounds took for what the next will take; return how much slower that is than ``score``."""
        if self.ratios:
            # The lower median: what is in the way of a round only ever makes it longer.
            self.drift = _median(self.ratios)
            for known in self.exits:
                known.scale = self.drift * _median(known.ratios)
        return self.drift


def _median(figures: Sequence[float]) -> float:
    """The median, of an even number the lower one. Short: all code between two passes is cold."""
    return sorted(figures)[(len(figures) - 1) // 2]
