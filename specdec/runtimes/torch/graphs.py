"""The PyTorch runtime by CUDA graphs: on a GPU, launching a step's small kernels takes longer than running them.

A pass is captured once for each number of rows, range of layers and capacity of the cache, and then replayed. Its
inputs (states, rotary factors, masks and the cache slots to write) are copied into its own buffers. Attention runs over
the whole capacity, with slots masked that are not filled. When the cache grows, passes are captured again. Long blocks
(prompts), drafters' heads, mixtures and recurrent layers run as they are. Knows nothing about drafting.
"""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from specdec.base.devices import upload
from specdec.base.errors import SpecDecError
from specdec.kvcache.cache import WHOLE, KVCache, RowEntries
from specdec.models.native_model import NativeModel
from specdec.runtimes.target import Pass
from specdec.runtimes.torch.attention import Attention, additive
from specdec.runtimes.torch.target import TorchTarget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 64  # passes over more tokens are not captured
STEPS = 64  # maximum number of captured passes; the least recently used ones are dropped

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


class CapturedTarget(TorchTarget):
    """The PyTorch runtime by recorded passes. Raises SpecDecError as ``TorchTarget``, and without a GPU.

    For each number of rows there is one buffer, which is lent to the cache that runs, so that passes stay recorded from
    one generation to the next. Recorded passes share their buffers, so threads take turns under the model's lock.

    record: the recorder; None: CUDA graphs.
    """

    def __init__(self, model: NativeModel | PreTrainedModel, record: Recorder | None = None) -> None:
        if record is None and model.device.type != "cuda":
            raise SpecDecError(f"CUDA graphs need the model on a CUDA device, not on '{model.device}'")
        self.record = record or functools.partial(record_cuda, device=model.device)
        self._steps: OrderedDict[Any, _Step] = OrderedDict()
        # By number of rows: the buffer, its part for each row, and whose these are.
        self._lent: dict[int, tuple[Tensor, list[Tensor], list[weakref.ref[RowEntries]]]] = {}
        super().__init__(model)

    @functools.cached_property
    def captures(self) -> bool:
        """Whether nothing in the layers depends on the host."""
        return not self.recurrent_layers and all(layer.experts is None for layer in self.network.layers)

    def new_cache(self, batch: int = 1) -> KVCache:
        if not self.captures:
            return super().new_cache(batch)
        return KVCache(self.num_layers, batch, self.device, layers=range(self.num_layers))

    def layers(self, x: Tensor, lo: int, hi: int, ctx: Pass) -> Tensor:
        if lo >= hi or not self.captures or x.shape[0] * x.shape[1] > ROWS or not torch.is_inference_mode_enabled():
            return super().layers(x, lo, hi, ctx)
        with self.lock:
            return self._recorded(x, lo, hi, ctx)

    def _lend(self, rows: list[RowEntries]) -> Tensor:
        """The buffer [2, N, B, Hkv, capacity, d], with the entries of ``rows`` in it."""
        whole, parts, users = self._lent.get(len(rows), (None, list[Tensor](), list[weakref.ref[RowEntries]]()))
        capacity = max(row.slots for row in rows)
        if whole is None or whole.shape[4] < capacity:
            two, layers, heads, _, d = rows[0].buffers[WHOLE].shape
            whole = torch.zeros(two, layers, len(rows), heads, capacity, d, dtype=self.dtype, device=self.device)
            self._steps = OrderedDict((key, step) for key, step in self._steps.items() if key[0] != len(rows))
            new = list(whole.unbind(2))
        elif all(row.buffers[WHOLE] is part for row, part in zip(rows, parts, strict=True)):
            return whole
        else:
            new = parts
        for user, part in zip(users, parts, strict=True):
            if (other := user()) is not None and other.buffers[WHOLE] is part:
                other.put(WHOLE, part.clone())
        for row, part in zip(rows, new, strict=True):
            own = row.buffers[WHOLE]
            part[..., : own.shape[3], :] = own
            part[..., own.shape[3] :, :] = 0  # a mask does not hide NaN
            row.put(WHOLE, part, lent=True)
        self._lent[len(rows)] = whole, new, [weakref.ref(row) for row in rows]
        return whole

    def _recorded(self, x: Tensor, lo: int, hi: int, ctx: Pass) -> Tensor:
        """``layers`` on the buffer for as many rows."""
        (batch, t, _), mask, cache = x.shape, ctx.mask, ctx.cache
        taps, ahead = {} if ctx.taps is None else ctx.taps, cache.lengths[lo] - cache.committed
        layers, windows = self.select_layers(lo, hi, ctx.adapters), sorted(set(self.windows[lo:hi]), key=str)
        mixer = layers[0].mixer
        assert isinstance(mixer, Attention)
        cache.claim(lo, hi, [t] * batch, mixer.kv_heads, mixer.size, self.dtype)
        keys, values = whole = self._lend(cache.entries)  # (N, B, Hkv, capacity, d)
        tapped = sorted(layer for layer in taps if lo <= layer <= hi)
        tables = self.network.tables_of(ctx)

        def function(x: Tensor, slots: Tensor, *others: Tensor) -> list[Tensor]:
            masks = dict(zip(windows, others, strict=False))
            pairs = zip(others[len(windows) :: 2], others[len(windows) + 1 :: 2], strict=True)

            def attend(index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                place = slots[:, None, :, None].expand_as(k)
                k, v = keys[index].scatter_(2, place, k), values[index].scatter_(2, place, v)
                return k, v, masks[self.windows[index]]

            seen = dict.fromkeys(tapped, x)
            given = replace(ctx, taps=seen)
            y = self.network.run(x, lo, layers, given, dict(zip(tables, pairs, strict=True)), attend)
            return [y, *(seen[layer] for layer in tapped)]

        shape, terms = (batch, 1, t * mixer.groups, whole.shape[4]), []
        for window in windows:
            term = additive(mask, window, mixer.groups, self.dtype, shape[3])
            terms.append(x.new_zeros(shape) if term is None else term)  # None: every slot is filled
        slots = upload([[n + ahead] for n in cache.rows], self.device) + torch.arange(t, device=self.device)  # (B, T)
        # As keys, layers live as long as the recorded pass, which reads their tensors.
        key = batch, t, lo, hi, *tapped, *layers
        y, *seen = self._step(key, function, [x, slots, *terms, *(each for pair in tables.values() for each in pair)])
        taps.update(zip(tapped, seen, strict=True))
        return y

    def readout(self, x: Tensor, head: nn.Linear | None = None) -> Tensor:
        readout, (batch, t, _) = super().readout, x.shape
        if head is not None or batch * t > ROWS or not torch.is_inference_mode_enabled():
            return readout(x, head)
        with self.lock:
            return self._step((None, batch, t), lambda x: [readout(x)], [x])[0]

    def _step(self, key: Any, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = _Step(function, inputs, self.record)
        self._steps.move_to_end(key)
        if len(self._steps) > STEPS:
            self._steps.popitem(last=False)
        return step(inputs)
