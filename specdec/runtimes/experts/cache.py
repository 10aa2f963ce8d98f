"""The experts of a layer in fast memory: slots, pins and LRU eviction. No threads, no tensors, no clock.

A slot belongs to an expert from the moment its loading is requested, so the contents of a cache depend on the sequence
of calls alone, never on timing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Counters:
    """Statistics of a store. Experts are counted per layer and demand (one pass over any number of tokens).

    demanded: hits + misses; hits = in_time (ready when demanded) + late (a prefetch was loading them).
    prefetched, failed: prefetches begun, and failed.
    evictions, unused: evicted experts, and those of them that were prefetched and never demanded.
    bytes_demand, bytes_prefetch: bytes read.
    stall_seconds: time that the model waited.
    """

    demanded: int = 0
    in_time: int = 0
    late: int = 0
    misses: int = 0
    prefetched: int = 0
    evictions: int = 0
    unused: int = 0
    failed: int = 0
    bytes_demand: int = 0
    bytes_prefetch: int = 0
    stall_seconds: float = 0.0

    @property
    def hits(self) -> int:
        return self.in_time + self.late

    @property
    def bytes(self) -> int:
        return self.bytes_demand + self.bytes_prefetch

    def since(self, earlier: Counters) -> Counters:
        old = asdict(earlier)
        return Counters(**{name: value - old[name] for name, value in asdict(self).items()})


@dataclass
class Slot:
    """Memory of one expert. pins: number of users; used: number of the last call that named it; job: its loading."""

    number: int
    expert: int | None = None
    pins: int = 0
    used: int = -1
    prefetched: bool = False  # and not demanded yet
    job: Any = None


class LayerCache:
    """The experts of one layer in ``slots`` slots.

    A new expert takes an empty slot; else, on demand, that of a prefetched expert that was not demanded (a wrong
    prediction); else the least recently used one. Pinned slots are never evicted.
    """

    def __init__(self, slots: int, counters: Counters | None = None) -> None:
        self.slots = [Slot(number) for number in range(slots)]
        self.where: dict[int, Slot] = {}
        self.calls = 0
        self.counters = counters or Counters()

    def pin(self, expert: int) -> Slot | None:
        """Pin the slot of a demanded expert until ``release``; None if it has none."""
        slot = self.where.get(expert)
        if slot is not None:
            slot.pins += 1
            self._use(slot, prefetched=False)
        return slot

    def release(self, slot: Slot) -> None:
        slot.pins -= 1
        assert slot.pins >= 0

    def admit(self, expert: int, demanded: bool, keep: frozenset[int] = frozenset()) -> Slot | None:
        """Give ``expert`` a slot, by eviction if needed; pin it if ``demanded``. None if no slot is available.

        keep: experts that must not be evicted.
        """
        assert expert not in self.where
        free = (s for s in self.slots if not s.pins and (s.expert is None or s.expert not in keep))
        slot = min(free, key=lambda s: (s.expert is not None, not (demanded and s.prefetched), s.used), default=None)
        if slot is None:
            return None
        if slot.expert is not None:
            self.evict(slot)
        slot.expert = expert
        self.where[expert] = slot
        slot.pins = int(demanded)
        self._use(slot, prefetched=not demanded)
        return slot

    def evict(self, slot: Slot) -> None:
        assert slot.expert is not None and not slot.pins
        self.counters.evictions += 1
        self.counters.unused += slot.prefetched
        del self.where[slot.expert]
        slot.expert, slot.prefetched = None, False

    def _use(self, slot: Slot, prefetched: bool) -> None:
        self.calls += 1
        slot.used, slot.prefetched = self.calls, prefetched
