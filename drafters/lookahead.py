"""Lookahead decoding: a Jacobi window beside a pool of n-grams, in the one scoring pass (Fu, arXiv 2402.02057).

The window guesses the tokens of the positions ahead, each at the head of a short trajectory of further guesses. It is a
tree: the heads follow one another after the root, and each trajectory branches off its head. So it is part of the
draft, and its tokens may even be accepted. The model's choice at the end of a trajectory completes an n-gram, which
enters the pool, as do the n-grams of the text. N-grams of the pool that begin with the root are the main draft. Needs
no training.
"""

from __future__ import annotations

import random
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from specdec.base.options import Count
from specdec.base.settings import Whole, checked
from specdec.runtimes.target import Target
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Drafter, Traits
from specdec.speculation.state import State
from specdec.speculation.tree_builder import merge


class _Row:
    """What a ``LookaheadDrafter`` keeps of one row.

    pool: for each token, the remaining tokens of the n-grams that begin with it, latest n-gram first.
    seen: number of tokens of the text whose n-grams are in the pool.
    window: the trajectories, each a list of guessed tokens that follow one another; the first token of trajectory i is
        a guess for the i-th token after the next one.
    ends: for each trajectory, the index of its last token in this step's scored block (0: the root); [] after
        ``withdraw``.
    """

    def __init__(self) -> None:
        self.pool: dict[int, list[tuple[int, ...]]] = {}
        self.seen = 0
        self.window: list[list[int]] = []
        self.ends: list[int] = []
        self.random = random.Random(0)  # a row does not depend on others


class LookaheadDrafter(Drafter):
    """Drafts n-grams from a pool, which fills as a window of guessed tokens is scored beside each draft (Jacobi).

    A step scores up to ``(window + guesses) * (ngram - 1)`` tokens and the root. Only trajectories that end within the
    draft's depth limit are run.

    window: number of positions ahead that are guessed.
    ngram: tokens of an n-gram, >= 2.
    guesses: maximum number of n-grams drafted per step.
    """

    name: ClassVar[str] = "lookahead"
    summary: ClassVar[str] = "Jacobi window and n-gram pool in the scoring pass; no training"

    @checked
    def __init__(self, window: Count = 4, ngram: Annotated[Whole, Field(ge=2)] = 3, guesses: Count = 4) -> None:
        self.window, self.ngram, self.guesses = window, ngram, guesses

    def bind(self, target: Target) -> None:
        self.traits = Traits((self.name,), taps=(target.num_layers + 1,))

    def begin(self) -> _Row:
        return _Row()

    def propose(self, state: State, limit: int) -> Draft:
        length = self.ngram - 1  # of a trajectory
        running = max(min(self.window, limit - length + 1), 0)
        continuations = []
        for b, (row, ids) in enumerate(zip(state.row_states, state.ids, strict=True)):
            for end in range(max(row.seen, self.ngram), len(ids) + 1):
                self._learn(row, ids[end - self.ngram : end])
            row.seen = len(ids) + 1
            while len(row.window) < running:  # random tokens of the text
                row.window.append(row.random.choices(ids, k=length))
            del row.window[running:]
            heads = [trajectory[0] for trajectory in row.window]
            guesses = [state.allowed(b, list(rest[:limit])) for rest in row.pool.get(ids[-1], ())]
            continuations.append(guesses + [heads[:i] + trajectory for i, trajectory in enumerate(row.window)])
        draft, ends = merge(continuations, state.cache.device)
        for row, last in zip(state.row_states, ends, strict=True):
            row.ends = last[len(last) - running :]
        return draft

    def _learn(self, row: _Row, ngram: list[int]) -> None:
        """Put an n-gram, a list of token ids, first in the pool of ``row`` among those that begin with the same token.

        At most ``guesses`` of them stay.
        """
        guesses, rest = row.pool.setdefault(ngram[0], []), tuple(ngram[1:])
        if rest in guesses:
            guesses.remove(rest)
        guesses.insert(0, rest)
        del guesses[self.guesses :]

    def withdraw(self, row_state: _Row) -> None:
        row_state.ends = []

    def observe(self, row_states: list[Any], paths: list[list[int]], taps: dict[int, Tensor]) -> None:
        logits = taps[self.traits.taps[0]]  # (B, 1 + M, V); a prompt has none
        for b, (row, path) in enumerate(zip(row_states, paths, strict=True)):
            if row.ends:
                for trajectory, answer in zip(row.window, logits[b, row.ends].argmax(-1).tolist(), strict=True):
                    self._learn(row, [*trajectory, answer])
                    trajectory[:] = [*trajectory[1:], answer]  # its head now guesses the next position
            passed = len(path) - bool(row.ends)
            del row.window[:passed]
            row.ends = []
