"""Drafters that run pairs: a token, and a state of the token before it, through layers with a KV cache of their own.

A *pair* is a token of the text or the draft together with the state of the token before it. That state is made of the
model's states if the token before is in the text, and is the layers' own output if it is a drafted one. The layers'
output for a pair predicts the token after the pair's. The keys and values of drafted tokens' pairs leave the cache with
the next step, which runs the pairs of all new tokens of the text.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specdec.base.devices import is_asynchronous, upload
from specdec.kvcache.cache import KVCache
from specdec.kvcache.mask import Mask
from specdec.runtimes.draft_path import DeviceChoice, DeviceTree, TreeLimits
from specdec.runtimes.prefill import PASS_TOKENS
from specdec.runtimes.target import Target
from specdec.runtimes.torch.captured_draft import grow_captured
from specdec.runtimes.torch.draft import Rules, Step, given_of, noise_of, states_of
from specdec.runtimes.torch.static_cache import SPARE, TOKENS, Lanes, StaticCache, bucket
from specdec.speculation.candidates import Candidates
from specdec.speculation.device_draft import DeviceDraft, choice_of
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Traits
from specdec.speculation.state import State

from .chain import ChainDrafter, ChainRow, Readout


class Pairs(NamedTuple):
    """The root of each row, the last token of its text, after which levels are drafted. ``PairDrafter.pairs`` makes it.

    A *pair* is a token and the state of the token before it; those of the roots have run.

    tokens, positions: those of the roots, int64 [B, 1] each.
    last: output of the drafter's layers for the root's pair, [B, 1, D'], of their own size D' (``PairDrafter.inner``).
    sure: whether the model will choose its likeliest allowed token after each node, as in greedy decoding.
    """

    tokens: Tensor
    positions: Tensor
    last: Tensor
    sure: bool


class PairRow(ChainRow):
    """What a ``PairDrafter`` keeps of one row (sequence). A *pair* is a token and the state of the token before it.

    cache: the drafter's keys and values of the pairs that were run.
    states: the model's states of the tokens before those whose pairs have not run yet, the last tokens of the text. A
        list of parts in order, each [n, L D] for n tokens: the input states of the L ``PairDrafter.layers``,
        concatenated.
    count: the number of these tokens.
    last: output of the drafter's layers for the root's pair, [1, 1, D'], of their own size D' (``PairDrafter.inner``);
        empty before a pair has run.
    """

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        self.cache, self.states, self.count, self.last = cache, list[Tensor](), 0, torch.empty(0)

    def add(self, part: Tensor) -> None:
        """Append ``part``, [n, L D], to ``states``."""
        self.states.append(part)
        self.count += len(part)

    def clear(self) -> None:
        """Remove all ``states``, because their pairs have run."""
        self.states, self.count = [], 0


class PairDrafter(ChainDrafter):
    """Base class of drafters with layers of their own, which run pairs of a token and the model's state before it.

    A subclass defines ``name``, ``summary``, ``shift``, ``cost_key``, ``layers``, ``keys`` and ``inner``, the last
    three before it calls ``bind`` of this class, and ``tokens`` if it drafts only some tokens. It implements ``run``,
    ``inputs`` and ``logits``, and ``fed`` if ``run`` does not read its own outputs as they are.

    On a GPU with CUDA graphs a whole draft is one captured function: the pairs of new tokens, every level, and the
    selection of nodes. ``run`` then gets ``Lanes``, tensors at fixed addresses, in place of a ``KVCache``.

    shift: position of a pair's token in the text minus the position that the drafter's layers see.
    layers: the L layers of the model whose input states, concatenated, are the state of a pair (``inputs``); N: the
        final state.
    tokens: the draft vocabulary, int64 [V']; None: all tokens.
    cost_key: distinguishes drafters of the same name that need different times to draft.
    target: the model.
    keys: number of layers of ``run``, key heads of each, and the size of a head, if ``run`` takes ``Lanes`` in place of
        a ``KVCache``; None: it does not.
    inner: D', the size of the outputs of ``run``.
    static: the keys and values of all rows where drafts are captured; None: they are not.
    """

    shift: ClassVar[int]
    layers: tuple[int, ...]
    tokens: Tensor | None = None
    cost_key: str
    target: Target
    keys: tuple[int, int, int] | None
    inner: int
    static: StaticCache | None = None

    def new_cache(self) -> KVCache:
        """Return an empty cache of one row for the keys and values of the drafter's layers."""
        assert self.keys is not None
        return KVCache(self.keys[0], 1, self.target.device, layers=[range(self.keys[0])])

    @abstractmethod
    def run(self, tokens: Tensor, states: Tensor, positions: Tensor, mask: Mask, cache: KVCache | Lanes) -> Tensor:
        """Run T pairs of each of B rows through the drafter's layers; return the output of the last one, [B, T, D'].

        Keys and values of the pairs are appended to ``cache``, uncommitted.

        tokens: token ids of the pairs, int64 [B, T].
        states: the state of each pair, that of the token before, [B, T, D'], as ``inputs`` or ``fed`` returns it.
        positions: the positions that the layers see, int64 [B, T]: those of the tokens in the text minus ``shift``.
        mask: which pairs, earlier ones in ``cache`` and these, each pair attends to.
        cache: keys and values of each row's earlier pairs; ``Lanes`` inside a captured function.
        """

    @abstractmethod
    def inputs(self, states: Tensor) -> Tensor:
        """Return the argument ``states`` of ``run``, [B, T, D'], from the model's states in ``layers``, [B, T, L D]."""

    def fed(self, outputs: Tensor) -> Tensor:
        """Return the argument ``states`` of ``run``, [B, T, D'], for pairs whose token before is a drafted one.

        outputs: the outputs of ``run`` for the tokens before, [B, T, D']. By default they are returned unchanged.
        """
        return outputs

    @abstractmethod
    def logits(self, outputs: Tensor) -> Tensor:
        """Return draft logits [B, T, V'] from outputs of ``run``, [B, T, D']."""

    def bind(self, target: Target) -> None:
        self.target = target
        if self.keys is not None:
            self.static = target.static_cache(range(self.keys[0]), self.keys[1:])
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
                row.add(states[b, upload(path, states.device)])

    def keep_up(self, row_states: list[Any], texts: Sequence[Sequence[int]]) -> None:
        late = [b for b, row in enumerate(row_states) if row.count >= TOKENS]  # only these: others would be padded
        if late:
            self._run_new([row_states[b] for b in late], [texts[b] for b in late])

    def propose(self, state: State, limit: int) -> Draft:
        choice = choice_of(replace(state, prices=None), limit, self.nodes or limit, 1)
        tree = None if choice is None else self.draft_captured(state, limit, 1, choice)
        if tree is not None:
            return DeviceDraft(tree, state, limit, chain=True)
        cache = self.catch_up(state)
        step = functools.cache(lambda: self.levels(self.pairs(state), cache))  # not made if no token is drafted

        def read(token: Tensor, _: Tensor) -> Readout:
            return Readout(step()(token, torch.zeros_like(token), None)[:, 0])

        return self.chain(state, limit, read, self.tokens)

    def pairs(self, state: State) -> Pairs:
        """Return the roots of all rows, their positions and the outputs of their pairs, which ``catch_up`` has run."""
        last = torch.cat([row.last for row in state.row_states])
        return Pairs(state.roots, state.positions, last, state.sampler.best_allowed)

    def levels(self, pairs: Pairs, cache: KVCache | Lanes) -> Step:
        """Return a function that computes the draft logits of one level after the other.

        It is called as ``step(tokens, parents, paths)``: first with the roots, whose pairs have run already, and then
        with the W tokens of each level that get children, whose pairs it runs. tokens: int64 [B, W]; parents: their
        parents' indices in the level before, int64 [B, W]; paths: which of all U tokens so far are on the path to each,
        bool [B, W, U], or None for a chain. It returns logits [B, W, V'].

        pairs: the roots and the outputs for them.
        cache: the KV cache of all rows, as ``catch_up`` returns it.
        """
        outputs, level, most = pairs.last, 0, self.target.context - 1

        def step(tokens: Tensor, parents: Tensor, paths: Tensor | None) -> Tensor:
            nonlocal outputs, level
            if level:
                at = (pairs.positions + level).clamp_max(most) - self.shift  # other rows may go deeper
                positions = at.expand_as(tokens)
                mask = cache.register(0, positions, None if paths is None else paths[..., 1:])
                states = self.fed(states_of(outputs, parents))
                outputs = self.run(tokens, states, positions, mask, cache)
            level += 1
            return self.logits(outputs)

        return step

    def slots(self, levels: int, keep: int) -> int:
        """Return the number of uncommitted cache slots of a row that a draft needs.

        levels: number of levels that are drafted. keep: number of nodes of each level that get children.
        """
        return (levels - 1) * keep

    def draft_captured(
        self,
        state: State,
        levels: int,
        width: int,
        choice: DeviceChoice,
        given: Sequence[Candidates] | None = None,
    ) -> DeviceTree | None:
        """Run the pairs of new tokens, draft, and select nodes, all in one captured function (CUDA graph).

        Return the selected nodes, which are on the device; None: it cannot be captured here, and nothing was drafted.

        state: the rows, whose ``PairRow`` are brought up to date.
        levels: maximum number of levels (depths of the tree). width: number of children of a node.
        choice: the rule by which nodes are selected.
        given: the candidates of n-grams for each row, which the draft extends; None: there are none.
        """
        static, target, rows = self.static, self.target, state.row_states
        batch, keep = len(rows), width if len(rows) == 1 else 1
        if static is None or not torch.is_inference_mode_enabled() or self.slots(levels, keep) > SPARE:
            return None
        if batch * max(row.count for row in rows) > TOKENS:  # a prompt
            self.catch_up(state)
        counts = [row.count for row in rows]
        size, device = bucket(max(1, *counts)), target.device
        none = torch.zeros(0, len(self.layers) * target.hidden_size, dtype=target.dtype, device=device)
        parts = [row.states[0] if len(row.states) == 1 else torch.cat([none, *row.states]) for row in rows]
        states = torch.stack([F.pad(part, (0, 0, 0, size - len(part))) for part in parts])
        last = [row.last if len(row.last) else none.new_zeros(1, 1, self.inner) for row in rows]
        numbers = list[list[int]]()  # of each row: root, its position, position of the first pair, counts, tokens
        for ids, count, position in zip(state.ids, counts, state.cache.rows, strict=True):
            first = len(ids) - count
            numbers.append([ids[-1], position, first - self.shift, count, *ids[first:], *[0] * (size - count)])
        prices, sampled = state.prices, state.sampler.sampled(state.ids)
        tables = upload(prices.tables, device, torch.float32) if prices and prices.tables else None
        rules = Rules(self.tokens, tables, given=given_of(given, device))
        if sampled is not None:
            noise, sampling = noise_of(sampled, levels, target.vocab_size, device)
            rules = rules._replace(noise=noise, sampling=sampling)
        sure, most = state.sampler.best_allowed, target.context - 1
        with target.lock:
            cache = rows[0].cache.of([entries for row in rows for entries in row.cache.entries])
            places = static.place(cache.entries, cache.committed + size + self.slots(levels, keep))
            lanes = static.lanes(bucket(max(places) + 1), places, cache.rows)

            def step(whole: Any, rows: Any) -> tuple[Step, Sequence[Tensor]]:
                (numbers, _), (ints, states, last) = whole, rows
                own = Lanes(static, numbers, lanes.total)
                root, position, first, counts, tokens = ints.split((1, 1, 1, 1, size), 1)
                positions = (first + static.block[:size]).clamp(max=most)
                outputs = self.run(tokens, self.inputs(states), positions, own.register(0, positions), own)
                own.keep(counts[:, 0])
                end = outputs.gather(1, (counts - 1).clamp(min=0)[..., None].expand(-1, 1, outputs.shape[2]))
                last = torch.where(counts[..., None] > 0, end, last)
                return self.levels(Pairs(root, position, last, sure), own), [last]

            key, given_rows = ("pairs", self, sure), (upload(numbers, device), states, torch.cat(last))
            limits = TreeLimits(levels, width)
            roots = given_rows[0][:, :1]
            found, [last_ones] = grow_captured(
                target, key, step, roots, limits, rules, choice, keep, (), given_rows, lanes
            )
            cache.commit([range(count) for count in counts])
            for row, own in zip(rows, last_ones.clone().split(1), strict=True):
                row.last = own
                row.clear()
        assert isinstance(found, DeviceTree)
        return found

    def catch_up(self, state: State) -> KVCache:
        """Run the pairs of all rows' new tokens, up to the roots; return one cache over the rows' own caches.

        Sets ``last`` of each row's ``PairRow``, commits the keys and values of these pairs, and empties ``states``.
        """
        return self._run_new(state.row_states, state.ids)

    def _run_new(self, rows: Sequence[PairRow], texts: Sequence[Sequence[int]]) -> KVCache:
        """Run the pairs of new tokens of ``rows``; return one cache over the rows' own caches. See ``catch_up``.

        texts: for each row, the token ids of its text, up to the token of its last pair.
        """
        cache = rows[0].cache.of([entries for row in rows for entries in row.cache.entries])
        like = next((row.states[0][:0] for row in rows if row.states), None)
        if like is None:
            return cache
        new = [torch.cat([like, *row.states]) for row in rows]  # (n, ...) each
        for states, counts, tokens, positions in _chunks(self.target, texts, new, self.shift):
            mask = cache.register(0, positions)
            out = self.run(tokens, self.inputs(states), positions, mask, cache)  # (B, T, D')
            cache.commit([range(count) for count in counts])
            for b, (row, count) in enumerate(zip(rows, counts, strict=True)):
                if count:
                    row.last = out[b : b + 1, count - 1 : count].clone()
        for row in rows:
            row.clear()
        return cache


def _chunks(
    target: Target, texts: Sequence[Sequence[int]], states: Sequence[Tensor], shift: int
) -> Iterator[tuple[Tensor, list[int], Tensor, Tensor]]:
    """Yield the last pairs of each row's text in chunks of at most ``PASS_TOKENS`` pairs.

    A chunk is a tuple: states [B, T, L D], number of pairs of each row, token ids and positions, int64 [B, T] each.
    Rows with fewer pairs are padded.

    target: the model. texts: for each row, the token ids of its text.
    states: for each row, the states [n, L D] before the last n tokens of its text.
    shift: position of a pair's token in the text minus the position that the drafter's layers see.
    """
    device, last = target.device, target.context - 1
    for start in range(0, max(map(len, states)), PASS_TOKENS):
        parts = [each[start : start + PASS_TOKENS] for each in states]
        counts = list(map(len, parts))
        first = [len(ids) - len(each) + start for ids, each in zip(texts, states, strict=True)]
        pieces = [ids[at : at + n] for ids, at, n in zip(texts, first, counts, strict=True)]
        tokens = upload([[*piece, *[0] * (max(counts) - len(piece))] for piece in pieces], device)
        positions = upload([[min(at - shift + i, last) for i in range(max(counts))] for at in first], device)
        yield pad_sequence(parts, batch_first=True), counts, tokens, positions
