"""Drafters that run pairs: a token, and a state of the token before it, through layers with a KV cache of their own.

The pair of a drafted token has the layers' own output instead of the state. Its entries leave the cache with the next
step, which runs the pairs of all new tokens of the text.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specdec.base.devices import is_asynchronous, upload
from specdec.kvcache.cache import KVCache
from specdec.kvcache.mask import Mask
from specdec.runtimes.prefill import PASS_TOKENS
from specdec.runtimes.target import Target
from specdec.runtimes.torch.draft import Step, states_of
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Traits
from specdec.speculation.state import State

from .chain import ChainDrafter, ChainRow, Readout


class PairRow(ChainRow):
    """What a ``PairDrafter`` keeps of one row.

    cache: keys and values of the pairs that were run.
    states: the model's states of tokens whose pairs have not run yet, in parts [n, D'].
    last: output of the drafter's layers for the pair of the root, [1, 1, D'].
    """

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        self.cache, self.states, self.last = cache, list[Tensor](), torch.empty(0)


class PairDrafter(ChainDrafter):
    """Base class of drafters with layers of their own, which run pairs of a token and the model's state before it.

    shift: position of a pair's token in the text minus the position that the drafter's layers see.
    layers: the model's layers whose input states, concatenated, are a pair's state; N: the final state.
    tokens: the draft vocabulary, int64 [V']; None: all tokens.
    cost_key: distinguishes drafters of the same name that need different times to draft.
    target: the model.
    """

    shift: ClassVar[int]
    layers: tuple[int, ...]
    tokens: Tensor | None = None
    cost_key: str
    target: Target

    @abstractmethod
    def new_cache(self) -> KVCache:
        """Return an empty cache of one row."""

    @abstractmethod
    def run(self, tokens: Tensor, states: Tensor, positions: Tensor, mask: Mask, cache: KVCache) -> Tensor:
        """Run T pairs of each row after the pairs in ``cache``; return the layers' output, [B, T, D'].

        tokens, positions: the pairs' tokens and positions, int64 [B, T] each. states: the pairs' states, [B, T, D'].
        mask: which entries of ``cache`` each pair sees.
        """

    @abstractmethod
    def inputs(self, states: Tensor) -> Tensor:
        """Return the argument ``states`` of ``run``, from the model's states in ``layers``, [B, T, n D]."""

    def fed(self, outputs: Tensor) -> Tensor:
        """Return the argument ``states`` of ``run`` for drafted tokens, by default its own outputs [B, T, D']."""
        return outputs

    @abstractmethod
    def logits(self, outputs: Tensor) -> Tensor:
        """Return draft logits [B, T, V'] from outputs of ``run``, [B, T, D']."""

    def bind(self, target: Target) -> None:
        self.target = target
        self.traits = Traits(
            (self.name,),
            taps=tuple(sorted(set(self.layers))),
            whole_prompts=True,
            has_probabilities=not is_asynchronous(target.device),
            cost_key=self.cost_key,
        )

    def begin(self) -> PairRow:
        return PairRow(self.new_cache())

    def observe(self, row_states: list[Any], paths: list[list[int]], taps: dict[int, Tensor]) -> None:
        states = torch.cat([taps[layer] for layer in self.layers], -1)
        for b, (row, path) in enumerate(zip(row_states, paths, strict=True)):
            if path:
                row.states.append(states[b, upload(path, states.device)])

    def propose(self, state: State, limit: int) -> Draft:
        cache = self.catch_up(state)
        step = functools.cache(lambda: self.levels(state, cache))  # not made if no token is drafted

        def read(token: Tensor, _: Tensor) -> Readout:
            return Readout(step()(token, torch.zeros_like(token), None)[:, 0])

        return self.chain(state, limit, read, self.tokens)

    def levels(self, state: State, cache: KVCache) -> Step:
        """Return the function that computes the draft logits of one level after the other, as ``grow`` calls it.

        cache: the KV cache of all rows, as ``catch_up`` returns it.
        """
        outputs, level = torch.cat([row.last for row in state.row_states]), 0  # (B, 1, D')
        roots, last = state.positions, state.target.context - 1

        def step(tokens: Tensor, parents: Tensor, paths: Tensor | None) -> Tensor:
            nonlocal outputs, level
            if level:
                positions = ((roots + level).clamp_max(last) - self.shift).expand_as(tokens)  # other rows may go deeper
                mask = cache.register(0, positions, None if paths is None else paths[..., 1:])
                states = self.fed(states_of(outputs, parents))
                outputs = self.run(tokens, states, positions, mask, cache)
            level += 1
            return self.logits(outputs)

        return step

    def catch_up(self, state: State) -> KVCache:
        """Run the pairs of all rows' new tokens, up to the roots; return the cache of all rows."""
        rows: list[PairRow] = state.row_states
        cache = rows[0].cache.of([entries for row in rows for entries in row.cache.entries])
        like = next((row.states[0][:0] for row in rows if row.states), None)
        if like is None:
            return cache
        new = [torch.cat([like, *row.states]) for row in rows]  # (n, ...) each
        for states, counts, tokens, positions in _chunks(state, new, self.shift):
            mask = cache.register(0, positions)
            out = self.run(tokens, self.inputs(states), positions, mask, cache)  # (B, T, D')
            cache.commit([range(count) for count in counts])
            for b, (row, count) in enumerate(zip(rows, counts, strict=True)):
                if count:
                    row.last = out[b : b + 1, count - 1 : count].clone()
        for row in rows:
            row.states = []
        return cache


def _chunks(state: State, states: Sequence[Tensor], shift: int) -> Iterator[tuple[Tensor, list[int], Tensor, Tensor]]:
    """Yield the pairs of each row up to its root in chunks of at most ``PASS_TOKENS`` pairs.

    A chunk is a tuple: states [B, T, D], number of pairs of each row, token ids and positions, int64 [B, T] each.

    states: for each row, the states [n, D] before the last n tokens of its text.
    shift: position of a pair's token in the text minus the position that the drafter's layers see.
    """
    device, last = state.cache.device, state.target.context - 1
    for start in range(0, max(map(len, states)), PASS_TOKENS):
        parts = [each[start : start + PASS_TOKENS] for each in states]
        counts = list(map(len, parts))
        first = [len(ids) - len(each) + start for ids, each in zip(state.ids, states, strict=True)]
        texts = [ids[at : at + n] for ids, at, n in zip(state.ids, first, counts, strict=True)]
        tokens = upload([[*text, *[0] * (max(counts) - len(text))] for text in texts], device)
        positions = upload([[min(at - shift + i, last) for i in range(max(counts))] for at in first], device)
        yield pad_sequence(parts, batch_first=True), counts, tokens, positions
