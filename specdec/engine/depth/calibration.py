"""How often drafts are accepted: by what their source says, and by position. In the row first, over all rows second."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from specdec.speculation.candidates import KNOTS, Candidates

SAID = [1 / (1 + math.exp(-knot)) for knot in KNOTS]  # the probabilities at the knots
FIRST = 0.6  # acceptance at the first position of a drafter that is unknown
WEIGHT, ROW_WEIGHT = 4.0, 20.0  # observations that count as much as what is assumed, and as all rows
MEMORY, ROW_MEMORY = 120.0, 60.0  # observations that are remembered of all rows, and of one
KEPT = 20.0  # observations that are remembered when a drafter has changed
NOTHING = Candidates.none()
SIZES = 8  # groups of batch sizes with figures of their own: 1, 2 or 3, 4 to 7, ... rows


class Tally:
    """The numbers of trials and of hits, by number. Later ones count more: at most about ``memory`` are remembered."""

    def __init__(self, size: int, memory: float) -> None:
        self.hits, self.trials, self.memory = [0.0] * size, [0.0] * size, memory

    def add(self, number: int, hit: float, weight: float = 1.0) -> None:
        fade = min(self.memory / (self.trials[number] + weight), 1.0)
        self.trials[number] = fade * (self.trials[number] + weight)
        self.hits[number] = fade * (self.hits[number] + weight * hit)

    def mean(self, number: int, assumed: float, weight: float) -> float:
        """The share of hits; ``assumed`` counts as ``weight`` trials."""
        return (self.hits[number] + weight * assumed) / (self.trials[number] + weight)

    def means(self, assumed: Iterable[float], weight: float) -> list[float]:
        """The same of every number."""
        each = zip(assumed, self.hits, self.trials, strict=False)
        return [(hits + weight * mean) / (trials + weight) for mean, hits, trials in each]

    def forget(self) -> None:
        """What was seen counts little from now on."""
        for number, trials in enumerate(self.trials):
            fade = min(KEPT / max(trials, KEPT), 1.0)
            self.hits[number], self.trials[number] = fade * self.hits[number], fade * trials


class History:
    """What the drafts of one row, or of all rows, have yielded.

    by_source: for each source, trials and hits at the knots of what it said. A trial between two knots counts for both.
    by_position: for each exit, whether the first, second, .. level added a token where nothing else had the right one.
    worth: by the number of rows in a step, the tokens that a draft added beyond its price.
    """

    def __init__(self, sources: int, exits: int, levels: int, memory: float = ROW_MEMORY) -> None:
        self.by_source = [Tally(len(KNOTS), memory) for _ in range(sources)]
        self.by_position = [Tally(levels, memory) for _ in range(exits)]
        self.worth = Tally(SIZES, memory)

    def tallies(self) -> list[Tally]:
        """All of them, in one order."""
        return [*self.by_source, *self.by_position, self.worth]

    def add(self, seen: Seen, exit: int, rows: int, worth: float) -> None:
        """Add a row's draft in a step of ``rows``. worth: the tokens that it added beyond their price."""
        for source, knot, weight, hit in seen.candidates:
            self.by_source[source].add(knot, hit, weight)
        for level, hit in seen.levels:
            self.by_position[exit].add(level, hit)
        self.worth.add(_size(rows), worth)


class Seen(NamedTuple):
    """What a step says of a row's draft.

    candidates: of each candidate whose predecessors were right: its source, a knot near what that said, the weight
        there, and whether it was right.
    levels: the number of each level behind right tokens, and whether its token was accepted. Level 0 is the first at
        which nothing else had the right token.
    """

    candidates: list[tuple[int, int, float, float]]
    levels: list[tuple[int, float]]

    @classmethod
    def of(
        cls, accepted: int, levels: int, first: int = 0, found: Candidates = NOTHING, tokens: Sequence[int] = ()
    ) -> Seen:
        """From a draft of so many ``levels``, of which the first ``accepted`` tokens were right.

        first: number of right tokens that were there without levels.
        found, tokens: what the draft was chosen from, and the tokens that followed the root.
        """
        seen = cls([], [(level - first, float(level < accepted)) for level in range(first, min(levels, accepted + 1))])
        children, at = dict[int, list[int]](), 0
        for node, parent in enumerate(found.parents):
            children.setdefault(parent, []).append(node)
        for token in tokens:
            if not (nodes := children.get(at)):
                break
            at = 0
            for node in nodes:
                hit = found.tokens[node] == token
                at = node + 1 if hit else at
                for source, said in enumerate(found.raw):
                    if said[node] > 0:
                        seen.candidates.extend((source, *near, float(hit)) for near in _near(said[node]))
            if not at:
                break
        return seen


def _near(said: float) -> list[tuple[int, float]]:
    """The knots around what a source says, and the share of each."""
    at = math.log(max(said, 1e-9) / max(1 - said, 1e-9)) - KNOTS[0]
    if at <= 0 or at >= len(KNOTS) - 1:
        return [(0 if at <= 0 else len(KNOTS) - 1, 1.0)]
    below = int(at)
    return [(below, 1 + below - at), (below + 1, at - below)] if at > below else [(below, 1.0)]


def _size(rows: int) -> int:
    return min(rows.bit_length(), SIZES) - 1


def worth(row: History, common: History, rows: int) -> float:
    """The tokens that a draft of ``row`` adds beyond its price, in a step of so many rows."""
    size = _size(rows)
    return row.worth.mean(size, common.worth.mean(size, 1.0, WEIGHT), ROW_WEIGHT)


def table(row: History, common: History, source: int) -> list[float]:
    """The calibrated probabilities of a source at the knots, for ``row``."""
    return row.by_source[source].means(common.by_source[source].means(SAID, WEIGHT), ROW_WEIGHT)


def rates(row: History, common: History, exit: int) -> list[float]:
    """How likely each level adds a token where nothing else has the right one, for ``row``."""
    own, others, rate, found = row.by_position[exit], common.by_position[exit], FIRST, list[float]()
    for level in range(len(own.hits)):
        assumed = others.mean(level, rate, ROW_WEIGHT if level else WEIGHT)  # a level is much like the last
        rate = own.mean(level, assumed, ROW_WEIGHT)
        found.append(rate)
    return found
