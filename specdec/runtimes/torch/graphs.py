"""The PyTorch runtime by captured passes and drafts (``capture``).

Numbers of rows and of tokens are rounded up to buckets, and a pass is captured once for each pair of them, and for a
range of layers. Masks and rotary factors are made inside it. Attention runs over all slots of the static cache, with
those masked that are not filled. When the cache grows, passes are captured again. Long blocks (prompts),
drafters' heads, and a draft's tokens in recurrent layers run as they are.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.base.devices import download, upload
from specdec.base.errors import SpecDecError
from specdec.kvcache.cache import KVCache
from specdec.kvcache.mask import RowMask
from specdec.kvcache.recurrent import LayerStates
from specdec.models.native_model import NativeModel
from specdec.runtimes.draft_path import (
    DeviceTree,
    DraftPath,
    DraftRoots,
    LevelNodes,
    Nodes,
    TreeLimits,
)
from specdec.runtimes.target import GrowingLinear, Pass, largest
from specdec.runtimes.torch.attention import Attention
from specdec.runtimes.torch.capture import Captured, CudaRecorder, Function, Record, flattened
from specdec.runtimes.torch.delta_rule import DeltaRule
from specdec.runtimes.torch.draft import PathStep, choose, grow, limits_of, rules_of
from specdec.runtimes.torch.linear import dense
from specdec.runtimes.torch.model import Layer, Store, context
from specdec.runtimes.torch.static_cache import SPARE, StaticCache, bucket
from specdec.runtimes.torch.target import TorchTarget, explain_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 64  # passes over more tokens are not captured
CAPTURES = 64  # that are kept; the least recently used ones are dropped
CACHED = "layers", "draft"  # what is captured over the static cache


class CapturedTarget(TorchTarget):
    """The PyTorch runtime on a CUDA device, where passes are captured as CUDA graphs.

    Captured passes share their buffers, so threads take turns under the model's lock. Raises SpecDecError as
    ``TorchTarget`` does, and without a GPU.

    record: captures a function; None: a ``CudaRecorder``.
    """

    def __init__(self, model: NativeModel | PreTrainedModel, record: Record | None = None) -> None:
        if record is None and model.device.type != "cuda":
            raise SpecDecError(f"CUDA graphs need the model on a CUDA device, not on '{model.device}'")
        self.record = record or CudaRecorder(model.device)
        self.captured: OrderedDict[Any, Captured] = OrderedDict()
        self._chains = dict[tuple[int, int], Tensor]()
        super().__init__(model)

    @functools.cached_property
    def static(self) -> StaticCache:
        """The keys, values and states of captured passes."""
        mixers = [layer.mixer for layer in self.network.layers]
        attention = [each for each in (mixers[n] for n in self._attention_layers()) if isinstance(each, Attention)]
        recurrent = [mixer for mixer in mixers if isinstance(mixer, DeltaRule)]
        shape = len(attention), max(each.kv_heads for each in attention), max(each.size for each in attention)
        kinds = recurrent[0].kinds if recurrent else {}
        how = self.dtype, self.device, self.lock, self._forget
        return StaticCache(shape, *how, len(recurrent), kinds, self.hidden_size)

    def _attention_layers(self) -> list[int]:
        """Return the numbers of the layers with keys and values of their own."""
        each = enumerate(self.network.layers)
        return [n for n, layer in each if isinstance(layer.mixer, Attention) and layer.source == n]

    def _forget(self) -> None:
        """Delete all captured functions, because the static cache has got new memory."""
        self.captured = OrderedDict((key, each) for key, each in self.captured.items() if key[0] not in CACHED)

    @property
    def spare_bytes(self) -> int:
        return self.static.spare_bytes

    def new_cache(self, batch: int = 1) -> KVCache:
        recurrent = sorted(self.recurrent_layers)
        layers, least = [self._attention_layers()], self.static.shape[1:]
        return KVCache(self.num_layers, batch, self.device, layers=layers, recurrent=recurrent, least=least)

    def capture(self, key: Any, make: Callable[[], tuple[Function, Sequence[Tensor]]]) -> Captured:
        """Return the captured function of ``key``; at the first call, capture the function and inputs of ``make()``."""
        if key not in self.captured:
            self.captured[key] = Captured(*make(), self.record)
        self.captured.move_to_end(key)
        if len(self.captured) > CAPTURES:
            self.captured.popitem(last=False)
        return self.captured[key]

    # -- passes -------------------------------------------------------------------------------------------------------

    @explain_memory
    def layers(self, x: Tensor, lo: int, hi: int, ctx: Pass) -> Tensor:
        (batch, t, _), mask, cache = x.shape, ctx.mask, ctx.cache
        ahead = cache.lengths[lo] - cache.committed if lo < hi else 0
        short = lo < hi and batch * t <= TOKENS and ahead + bucket(t) <= SPARE
        plain = ctx.routed is None and ctx.choose is None and torch.is_inference_mode_enabled()
        if self.recurs(lo, hi):  # a draft's later tokens, and changed layers, run as they are
            pending = max(max(states.pending, default=0) for states in cache.states)
            plain = plain and not ahead and ctx.adapters is None and pending <= TOKENS
        without = self.without_keys(cache, lo, hi, ahead + t)
        plain = plain and all(cache.lengths[layer] == cache.committed for layer in without)
        if not short or not plain or not isinstance(mask, RowMask):
            return super().layers(x, lo, hi, ctx)
        with self.lock:
            return self._run(x, lo, hi, ctx, mask, ahead)

    def without_keys(self, cache: KVCache, lo: int, hi: int, drafted: int) -> frozenset[int]:
        """Return the layers before ``lo`` whose keys layers [lo, hi) read, and that lack those of uncommitted tokens.

        drafted: number of uncommitted tokens, those of the pass included.
        """
        sources = {layer.source for layer in self.network.layers[lo:hi]}
        return frozenset(n for n in sources if n < lo and cache.lengths[n] < cache.committed + drafted)

    def recurs(self, lo: int, hi: int) -> bool:
        """Return whether a layer of [lo, hi) is recurrent."""
        return any(lo <= layer < hi for layer in self.recurrent_layers)

    def _run(self, x: Tensor, lo: int, hi: int, ctx: Pass, mask: RowMask, ahead: int) -> Tensor:
        (batch, t, width), cache, taps, static = x.shape, ctx.cache, {} if ctx.taps is None else ctx.taps, self.static
        places = static.place(cache.entries, cache.committed + ahead + t)
        cache.claim(lo, hi, [t] * batch, [static.shape[1:]], self.dtype)
        memo: dict[Any, Any] = mask.memo  # the ranges of layers of a step share a mask
        states = [row for row in cache.states if isinstance(row, LayerStates)]
        pending = [list(row.pending) for row in states]
        key = "captured", static.slots, ahead, *places, *map(tuple, pending)
        if key not in memo:
            drafted = mask.drafted if isinstance(mask.drafted, Tensor) else torch.stack([*mask.drafted])
            memo[key] = *self._numbers(cache.rows, places, ahead, pending), drafted, self._tree(mask, t, ahead)
        numbers, lanes, positions, tree = memo[key]
        count, size, tapped = bucket(max(places) + 1), bucket(t), sorted(n for n in taps if lo <= n <= hi)
        without = self.without_keys(cache, lo, hi, ahead + t)
        ids = [ctx.known_ids()] if self.network.embeds else []
        layers = self.select_layers(lo, hi, ctx.adapters)
        recurrent = [cache.recurrent.index(layer) for layer in range(lo, hi) if layer in self.recurrent_layers]
        most = max((own[layer] for own in pending for layer in recurrent), default=0)
        before = bucket(most) if most else 0
        for row in states:
            row.ran(recurrent)

        def make() -> tuple[Function, Sequence[Tensor]]:
            stored = self.store(count)

            def function(numbers: Tensor, x: Tensor, positions: Tensor, tree: Tensor, *ids: Tensor) -> Sequence[Tensor]:
                seen, store = dict.fromkeys(tapped, x), stored(numbers, size, positions, tree, before, without)
                y = self.network.run(x, lo, layers, context(seen, *ids), store)
                return [y, *(seen[layer] for layer in tapped)]

            nobody, _ = self._numbers([], [], 0, count=count)
            tree = nobody.new_zeros(count, size, SPARE, dtype=torch.bool)
            own = [nobody.new_zeros(count, size) for _ in ids]
            return function, [nobody, x.new_zeros(count, size, width), nobody.new_zeros(count, SPARE), tree, *own]

        # Layers live as long as what is captured of them
        held = self.capture(("layers", count, size, before, lo, hi, without, *tapped, *layers), make)
        outputs = held([numbers], [x, positions, tree, *ids], lanes)
        y, *seen = (out[:batch, :t].clone() if lanes is None else out[lanes, :t] for out in outputs)
        taps.update(zip(tapped, seen, strict=True))
        return y

    def _numbers(
        self,
        committed: Sequence[int],
        places: Sequence[int],
        ahead: int,
        pending: Sequence[Sequence[int]] = (),
        count: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the argument ``numbers`` of ``store``, and the lane of each row, int64 [B].

        The second value is None if rows 0, 1, .. are in lanes 0, 1, ..
        committed: number of committed tokens of each row. places: the lane of each row.
        ahead: number of uncommitted slots before the tokens of the pass.
        pending: for each row, the number of pending tokens in each recurrent layer; (): there are none.
        count: number of lanes, L; None: as many as the rows need.
        """
        count = bucket(max(places) + 1) if count is None else count
        filled, starts = [0] * count, [self.static.slots - SPARE] * count  # of a lane without a row
        waiting = [[0] * count for _ in range(self.static.recurrent)]
        for row, (lane, n) in enumerate(zip(places, committed, strict=True)):
            filled[lane] = starts[lane] = n
            for layer, tokens in enumerate(pending[row] if pending else ()):
                waiting[layer][lane] = tokens
        in_order = [*places] == list(range(len(places)))
        whole = [*filled, *starts, ahead, *(tokens for own in waiting for tokens in own)]
        numbers = upload([*whole, *(() if in_order else places)], self.device)
        return numbers[: len(whole)], None if in_order else numbers[len(whole) :]

    def _tree(self, mask: RowMask, t: int, ahead: int) -> Tensor:
        """Return which uncommitted slots each token of a pass sees, bool [B, T, U], or with further slots.

        t: T. ahead: number of uncommitted slots before the tokens.
        """
        if not mask.chains:
            assert mask.ancestors is not None
            return upload(mask.ancestors, self.device, torch.bool).expand(len(mask.committed), -1, -1)
        if (t, ahead) not in self._chains:
            self._chains[t, ahead] = torch.ones(t, SPARE, dtype=torch.bool, device=self.device).tril(ahead)
        return self._chains[t, ahead].expand(len(mask.committed), -1, -1)

    def store(self, count: int) -> Callable[..., Store]:
        """Return a function that makes the ``Store`` of a captured pass over L = ``count`` lanes, inside the pass.

        The function's arguments are:
        numbers: for each lane the number of committed slots, then for each the index of the first uncommitted slot,
            then the number of uncommitted slots before the tokens, then for each of R recurrent layers and each lane
            the number of pending tokens: int64 [2 L + 1 + R L].
        t: T.
        places: positions of uncommitted slots, int64 [L, U], those of the tokens included.
        tree: which of the uncommitted slots a token sees, bool [L, T, U].
        before: maximum number of pending tokens.
        without: layers before those of the pass whose uncommitted tokens have no keys.
        """
        static, device, mixers = self.static, self.device, [layer.mixer for layer in self.network.layers]
        assert static.whole is not None
        (keys, values), slots, hidden = static.whole, static.slots, torch.finfo(self.dtype).min / 2
        every, block = torch.arange(slots, device=device), torch.arange(SPARE, device=device)
        rotary = {each: self.network.table(each, slots) for each in self.network.used}
        # The place of a layer among those of its kind that have states of their own
        owners = [n for n, layer in enumerate(self.network.layers) if layer.source == n]
        place_of = {n: sum(type(mixers[m]) is type(mixers[n]) for m in owners if m < n) for n in owners}

        def store(
            numbers: Tensor,
            t: int,
            places: Tensor,
            tree: Tensor,
            before: int = 0,
            without: Collection[int] = (),
        ) -> Store:
            committed, starts, ahead, pending = numbers.split((count, count, 1, static.recurrent * count))
            own = (ahead + block[:t]).expand(count, -1)  # (L, T), among uncommitted slots
            place = starts[:, None] + own
            positions, uncommitted = places.gather(1, own), starts[:, None] + block[: places.shape[1]]
            at = every.repeat(count, 1).scatter_(1, uncommitted, places)  # (L, slots), positions of keys
            visible = (every < committed[:, None])[:, None].repeat(1, t, 1)  # (L, T, slots)
            visible = visible.scatter_(2, uncommitted[:, None].expand(-1, t, -1), tree)
            terms = dict[tuple[int | None, int, bool], Tensor]()
            for layer in self.network.layers:
                mixer = layer.mixer
                for lacks in (False, True) if isinstance(mixer, Attention) else ():
                    assert isinstance(mixer, Attention)
                    key = layer.window, mixer.groups, lacks
                    if key in terms or (lacks and layer.source not in without):
                        continue
                    near = visible & (every < committed[:, None])[:, None] if lacks else visible
                    if layer.window is not None:
                        near = near & (positions[:, :, None] - at[:, None] < layer.window)
                    term = torch.zeros(near.shape, dtype=self.dtype, device=self.device).masked_fill_(~near, hidden)
                    terms[key] = term.repeat_interleave(mixer.groups, 1)[:, None]

            def attend(index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                layer = self.network.layers[index]
                mixer, own = layer.mixer, place_of[layer.source]
                assert isinstance(mixer, Attention)
                k_all, v_all = (each[own, :count, : mixer.kv_heads, :, : mixer.size] for each in (keys, values))
                if layer.source == index:
                    to = place[:, None, :, None].expand_as(k)
                    k_all, v_all = k_all.scatter_(2, to, k), v_all.scatter_(2, to, v)
                return k_all, v_all, terms[layer.window, mixer.groups, layer.source in without]

            def recur(index: int, layer: Layer, h: Tensor) -> Tensor:
                """Run pending tokens, which join the states, and those of the pass in one go."""
                assert isinstance(layer.mixer, DeltaRule)
                own, (_, t, _), chain = place_of[index], h.shape, block[:before, None] >= block[:before]
                states = {key: each[own, :count] for key, each in static.states.items()}
                inputs = static.inputs[own, :count]
                kept = block[:before] < pending.view(-1, count)[own, :, None]  # (L, P)
                first = F.pad(chain & kept[:, None], (0, t))  # (L, P, P + T)
                then = torch.cat((kept[:, None].expand(-1, t, -1), tree[:, :, :t]), 2)
                mapped = layer.map("qkv", torch.cat((inputs[:, :before], h), 1))
                out, after = layer.mixer(mapped, states, torch.cat((first, then), 1), F.pad(kept, (0, t)))
                for key, state in states.items():
                    state.copy_(after[key])
                there = (committed == starts)[:, None, None]  # other batches may have rows in the other lanes
                inputs[:, :t] = torch.where(there, h, inputs[:, :t])
                return layer.map("out", out[:, before:])

            tables = {each: table[positions].unbind(-1) for each, table in rotary.items()}
            return Store(tables, attend, recur)  # type: ignore[arg-type]

        return store

    # -- drafts -------------------------------------------------------------------------------------------------------

    @explain_memory
    def draft_rows(
        self, cache: KVCache, roots: DraftRoots, path: DraftPath, limits: TreeLimits
    ) -> list[Nodes] | DeviceTree:
        keep, growing = 1 if len(roots.tokens) > 1 else limits.width, path.heads[-1]
        fits = 1 + (limits.levels - 1) * keep <= SPARE and (
            not isinstance(growing, GrowingLinear) or growing.bias is None
        )
        fits = fits and not any(self.recurs(lo, hi) for lo, hi in path.segments)
        if not fits or roots.masks is not None or not torch.is_inference_mode_enabled():
            return super().draft_rows(cache, roots, path, limits)
        with self.lock:
            return self._draft(cache, roots, path, limits, keep)

    def _draft(
        self, cache: KVCache, roots: DraftRoots, path: DraftPath, limits: TreeLimits, keep: int
    ) -> list[Nodes] | DeviceTree:
        """Draft all levels, and let the device take nodes, as one captured function. keep: as in ``grow``."""
        choice = roots.choice
        places = self.static.place(cache.entries, cache.committed + 1 + (limits.levels - 1) * keep)
        numbers, lanes = self._numbers(cache.rows, places, 0)
        count, batch, growing = bucket(max(places) + 1), len(roots.tokens), path.heads[-1]
        heads = [head for head in path.heads if not isinstance(head, GrowingLinear)]
        readouts, weights = [self.head_map(head) for head in heads], list[Any](heads)
        rules = rules_of(roots, path.tokens, limits.levels, self.vocab_size, waits=False)
        if isinstance(growing, GrowingLinear):  # all of its memory is read, so that it may grow
            spare, forbidden = len(growing.memory.values) - growing.out_features, rules.forbidden
            if forbidden is None:
                forbidden = numbers.new_zeros(batch, growing.out_features, dtype=torch.bool)
            vocab = None if rules.vocab is None else F.pad(rules.vocab, (0, spare))
            rules = rules._replace(vocab=vocab, forbidden=F.pad(forbidden, (0, spare), value=True))
            readouts.append(dense(growing.memory.values))
            weights.append(growing.memory)
        layers = [self.select_layers(lo, hi, path.adapters) for lo, hi in path.segments]
        without = {layer.source for part in layers for layer in part}.difference(
            *(range(lo, hi) for lo, hi in path.segments)
        )
        bounds, prices = (None, None) if choice is None else limits_of(choice, count, self.device)
        tokens = upload([[token] for token in roots.tokens], self.device)
        states = tuple(x[:, roots.place : roots.place + 1] for x in (roots.final, *roots.carried))
        whole, sizes, rebuild = flattened((numbers, rules.vocab, prices))
        own, own_sizes, rebuild_own = flattened((tokens, states, rules._replace(vocab=None), bounds))

        def make() -> tuple[Function, Sequence[Tensor]]:
            stored = self.store(count)

            def function(*inputs: Tensor) -> Sequence[Tensor]:
                numbers, vocab, prices = rebuild(inputs[: len(whole)])
                tokens, (final, *carried), rules, bounds = rebuild_own(inputs[len(whole) :])
                seen, passes = list[Tensor](), list[Store]()

                def run(number: int, x: Tensor, level: int, paths: Tensor | None, ids: Tensor) -> Tensor:
                    if not number:  # all segments of a level see the same tokens
                        t, ahead = x.shape[1], sum(part.shape[1] for part in seen)
                        seen.append((numbers[:count, None] + level).expand(-1, t))
                        tree = (
                            paths
                            if paths is not None
                            else torch.ones(count, t, ahead + t, dtype=torch.bool, device=x.device)
                        )
                        at = torch.cat((numbers[: 2 * count], numbers[2 * count :] + ahead))  # no recurrent layer runs
                        passes[:] = [stored(at, t, torch.cat(seen, 1), tree, without=without)]
                    return self.network.run(x, path.segments[number][0], layers[number], context(ids=ids), passes[0])

                embed = lambda tokens, level: self.network.embed(tokens)  # noqa: E731
                read = [lambda x, head=head: self.network.readout(x, head) for head in readouts]
                step = PathStep(path, final, carried, embed, run, read, rules.forbidden)
                waits = rules.given is not None and choice is None
                grown = grow(
                    step, tokens, replace(limits, level=0.0, node=0.0), rules._replace(vocab=vocab), keep, waits
                )
                return [grown.packed()] if choice is None else choose(grown, choice.nodes, bounds, prices)[:4]

            nobody, _ = self._numbers([], [], 0, count=count)
            lane_inputs = [x.new_zeros(count, *x.shape[1:]) for x in own]
            return function, [nobody, *(x.clone() for x in whole[1:]), *lane_inputs]

        weights += [layer for part in layers for layer in part]
        key = "draft", path, *weights, count, limits.levels, limits.width, keep, choice and choice.nodes
        held = self.capture((*key, *sizes, *(size and size[1:] for size in own_sizes)), make)
        found = [out[:batch] if lanes is None else out[lanes] for out in held(whole, own, lanes)]
        if choice is not None:
            return DeviceTree(found[0], found[1], found[2], found[3], 1 if rules.given is None else 3)
        return [LevelNodes.unpacked(row, len(row) // 4) for row in found[0].tolist()]

    # -- readouts -----------------------------------------------------------------------------------------------------

    @explain_memory
    def readout(self, x: Tensor, head: nn.Linear | None = None) -> Tensor:
        if head is not None or not self._reads(x):
            return super().readout(x, head)
        with self.lock:
            return self._read("logits", x, super().readout).clone()

    @explain_memory
    def greedy_tokens(self, x: Tensor, *also: Tensor) -> list[list[list[int]]]:
        if not self._reads(x):
            return super().greedy_tokens(x, *also)
        readout = super().readout
        with self.lock:
            return download(*also, self._read("largest", x, lambda states: largest(readout(states))))

    def _reads(self, x: Tensor) -> bool:
        return x.shape[0] * x.shape[1] <= TOKENS and torch.is_inference_mode_enabled()

    def _read(self, name: str, x: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``read(x)`` of states [B, T, D], captured under ``name``; the next call overwrites the result."""
        count, size = x.shape[0] * x.shape[1], bucket(x.shape[0] * x.shape[1])
        held = self.capture((name, size), lambda: (lambda states: [read(states)], [x.new_zeros(size, 1, x.shape[2])]))
        [found] = held((), [x.flatten(0, 1)[:, None]])
        return found[:count].view(*x.shape[:2], *found.shape[2:])
