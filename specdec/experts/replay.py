"""Offline: what a cache would have held, from a recorded sequence of demands and prefetches, and what it would save.

Written apart from the engine's cache, so that agreement of the two means something: the replay has no slots, pins or
threads, only lists of experts from least to most recently named.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from specdec.experts.store import Event

POLICIES = ("lru", "least-stale", "belady")


@dataclass
class Replayed:
    """As the engine counts (``Counters``): hits are experts that had a slot when they were demanded."""

    demanded: int = 0
    hits: int = 0
    prefetched: int = 0
    evictions: int = 0
    unused: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / max(self.demanded, 1)


@dataclass
class _Entry:
    tick: int
    order: int
    uses: int
    guessed: bool


def replay(trace: Sequence[Event], slots: int, policy: str = "lru") -> Replayed:
    """Run ``trace`` through caches of ``slots`` experts per layer.

    policy: "lru", "least-stale", or "belady": the expert demanded again last goes, which no policy without prefetching
    can beat; it knows the future and takes no prefetches.
    """
    out = Replayed()
    held: dict[int, dict[int, _Entry]] = defaultdict(dict)
    ticks: dict[int, int] = defaultdict(int)
    orders: dict[int, int] = defaultdict(int)
    future = _next_uses(trace) if policy == "belady" else {}

    def name(row: int, expert: int, demanded: bool, new: bool) -> None:
        orders[row] += 1
        uses = 0 if new else held[row][expert].uses
        guessed = not demanded and (new or held[row][expert].guessed)
        held[row][expert] = _Entry(ticks[row], orders[row], uses + demanded, guessed)

    def room(row: int, keep: set[int] | frozenset[int], demanded: bool, now: int) -> bool:
        """Make room for one expert without putting out any of ``keep``; whether there is some."""
        entries = held[row]
        if len(entries) < slots:
            return True
        loose = [e for e in entries if e not in keep]
        if not loose:
            return False
        if policy == "belady":
            victim = max(
                loose, key=lambda e: (next((n for n in future[row, e] if n > now), 1 << 60), -entries[e].order)
            )
        elif policy == "least-stale":
            wrong = [e for e in loose if demanded and entries[e].guessed] or loose
            victim = min(wrong, key=lambda e: (entries[e].tick, entries[e].uses, entries[e].order))
        else:
            wrong = [e for e in loose if demanded and entries[e].guessed] or loose
            victim = min(wrong, key=lambda e: entries[e].order)
        out.evictions += 1
        out.unused += entries.pop(victim).guessed
        return True

    for now, (kind, row, experts, spare) in enumerate(trace):
        if kind == "prefetch":
            for expert in experts if policy != "belady" else ():
                known = expert in held[row]
                if not known and not room(row, frozenset(spare), False, now):
                    break
                name(row, expert, demanded=False, new=not known)
                out.prefetched += not known
            continue
        ticks[row] += 1
        there = [e for e in experts if e in held[row]]
        for expert in there:
            name(row, expert, demanded=True, new=False)
        out.demanded, out.hits = out.demanded + len(experts), out.hits + len(there)
        busy, missing = list(there), [e for e in experts if e not in there]
        while missing:  # each expert computed with makes room for a missing one
            if room(row, set(busy), True, now):
                name(row, missing[0], demanded=True, new=True)
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
