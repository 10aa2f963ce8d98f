"""N-grams joined with another drafter, as in ``ngram+m2r2``: one tree of the candidates of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from specdec.runtimes.draft_path import DeviceTree
from specdec.runtimes.target import Target
from specdec.speculation.candidates import Candidates
from specdec.speculation.device_draft import DeviceDraft, choice_of
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Drafter
from specdec.speculation.state import State
from specdec.speculation.tree_builder import draft_best, worth_scoring

from .ngram import NgramDrafter, NgramRow

# The sources of candidates: n-grams where the other drafter has no candidate, where it has others, and that drafter.
NGRAM_ALONE, NGRAM_WITH_OTHERS, OTHER = range(3)
UNKNOWN = 0.5  # raw probability of a token whose drafter has none, until calibration knows better


class JoinedRow(NgramRow):
    """What a ``JoinedDrafter`` keeps of one row: what n-grams keep, and ``other``, the other drafter's state of it."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.other = other


class JoinedDrafter(Drafter):
    """Drafts one tree from the candidate tokens of both drafters, ``ngram`` and ``other`` ("ngram+NAME").

    ngram: looks up the last tokens of the text in earlier texts. other: another drafter, such as
        m2r2. It does not run in a step in which the n-grams alone are worth more than one more drafted level costs.
    """

    name: ClassVar[str] = "joined"

    def __init__(self, ngram: NgramDrafter, other: Drafter) -> None:
        self.ngram = ngram
        self.other = other

    def bind(self, target: Target) -> None:
        self.ngram.bind(target)
        self.other.bind(target)
        own, first = self.other.traits, self.ngram.name
        self.learner = self.other.learner
        self.traits = replace(
            own,
            sources=(first, first, self.other.name),
            has_probabilities=True,
            level_shares=own.level_shares[-1:],
            cost_key=f"{self.other.name} {own.cost_key}",
        )

    def begin(self) -> JoinedRow:
        return JoinedRow(self.other.begin())

    def end(self, row_state: JoinedRow, ids: list[int], start: int, learn: bool = True) -> None:
        self.ngram.end(row_state, ids, start, learn)
        self.other.end(row_state.other, ids, start, learn)

    def observe(self, row_states: list[Any], paths: list[list[int]], taps: dict[int, Tensor]) -> None:
        self.other.observe([row.other for row in row_states], paths, taps)

    def keep_up(self, row_states: list[Any], texts: Sequence[Sequence[int]]) -> None:
        self.other.keep_up([row.other for row in row_states], texts)

    def withdraw(self, row_state: JoinedRow) -> None:
        self.other.withdraw(row_state.other)

    def propose(self, state: State, limit: int) -> Draft:
        of_other = replace(state, row_states=[row.other for row in state.row_states], exit=None)
        if state.threshold is not None:  # n-grams have no confidence by which tokens could be accepted
            return self.other.propose(of_other, limit)
        nodes, prices = self.ngram.nodes, state.prices
        given = self.ngram.candidates(state, limit)
        alone = worth_scoring(given, limit, nodes, prices)
        most = limit
        if prices is not None:
            if not (most := min(prices.levels(alone), limit)):
                return draft_best(given, limit, nodes, state, 0, alone)
            of_other.prices = prices.of(OTHER, NGRAM_ALONE, NGRAM_WITH_OTHERS)
        choice = choice_of(of_other, most, nodes, 2)
        if choice is None:
            found = self.other.candidates(of_other, limit, given)
        else:
            found = self.other.candidates(of_other, most, given, choice)
        if isinstance(found, DeviceTree):
            return DeviceDraft(found, of_other, most, without_levels=alone)
        if found is None:
            found = self._proposed(of_other, limit)
        if not any(each.tokens for each in found):
            return draft_best(given, limit, nodes, state, 0, alone)
        levels = max(each.levels() for each in found)
        draft = draft_best(self.ngram.candidates(state, limit, found), limit, nodes, state, levels, alone)
        assert draft.found is not None
        draft.found.skipped = [b for b, each in enumerate(found) if not each.tokens]
        return draft

    def _proposed(self, state: State, limit: int) -> list[Candidates]:
        """Draft by ``other.propose``, for a drafter without ``candidates`` in this step; return each row's candidates.

        They are nodes of a larger tree later, with other indices, so the draft itself is never scored: the keys and
        values that it left in ``state.cache`` are removed, and ``other`` forgets it (``Drafter.withdraw``).
        Each token has the probability ``UNKNOWN`` after the tokens before it, unless the draft has its own candidates.

        state: the rows, with the row states of ``other``. limit: maximum depth.
        """
        draft = self.other.propose(state, limit)
        if draft.states is not None:  # of a tree of other nodes, scoring begins at layer 0
            state.cache.trim(draft.states.shape[1], 0, draft.exit_layer)
        for row_state in state.row_states:  # nodes get other places in the joined tree
            self.other.withdraw(row_state)
        lists, depths, rows = draft.lists(), draft.depths()[1:], list[Candidates]()
        if draft.found is not None:
            return list(draft.found.rows)
        for tokens, most in zip(lists, state.depths, strict=True):
            there = [True]  # of each block token, whether the row has its path
            for token, parent, depth in zip(tokens, draft.parents, depths, strict=True):
                there.append(there[parent] and token >= 0 and depth <= most)
            every = Candidates(
                [depth * math.log(UNKNOWN) for depth in depths], tokens, [*draft.parents], [[UNKNOWN] * len(tokens)]
            )
            rows.append(every.only([node for node, own in enumerate(there[1:]) if own]))
        return rows
