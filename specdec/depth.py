"""How deep to draft: a fixed depth, or one chosen from measured costs and running acceptance.

Speculation pays when the tokens a round is expected to yield, per second, beat one token per plain step. ``AutoDepth``
estimates both sides as it goes, picks the best depth, decodes plainly when every depth loses, and probes again at
intervals whose cost it bounds. Knows nothing about models: seconds and counts in, a depth out.
"""

from __future__ import annotations

import bisect
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol


class DepthPolicy(Protocol):
    """Asked for a depth before each round, told what the round took and yielded after it."""

    def depth(self, batch: int) -> int:
        """Most tokens to draft for each of ``batch`` rows in the next round; 0 is a plain decoding step."""

    def confidence(self) -> float:
        """A drafter may stop early once the probability that its whole chain stands falls below this."""

    def spare(self, batch: int, depth: int) -> int:
        """Nodes beside a chain of ``depth``, per row, that are worth scoring although they are not drafted along."""

    def observe(self, drafted: Sequence[int], accepted: Sequence[int], rows: int, draft: float, rest: float) -> None:
        """One round: drafted depth and accepted tokens of each row, tokens scored, seconds drafting and not."""


class FixedDepth:
    """Always ``depth``."""

    def __init__(self, depth: int) -> None:
        self._depth = depth

    def depth(self, batch: int) -> int:
        return self._depth

    def confidence(self) -> float:
        return 0.0

    def spare(self, batch: int, depth: int) -> int:
        return 0

    def observe(self, drafted: Sequence[int], accepted: Sequence[int], rows: int, draft: float, rest: float) -> None:
        pass


class AutoDepth:
    """Maximises expected tokens per second: (1 + sum_i prod_{j <= i} a_j) / (k d + s(B + B k w)) over depths k.

    a_j: running acceptance of the j-th drafted token given the ones before; d: seconds per drafted depth; s(n): those
    of a round that scores n tokens, without drafting; B: rows of the batch; w: tokens lately scored per drafted depth
    (1 for chains). ``score`` gives s at some sizes and ``draft`` is d, as measured on this machine; with ``live``, both
    are followed as rounds go by, by running medians: a slow round (another process, a growing buffer) swings nothing,
    and figures from a busy hour are mended by the first rounds that disagree. Without it decisions depend on what was
    drafted and accepted alone, so that seeded sampling repeats. ``accepted``: what an earlier policy knew
    (``known``), to begin with.

    Estimates may be wrong, so two accounts, in tokens that plain decoding would have yielded, bound what is lost:
    ``trust`` bears the failure of any draft, and rounds that gain restore it; ``credit`` grows by ``SHARE`` in plain
    rounds and bears what probes really took.
    """

    MOST = 8  # deepest draft considered
    MEMORY = 0.96  # weight of the past in running figures, per round
    PRIOR, WEIGHT = 0.6, 3.0  # acceptance assumed before anything was seen; how many observations a belief is worth
    SIBLING, SIBLINGS = 0.03, 8  # tokens that a node beside the chain is taken to add to a round; most such nodes
    SHARE = 0.01  # of the time that drafting which does not pay may cost
    CREDIT = 0.5  # tokens' worth of time that a first probe may cost at once
    DEAREST = 8.0  # tokens' worth of time that a probe is believed to have cost at most: the machine may have slept
    TRUST, MOST_TRUST = 1.5, 16.0  # tokens' worth of time that drafting may have lost, at first and after successes
    RECENT = 15  # rounds whose median is believed
    REST = 3  # plain rounds after one that was decided: they change little, and deciding costs time, too

    def __init__(
        self, score: Mapping[int, float], draft: float, live: bool = True, accepted: Sequence[float] = ()
    ) -> None:
        self.score, self.sizes = dict(score), sorted(score)
        begin = list(accepted)[: self.MOST]
        self.offered = [3 * self.WEIGHT] * len(begin) + [0.0] * (self.MOST - len(begin))
        self.stood = [3 * self.WEIGHT * share for share in begin] + [0.0] * (self.MOST - len(begin))
        self.belief_weight = [self.WEIGHT] * self.MOST  # fades as observations come in
        self.live, self.batch, self.width = live, 1, 1.0
        self.ratios: deque[float] = deque(maxlen=self.RECENT)  # measured seconds of a round over what ``score`` says
        # Of drafting one depth, on a machine as fast as ``score`` says: what slows drafting slows scoring, too.
        self.steps: deque[float] = deque([draft], maxlen=self.RECENT)
        self.drift, self.draft = 1.0, draft  # what these come to now
        self.credit, self.trust = self.CREDIT, self.TRUST  # what a probe, and any draft, may lose by now, in tokens
        self.probing = False
        self.rest = 0  # plain rounds to go before anything is decided
        self._speeds: list[float] = []  # of this round

    def depth(self, batch: int) -> int:
        if self.rest and batch == self.batch:
            self.rest -= 1
            return 0
        self.batch, self._speeds, self.rest = batch, [], 0
        speeds = self.speeds()
        best = max(range(self.MOST + 1), key=speeds.__getitem__)
        self.probing = best == 0
        if best:
            return max((k for k in range(best + 1) if self.loss(k) <= self.trust), default=0)
        probe = max(range(1, self.MOST + 1), key=speeds.__getitem__)
        # A probe costs this much more than decoding its tokens plainly would.
        excess = self.expected()[probe] * (speeds[0] / speeds[probe] - 1)
        if excess <= self.credit:
            return probe
        self.rest = self.REST
        return 0

    def loss(self, depth: int) -> float:
        """What a round of this depth loses if nothing of it stands: tokens that plain decoding yields in the time."""
        rows = self.batch * (1 + depth * self.width)
        return (depth * self.draft + self.seconds(rows)) / self.seconds(self.batch) - 1

    def confidence(self) -> float:
        """Drafting one token more pays if P(chain stands) x seconds per token exceeds what that token costs."""
        one_more = self.draft + max(self.seconds(2 * self.batch) - self.seconds(self.batch), 0.0)
        return min(one_more * max(self.speeds()), 1.0)

    def spare(self, batch: int, depth: int) -> int:
        """The most that cost less than the tokens they are taken to add, by the measured price of scoring them."""
        worth = self.SIBLING / self.speeds()[min(depth, self.MOST)]  # seconds
        chain = self.seconds(batch * (1 + depth))
        prices = ((m, self.seconds(batch * (1 + depth + m)) - chain) for m in range(1, self.SIBLINGS + 1))
        return max((m for m, price in prices if price <= m * worth), default=0) if depth else 0

    def expected(self) -> list[float]:
        """Tokens a round of each depth is expected to yield. A position is believed to be like the one before it."""
        totals, reach, belief = [1.0], 1.0, self.PRIOR
        for stood, offered, weight in zip(self.stood, self.offered, self.belief_weight, strict=True):
            belief = (stood + weight * belief) / (offered + weight)
            reach *= belief
            totals.append(totals[-1] + reach)
        return totals

    def seconds(self, rows: float) -> float:
        """Seconds of a round that scores ``rows`` tokens, without drafting: linear between and beyond known sizes."""
        at = min(max(bisect.bisect_left(self.sizes, rows), 1), len(self.sizes) - 1)
        below, above = self.sizes[at - 1], self.sizes[at]
        low, high = self.score[below], self.score[above]
        return self.drift * (low + (rows - below) / (above - below) * max(high - low, 0.0))

    def speeds(self) -> list[float]:
        """Expected tokens per second when drafting so many tokens a round: 0, 1, .. ``MOST``."""
        if not self._speeds:
            per_depth = self.batch * self.width
            self._speeds = [
                tokens / (depth * self.draft + self.seconds(self.batch + depth * per_depth))
                for depth, tokens in enumerate(self.expected())
            ]
        return self._speeds

    def known(self) -> list[float]:
        """The running acceptance of each position that enough was seen of."""
        seen = [n >= 3 * self.WEIGHT for n in self.offered]
        count = seen.index(False) if False in seen else self.MOST
        return [s / n for s, n in zip(self.stood[:count], self.offered[:count], strict=True)]

    def observe(self, drafted: Sequence[int], accepted: Sequence[int], rows: int, draft: float, rest: float) -> None:
        deepest = max(drafted)
        if deepest:
            self.width = 0.8 * self.width + 0.2 * (rows / len(drafted) - 1) / deepest
        if self.live:
            # The lower median: what is in the way of a round only ever makes it longer.
            self.ratios.append(rest * self.drift / self.seconds(rows))
            self.drift = statistics.median_low(self.ratios)
            if deepest:
                self.steps.append(draft / deepest / self.drift)
            self.draft = self.drift * statistics.median_low(self.steps)
        if deepest:
            plain, got = self.seconds(len(drafted)), 1 + statistics.fmean(accepted)
            usual = deepest * self.draft + self.seconds(rows)
            self.trust = min(self.trust + got - usual / plain, self.MOST_TRUST)
            if self.probing:  # what it really took: a drafter that was not asked for long may have to catch up
                spent = draft + rest if self.live else usual
                self.credit -= min(max(spent / plain - got, 0.0), self.DEAREST)
        else:
            self.trust = min(self.trust + self.SHARE, self.MOST_TRUST)
            self.credit += self.SHARE
        for position in range(min(deepest, self.MOST)):
            # Only rows whose chain stood up to here say anything about this position.
            reached = [a for d, a in zip(drafted, accepted, strict=True) if d > position and a >= position]
            if reached:
                share = sum(a > position for a in reached) / len(reached)
                self.stood[position] = self.MEMORY * self.stood[position] + share
                self.offered[position] = self.MEMORY * self.offered[position] + 1
                self.belief_weight[position] *= self.MEMORY
