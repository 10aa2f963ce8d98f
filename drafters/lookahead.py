"""Lookahead decoding: a Jacobi window beside a pool of n-grams, in the one scoring pass (Fu, arXiv 2402.02057).

The window guesses the tokens of the positions ahead, each at the head of a short trajectory of further guesses. It is a
tree: the heads follow one another after the root, each trajectory branches off its head. So it rides along as draft
nodes, and its tokens may even be accepted. What the model answers at the end of a trajectory completes an n-gram, which
enters the pool; n-grams of the pool that begin with the root are the real draft. Needs no training. N-grams of the
text itself enter the pool, too.
"""

from __future__ import annotations

import random
from typing import Any, ClassVar

from torch import Tensor

from specdec.base import options
from specdec.runtimes.target import Target
from specdec.speculation.draft import Draft, Drafter, State
from specdec.speculation.trie import merge


class _Row:
    """One row's pool and window."""

    def __init__(self) -> None:
        self.pool: dict[int, list[tuple[int, ...]]] = {}  # first token -> what followed it, latest first
        self.seen = 0  # tokens whose n-grams are in the pool
        self.window: list[list[int]] = []  # trajectories; the head of number i is a guess for position root + 1 + i
        self.ends: list[int] = []  # block indices at which they end in this step's draft
        self.random = random.Random(0)  # its own: a row does not depend on what else is in the batch


class LookaheadDrafter(Drafter):
    """Drafts n-grams from a pool that a Jacobi window of guesses fills as the text is generated.

    window: positions ahead that are guessed. ngram: tokens of an n-gram, >= 2. guesses: most n-grams drafted per step.
    A step scores up to ``(window + guesses) * (ngram - 1)`` tokens and the root. Only trajectories that end within the
    draft's depth limit are run.
    """

    name: ClassVar[str] = "lookahead"
    summary: ClassVar[str] = "Jacobi window and n-gram pool in the scoring pass; no training"

    def __init__(self, window: int = 4, ngram: int = 3, guesses: int = 4) -> None:
        self.window = options.whole("window", window, 1)
        self.ngram = options.whole("ngram", ngram, 2)
        self.guesses = options.whole("guesses", guesses, 1)

    def bind(self, target: Target) -> None:
        self.taps = (target.num_layers + 1,)

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
            while len(row.window) < running:  # the text's own tokens, at random
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
        known, rest = row.pool.setdefault(ngram[0], []), tuple(ngram[1:])
        if rest in known:
            known.remove(rest)
        known.insert(0, rest)
        del known[self.guesses :]

    def withdraw(self, row_state: _Row) -> None:
        row_state.ends = []

    def observe(self, row_states: list[Any], paths: list[list[int]], taps: dict[int, Tensor]) -> None:
        logits = taps[self.taps[0]]  # (B, 1 + M, V); a prompt has none
        for b, (row, path) in enumerate(zip(row_states, paths, strict=True)):
            if row.ends:
                for trajectory, answer in zip(row.window, logits[b, row.ends].argmax(-1).tolist(), strict=True):
                    self._learn(row, [*trajectory, answer])
                    trajectory[:] = [*trajectory[1:], answer]  # its head is a guess for one position further now
            passed = len(path) - bool(row.ends)
            del row.window[:passed]
            row.ends = []
