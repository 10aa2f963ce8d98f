"""Putting an expert store under a model: its experts modules are replaced by ones that ask the store.

While attached, the model's expert weights are not in memory; ``close`` reads them back from the packed file, unless
they were in a checkpoint before. The arithmetic is that of transformers' grouped products over resident experts: a
product of its own per expert, on the slots as they lie, and one sum per token. So what is computed does not depend on
where the weights come from, on what is cached, or on what is prefetched.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from specdec.embedded import cache_dir, progress
from specdec.errors import SpecDecError, did_you_mean
from specdec.experts import packed, predict
from specdec.experts.cache import EVICTIONS
from specdec.experts.control import Controller
from specdec.experts.layers import moe_layers
from specdec.experts.predict import Predictor
from specdec.experts.store import Counters, ExpertStore, Foreseen, slots_per_layer
from specdec.experts.tiers import DiskTier, EmulatedTier, PinnedTier, Tier, aligned
from specdec.stored import FUSED, Absent, StoredExperts, sample

FLOOR = 0.4  # least need of an expert that is prefetched
SOON = 0.15  # of a layer's time: what can be loaded in it waits until the layer is entered
STAY = (0.03, 0.25)  # by how much more than the cached one that it would put out: in the layer entered, and ahead of it


@dataclass(frozen=True)
class ExpertOptions:
    """How experts are offloaded.

    cache: fast memory for experts, as a share of all (float) or in bytes (int). prefetch: one of ``PREDICTORS``.
    folder: the packed file's; None: one in the user's cache, packed at first use, and anew when the weights have
    changed. eviction: "lru" or "least-stale"
    ("none": on demand without a cache, for study). bandwidth, latency: an emulated slow memory (bytes/s, s) instead of
    the disk. adaptive: stop prefetching where it does not pay.
    """

    cache: float = 0.25
    prefetch: str = "none"
    folder: Path | None = None
    eviction: str = "lru"
    bandwidth: float | None = None
    latency: float = 0.0
    adaptive: bool = True

    def check(self) -> None:
        """Raise SpecDecError for values that no model could make good."""
        for what, value, known in (
            ("expert predictor", self.prefetch, predict.PREDICTORS),
            ("eviction", self.eviction, EVICTIONS),
        ):
            if value not in known:
                raise SpecDecError(
                    f"unknown {what} '{value}'{did_you_mean(value, known)}; there are: {', '.join(known)}"
                )
        for name, kinds in (("bandwidth", (float, int, type(None))), ("latency", (float, int)), ("adaptive", (bool,))):
            if type(value := getattr(self, name)) not in kinds:
                raise SpecDecError(f"the expert option {name} cannot be {value!r}")


class _Experts(Absent):
    """Computes with the experts of one layer as the store has them."""

    def __init__(self, owner: Offload, row: int, own: Any) -> None:
        super().__init__(own, [sample(getattr(own, name)) for name in FUSED])
        self.__dict__["owner"], self.row = owner, row

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, D], the experts of each token and their weights [T, k] -> [T, D]."""
        owner: Offload = self.__dict__["owner"]
        store, k, device = owner.store, top_k_index.shape[1], hidden_states.device
        routed = top_k_index.tolist()
        wanted: dict[int, list[int]] = {}  # by expert, which of the T k pairs of token and expert
        for pair, expert in enumerate(expert for token in routed for expert in token):
            wanted.setdefault(expert, []).append(pair)
        out = hidden_states.new_empty(hidden_states.shape[0] * k, hidden_states.shape[1])  # of each pair
        with store.demand(self.row, sorted(wanted)) as groups:
            if owner.predictor is not None and owner.watching:
                owner.predictor.routed(self.row, hidden_states, routed)
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
    """Rows x [n, in] times the one of weight [S, out, in] that each group of rows has: [n, out].

    ends: int32 [S], where the rows of each group end.
    """
    old = x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0)
    if hasattr(F, "grouped_mm") and not old:
        return F.grouped_mm(x, weight.mT, offs=ends)
    parts = x.tensor_split(ends.tolist()[:-1])
    return torch.cat([F.linear(part, w) for part, w in zip(parts, weight, strict=True) if len(part)])


class Offload:
    """The experts of a model, held in slow memory for as long as this lives.

    ``store``, ``predictor`` and ``controller`` can be looked at; ``note`` says where experts come from.
    Raises SpecDecError if the model has no experts, or the options do not fit it.
    """

    def __init__(self, model: PreTrainedModel, fingerprint: str, options: ExpertOptions) -> None:
        options.check()
        self.model, self.fingerprint, self.options = model, fingerprint, options
        self.layers = moe_layers(model)
        if any(isinstance(layer.experts, _Experts) for layer in self.layers):
            raise SpecDecError("the experts of this model are offloaded already; close the decoder that has them")
        self.top_k = self.layers[0].top_k
        planned = packed.plan(self.layers, fingerprint)
        slots_per_layer(options.cache, planned, self.top_k)  # what is refused is refused before anything is packed
        origin = packed.origin(self.layers)
        self.folder = options.folder or cache_dir() / "experts" / origin.place
        self.predictor = self._predictor(options.prefetch, planned)
        self.index = self._index(origin, planned)
        tier = self._tier()
        try:
            self.store = ExpertStore(self.index, tier, options.cache, self.top_k, options.eviction)
        except SpecDecError:
            tier.close()
            raise
        self.note = tier.note
        self.controller = Controller(adaptive=options.adaptive)
        self.entered = 0  # layers, while predicting
        self.predicting = 0.0  # seconds
        self.watching = False  # whether the predictor is told of this pass
        self.own = [layer.experts for layer in self.layers]
        self.hooks: list[Any] = []
        self._attach()

    def describe(self) -> str:
        """One line for reports."""
        slots = len(self.store.caches[0].slots)
        text = (
            f"{slots} of {self.index.num_experts} experts per layer cached ({self.store.resident_bytes / 1e6:.0f} MB)"
        )
        return f"{text}, prefetch {self.options.prefetch}" + (f"; {self.note}" if self.note else "")

    def enter(self, row: int, x: Tensor) -> None:
        """Called as a pass enters a layer, with the residual [T, D]: predict, and prefetch."""
        done = self.store.counters
        self.controller.visit(row, len(x), done.stall_seconds, done.alone_seconds - self.predicting)
        predictor, on = self.predictor, self.controller.on
        if predictor is None:
            return
        prompt = len(x) > predictor.most_tokens
        self.watching = on or prompt or predictor.learns
        if not self.watching:
            return
        if prompt or not on:
            predictor.look(row, x)
            return
        rows, began = len(self.layers), time.perf_counter()
        self._foresee({target: ((target - row) % rows, need) for target, need in predictor.ahead(row, x)})
        self.entered += 1
        self.predicting += time.perf_counter() - began

    def _foresee(self, needs: dict[int, tuple[int, list[float]]]) -> None:
        """Have those experts loaded that are likely to be needed, the likeliest first, while there is time.

        needs: by row, how many layers ahead it is, and what it needs.
        """
        seen, later = {}, 0.0
        if self.predictor is not None and self.predictor.refines:
            later = SOON * self.controller.layer_seconds / (self.store.byte_seconds or math.inf)
        for row, (distance, need) in needs.items():
            wanted = sorted((e for e, n in enumerate(need) if n >= FLOOR), key=need.__getitem__, reverse=True)
            stay = STAY[min(distance, len(STAY) - 1)]
            patience = later if distance else 0.0
            slots = len(self.store.caches[row].slots)
            seen[row] = Foreseen(need, wanted[:slots], stay, self.entered + distance, patience)
        self.store.foresee(seen)

    def close(self) -> None:
        """Give the model its experts back, those that were in memory from the packed file, and end loading."""
        if not self.hooks:
            return
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        self.store.close()
        for row, (layer, own) in enumerate(zip(self.layers, self.own, strict=True)):
            if not isinstance(own, StoredExperts):
                own.gate_up_proj.data, own.down_proj.data = self._read_back(row)
            layer.block.experts = own

    # -- how it is put together -----------------------------------------------------------------------------------

    def _index(self, origin: packed.Origin, planned: packed.Index) -> packed.Index:
        """That of the folder given, if it is this model's; of the cache's, which is packed unless it is as it was."""
        if self.options.folder is not None:
            index = packed.open_index(self.folder)
            packed.check_model(index, self.layers, self.fingerprint, self.folder)
            if index.source != origin.state:
                text = f"Comparing the packed experts in {self.folder} with the model, once."
                with progress(text, "Comparing experts") as tell:
                    packed.same_weights(index, self.layers, self.folder, tell)
            return index
        try:
            index = packed.open_index(self.folder)
            packed.check_model(index, self.layers, self.fingerprint, self.folder)
            if index.source == origin.state:
                return index
        except SpecDecError:  # not packed yet, or damaged
            pass
        name = self.model.config._name_or_path or "the model"
        text = f"Packing the experts of {name} ({planned.total_bytes / 1e6:.0f} MB) into {self.folder}, once."
        with progress(text, "Packing experts") as tell:
            return packed.pack(self.layers, self.fingerprint, self.folder, tell)

    def _predictor(self, name: str, planned: packed.Index) -> Predictor | None:
        rows, experts = len(self.layers), planned.num_experts
        if name == "none":
            return None
        if name == "previous-token":
            return predict.PreviousToken(rows, experts)
        if name == "oracle":
            return predict.Oracle(experts)
        if name == "residual":
            return predict.residual(self.layers)
        leaps = predict.read_leaps(self.folder, self.fingerprint, experts, planned.hidden)
        return leaps if name == "m2r2" else predict.Shuffled(leaps, rows, experts)

    def _tier(self) -> Tier:
        options, device = self.options, self.model.device
        if device.type == "cuda":
            if options.bandwidth is not None:
                raise SpecDecError("the emulated slow memory is for studies on a CPU; leave the bandwidth out on a GPU")
            return PinnedTier(self.folder, self.index, device)
        if device.type != "cpu":
            raise SpecDecError(f"experts are offloaded on a CPU or a CUDA device; the model is on '{device}'")
        if options.bandwidth is not None:
            return EmulatedTier(self.folder, self.index, options.bandwidth, options.latency)
        return DiskTier(self.folder, self.index)

    def _read_back(self, row: int) -> tuple[Tensor, Tensor]:
        """All experts of a layer: [E, 2 F, D] and [E, D, F]."""
        tier, slot, count = DiskTier(self.folder, self.index), aligned(1, self.index.stride)[0], self.index.num_experts
        parts = self.index.views(slot)
        fused = [torch.empty(count, *part.shape, dtype=part.dtype, device=self.model.device) for part in parts]
        try:
            for expert in range(count):
                tier.read(row * count + expert, slot, 0, self.index.stride)
                for whole, part in zip(fused, parts, strict=True):
                    whole[expert].copy_(part)
        finally:
            tier.close()
        return fused[0], fused[1]

    def _attach(self) -> None:
        for row, (layer, own) in enumerate(zip(self.layers, self.own, strict=True)):
            layer.block.experts = _Experts(self, row, own)
            self.hooks.append(layer.entry.register_forward_pre_hook(self._entering(row)))
            if not isinstance(own, StoredExperts):
                for name in FUSED:
                    weight = getattr(own, name)
                    weight.data = weight.data.new_empty(0)

    def _entering(self, row: int) -> Any:
        return lambda _, inputs: self.enter(row, inputs[0].flatten(0, -2))


@dataclass
class Meter:
    """What the store did over a stretch of decoding."""

    store: ExpertStore
    start: Counters
    began: float

    @classmethod
    def begin(cls, store: ExpertStore) -> Meter:
        return cls(store, store.counters.since(Counters()), time.perf_counter())

    def figures(self, new_tokens: int) -> dict[str, float]:
        """Figures since the beginning; bytes and stalls per new token."""
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
