"""For studies of expert loading: a recording store, emulated slow memory, reference predictors, an offline replay."""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.base.errors import SpecDecError
from specdec.runtimes.experts.packed import ALIGNMENT, BLOCKS, Index, buffer
from specdec.runtimes.experts.predict import Needs, Predictor
from specdec.runtimes.experts.store import ExpertStore, Group
from specdec.runtimes.experts.tiers import aligned

# -- a store that records -------------------------------------------------------------------------------------------

Event = tuple[str, int, tuple[int, ...], tuple[int, ...]]  # "use" or "prefetch", row, experts, those not to evict


class StudyStore(ExpertStore):
    """Records its demands and prefetches in ``trace``. caching: whether experts are kept from demand to demand."""

    tier: Any
    reading: Any  # what is being loaded

    def __init__(self, index: Index, tier: Any, budget: float, top_k: int, caching: bool = True) -> None:
        self.trace: list[Event] = []
        self.caching, self.reading = caching, None
        super().__init__(index, tier, budget, top_k)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to load."""
        with self._change:
            return self._idle

    @contextmanager
    def demand(self, row: int, experts: Sequence[int]) -> Iterator[Iterator[Group]]:
        with ExitStack() as stack:
            with self._change:
                self.trace.append(("use", row, tuple(experts), ()))
                for slot in () if self.caching else self.caches[row].slots:
                    if slot.expert is not None and not slot.pins:
                        self.caches[row].evict(slot)
                groups = stack.enter_context(super().demand(row, experts))
                if self.reading not in (None, *self._demands) and hasattr(self.tier, "hurry"):
                    self.tier.hurry()
            yield groups

    def _next_job(self) -> Any:
        self.reading = super()._next_job()
        return self.reading

    def _begin_prefetch(self, row: int, expert: int, keep: frozenset[int]) -> Any:
        job = super()._begin_prefetch(row, expert, keep)
        if job is not None:
            self.trace.append(("prefetch", row, (expert,), tuple(sorted(keep))))
        return job


# -- emulated slow memory -------------------------------------------------------------------------------------------

QUANTUM = 2e-4  # seconds, or QUANTUM_LATENCIES: of what an emulated tier still transfers once it is hurried
QUANTUM_LATENCIES = 4
AT_ONCE = 1e-4  # seconds between two requests of a busy queue


class EmulatedTier:
    """RAM that takes as long as a declared bandwidth (bytes/s) and latency (s a request) say.

    One bucket serves demands and prefetches. Waiting sleeps, so the processor stays free, as during a real transfer.
    A request that follows the one before at once begins where that one ended, however late the sleeper awoke. A
    hurried one ends with the quantum that is being transferred.
    """

    def __init__(self, folder: Path, index: Index, bandwidth: float, latency: float = 0.0) -> None:
        self.index, self.checked = index, [False] * len(index.checksums)
        if not (bandwidth > 0 and latency >= 0):
            raise SpecDecError(f"an emulated tier needs a bandwidth > 0 and a latency >= 0; got {bandwidth}, {latency}")
        self.bandwidth, self.latency, self.free, self.returned = bandwidth, latency, 0.0, 0.0
        self.source = buffer(torch.from_file(str(folder / BLOCKS), size=index.total_bytes, dtype=torch.uint8))
        self.hurried = threading.Event()
        self.note = f"emulated slow memory: {bandwidth / 1e9:.3g} GB/s, {latency * 1e6:.0f} us a request"

    def slots(self, count: int) -> Tensor:
        return aligned(count, self.index.stride)

    def acquire(self, slot: Tensor) -> None: ...

    def release(self, slot: Tensor) -> None: ...

    def hurry(self) -> None:
        self.hurried.set()

    def read(self, block: int, slot: Tensor, start: int, stop: int) -> int:
        now = time.perf_counter()
        begin = self.latency + (self.free if now - self.returned < AT_ONCE else now)
        self.free = begin + (stop - start) / self.bandwidth
        base = block * self.index.stride
        # Python's own copy: torch's would give the interpreter away and ask for it back, from a model that computes.
        buffer(slot)[start:stop] = self.source[base + start : base + stop]
        if self.hurried.wait(max(self.free - time.perf_counter(), 0.0)):
            self.hurried.clear()
            quantum = max(QUANTUM, QUANTUM_LATENCIES * self.latency)
            passed = quantum * math.ceil(max(time.perf_counter() - begin, 0.0) / quantum + 1e-9)
            stop = min(stop, start + math.ceil(passed * self.bandwidth / ALIGNMENT) * ALIGNMENT)
            self.free = begin + (stop - start) / self.bandwidth
            time.sleep(max(self.free - time.perf_counter(), 0.0))
        if stop == self.index.stride and not self.checked[block]:
            self.index.check(block, slot)
            self.checked[block] = True
        self.returned = time.perf_counter()
        return stop

    def close(self) -> None:
        self.source = memoryview(b"")


# -- reference predictors -------------------------------------------------------------------------------------------

REACH = 4  # layers ahead that the oracle knows


class Oracle(Predictor):
    """Knows what follows wherever it has seen these very states before, such as in an earlier equal run."""

    most_tokens = 1 << 30

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.follows: dict[bytes, list[tuple[int, frozenset[int]]]] = {}
        self.recent: deque[bytes] = deque(maxlen=REACH + 1)

    def ahead(self, row: int, x: Tensor) -> Needs:
        key = row.to_bytes(4, "little") + x.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()
        known = self.follows.setdefault(key, [])
        if key not in self.recent:
            self.recent.append(key)
        return [(row, [float(e in experts) for e in range(self.num_experts)]) for row, experts in known]

    def routed(self, row: int, experts: list[list[int]]) -> None:
        chosen = frozenset(expert for token in experts for expert in token)
        for key in self.recent:
            if len(self.follows[key]) <= REACH:
                self.follows[key].append((row, chosen))


class Shuffled(Predictor):
    """Another predictor's needs, given to the wrong experts."""

    def __init__(self, inner: Predictor, rows: int, num_experts: int) -> None:
        self.inner = inner
        generator = torch.Generator().manual_seed(0)
        self.order = [torch.randperm(num_experts, generator=generator).tolist() for _ in range(rows)]

    def routed(self, row: int, experts: list[list[int]]) -> None:
        self.inner.routed(row, experts)

    def ahead(self, row: int, x: Tensor) -> Needs:
        return [(target, [need[e] for e in self.order[target]]) for target, need in self.inner.ahead(row, x)]


# -- replay ---------------------------------------------------------------------------------------------------------
#
# Written apart from the store's cache, so that agreement of the two means something: no slots, pins or threads, only
# lists of experts from least to most recently used.


@dataclass
class Replayed:
    """Counts as ``Counters`` does: hits are experts that had a slot when they were demanded."""

    demanded: int = 0
    hits: int = 0
    prefetched: int = 0
    evictions: int = 0
    unused: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / max(self.demanded, 1)


def replay(trace: Sequence[Event], slots: int, policy: str = "lru") -> Replayed:
    """Run ``trace`` through caches of ``slots`` experts per layer.

    policy: "lru", or "belady": the expert demanded again last goes, which no policy without prefetching can beat; it
    knows the future and takes no prefetches.
    """
    out = Replayed()
    held: dict[int, dict[int, bool]] = defaultdict(dict)  # experts, least recently used first: whether prefetched
    future = _next_uses(trace) if policy == "belady" else {}

    def use(row: int, expert: int, prefetched: bool) -> None:
        prefetched = prefetched and held[row].pop(expert, True)
        held[row].pop(expert, None)
        held[row][expert] = prefetched

    def room(row: int, keep: set[int], demanded: bool, now: int) -> bool:
        """Make room for one expert without evicting any of ``keep``; whether there is some."""
        entries = held[row]
        if len(entries) < slots:
            return True
        loose = [e for e in entries if e not in keep]
        if not loose:
            return False
        victim = next((e for e in loose if demanded and entries[e]), loose[0])
        if policy == "belady":
            victim = max(loose, key=lambda e: next((n for n in future[row, e] if n > now), 1 << 60))
        out.evictions += 1
        out.unused += entries.pop(victim)
        return True

    for now, (kind, row, experts, keep) in enumerate(trace):
        if kind == "prefetch":
            for expert in experts if policy != "belady" else ():
                known = expert in held[row]
                if not known and not room(row, set(keep), False, now):
                    break
                use(row, expert, prefetched=True)
                out.prefetched += not known
            continue
        there = [e for e in experts if e in held[row]]
        for expert in there:
            use(row, expert, prefetched=False)
        out.demanded, out.hits = out.demanded + len(experts), out.hits + len(there)
        busy, missing = list(there), [e for e in experts if e not in there]
        while missing:  # each expert computed with makes room for a missing one
            if room(row, set(busy), True, now):
                use(row, missing[0], prefetched=False)
                busy.append(missing.pop(0))
            else:
                busy.pop(0)
    return out


def _next_uses(trace: Sequence[Event]) -> dict[tuple[int, int], list[int]]:
    uses = defaultdict(list)
    for now, (kind, row, experts, _) in enumerate(trace):
        if kind == "use":
            for expert in experts:
                uses[row, expert].append(now)
    return uses


# -- other machines -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Where experts come from (bytes/s), and what computing reads its weights at (bytes/s)."""

    name: str
    slow: float
    fast: float


MACHINES = (
    Machine("PCIe 5.0 x16 to HBM3", 55e9, 3.35e12),
    Machine("PCIe 4.0 x16 to HBM2e", 25e9, 2.0e12),
    Machine("NVMe to HBM3", 7e9, 3.35e12),
    Machine("NVMe to DDR5", 7e9, 200e9),
)


@dataclass(frozen=True)
class Shape:
    """A model by what matters here; dense: bytes of a layer that are not experts."""

    layers: int
    experts: int
    top_k: int
    expert_bytes: int
    dense: int


OLMOE = Shape(16, 64, 8, 12 * 2**20, 32 * 2**20)


def seconds_per_token(shape: Shape, machine: Machine, missed: float, prefetched: float) -> float:
    """Decoding time by the transfers measured: shares of a token's experts loaded on demand, and loaded ahead.

    Demand loads stall; loads ahead overlap with computing, which takes as long as reading the weights from fast memory.
    """
    compute = (shape.top_k * shape.expert_bytes + shape.dense) / machine.fast
    load = shape.top_k * shape.expert_bytes / machine.slow
    return shape.layers * (max(compute, prefetched * load) + missed * load)
