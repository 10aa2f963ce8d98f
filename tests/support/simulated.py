"""Simulated drafting without models: a machine with known costs, texts with known acceptance, and two drafters.

One drafter has tokens at no cost, as n-grams have, the other costs time for each level of the tree, as M2R2 does.
"""

import heapq
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from specdec.runtimes.draft_path import KNOTS, WIDTH, TreeLimits
from specdec.speculation.candidates import Candidates
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Drafter
from specdec.speculation.state import State
from specdec.speculation.trees import MOST_NODES

Tables = Sequence[Sequence[float] | None]
Kinds = Sequence[tuple[float, float]]  # of a place: how likely the free source is right there, and the levelled one
NONE: Tables = (None, None, None)
DEPTH = 12  # most levels of a draft


@dataclass(frozen=True)
class World:
    """A simulated machine.

    A pass over n tokens takes ``base * sqrt(1 + (n * ratio)^2)`` seconds, and more beyond 16 tokens.
    Other costs are relative to a pass over no token.
    phases: kinds of positions; a text has positions of the kinds of a phase, at random, for ``tokens`` tokens of a
    row.
    powers: for each drafter, a probability p is stated as p ** (1 / power). told: factor on the ``ratio`` that the
    policy knows. busy: number of first steps that other work makes slow. cold: what levels take more after a step
    without levels.
    """

    phases: Sequence[Kinds]
    ratio: float = 0.02
    level: float = 0.1
    first: float = 0.01
    free: float = 0.01
    rows: int = 1
    powers: tuple[float, float] = (1.0, 1.0)
    tokens: int = 800
    told: float = 1.3
    base: float = 0.02
    busy: int = 0
    cold: float = 0.0

    def scoring(self, tokens: int) -> float:
        return self.base * math.hypot(1, tokens * self.ratio) * (1.05 if tokens > 16 else 1.0)

    def drafting(self, free: bool, levels: int) -> float:
        return self.base * (free * self.free + (levels > 0) * self.first + levels * self.level)


class Row:
    """A simulated text. Its token at position t is 3 t; a drafter's wrong proposal there is 3 t + 1 or 3 t + 2."""

    def __init__(self, world: World, kinds: Kinds, seed: int) -> None:
        self.at, rng = 0, random.Random(seed)
        self.other = self  # also the state of the other of two joined drafters
        self.said, self.drafted = list[tuple[float, ...]](), list[tuple[int, ...]]()
        for t in range(2 * world.tokens + 2 * DEPTH + 2):  # some rows are ahead of others
            chances, one, alike = rng.choice(kinds), rng.random(), rng.random() < 0.5
            lucks = one, one if alike else rng.random()
            wrong = 3 * t + 1, 3 * t + 1 + (not alike)
            parts = zip(chances, lucks, wrong, strict=True)
            self.drafted.append(tuple(3 * t if luck < p else other for p, luck, other in parts))
            self.said.append(tuple(p ** (1 / power) for p, power in zip(chances, world.powers, strict=True)))

    def token(self, depth: int, right: bool, source: int) -> tuple[int, float]:
        """Return what drafter ``source`` proposes after a path of ``depth`` tokens, and the probability that it states.

        right: whether the path is right so far.
        """
        place = self.at + depth
        return self.drafted[place][source] if right else 3 * place + 1 + source, self.said[place][source]

    def rightly(self, depth: int, token: int) -> bool:
        return token == 3 * (self.at + depth)


def calibrated(p: float, table: Sequence[float] | None) -> float:
    if table is None or p <= 0:
        return p
    at = min(max(math.log(p / max(1 - p, 1e-9)) - KNOTS[0], 0.0), len(KNOTS) - 1.001)
    return table[int(at)] + (at - int(at)) * (table[int(at) + 1] - table[int(at)])


def shared(found: dict[int, Any]) -> None:
    """Reduce probabilities of candidates whose sum exceeds 1: the likeliest keeps its own."""
    total, most = sum(own[0] for own in found.values()), max(found, key=lambda token: found[token][0], default=0)
    for token, own in found.items():
        if total > 1 and token != most:
            own[0] *= (1 - found[most][0]) / (total - found[most][0])


class Free(Drafter):
    """A drafter whose tokens cost nothing, as n-grams. Its tree also has paths of the other drafter."""

    name, nodes = "free", None

    def candidates(self, state: State, limit: int, given: Sequence[Candidates] | None = None) -> list[Candidates]:
        tables = state.prices.tables if state.prices else [NONE] * len(state.ids)
        rows = zip(state.row_states, given or [None] * len(state.ids), tables, strict=True)
        return [self.grown(row, limit, learned, own) for row, learned, own in rows]

    def grown(self, row: Row, limit: int, learned: Candidates | None, tables: Tables) -> Candidates:
        alone, beside, heads = (*tables, None, None)[:3]
        behind, found = defaultdict[int, list[int]](list), Candidates.none(3)
        for node, parent in enumerate(learned.parents if learned else ()):
            behind[parent].append(node)
        order = itertools.count()
        heap = [(0.0, next(order), 0, -1, -1, True, True, 0, (0.0, 0.0, 0.0))]
        while heap and len(found.tokens) < MOST_NODES:
            score, _, parent, token, depth, right, own, place, raw = heapq.heappop(heap)
            if depth >= 0:
                found.scores.append(-score)
                found.tokens.append(token)
                found.parents.append(parent)
                for into, value in zip(found.raw, raw, strict=True):
                    into.append(value)
            if depth + 1 >= limit:
                continue
            after: dict[int, Any] = {}  # token: probability, what n-grams and the levelled source say, its place there
            if own:
                token, p = row.token(depth + 1, right, 0)
                after[token] = [0.0, p, 0.0, -1]
            for node in behind[place] if learned and place >= 0 else ():
                entry = after.setdefault(learned.tokens[node], [0.0, 0.0, 0.0, -1])
                entry[2:] = learned.raw[0][node], node + 1
            others = any(entry[2] for entry in after.values())
            for entry in after.values():
                table = beside if others and not entry[2] else alone
                entry[0] = max(calibrated(entry[1], table), calibrated(entry[2], heads))
            shared(after)
            for token, (p, own_p, said, at) in after.items():
                raw = (0.0, 0.0, said) if said else (0.0, own_p, 0.0) if others else (own_p, 0.0, 0.0)
                good = right and row.rightly(depth + 1, token)
                if p * math.exp(-score) > 0.01:
                    node = score - math.log(min(p, 1.0)), next(order), len(found.tokens), token
                    heapq.heappush(heap, (*node, depth + 1, good, own_p > 0, at, raw))
        return found if learned else found._replace(raw=found.raw[:1])

    def propose(self, state: State, limit: int) -> Draft:
        raise NotImplementedError


class Levels(Drafter):
    """A drafter that adds one token after the likeliest nodes at each level, also after nodes of another drafter."""

    name = "levels"

    def candidates(
        self, state: State, limit: int, given: Sequence[Candidates] | None = None
    ) -> list[Candidates] | None:
        count, prices = len(state.ids), state.prices
        limits = prices.limits(limit, WIDTH) if prices else TreeLimits(limit)
        tables = prices.tables if prices else [NONE] * count
        found, ends = [Candidates.none() for _ in range(count)], [[(0, 0, True, 0.0)] for _ in range(count)]
        for level in range(limits.levels):
            gain = 0.0
            for b, row in enumerate(state.row_states):
                new, (heads, _, beside), tree = list[tuple[int, int, bool, float]](), tables[b], found[b]
                for node, place, right, score in ends[b]:
                    token, said = row.token(level, right, 1)
                    after = {token: [calibrated(said, heads), said, -1]}
                    if given is not None and place >= 0:
                        for n, (token, parent) in enumerate(zip(given[b].tokens, given[b].parents, strict=True)):
                            if parent == place:
                                entry = after.setdefault(token, [0.0, 0.0, -1])
                                entry[0], entry[2] = max(entry[0], calibrated(given[b].raw[0][n], beside)), n + 1
                    shared(after)
                    for token, (p, said, at) in after.items():
                        tree.tokens.append(token)
                        tree.parents.append(node)
                        tree.raw[0].append(said)
                        tree.scores.append(score + math.log(max(p, 1e-9)))
                        new.append((len(tree.tokens), int(at), right and row.rightly(level, token), tree.scores[-1]))
                new.sort(key=lambda end: -end[3])
                worth = [limits.rate(level + 1) * math.exp(end[3]) - limits.node for end in new]
                ends[b] = [end for n, end in enumerate(new[: WIDTH if count == 1 else 1]) if not n or worth[n] > 0]
                gain += sum(max(each, 0.0) for each in worth[: len(ends[b])])
            if gain < limits.level:
                break
        return found

    def propose(self, state: State, limit: int) -> Draft:
        raise NotImplementedError


def state_of(rows: Sequence[Row], prices: Any = None) -> State:
    cache: Any = SimpleNamespace(device=torch.device("cpu"))
    nothing: Any = None
    sampler: Any = SimpleNamespace(plain_greedy=True)
    return State(nothing, cache, sampler, [[0]] * len(rows), prices, row_states=list(rows))
