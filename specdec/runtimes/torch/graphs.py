"""The PyTorch runtime on CUDA, with CUDA graphs ("captured functions"). These are captured:

- a forward pass of at most ``TOKENS`` tokens through a range of layers, for each bucket of rows and of tokens
- a draft with all of its levels, and the selection of its nodes (``captured_draft.grow_captured``)
- the readout of at most ``TOKENS`` states with the model's own output head, as logits or as greedy tokens

Numbers of rows (sequences) and of tokens are rounded up to powers of two ("buckets"). A captured function reads and
writes keys, values and recurrent states in a static cache, one tensor at a fixed address in which each row has a lane.
It masks slots without keys, and makes masks and rotary factors itself. When the static cache is allocated anew, the
functions over it are captured again. All else runs without capture: long inputs such as prompts, and readouts with
other heads outside of drafts.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from specdec.base.devices import download, upload
from specdec.base.errors import SpecDecError
from specdec.kvcache.cache import KVCache
from specdec.kvcache.mask import RowMask
from specdec.kvcache.recurrent import LayerStates
from specdec.models.native_model import NativeModel
from specdec.runtimes.draft_path import DeviceTree, DraftPath, DraftRoots, Nodes, TreeLimits
from specdec.runtimes.target import Pass, largest
from specdec.runtimes.torch.attention import Attention
from specdec.runtimes.torch.capture import Captured, CudaRecorder, Function, Record, capturing, flattened
from specdec.runtimes.torch.captured_draft import grow_captured
from specdec.runtimes.torch.delta_rule import DeltaRule
from specdec.runtimes.torch.draft import PathStep, fixed_heads, rules_of
from specdec.runtimes.torch.static_cache import SPARE, TOKENS, InLanes, Lanes, LanesMask, StaticCache, bucket
from specdec.runtimes.torch.target import TorchTarget, explain_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CAPTURES = 64  # that are kept; the least recently used ones are dropped


class CapturedTarget(TorchTarget):
    """The target model in the PyTorch runtime on a CUDA device, with short passes and drafts captured as CUDA graphs.

    A captured function is a sequence of kernels that is recorded once, and replayed on new values in fixed tensors.

    Captured functions share their input and output buffers, so threads take turns under the model's lock. Raises
    SpecDecError if the model is not on a CUDA device, if its family is unknown, and if its logits differ from those of
    the model's own forward pass.

    record: records a function without arguments and returns its replay; None: CUDA graphs are recorded.
    captured_functions: the captured functions by key, the most recently used last. The first part of a key is the
        static cache that the function uses, or None.
    """

    def __init__(self, model: NativeModel | PreTrainedModel, record: Record | None = None) -> None:
        if record is None and model.device.type != "cuda":
            raise SpecDecError(f"CUDA graphs need the model on a CUDA device, not on '{model.device}'")
        self.record = record or CudaRecorder(model.device)
        self.captured_functions: OrderedDict[Any, Captured] = OrderedDict()
        self._chains = dict[tuple[int, int], Tensor]()
        super().__init__(model)

    @functools.cached_property
    def static(self) -> StaticCache:
        """The cache at fixed addresses that holds keys, values and recurrent states of captured passes (CUDA graphs).

        It is made at first use, and has memory only after rows are placed in it.
        """
        mixers = [layer.mixer for layer in self.network.layers]
        recurrent = [mixer for mixer in mixers if isinstance(mixer, DeltaRule)]
        kinds = recurrent[0].kinds if recurrent else {}
        assert self.keys is not None
        return self.static_cache(self._attention_layers(), self.keys, sorted(self.recurrent_layers), kinds)

    def _attention_layers(self) -> list[int]:
        """Return the indices of the attention layers that store keys and values of their own, in ascending order."""
        each = enumerate(self.network.layers)
        return [n for n, layer in each if isinstance(layer.mixer, Attention) and layer.source == n]

    def static_cache(
        self, layers: Sequence[int], keys: tuple[int, int], recurrent: Sequence[int] = (), kinds: Any = None
    ) -> StaticCache:
        """Return an empty static cache: tensors at fixed addresses for keys, values and states of captured functions.

        layers: indices of the attention layers that store keys and values.
        keys: number of key heads of a layer, and size of a head; the largest ones if layers differ. Values have the
            same shape.
        recurrent: indices of the recurrent layers.
        kinds: (shape without the batch axis, dtype) of each state of a recurrent layer, by key such as ("conv", 0)
            (``DeltaRule.kinds``); None: there are no states.
        """
        how = self.dtype, self.device, self.lock, self._forget
        return StaticCache(layers, keys, *how, recurrent, kinds, self.hidden_size, self.num_layers)

    def _forget(self, static: StaticCache) -> None:
        """Delete all captured functions (CUDA graphs) that use ``static``, a static cache whose memory is replaced.

        The static cache calls it (``StaticCache.forget``). The functions are captured again at their next use.
        """
        kept = ((key, each) for key, each in self.captured_functions.items() if key[0] is not static)
        self.captured_functions = OrderedDict(kept)

    @property
    def spare_bytes(self) -> int:
        return self.static.spare_bytes

    def new_cache(self, batch: int = 1) -> KVCache:
        recurrent = sorted(self.recurrent_layers)
        layers, least = [self._attention_layers()], self.static.shape
        return KVCache(self.num_layers, batch, self.device, layers=layers, recurrent=recurrent, least=least)

    def _capture(self, key: Any, make: Callable[[], tuple[Function, Sequence[Tensor]]]) -> Captured:
        """Return the captured function (CUDA graph) of ``key``; capture it at the first call with this key.

        A key that was dropped is captured again.

        key: hashable; tells captured functions apart. At most ``CAPTURES`` functions are kept; the least recently used
            one is dropped.
        make: returns the function to capture and its input tensors, whose addresses stay fixed.
        """
        functions = self.captured_functions
        if key not in functions:
            functions[key] = Captured(*make(), self.record)
        functions.move_to_end(key)
        if len(functions) > CAPTURES:
            functions.popitem(last=False)
        return functions[key]

    @explain_memory
    def captured(
        self,
        key: Sequence[Any],
        function: Callable[[Any, Any], Sequence[Tensor]],
        whole: Any,
        rows: Any,
        lanes: InLanes | None = None,
    ) -> list[Tensor]:
        own, own_shapes, rebuild_own = flattened(rows)
        first, shapes, rebuild = flattened(whole if lanes is None else (lanes.numbers, whole))
        count = bucket(len(own[0])) if lanes is None else lanes.total

        def make() -> tuple[Function, Sequence[Tensor]]:
            def flat(*inputs: Tensor) -> Sequence[Tensor]:
                return function(rebuild(inputs[: len(first)]), rebuild_own(inputs[len(first) :]))

            held = [x.clone() for x in first]
            if lanes is not None:  # no row changes while the function is captured
                held[0] = lanes.static.lanes(count).numbers
            return flat, [*held, *(x.new_zeros(count, *x.shape[1:]) for x in own)]

        sizes = count, shapes, tuple(shape and shape[1:] for shape in own_shapes)
        with self.lock:
            outputs = self._capture((None if lanes is None else lanes.static, *key, *sizes), make)(
                first, own, None if lanes is None else lanes.rows
            )
            if lanes is None or lanes.rows is None:
                return [out[: len(own[0])] for out in outputs]
            return [out[lanes.rows] for out in outputs]

    # -- passes -------------------------------------------------------------------------------------------------------

    @explain_memory
    def layers(self, x: Tensor, lo: int, hi: int, ctx: Pass) -> Tensor:
        (batch, t, _), mask, cache = x.shape, ctx.mask, ctx.cache
        if capturing() or lo == hi or not isinstance(mask, RowMask):
            return super().layers(x, lo, hi, ctx)
        ahead = cache.lengths[lo] - cache.committed
        short = batch * t <= TOKENS and ahead + bucket(t) <= SPARE
        plain = ctx.routed is None and ctx.choose is None and torch.is_inference_mode_enabled()
        pending = max((max(states.pending) for states in cache.states), default=0)
        partly = any(cache.lengths[n] != cache.committed for n in self._without_keys(cache, lo, hi, ahead + t))
        if not short or not plain or partly or pending > TOKENS:
            return super().layers(x, lo, hi, ctx)
        with self.lock:
            return self._run(x, lo, hi, ctx, mask, ahead)

    def _sources(self, lo: int, hi: int) -> set[int]:
        """Return the layers before ``lo`` whose keys and values the layers [lo, hi) read in place of their own."""
        return {layer.source for layer in self.network.layers[lo:hi] if layer.source < lo}

    def _without_keys(self, cache: KVCache, lo: int, hi: int, drafted: int) -> frozenset[int]:
        """Return the layers before ``lo`` whose keys layers [lo, hi) read, and which have not run all drafted tokens.

        cache: the KV cache of the pass through layers [lo, hi).
        drafted: number of uncommitted tokens of a row after the pass, the tokens of the pass included.
        """
        return frozenset(n for n in self._sources(lo, hi) if cache.uncommitted(n) < drafted)

    def _run(self, x: Tensor, lo: int, hi: int, ctx: Pass, mask: RowMask, ahead: int) -> Tensor:
        (batch, t, width), cache, taps, static = x.shape, ctx.cache, {} if ctx.taps is None else ctx.taps, self.static
        places = static.place(cache.entries, max(*cache.lengths, cache.committed + ahead + t))
        without = self._without_keys(cache, lo, hi, ahead + t)
        complete = self._sources(lo, hi) - without
        cache.claim(lo, hi, [t] * batch, [static.shape], self.dtype)
        count, size, tapped = bucket(max(places) + 1), bucket(t), sorted(n for n in taps if lo <= n <= hi)
        memo: dict[Any, Any] = mask.memo  # the ranges of layers of a step share a mask
        pending, before, run = self._pending(cache, [(lo, hi)])
        held = bucket(ahead) if run and ahead else 0
        key = "captured", static.slots, ahead, *places, *map(tuple, pending)
        if key not in memo:
            drafted = mask.drafted if isinstance(mask.drafted, Tensor) else torch.stack([*mask.drafted])
            lanes = static.lanes(count, places, cache.rows, ahead, pending)
            memo[key] = lanes, drafted, self._tree(mask, t, ahead)
        lanes, positions, tree = memo[key]
        ids = [ctx.known_ids()] if self.network.embeds else []
        layers = self.select_layers(lo, hi, ctx.adapters)
        for row in cache.states:
            assert isinstance(row, LayerStates)
            row.ran(run)

        def function(numbers: Tensor, x: Tensor, positions: Tensor, tree: Tensor, *ids: Tensor) -> Sequence[Tensor]:
            own = Lanes(static, numbers, count, before, held, complete)
            query = positions.gather(1, (own.ahead + static.block[:size]).expand(count, -1))
            seen = dict.fromkeys(tapped, x)
            mask = LanesMask(own, query, positions, tree)
            ctx = Pass(query, mask, own, seen, ids=ids[0] if ids else None)  # type: ignore[arg-type]
            y = self.network.run(x, lo, layers, ctx)
            return [y, *(seen[layer] for layer in tapped)]

        def make() -> tuple[Function, Sequence[Tensor]]:
            nobody = static.lanes(count).numbers
            tree = nobody.new_zeros(count, size, SPARE, dtype=torch.bool)
            own = [nobody.new_zeros(count, size) for _ in ids]
            return function, [nobody, x.new_zeros(count, size, width), nobody.new_zeros(count, SPARE), tree, *own]

        # Layers live as long as what is captured of them
        sizes = count, size, before, held
        function_of = self._capture((static, "layers", *sizes, lo, hi, without, *tapped, *layers), make)
        outputs = function_of([lanes.numbers], [x, positions, tree, *ids], lanes.rows)
        y, *seen = (out[:batch, :t].clone() if lanes.rows is None else out[lanes.rows, :t] for out in outputs)
        taps.update(zip(tapped, seen, strict=True))
        return y

    def _pending(self, cache: KVCache, ranges: Sequence[tuple[int, int]]) -> tuple[list[list[int]], int, list[int]]:
        """Return (pending, most, run): what a CUDA graph must know about the recurrent layers that it runs.

        Pending tokens are accepted tokens that a recurrent layer's state does not include yet.

        pending: pending[b][r] is the number of pending tokens of row b in recurrent layer number r.
        most: the largest of these numbers in ``ranges``, rounded up to a power of two; 0: there are no pending tokens.
        run: which recurrent layers are in ``ranges``, as indices r among the recurrent layers.

        cache: the KV cache. ranges: ranges of layers [lo, hi) that the graph runs.
        """
        pending = [list(states.pending) for states in cache.states]
        run = [n for n, layer in enumerate(cache.recurrent) if any(lo <= layer < hi for lo, hi in ranges)]
        most = max((own[layer] for own in pending for layer in run), default=0)
        return pending, bucket(most) if most else 0, run

    def _tree(self, mask: RowMask, t: int, ahead: int) -> Tensor:
        """Return which uncommitted tokens each token of a pass may attend to, bool [B, T, U] on the target's device.

        Index u is the u-th uncommitted token of the row. The pass has the last T of them, so that token t is number
        ``ahead`` + t. U is ``ahead`` + T or, if no row has a tree, the constant ``SPARE`` (128): each token then
        attends to those up to itself, and entries after it are False. Results for chains are cached.

        mask: the mask of the pass over B rows. t: T, number of tokens per row in the pass.
        ahead: number of uncommitted tokens of a row before those of the pass.
        """
        if not mask.chains:
            assert mask.ancestors is not None
            return upload(mask.ancestors, self.device, torch.bool).expand(len(mask.committed), -1, -1)
        if (t, ahead) not in self._chains:
            self._chains[t, ahead] = torch.ones(t, SPARE, dtype=torch.bool, device=self.device).tril(ahead)
        return self._chains[t, ahead].expand(len(mask.committed), -1, -1)

    # -- drafts -------------------------------------------------------------------------------------------------------

    @explain_memory
    def draft_rows(
        self, cache: KVCache, roots: DraftRoots, path: DraftPath, limits: TreeLimits
    ) -> list[Nodes] | DeviceTree:
        keep = 1 if len(roots.tokens) > 1 else limits.width
        pending, before, run = self._pending(cache, path.segments)
        fits = 1 + (limits.levels - 1) * keep <= SPARE and before <= TOKENS
        heads = fixed_heads(path.heads, path.tokens, roots.forbidden, len(roots.tokens))
        if not fits or heads is None or roots.masks is not None or not torch.is_inference_mode_enabled():
            return super().draft_rows(cache, roots, path, limits)
        with self.lock:
            static = self.static
            places = static.place(cache.entries, max(cache.lengths) + 1 + (limits.levels - 1) * keep)
            lanes = static.lanes(bucket(max(places) + 1), places, cache.rows, 0, pending)
            rules = rules_of(roots, heads.tokens, limits.levels, self.vocab_size, waits=False)
            tokens = upload([[token] for token in roots.tokens], self.device)
            states = [x[:, roots.place : roots.place + 1] for x in (roots.final, *roots.carried)]

            def step(whole: Any, rows: Any) -> tuple[PathStep, Sequence[Tensor]]:
                (numbers, _), [(final, *carried), forbidden] = whole, rows
                own = Lanes(static, numbers, lanes.total, before)
                return self.path_step(own, path, heads.heads, own.committed, final, carried, forbidden), ()

            # Layers and heads live as long as what is captured of them
            layers = [layer for lo, hi in path.segments for layer in self.select_layers(lo, hi, path.adapters)]
            key = "draft", path, before, *heads.heads, *layers
            rows = states, heads.forbidden
            found, _ = grow_captured(self, key, step, tokens, limits, rules, roots.choice, keep, (), rows, lanes)
            for row in cache.states:
                assert isinstance(row, LayerStates)
                row.ran(run)
            return found

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
        return not capturing() and x.shape[0] * x.shape[1] <= TOKENS and torch.is_inference_mode_enabled()

    def _read(self, name: str, x: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``read(x)`` of final states ``x`` [B, T, D], captured. The next call overwrites the result.

        name: distinguishes the captured functions of different ``read``.
        read: takes states [n, 1, D] and returns a tensor [n, 1, ...], such as logits or greedy tokens, without reading
            values on the CPU. The result of ``_read`` is [B, T, ...].
        """
        count, size = x.shape[0] * x.shape[1], bucket(x.shape[0] * x.shape[1])
        inputs = [x.new_zeros(size, 1, x.shape[2])]
        function_of = self._capture((None, name, size), lambda: (lambda states: [read(states)], inputs))
        [found] = function_of((), [x.flatten(0, 1)[:, None]])
        return found[:count].view(*x.shape[:2], *found.shape[2:])
