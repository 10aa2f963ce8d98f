"""Growing a draft in one native call: what the kernels read is built once for a route, and used again every round.

Between two passes all code is cold, so a round changes few fields here and builds nothing. Knows the kernels'
structures, and of the model only what ``Kernels`` hands over.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

from torch import Tensor, nn

from specdec import cores, kernels, native
from specdec.adapters import Adapters
from specdec.cache import KVCache
from specdec.growth import Candidates, Route, Seed
from specdec.native import INT, POINTER, done, pointer


class Kernels(Protocol):
    """What the native runtime has of a model."""

    lib: Any
    embedding: Tensor
    final_norm: Tensor
    eps: float
    vocab_size: int
    windows: list[int | None]

    def head(self, head: nn.Linear | None) -> native.Packed:
        """An output head, packed; None: the model's own."""

    def draft_call(self, lo: int, hi: int, adapters: Adapters) -> tuple[native.Model, native.Call]:
        """Layers [lo, hi) with ``adapters`` on one token, for kernels that make masks and states themselves."""

    def place(self, call: native.Call, cache: KVCache, lo: int, hi: int, count: int) -> Any:
        """Have ``call`` write to the next ``count`` slots of layers [lo, hi); return what must live as long."""


class Growth:
    """Trees of ``levels`` levels, ``width`` nodes of which are drafted on from, along ``route``; one at a time."""

    def __init__(self, target: Kernels, route: Route, levels: int, width: int) -> None:
        self.segments, self.drafted = route.segments, 1 + (levels - 1) * width
        self.position = (ctypes.c_int64 * 1)()
        count = levels * width * width
        self.found = (ctypes.c_float * count)(), (INT * count)(), (INT * count)()  # scores, tokens, parents
        maps, heads = [leap.packed for leap in route.leaps], [target.head(head) for head in route.heads]
        self.legs = (native.Leg * len(maps))()
        self.calls: list[native.Call] = []
        self.alive: list[Any] = [maps, heads]
        for leg, leap in zip(self.legs, maps, strict=True):
            assert leap is not None
            leg.leap = ctypes.addressof(leap.struct)
        for leg, (lo, hi) in zip(self.legs, route.segments, strict=False):
            model, call = target.draft_call(lo, hi, route.adapters)
            call.positions = ctypes.addressof(self.position)
            leg.model, leg.call = ctypes.addressof(model), ctypes.addressof(call)
            self.calls.append(call)
            self.alive.append(model)
        self.struct = native.Growth(
            *(len(maps), levels, width, 0, ctypes.addressof(self.legs)),
            *(target.embedding.data_ptr(), None),
            (POINTER * 2)(*(ctypes.addressof(head.struct) for head in heads)),
            (INT * 2)(*(head.width for head in heads)),
            *(pointer(route.tokens), target.final_norm.data_ptr(), target.eps, kernels.UNIT_EPS, 0.0),
            *(ctypes.addressof(out) for out in self.found),
        )

    @staticmethod
    def serves(target: Kernels, route: Route, levels: int, width: int) -> bool:
        """Whether the kernels take such a route and such a tree."""
        outputs = sum(target.vocab_size if head is None else head.out_features for head in route.heads)
        near = any(window is not None and window <= levels for window in target.windows)
        fits = width <= min(16, outputs) and len(route.leaps) <= 8 and len(route.heads) <= 2 and not near
        return fits and route.adapters.coarse and bool(route.segments) and all(leap.packed for leap in route.leaps)

    def __call__(self, target: Kernels, cache: KVCache, seed: Seed, confidence: float) -> Candidates:
        struct, segments = self.struct, self.segments
        final, *carried = (x.contiguous() for x in (seed.final, *seed.carried))
        before = seed.place * final.shape[2] * final.element_size()  # bytes
        self.position[0] = seed.position
        alive = []
        for leg, call, state, (lo, hi) in zip(self.legs, self.calls, carried, segments, strict=False):
            alive.append(target.place(call, cache, lo, hi, self.drafted))
            call.threads = cores.threads()
            leg.carried = call.x = state.data_ptr() + before
        struct.root, struct.final, struct.confidence = seed.token, final.data_ptr() + before, confidence
        count = target.lib.specdec_grow(ctypes.byref(struct))
        for lo, hi in segments:
            cache.trim(self.drafted, lo, hi)
        done(count)
        scores, tokens, parents = self.found
        return Candidates(scores[:count], tokens[:count], parents[:count])
