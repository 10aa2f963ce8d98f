"""How often drafts are accepted: by the raw probability of their source and by position, in one row and in all.

A *source* proposes candidate tokens with *raw* probabilities (``Traits.sources``). Its *calibrated* probabilities are
the shares of such candidates that were accepted, counted at the *knots*, fixed log-odds of raw probabilities
(``KNOTS``). An *exit* is a place where drafted tokens leave the model; a drafter has one or more, numbered from 0. A
*level* is a step of drafting, which adds tokens at one depth. The *gain* of a draft is the number of its accepted
tokens minus its cost in tokens: its seconds times the present speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from specdec.runtimes.draft_path import KNOTS
from specdec.speculation.candidates import Candidates

RAW_PROBABILITIES = [1 / (1 + math.exp(-knot)) for knot in KNOTS]  # at the knots of a calibration table
FIRST = 0.6  # acceptance at the first position of a drafter that is unknown
PRIOR_COUNT = 4.0  # observations that the assumed rates count as
ROW_PRIOR_COUNT = 20.0  # observations that the rates of all rows count as, in the rates of one row
MEMORY, ROW_MEMORY = 120.0, 60.0  # observations that are remembered of all rows, and of one
COUNT_AFTER_CHANGE = 20.0  # observations that are remembered when a drafter has changed
NOTHING = Candidates.none()
SIZES = 8  # groups of batch sizes with figures of their own: 1, 2 or 3, 4 to 7, ... rows


class DecayedCounts:
    """Counts of trials and of hits in ``size`` bins, numbered from 0, with exponential forgetting.

    hits, trials: the decayed counts of each bin, [size].
    memory: maximum decayed number of trials of a bin; the larger, the slower it forgets.
    """

    def __init__(self, size: int, memory: float) -> None:
        self.hits = [0.0] * size
        self.trials = [0.0] * size
        self.memory = memory

    def add(self, number: int, hit: float, weight: float = 1.0) -> None:
        """Add ``weight`` trials to bin ``number``, and scale its counts down to ``memory`` trials if there are more.

        hit: share of these trials that were hits, in [0, 1]; or any number whose mean is to be estimated, such as a
            gain.
        """
        fade = min(self.memory / (self.trials[number] + weight), 1.0)
        self.trials[number] = fade * (self.trials[number] + weight)
        self.hits[number] = fade * (self.hits[number] + weight * hit)

    def mean(self, number: int, assumed: float, weight: float) -> float:
        """Return the share of hits in bin ``number``, with a prior of ``weight`` trials of mean ``assumed``."""
        return (self.hits[number] + weight * assumed) / (self.trials[number] + weight)

    def means(self, assumed: Iterable[float], weight: float) -> list[float]:
        """Return the share of hits in each of the first bins, each with a prior: a list as long as ``assumed``.

        assumed: the mean of each bin's prior. weight: number of trials that a prior counts as.
        """
        each = zip(assumed, self.hits, self.trials, strict=False)
        return [(hits + weight * mean) / (trials + weight) for mean, hits, trials in each]

    def forget(self) -> None:
        """Scale each bin's counts down to at most ``COUNT_AFTER_CHANGE`` (20) trials, in place; shares of hits stay."""
        for number, trials in enumerate(self.trials):
            fade = min(COUNT_AFTER_CHANGE / max(trials, COUNT_AFTER_CHANGE), 1.0)
            self.hits[number], self.trials[number] = fade * self.hits[number], fade * trials


class History:
    """The outcomes of the drafts of one row (sequence), or of all rows, by which later acceptance is predicted.

    A *source*, such as n-grams, proposes candidate tokens with probabilities, which are *raw*: not calibrated. An
    *exit* is a layer of the model at which drafted tokens leave it. A *level* is all tokens of a draft at one depth.

    sources, exits, levels: numbers of sources, of exits, and of levels of the deepest draft.
    memory: maximum decayed number of trials of a counter's bin; the larger, the slower it forgets.
    by_source: for each source, a counter with a bin for each of the log-odds ``KNOTS`` (-4 .. 6): the candidates with
        such a raw probability, and those that were right. One between two of the log-odds counts for both.
    by_position: for each exit, a counter with a bin for each level, numbered from the first at which no other source
        had the right token: the levels, and those whose token was accepted.
    gains: a counter with a bin for each group of batch sizes (``_size``); its mean is the gain of a row's draft in a
        step: accepted tokens minus its cost in tokens (its seconds times tokens per second).
    """

    def __init__(self, sources: int, exits: int, levels: int, memory: float = ROW_MEMORY) -> None:
        self.by_source = [DecayedCounts(len(KNOTS), memory) for _ in range(sources)]
        self.by_position = [DecayedCounts(levels, memory) for _ in range(exits)]
        self.gains = DecayedCounts(SIZES, memory)

    def all_counts(self) -> list[DecayedCounts]:
        """Return all counters, not copies: those of the sources, then those of the exits, then ``gains``."""
        return [*self.by_source, *self.by_position, self.gains]

    def add(self, outcome: Outcome, exit: int, rows: int, gain: float) -> None:
        """Count the outcome of one row's draft in one step.

        outcome: which candidates and levels of the draft were right.
        exit: index of the exit to which it was drafted. rows: number of rows (sequences) that shared the step.
        gain: number of accepted tokens minus the draft's cost in tokens (its seconds times tokens per second).
        """
        for source, knot, weight, hit in outcome.candidates:
            self.by_source[source].add(knot, hit, weight)
        for level, hit in outcome.levels:
            self.by_position[exit].add(level, hit)
        self.gains.add(_size(rows), gain)


class Outcome(NamedTuple):
    """The outcome of one row's draft in one step, for the counters of ``History``.

    A knot is the index of an entry of ``KNOTS``, the log-odds at which acceptance is counted. A probability between two
    knots counts for both, with weights in [0, 1] that sum up to 1. A level is all tokens of a draft at one depth.

    candidates: a tuple (index of the source, knot, weight of the knot, 1.0 or 0.0) for each candidate token whose
        parent is in the text, for each source (such as n-grams) that gave it a probability, and each knot near that.
        The last entry is 1.0 if the candidate was the right token, the one that followed in the text.
    levels: (number of the level, 1.0 or 0.0) for each draft level after accepted tokens: 1.0 if its token was accepted.
        Level 0 is the first one at which no other source had the right token.
    """

    candidates: list[tuple[int, int, float, float]]
    levels: list[tuple[int, float]]

    @classmethod
    def of(
        cls, accepted: int, levels: int, first: int = 0, found: Candidates = NOTHING, tokens: Sequence[int] = ()
    ) -> Outcome:
        """Return the outcome of one row's draft.

        accepted: number of accepted tokens of the draft. levels: number of its levels (depths).
        first: number of first levels at which another source (such as n-grams) already had the right token; they are
            not counted.
        found: the candidates that the draft was chosen from, a tree after the root (the text's last token).
        tokens: ids of the tokens that then followed the root in the text; (): no candidates are counted.
        """
        outcome = cls(
            [], [(level - first, float(level < accepted)) for level in range(first, min(levels, accepted + 1))]
        )
        at = 0
        for token in tokens:
            children = [node for node, parent in enumerate(found.parents) if parent == at]
            at = 0
            for node in children:
                hit = found.tokens[node] == token
                at = node + 1 if hit else at
                for source, raw in enumerate(found.raw):
                    if raw[node] > 0:
                        outcome.candidates.extend([(source, *near, float(hit)) for near in _near(raw[node])])
            if not at:
                break
        return outcome


def _near(raw: float) -> list[tuple[int, float]]:
    """Return [(knot, weight), ..] for linear interpolation between the one or two knots next to a probability.

    A knot is an index of ``KNOTS``, which lists log-odds; the weights sum up to 1.

    raw: the probability, in [0, 1]. Its log-odds may lie beyond the first or last knot, which then has weight 1.
    """
    at = math.log(max(raw, 1e-9) / max(1 - raw, 1e-9)) - KNOTS[0]
    if at <= 0 or at >= len(KNOTS) - 1:
        return [(0 if at <= 0 else len(KNOTS) - 1, 1.0)]
    below = int(at)
    return [(below, 1 + below - at), (below + 1, at - below)] if at > below else [(below, 1.0)]


def _size(rows: int) -> int:
    """Return the index of the group of batch sizes to which ``rows`` rows belong, in 0 .. ``SIZES`` - 1.

    The groups are 1 row, 2 or 3 rows, 4 to 7, and so on; the last one has no upper bound.
    """
    return min(rows.bit_length(), SIZES) - 1


def expected_gain(row: History, common: History, rows: int) -> float:
    """Return the expected gain of a row's draft: the number of accepted tokens minus its cost in tokens.

    The cost is the draft's seconds times the present speed in tokens per second. The result is the mean of earlier
    gains in steps of about as many rows; 1 before there are any.

    row, common: the histories of this row and of all rows. rows: number of rows (sequences) in the step.
    """
    size = _size(rows)
    return row.gains.mean(size, common.gains.mean(size, 1.0, PRIOR_COUNT), ROW_PRIOR_COUNT)


def table(row: History, common: History, source: int) -> list[float]:
    """Return the calibration table of one source (such as n-grams) in one row: calibrated probabilities, a list of 11.

    Entry i is the share of accepted candidates among those whose raw probability had the log-odds ``KNOTS[i]``, which
    are -4 .. 6. Few observations of the row are completed by those of all rows.

    row, common: the histories of this row and of all rows. source: index of the source in ``Traits.sources``.
    """
    return row.by_source[source].means(common.by_source[source].means(RAW_PROBABILITIES, PRIOR_COUNT), ROW_PRIOR_COUNT)


def rates(row: History, common: History, exit: int) -> list[float]:
    """Return, for each level of a row's draft, the probability that it adds a right token that no other source has.

    A level is all tokens at one depth. The list has an entry for each level of the deepest draft, the root's children
    first. Few observations of the row are completed by those of all rows.

    row, common: the histories of this row and of all rows.
    exit: index of the exit (layer at which drafted tokens leave the model) to which levels are drafted.
    """
    own, others, rate = row.by_position[exit], common.by_position[exit], FIRST
    found: list[float] = []
    for level in range(len(own.hits)):
        assumed = others.mean(level, rate, ROW_PRIOR_COUNT if level else PRIOR_COUNT)  # a level is much like the last
        rate = own.mean(level, assumed, ROW_PRIOR_COUNT)
        found.append(rate)
    return found
