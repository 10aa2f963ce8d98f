"""The fused runtime by CUDA graphs: on a GPU, launching a step's small kernels takes longer than running them.

A pass is captured once for each number of rows, range of layers and capacity of the cache, and then replayed. Its
inputs (states, rotary factors, masks and the cache slots to write) are copied into its own buffers. Attention runs over
the whole capacity, with slots masked that are not filled. When the cache grows, passes are captured again. Long blocks
(prompts) run as in the fused runtime. Knows nothing about drafting.
"""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.base.errors import SpecDecError
from specdec.kvcache.cache import KVCache
from specdec.models.native_model import NativeModel, as_transformers
from specdec.runtimes.fused import FusedTarget
from specdec.runtimes.target import Pass

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 64  # passes over more tokens are not captured
STEPS = 64  # maximum number of captured passes; the least recently used ones are dropped
HEADS = 64  # drafters' heads with sizes in the same multiple of so many outputs share captured passes


Recorder = Callable[[Callable[[], None]], Callable[[], None]]  # a function -> its replay, on the same memory


def record_cuda(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record ``run`` on a CUDA device. It must neither read its results nor depend on the host."""
    with torch.cuda.device(device):  # streams belong to the current device
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()  # libraries allocate memory at first use, which cannot be recorded
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may use the device meanwhile
            run()
    return graph.replay


class _Step:
    """A recorded function of tensors of fixed shapes."""

    def __init__(self, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], record: Recorder) -> None:
        self.inputs = [x.clone() for x in inputs]
        self.outputs = [torch.empty_like(y) for y in function(*self.inputs)]

        def run() -> None:
            for out, y in zip(self.outputs, function(*self.inputs), strict=True):
                out.copy_(y)

        self.replay = record(run)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        for buffer, x in zip(self.inputs, inputs, strict=True):
            buffer.copy_(x)
        self.replay()
        return [out.clone() for out in self.outputs]  # the next replay writes over them


class _HeadSlot:
    """A head of ``size`` outputs that takes the values of others, so that they share its recorded passes.

    Drafters make new heads as their vocabulary follows the context.

    loaded: the last head, and the version of its values.
    """

    def __init__(self, like: nn.Linear, size: int) -> None:
        options = {"bias": like.bias is not None, "device": like.weight.device, "dtype": like.weight.dtype}
        self.head = nn.utils.skip_init(nn.Linear, like.in_features, size, **options).requires_grad_(False)
        self.loaded: tuple[weakref.ref[nn.Linear] | None, object] = None, None

    def load(self, head: nn.Linear) -> None:
        """Copy the values of ``head``, unless they are there. Further outputs have no meaning."""
        version = tuple(0 if p.is_inference() else p._version for p in head.parameters())
        source, loaded = self.loaded
        if source is None or source() is not head or loaded != version:
            for own, values in zip(self.head.parameters(), head.parameters(), strict=True):
                own[: len(values)] = values.detach()
            self.loaded = weakref.ref(head), version


class GraphedTarget(FusedTarget):
    """The fused runtime by recorded passes. Raises SpecDecError as ``FusedTarget``, and without a GPU.

    There is one cache buffer per batch size, so that passes stay recorded from one generation to the next. While a
    cache has it, passes with other caches are not recorded. Recorded passes share their buffers, so threads take turns
    under the model's lock.

    record: the recorder; None: CUDA graphs.
    """

    runtime = "graphs"

    def __init__(self, model: NativeModel | PreTrainedModel, record: Recorder | None = None) -> None:
        model = as_transformers(model)
        if record is None and model.device.type != "cuda":
            raise SpecDecError(f"CUDA graphs need the model on a CUDA device, not on '{model.device}'")
        self.record = record or functools.partial(record_cuda, device=model.device)
        self._steps: OrderedDict[Any, _Step] = OrderedDict()
        # By batch size: the last cache with the buffer, and the buffer.
        self._buffers: dict[int, tuple[weakref.ref[KVCache], Tensor]] = {}
        self._head_slots: dict[tuple[int, bool], _HeadSlot] = {}  # by size, and whether there is a bias
        super().__init__(model)

    def new_cache(self, batch: int = 1) -> KVCache:
        with self.lock:
            user, whole = self._buffers.get(batch, (None, None))
            if not batch or (user is not None and user() is not None):
                return super().new_cache(batch)
            if whole is None:
                shape = (2, self.num_layers, batch, self.kv_heads, 256, self.head_dim)
                whole = torch.zeros(shape, dtype=self.dtype, device=self.device)
            else:
                with torch.inference_mode():  # one that has grown was made in it
                    whole.zero_()  # a mask does not hide NaN
            cache = KVCache(self.num_layers, batch, self.device, buffer=whole)
            self._buffers[batch] = weakref.ref(cache), whole
            return cache

    def layers(self, x: Tensor, lo: int, hi: int, ctx: Pass) -> Tensor:
        batch, t, _ = x.shape
        user, _ = self._buffers.get(batch, (None, None))
        lent = user is not None and user() is ctx.cache
        if lo >= hi or batch * t > ROWS or not lent or not torch.is_inference_mode_enabled():
            return super().layers(x, lo, hi, ctx)
        with self.lock:
            return self._recorded(x, lo, hi, ctx)

    def _recorded(self, x: Tensor, lo: int, hi: int, ctx: Pass) -> Tensor:
        """``layers`` for the cache that has the buffer."""
        (batch, t, _), mask, cache = x.shape, ctx.mask, ctx.cache
        taps = {} if ctx.taps is None else ctx.taps
        user, whole = self._buffers[batch]
        start = cache.claim(lo, hi, t, self.kv_heads, self.head_dim, self.dtype)
        assert cache.buffer is not None
        if cache.buffer is not whole:  # it has grown
            whole = cache.buffer
            self._buffers[batch] = user, whole
            self._steps = OrderedDict((key, step) for key, step in self._steps.items() if key[0] != batch)
        keys, values = whole[:, :, :batch]  # (N, B, Hkv, capacity, d); there may be unused rows
        stack = self._select_layers(x, lo, hi, ctx, grad=False)[lo:hi]
        windows = sorted(set(self.windows[lo:hi]), key=str)
        tapped = sorted(layer for layer in taps if lo <= layer <= hi)

        def function(x: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, *terms: Tensor) -> list[Tensor]:
            masks = dict(zip(windows, terms, strict=True))

            def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                k, v = keys[index].index_copy_(2, slots, k), values[index].index_copy_(2, slots, v)
                return F.scaled_dot_product_attention(q, k, v, masks[self.windows[index]], scale=self.scale)

            seen = {layer: x for layer in tapped}
            y = self._run(x, lo, hi, [*self._stacks["dense"][:lo], *stack], (cos, sin), attend, seen)
            return [y, *(seen[layer] for layer in tapped)]

        rotary = self._rotary(ctx.positions, mask, mask.keys.shape[1])  # no position is beyond its slot
        shape = batch, 1, t * self.groups, whole.shape[4]
        terms = []
        for window in windows:
            term = self._additive(mask, window, shape[3])
            terms.append(x.new_zeros(shape) if term is None else term)  # None: every slot is filled
        slots = torch.arange(start, start + t, device=self.device)
        # The maps identify their adapters, too: changed adapters make new ones. As keys, they live as long as the
        # recorded pass.
        key = batch, t, lo, hi, tuple(tapped), tuple(m for layer in stack for m in layer)
        y, *seen = self._step(key, function, [x, slots, *rotary, *terms])
        taps.update(zip(tapped, seen, strict=True))
        return y

    def readout(self, x: Tensor, head: nn.Linear | None = None) -> Tensor:
        batch, t, _ = x.shape
        if batch * t > ROWS or not torch.is_inference_mode_enabled():
            return super().readout(x, head)
        readout = super().readout
        with self.lock:
            if head is None:
                return self._step((None, batch, t), lambda x: [readout(x)], [x])[0]
            size = -(-head.out_features // HEADS) * HEADS, head.bias is not None
            slot = self._head_slots.get(size)
            if slot is None:
                slot = self._head_slots[size] = _HeadSlot(head, size[0])
            slot.load(head)
            read = slot.head

            def function(x: Tensor) -> list[Tensor]:
                return [read(self.final_norm(x.reshape(batch * t, -1))).view(batch, t, -1)]

            return self._step((None, batch, t, size), function, [x])[0][..., : head.out_features]

    def _step(self, key: Any, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = _Step(function, inputs, self.record)
        self._steps.move_to_end(key)
        if len(self._steps) > STEPS:
            self._steps.popitem(last=False)
        return step(inputs)
