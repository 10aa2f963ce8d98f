"""The PyTorch runtime by captured passes: on a GPU, launching a step's small kernels takes longer than running them.

Numbers of rows and of tokens are rounded up to buckets, and a pass is captured once for each pair of them, and for a
range of layers. Its inputs are copied into buffers; masks and rotary factors are made inside it. Attention runs over
all slots of the static cache, with those masked that are not filled. When the cache grows, passes are captured again.
Long blocks (prompts), drafters' heads, mixtures and recurrent layers run as they are. Knows nothing about drafting.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from specdec.base.devices import download, upload
from specdec.base.errors import SpecDecError
from specdec.kvcache.cache import KVCache
from specdec.kvcache.mask import Chunk, RowMask
from specdec.models.native_model import NativeModel
from specdec.runtimes.draft_path import DeviceChoice, DeviceTree, DraftPath, DraftRoots, Masks, Nodes, TreeLimits
from specdec.runtimes.target import Pass, largest
from specdec.runtimes.torch.attention import Attention
from specdec.runtimes.torch.captured_draft import CapturedDraft
from specdec.runtimes.torch.model import Attend, Layer, Tables, context
from specdec.runtimes.torch.static_cache import SPARE, StaticCache, bucket
from specdec.runtimes.torch.target import TorchTarget, explain_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 64  # passes over more tokens are not captured
CAPTURES = 64  # that are kept; the least recently used ones are dropped

CACHED = "layers", "draft"  # what is captured over the static cache

Function = Callable[..., Sequence[Tensor]]
Record = Callable[[Callable[[], None]], Callable[[], None]]  # a function -> its replay, on the same memory


class CudaRecorder:
    """Captures functions as CUDA graphs, which share one memory pool, and one stream on which functions warm up.

    A function must neither read its results nor depend on the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):  # streams belong to the current device
            self.pool, self.aside = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self.device):
            self.aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.aside):
                run()  # libraries allocate memory at first use, which cannot be captured
            torch.cuda.current_stream().wait_stream(self.aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # others use the device
                run()
        return graph.replay


class Captured:
    """A captured function of tensors at fixed addresses, which it keeps alive.

    function: the function, which takes no arguments and reads ``inputs``.
    inputs: the tensors that the caller fills before each call.
    record: captures the function, as ``CudaRecorder`` does.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor], record: Record) -> None:
        self.function, self.inputs = function, inputs
        self.outputs = [torch.empty_like(y) for y in function(*inputs)]

        def run() -> None:
            for out, y in zip(self.outputs, function(*inputs), strict=True):
                out.copy_(y)

        self.replay = record(run)

    def __call__(self) -> Sequence[Tensor]:
        """Run the function, and return its result tensors, which the next call overwrites."""
        self.replay()
        return self.outputs


@dataclass(eq=False)
class _Inputs:
    """The input tensors of captured passes over L lanes and T tokens. All but ``x`` are filled once for each mask.

    x: input states, [L, T, D].
    numbers: for each lane the number of committed slots, then for each the index of the first uncommitted slot, then
        the number of uncommitted slots before the T tokens: [2 L + 1].
    places: positions of uncommitted slots, [L, SPARE].
    tree: whether a token sees an uncommitted slot, bool [L, T, SPARE].
    order: the lane of each row, [B]; None: rows 0, 1, .. are in lanes 0, 1, ..
    """

    x: Tensor
    numbers: Tensor
    places: Tensor
    tree: Tensor
    order: Tensor | None = None
    filled: tuple[Any, ...] = ()


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
        self._inputs = dict[tuple[int, int], _Inputs]()
        self._chains = dict[tuple[int, int], Tensor]()
        super().__init__(model)

    @functools.cached_property
    def static(self) -> StaticCache | None:
        """The memory for keys and values of captured passes; None: no pass can be captured for this model."""
        mixers = [layer.mixer for layer in self.network.layers]
        routes = any(layer.experts is not None for layer in self.network.layers)
        first, chunked = mixers[0], any(isinstance(window, Chunk) for window in self.windows)
        if self.recurrent_layers or routes or chunked or not isinstance(first, Attention):
            return None
        shape = self.num_layers, first.kv_heads, first.size
        return StaticCache(shape, self.dtype, self.device, self.lock, self._forget)

    def _forget(self) -> None:
        """Delete all captured functions, because the static cache has got new memory."""
        self.captured = OrderedDict((key, each) for key, each in self.captured.items() if key[0] not in CACHED)

    @property
    def spare_bytes(self) -> int:
        return 0 if self.static is None else self.static.spare_bytes

    def new_cache(self, batch: int = 1) -> KVCache:
        if self.static is None:
            return super().new_cache(batch)
        return KVCache(self.num_layers, batch, self.device, layers=range(self.num_layers))

    @explain_memory
    def layers(self, x: Tensor, lo: int, hi: int, ctx: Pass) -> Tensor:
        (batch, t, _), mask, cache = x.shape, ctx.mask, ctx.cache
        short = lo < hi and batch * t <= TOKENS and cache.lengths[lo] - cache.committed + bucket(t) <= SPARE
        if self.static is None or not short or not isinstance(mask, RowMask) or not torch.is_inference_mode_enabled():
            return super().layers(x, lo, hi, ctx)
        with self.lock:
            return self._run(x, lo, hi, ctx, mask, self.static)

    def _run(self, x: Tensor, lo: int, hi: int, ctx: Pass, mask: RowMask, static: StaticCache) -> Tensor:
        (batch, t, _), cache, taps = x.shape, ctx.cache, {} if ctx.taps is None else ctx.taps
        ahead = cache.lengths[lo] - cache.committed
        lanes = static.place(cache.entries, cache.committed + ahead + t)
        cache.claim(lo, hi, [t] * batch, *static.shape[1:], self.dtype)
        size = bucket(max(lanes) + 1), bucket(t)
        inputs = self._fill(size, lanes, x, ahead, mask)
        rows = slice(batch) if inputs.order is None else inputs.order
        inputs.x[rows, :t] = x
        layers, tapped = self.select_layers(lo, hi, ctx.adapters), sorted(n for n in taps if lo <= n <= hi)
        key = "layers", *size, lo, hi, *tapped, *layers  # layers live as long as what is captured of them
        outputs = self.capture(key, lambda: (self._pass(inputs, lo, layers, tapped), ()))()
        y, *seen = (out[:batch, :t].clone() if inputs.order is None else out[rows, :t] for out in outputs)
        taps.update(zip(tapped, seen, strict=True))
        return y

    def _fill(self, size: tuple[int, int], lanes: list[int], x: Tensor, ahead: int, mask: RowMask) -> _Inputs:
        """Fill and return the inputs of a pass for rows in ``lanes``, except ``x``.

        size: numbers of lanes and of tokens. ahead: number of uncommitted slots before the tokens.
        """
        (count, t), (batch, own, width) = size, x.shape
        if size not in self._inputs:
            whole, ints = x.new_zeros(count, t, width), x.new_zeros(2 * count + 1, dtype=torch.long)
            places, tree = ints.new_zeros(count, SPARE), ints.new_zeros(count, t, SPARE, dtype=torch.bool)
            self._inputs[size] = _Inputs(whole, ints, places, tree)
        inputs = self._inputs[size]
        if (batch, own) != size:
            inputs.x.zero_()  # padding is finite: a mask does not hide NaN
        if inputs.filled and inputs.filled[0] is mask and inputs.filled[1:] == (lanes, ahead):
            return inputs
        assert self.static is not None and self.static.whole is not None
        committed, starts = [0] * count, [self.static.whole.shape[4] - SPARE] * count  # of a lane without a row
        for lane, n in zip(lanes, mask.committed, strict=True):
            committed[lane] = starts[lane] = n
        in_order = lanes == list(range(batch))
        ints = upload([*committed, *starts, ahead, *(() if in_order else lanes)], self.device)
        inputs.numbers.copy_(ints[: 2 * count + 1])
        inputs.order = None if in_order else ints[2 * count + 1 :]
        rows = slice(batch) if inputs.order is None else inputs.order
        places = mask.drafted if isinstance(mask.drafted, Tensor) else torch.stack([*mask.drafted])
        inputs.places[rows, : places.shape[1]] = places
        if mask.chains:
            inputs.tree.copy_(self._chain(t, ahead))
        else:
            inputs.tree.zero_()
            assert mask.ancestors is not None
            inputs.tree[rows, :own, : mask.ancestors.shape[-1]] = upload(mask.ancestors, self.device, torch.bool)
        inputs.filled = mask, lanes, ahead
        return inputs

    def _chain(self, t: int, ahead: int) -> Tensor:
        """Return which slots each of ``t`` tokens of a chain sees behind ``ahead`` uncommitted ones, [T, SPARE]."""
        if (t, ahead) not in self._chains:
            self._chains[t, ahead] = torch.ones(t, SPARE, dtype=torch.bool, device=self.device).tril(ahead)
        return self._chains[t, ahead]

    def _pass(
        self, inputs: _Inputs, lo: int, layers: Sequence[Layer], tapped: Sequence[int]
    ) -> Callable[[], list[Tensor]]:
        """Return a pass over ``layers``, the first of which is layer ``lo``, as a function without arguments.

        The function returns the states before the layers ``tapped``, then the output, [L, T, D] each.
        """
        count, t, _ = inputs.x.shape
        attention = self.attention(count)

        def function() -> list[Tensor]:
            committed, starts, ahead = inputs.numbers.split((count, count, 1))
            rotary, attend = attention(committed, starts, ahead, t, inputs.places, inputs.tree)
            seen = dict.fromkeys(tapped, inputs.x)
            y = self.network.run(inputs.x, lo, layers, context(seen), rotary, attend)
            return [y, *(seen[layer] for layer in tapped)]

        return function

    def attention(self, count: int) -> Callable[..., tuple[Tables, Attend]]:
        """Return a function that makes the rotary tables and the attention of a pass over ``count`` lanes.

        The function's arguments are:
        committed, starts: for each lane, number of committed slots and index of the first uncommitted one, int64 [L].
        ahead: number of uncommitted slots before the T tokens. t: T.
        places, tree: as in ``_Inputs``, for at least the slots up to the tokens.
        """
        assert self.static is not None and self.static.whole is not None
        mixer = self.network.layers[0].mixer
        assert isinstance(mixer, Attention)
        keys, values = whole = self.static.whole  # (N, lanes, H, slots, d)
        slots, groups, hidden = whole.shape[4], mixer.groups, torch.finfo(self.dtype).min / 2
        every, block = torch.arange(slots, device=self.device), torch.arange(SPARE, device=self.device)
        tables = {each: self.network.table(each, slots) for each in self.network.used}

        def attention(
            committed: Tensor, starts: Tensor, ahead: Tensor | int, t: int, places: Tensor, tree: Tensor
        ) -> tuple[Tables, Attend]:
            own = (ahead + block[:t]).expand(count, -1)  # (L, T), among uncommitted slots
            place = starts[:, None] + own
            positions, uncommitted = places.gather(1, own), starts[:, None] + block[: places.shape[1]]
            at = every.repeat(count, 1).scatter_(1, uncommitted, places)  # (L, slots), positions of keys
            visible = (every < committed[:, None])[:, None].repeat(1, t, 1)  # (L, T, slots)
            visible = visible.scatter_(2, uncommitted[:, None].expand(-1, t, -1), tree)
            terms = dict[int | None, Tensor]()
            for window in {*self.windows}:
                near = visible if window is None else visible & (positions[:, :, None] - at[:, None] < window)
                term = torch.zeros(near.shape, dtype=self.dtype, device=self.device).masked_fill_(~near, hidden)
                terms[window] = term.repeat_interleave(groups, 1)[:, None]

            def attend(index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                to = place[:, None, :, None].expand_as(k)
                k, v = (each[index, :count].scatter_(2, to, new) for each, new in ((keys, k), (values, v)))
                return k, v, terms[self.windows[index]]

            return {each: table[positions].unbind(-1) for each, table in tables.items()}, attend  # type: ignore[misc]

        return attention

    @explain_memory
    def draft_rows(
        self,
        cache: KVCache,
        roots: DraftRoots,
        path: DraftPath,
        limits: TreeLimits,
        masks: Masks | None = None,
        choice: DeviceChoice | None = None,
    ) -> list[Nodes] | DeviceTree:
        draft = CapturedDraft(self, roots, path, limits, choice)
        if self.static is None or masks is not None or not draft.fits or not torch.is_inference_mode_enabled():
            return super().draft_rows(cache, roots, path, limits, masks, choice)
        with self.lock:
            return draft.run(cache, self.static)

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
        held = self.capture((name, size), lambda: (lambda states: [read(states)], [x.new_zeros(1, size, x.shape[2])]))
        held.inputs[0][0, :count] = x.flatten(0, 1)
        [found] = held()
        return found[0, :count].view(*x.shape[:2], *found.shape[2:])

    def capture(self, key: Any, make: Callable[[], tuple[Function, Sequence[Tensor]]]) -> Captured:
        """Return the captured function of ``key``; at the first call, capture the function and inputs of ``make()``."""
        if key not in self.captured:
            self.captured[key] = Captured(*make(), self.record)
        self.captured.move_to_end(key)
        if len(self.captured) > CAPTURES:
            self.captured.popitem(last=False)
        return self.captured[key]
