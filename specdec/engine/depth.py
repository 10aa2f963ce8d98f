"""How deep to draft, and to which exit: fixed, or chosen by expected tokens per second.

``AutoDepth`` takes the depth and exit with the most expected tokens per second, by a table of step costs that is scaled
to what recent steps take, and a running estimate of how often the drafted token at each position is accepted; depth 0
is plain decoding. What it does not take (drafting where plain decoding is faster, another exit, one token deeper) it
probes: each exit saves up its part of 1 % of the decode time, and is tried when that pays for the expected loss. A new
request starts from the acceptance of earlier ones, worth five observations.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import operator
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

MOST = 8  # deepest draft considered
PROBES = 0.01  # share of the decode time that probes may lose
PRIOR, WEIGHT = 0.6, 1.25  # acceptance of an unknown drafter, and how many observations this guess is worth
CARRIED = 5.0  # observations that the acceptance of earlier requests is worth
MEMORY, LONG_MEMORY = 0.97, 0.998  # weight of the past per step: within a request, over requests
RECENT = 15  # steps whose median ratio of measured to expected seconds scales the table
HOLD = 15  # most plain steps without a decision
NODE_GAIN, MOST_NODES = 0.03, 8  # tokens that an extra tree node adds to a step on average; most such nodes


@dataclass(frozen=True)
class Costs:
    """Seconds: ``score[n]`` of a pass over n tokens (embedding, layers, readout), ``drafts`` of drafting.

    drafts: for each exit, the first drafted token and each further one. accepted: for each exit and position, how often
    the drafted token was accepted in earlier requests, and how many observations that rests on.
    """

    score: dict[int, float]
    drafts: tuple[tuple[float, float], ...]
    accepted: tuple[tuple[tuple[float, float], ...], ...] = ()

    def scoring(self, tokens: float) -> float:
        """Seconds of a pass over ``tokens``: linear between and beyond the sizes in ``score``."""
        sizes = sorted(self.score)
        at = min(max(bisect.bisect_left(sizes, tokens), 1), len(sizes) - 1)
        below, above = sizes[at - 1], sizes[at]
        low, high = self.score[below], self.score[above]
        return low + (tokens - below) / (above - below) * max(high - low, 0.0)

    def drafting(self, depth: int, exit: int = -1) -> float:
        """Seconds of drafting ``depth`` tokens deep."""
        first, further = self.drafts[exit]
        return max(first + (depth - 1) * further, 1e-9) if depth else 0.0


class Choice(NamedTuple):
    """What to draft in a step.

    depth: most tokens for each row; 0 is a plain step. exit: ``State.exit``. extra_nodes: tree nodes beside the chain,
    per row, that are worth scoring. confidence: a drafter may stop once its whole chain is less likely to be accepted.
    """

    depth: int = 0
    exit: int | None = None
    extra_nodes: int = 0
    confidence: float = 0.0


class DepthPolicy(ABC):
    """Chooses what to draft before each step, and learns from the step."""

    @abstractmethod
    def choose(self, batch: int) -> Choice:
        """What to draft in the next step of ``batch`` rows."""

    def observe(  # noqa: B027 (optional)
        self, drafted: Sequence[int], accepted: Sequence[int], scored: int, draft: float, rest: float
    ) -> None:
        """A step: drafted depth and accepted tokens of each row, tokens scored, seconds of drafting and of the rest."""


class FixedDepth(DepthPolicy):
    """Always the same depth and exit."""

    def __init__(self, depth: int, exit: int | None = None) -> None:
        self.choice = Choice(depth, exit)

    def choose(self, batch: int) -> Choice:
        return self.choice


class _Counts:
    """Observations and acceptances of each position; the past fades."""

    def __init__(self, memory: float) -> None:
        self.memory, self.seen, self.accepted = memory, [0.0] * MOST, [0.0] * MOST

    def start(self, known: Sequence[tuple[float, float]], most: float) -> None:
        """Start from shares of acceptance, worth ``most`` observations each at most."""
        for position, (share, seen) in enumerate(known[:MOST]):
            self.seen[position] = min(seen, most)
            self.accepted[position] = share * self.seen[position]

    def add(self, position: int, seen: int, accepted: int) -> None:
        self.seen[position] = self.memory * self.seen[position] + seen
        self.accepted[position] = self.memory * self.accepted[position] + accepted

    def known(self) -> tuple[tuple[float, float], ...]:
        """Share and observations, for as many positions as were drafted."""
        return tuple((accepted / seen, seen) for accepted, seen in zip(self.accepted, self.seen, strict=True) if seen)

    def tokens(self) -> list[float]:
        """Expected tokens of a step at depth 0, 1, .. ``MOST``. A position is assumed to be like the one before it."""
        shares, share = [], PRIOR
        for accepted, seen in zip(self.accepted, self.seen, strict=True):
            share = (accepted + WEIGHT * share) / (seen + WEIGHT)
            shares.append(share)
        return list(itertools.accumulate(itertools.accumulate(shares, operator.mul), initial=1.0))


class _Exit:
    """What is known of drafting to one exit.

    ratios: measured to expected seconds of drafting, over that of scoring. budget: seconds saved up for a probe.
    """

    def __init__(self, known: Sequence[tuple[float, float]]) -> None:
        self.ratios, self.budget = deque([1.0], maxlen=RECENT), 0.0
        self.all, self.own = _Counts(LONG_MEMORY), _Counts(MEMORY)  # acceptance in all requests, and in this one
        self.all.start(known, float("inf"))
        self.begin()

    def begin(self) -> None:
        self.own.start(self.all.known(), CARRIED)

    def count(self, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        for position in range(min(max(drafted), MOST)):
            # Only rows whose chain was accepted up to here say anything about this position.
            reached = [a for d, a in zip(drafted, accepted, strict=True) if d > position and a >= position]
            for counts in (self.all, self.own):
                counts.add(position, len(reached), sum(a > position for a in reached))


class _Step(NamedTuple):
    """A step that could be taken: the expected tokens of each row, seconds, and tokens per second."""

    speed: float
    exit: int
    depth: int
    tokens: float
    seconds: float


class AutoDepth(DepthPolicy):
    """The policy above. One serves all requests of a decoder; ``begin`` says that a new one starts."""

    def __init__(self, costs: Costs) -> None:
        self.table = costs
        self.scoring, self.drafting = functools.lru_cache(costs.scoring), functools.lru_cache(costs.drafting)
        known = itertools.zip_longest(costs.drafts, costs.accepted[: len(costs.drafts)], fillvalue=())
        self.exits = [_Exit(accepted) for _, accepted in known]
        self.ratios: deque[float] = deque(maxlen=RECENT)  # measured to expected seconds of scoring
        self.width = 1.0  # tokens lately scored per drafted depth, beside extra nodes: more than 1 in a fixed tree
        self.batch, self.hold, self.elapsed = 0, 0, 0.0  # plain steps to go, and seconds gone, between two decisions
        self.choice, self.probe, self.speed = Choice(), False, 0.0  # of the last decision; the best expected speed

    def begin(self) -> None:
        self.hold = 0
        for known in self.exits:
            known.begin()

    def choose(self, batch: int) -> Choice:
        if self.hold and batch == self.batch:
            self.hold -= 1
            return self.choice
        self.batch, self.probe = batch, False
        steps = self.steps()
        best = max(map(max, steps))
        chosen, self.speed, wait = best, best.speed, HOLD * best.seconds
        share = PROBES / len(self.exits)
        for known, own in zip(self.exits, steps, strict=True):
            drafts = own[best.depth + 1 : best.depth + 2] if best.depth and own[best.depth] is best else own[1:]
            if not drafts:
                continue
            other = max(drafts)
            loss = other.seconds - other.tokens / best.speed
            known.budget = min(known.budget + share * self.elapsed, loss)
            wait = min(wait, (loss - known.budget) / share)
            if known.budget >= loss and not self.probe:
                chosen, self.probe = other, True
        self.elapsed, self.hold = 0.0, 0
        if chosen.depth:
            self.choice = self._choice(chosen)
        else:
            self.choice, self.hold = Choice(), int(wait / best.seconds)
        return self.choice

    def observe(self, drafted: Sequence[int], accepted: Sequence[int], scored: int, draft: float, rest: float) -> None:
        deepest = max(drafted)
        self.elapsed += draft + rest
        self.ratios.append(rest / self.scoring(scored))
        if not deepest:
            return
        exit, nodes = self.choice.exit or 0, scored / len(drafted) - 1
        chain = nodes <= self.choice.depth + self.choice.extra_nodes
        self.width = 0.8 * self.width + 0.2 * (1.0 if chain else nodes / deepest)
        used, pace = self.exits[exit], _median(self.ratios)
        used.ratios.append(draft / pace / self.drafting(deepest, exit))
        used.count(drafted, accepted)
        if self.probe:  # what it took by the median, as a single step may be slow for any reason
            took = pace * (_median(used.ratios) * self.drafting(deepest, exit) + self.scoring(scored))
            used.budget -= took - (1 + sum(accepted) / len(accepted)) / self.speed

    def steps(self) -> list[list[_Step]]:
        """For each exit, the steps of depth 0, 1, .. ``MOST``."""
        pace = _median(self.ratios)
        scoring = [self.scoring(self.batch * (1 + depth * self.width)) for depth in range(MOST + 1)]
        found = []
        for exit, known in enumerate(self.exits):
            tokens, ratio = known.own.tokens(), _median(known.ratios)
            seconds = [pace * (ratio * self.drafting(k, exit) + s) for k, s in enumerate(scoring)]
            found.append([_Step(n / s, exit, k, n, s) for k, (n, s) in enumerate(zip(tokens, seconds, strict=True))])
        return found

    def costs(self) -> Costs:
        """The table as recent steps have it, and what is known of acceptance."""
        pace = _median(self.ratios)
        scales = [pace * _median(known.ratios) for known in self.exits]
        drafts = tuple((a * first, a * further) for a, (first, further) in zip(scales, self.table.drafts, strict=True))
        score = {n: pace * seconds for n, seconds in self.table.score.items()}
        return Costs(score, drafts, tuple(known.all.known() for known in self.exits))

    def _choice(self, step: _Step) -> Choice:
        """``step``, with what else pays: its price in seconds is less than the tokens it adds are worth."""
        batch, scoring, second = self.batch, self.scoring, self.speed * _median(self.ratios)
        further = _median(self.exits[step.exit].ratios) * self.table.drafts[step.exit][1]
        confidence = min((further + scoring(2 * batch) - scoring(batch)) * second, 1.0)
        nodes, chain = range(1, MOST_NODES + 1), batch * (1 + step.depth)
        extra = (m for m in nodes if (scoring(chain + batch * m) - scoring(chain)) * second <= m * NODE_GAIN)
        return Choice(step.depth, step.exit if len(self.exits) > 1 else None, max(extra, default=0), confidence)


def _median(ratios: Sequence[float]) -> float:
    """The lower median; 1 of none. What else the machine does only ever makes a step longer."""
    return sorted(ratios)[(len(ratios) - 1) // 2] if ratios else 1.0
