"""Replaces a model's experts by modules that read them from a store.

While attached, the model's expert weights are not in memory; ``close`` reads them back from the packed file, unless
they are in a checkpoint. The arithmetic is that of transformers' grouped products over resident experts: one product
per expert, in the order of slots, and one sum per token. So the result does not depend on what is cached or prefetched.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from contextlib import closing
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from specdec.base import terminal
from specdec.base.errors import SpecDecError
from specdec.base.files import cache_dir
from specdec.base.settings import Settings
from specdec.models.checkpoint import FUSED, Absent, StoredExperts, sample
from specdec.runtimes.experts import packed, predict
from specdec.runtimes.experts.layers import moe_layers
from specdec.runtimes.experts.predict import Predictor
from specdec.runtimes.experts.store import ExpertStore, Forecast, slots_per_layer
from specdec.runtimes.experts.tiers import DiskTier, PinnedTier, Tier, aligned

if TYPE_CHECKING:
    from specdec.runtimes.native.experts import MappedExperts

LIKELY = 0.4  # minimum need of an expert that is prefetched
MARGIN = (0.03, 0.25)  # by how much it must exceed the need of the expert it evicts: in the current layer, and ahead


class ExpertOptions(Settings):
    """How experts are offloaded.

    cache: fast memory for experts, as a share of all (float) or in bytes (int).
    folder: of the packed file; None: one in the user's cache, packed at first use and when the weights have changed.
    adaptive: whether to stop prefetching where it does not pay.
    """

    cache: float | int = Field(0.25, title="a share (float) or a number of bytes (int)")
    prefetch: Literal["none", "previous-token", "residual", "m2r2"] = "none"
    folder: Path | None = None
    adaptive: bool = True

    @property
    def plain(self) -> bool:
        """Whether the native runtime can do it: an LRU cache alone."""
        return self.prefetch == "none" and self.folder is None

    def __init__(self, cache: float = 0.25, prefetch: str = "none", folder: Path | None = None, **more: Any) -> None:
        super().__init__(cache=cache, prefetch=prefetch, folder=folder, **more)


class _Experts(Absent):
    """Replaces the experts module of one layer."""

    def __init__(self, owner: Offload, row: int, own: Any) -> None:
        super().__init__(own, [sample(getattr(own, name)) for name in FUSED])
        self.__dict__["owner"], self.row = owner, row

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Hidden states [T, D], each token's experts and their weights [T, k] -> [T, D]."""
        owner: Offload = self.__dict__["owner"]
        store, k, device = owner.store, top_k_index.shape[1], hidden_states.device
        routed = top_k_index.tolist()
        wanted: dict[int, list[int]] = {}  # by expert: indices of its pairs among the T k pairs of token and expert
        for pair, expert in enumerate(expert for token in routed for expert in token):
            wanted.setdefault(expert, []).append(pair)
        out = hidden_states.new_empty(hidden_states.shape[0] * k, hidden_states.shape[1])  # of each pair
        with store.demand(self.row, sorted(wanted)) as groups:
            if owner.predictor is not None:
                owner.predictor.routed(self.row, routed)
            gate_up, down = store.weights[self.row]
            for group in groups:
                by_slot = {slot: wanted[expert] for expert, slot in group}
                ends = list(accumulate(len(by_slot.get(slot, ())) for slot in range(len(gate_up))))
                offsets = torch.tensor(ends, dtype=torch.int32, device=device)
                pairs = torch.tensor([pair for slot in sorted(by_slot) for pair in by_slot[slot]], device=device)
                gate, up = grouped(hidden_states[pairs // k], gate_up, offsets).chunk(2, -1)
                out[pairs] = grouped(self.act_fn(gate) * up, down, offsets)
        weighted = out * top_k_weights.reshape(-1, 1)
        return weighted.view(-1, k, weighted.shape[1]).sum(1).to(hidden_states.dtype)


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows x [n, in], in S groups, times the weight [S, out, in] of each group: [n, out].

    ends: end of each group's rows, int32 [S].
    """
    old = x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0)
    if hasattr(F, "grouped_mm") and not old:
        return F.grouped_mm(x, weight.mT, offs=ends)
    parts = x.tensor_split(ends.tolist()[:-1])
    return torch.cat([F.linear(part, w) for part, w in zip(parts, weight, strict=True) if len(part)])


class Offload:
    """Keeps the experts of a model in slow memory until ``close``.

    Raises SpecDecError if the model has no experts, or the options do not fit it.
    """

    def __init__(self, model: PreTrainedModel, fingerprint: str, options: ExpertOptions) -> None:
        self.model, self.fingerprint, self.options = model, fingerprint, options
        self.layers = moe_layers(model)
        if any(isinstance(layer.experts, _Experts) for layer in self.layers):
            raise SpecDecError("the experts of this model are offloaded already; close the decoder that has them")
        self.top_k = self.layers[0].top_k
        planned = packed.plan(self.layers, fingerprint)
        slots_per_layer(options.cache, planned.shape, self.top_k)  # refuses a small cache before anything is packed
        origin = packed.origin(self.layers)
        self.folder = options.folder or cache_dir() / "experts" / origin.place
        self.predictor = self._predictor(options.prefetch, planned)
        self.index = self._index(origin, planned)
        self.store = ExpertStore(self.index, self._tier(), options.cache, self.top_k)
        self.controller = Controller(adaptive=options.adaptive)
        self.entered = 0  # number of layers entered with predictions
        self.own = [layer.experts for layer in self.layers]
        self.hooks: list[Any] = []
        self._attach()

    def describe(self) -> str:
        """One line for reports."""
        slots, size = len(self.store.caches[0].slots), self.store.resident_bytes / 1e6
        cached = f"{slots} of {self.index.num_experts} experts per layer cached ({size:.0f} MB)"
        return "; ".join(filter(None, [f"{cached}, prefetch {self.options.prefetch}", self.store.tier.note]))

    def enter(self, row: int, x: Tensor) -> None:
        """A pass enters a layer with the residual [T, D]: predict and prefetch."""
        self.controller.enter(row, len(x))
        if self.predictor is not None and self.controller.on and len(x) <= self.predictor.most_tokens:
            self.prefetch(row, self.predictor.ahead(row, x))
            self.entered += 1

    def prefetch(self, row: int, needs: predict.Needs) -> None:
        """Load the experts that are likely to be needed, the likeliest first, as many as there are slots."""
        forecasts = {}
        for target, need in needs:
            distance = (target - row) % len(self.layers)
            likely = sorted((e for e, n in enumerate(need) if n >= LIKELY), key=need.__getitem__, reverse=True)
            wanted = likely[: len(self.store.caches[target].slots)]
            forecasts[target] = Forecast(need, wanted, MARGIN[distance > 0], self.entered + distance)
        self.store.prefetch(forecasts)

    def close(self) -> None:
        """Restore the model's experts (those that were in memory from the packed file), and end loading."""
        if not self.hooks:
            return
        while self.hooks:
            self.hooks.pop().remove()
        self.store.close()
        for row, (layer, own) in enumerate(zip(self.layers, self.own, strict=True)):
            if not isinstance(own, StoredExperts):
                own.gate_up_proj.data, own.down_proj.data = self._read_back(row)
            layer.block.experts = own

    # -- how it is put together -----------------------------------------------------------------------------------

    def _index(self, origin: packed.Origin, planned: packed.Index) -> packed.Index:
        """The index of the packed file. If it is another model's: repacked in the user's cache, refused elsewhere."""
        try:
            index = packed.open_index(self.folder)
            packed.check_model(index, planned, self.folder)
            if index.source == origin.state:
                return index
        except SpecDecError:  # not packed yet, or damaged
            if self.options.folder is not None:
                raise
        if self.options.folder is not None:
            terminal.say(f"Comparing the packed experts in {self.folder} with the model, once.")
            with terminal.Bar("Comparing experts") as bar:
                packed.same_weights(index, self.layers, self.folder, bar)
            return index
        name = self.model.config._name_or_path or "the model"
        terminal.say(f"Packing the experts of {name} ({planned.total_bytes / 1e6:.0f} MB) into {self.folder}, once.")
        with terminal.Bar("Packing experts") as bar:
            return packed.pack(self.layers, self.fingerprint, self.folder, bar)

    def _predictor(self, name: str, planned: packed.Index) -> Predictor | None:
        if name == "previous-token":
            return predict.PreviousToken(len(self.layers), planned.num_experts)
        if name == "residual":
            return predict.residual(self.layers)
        if name == "m2r2":
            return predict.read_predictor(self.folder, self.fingerprint, planned.num_experts, planned.hidden)
        return None

    def _tier(self) -> Tier:
        device = self.model.device
        if device.type == "cuda":
            return PinnedTier(self.folder, self.index, device)
        if device.type != "cpu":
            raise SpecDecError(f"experts are offloaded on a CPU or a CUDA device; the model is on '{device}'")
        return DiskTier(self.folder, self.index)

    def _read_back(self, row: int) -> tuple[Tensor, Tensor]:
        """All experts of a layer: [E, 2 F, D] and [E, D, F]."""
        count, stride = self.index.num_experts, self.index.stride
        slots = aligned(count, stride)
        with closing(DiskTier(self.folder, self.index)) as tier:
            for expert, slot in enumerate(slots):
                tier.read(row * count + expert, slot, 0, stride)
        gate_up, down = (part.to(self.model.device, copy=True) for part in self.index.views(slots))
        return gate_up.contiguous(), down.contiguous()

    def _attach(self) -> None:
        for row, (layer, own) in enumerate(zip(self.layers, self.own, strict=True)):
            layer.block.experts = _Experts(self, row, own)
            enter = lambda _, inputs, row=row: self.enter(row, inputs[0].flatten(0, -2))  # noqa: E731
            self.hooks.append(layer.entry.register_forward_pre_hook(enter))
            if not isinstance(own, StoredExperts):
                for name in FUSED:
                    weight = getattr(own, name)
                    weight.data = weight.data.new_empty(0)


class Meter:
    """Statistics of a store from now on."""

    def __init__(self, store: ExpertStore | MappedExperts) -> None:
        self.store, self.start = store, replace(store.counters)

    def figures(self, new_tokens: int) -> dict[str, float]:
        """Figures so far; bytes and stalls per new token."""
        c = self.store.counters.since(self.start)
        demanded, tokens = max(c.demanded, 1), max(new_tokens, 1)
        return {
            "demanded": c.demanded,
            "hit_rate": c.hits / demanded,
            "in_time_rate": c.in_time / demanded,
            "prefetched": c.prefetched,
            "prefetch_unused": c.unused,
            "bytes_read": c.bytes,
            "bytes_per_token": c.bytes / tokens,
            "stall_ms_per_token": 1e3 * c.stall_seconds / tokens,
            "resident_bytes": self.store.resident_bytes,
        }


WINDOW = 5  # passes with one choice; the first one, while caches and forecasts change, is not counted
RECENT = 7  # number of comparisons whose median decides
SHARE = 0.02  # share of the time that trying the slower choice may cost
LONGEST = 64  # maximum number of windows until it is tried again
MOST_TOKENS = 16  # passes over more tokens (prompts) are not compared


class Controller:
    """Turns prefetching off where passes are slower with it.

    Two neighbouring windows of passes, with and without prefetching, make one comparison: other load on the machine
    slows both. The faster choice by the median of recent comparisons runs. The other is tried again for one window as
    often as ``SHARE`` of the time pays for.

    adaptive: False keeps prefetching on.
    on: whether to prefetch now.
    ratios: time with prefetching over time without.
    left: number of windows until the other choice is tried.
    passes: seconds per layer of the passes in this window; ``layers``: of the layers in this pass.
    before: the choice of the last window, and the median of its passes.
    """

    def __init__(self, adaptive: bool = True) -> None:
        self.adaptive, self.on = adaptive, True
        self.ratios: deque[float] = deque(maxlen=RECENT)
        self.left = 0
        self.passes, self.layers = list[float](), list[float]()
        self.before: tuple[bool, float] | None = None
        self.rows = 0
        self.last: float | None = None

    def enter(self, row: int, tokens: int) -> None:
        """A pass over so many tokens enters a mixture-of-experts layer."""
        now = time.perf_counter()
        self.rows = max(self.rows, row + 1)
        last, self.last = self.last, now if tokens <= MOST_TOKENS else None
        if last is None or self.last is None or now - last > 1.0:  # after a prompt, or a pause
            return
        self.layers.append(now - last)
        if row == 0 and len(self.layers) >= self.rows:
            self.passes.append(statistics.mean(self.layers))
            self.layers.clear()
            if self.adaptive and len(self.passes) == WINDOW:
                self._choose(statistics.median(self.passes[1:]))
                self.passes.clear()

    def _choose(self, seconds: float) -> None:
        """Choose for the next window, after one that took ``seconds`` per layer."""
        compared = self.before is not None and self.before[0] != self.on
        if self.before is not None and compared:
            self.ratios.append(seconds / self.before[1] if self.on else self.before[1] / seconds)
        self.before = self.on, seconds
        if len(self.ratios) < 2:
            self.on = not self.on
            return
        ratio = statistics.median(self.ratios)
        faster, lost = ratio <= 1, max(ratio, 1 / ratio) - 1
        if compared:
            self.on, self.left = faster, min(math.ceil(lost / SHARE), LONGEST)
        else:
            self.left -= 1
            if self.left <= 0:
                self.on = not faster
