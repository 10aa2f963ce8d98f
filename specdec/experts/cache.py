"""Which experts of a layer are in fast memory: slots, pins and eviction. No threads, no tensors, no clock.

What a cache holds follows from the sequence of calls alone, never from timing: a slot belongs to an expert from the
moment its loading is requested. So an offline replay of the calls arrives at the very same hits.
"""

from __future__ import annotations

from dataclasses import dataclass

EVICTIONS = ("lru", "least-stale", "none")


@dataclass
class Slot:
    """A place for one expert. ``pins``: users that hold it; ``tick``: the layer's demand when it was last named."""

    number: int
    expert: int | None = None
    pins: int = 0
    tick: int = -1
    order: int = -1  # of all namings, the last one's number
    uses: int = 0  # demands since it was admitted
    speculative: bool = False  # prefetched, and not demanded since


@dataclass
class Evicted:
    """evictions: experts put out; unused: those among them that were prefetched for nothing."""

    evictions: int = 0
    unused: int = 0


class LayerCache:
    """The experts of one layer in ``slots`` slots.

    eviction: "lru" (the one named longest ago), "least-stale" (by whole demands: of those not named since the oldest
    one, the one demanded least often; after SpecMD's policy), or "none" (keeps nothing between demands: loading on
    demand without a cache). Pinned slots are never evicted. count: where evictions are counted.
    """

    def __init__(self, slots: int, eviction: str = "lru", count: Evicted | None = None) -> None:
        self.slots = [Slot(number) for number in range(slots)]
        self.where: dict[int, Slot] = {}
        self.eviction, self.tick, self.order = eviction, 0, 0
        self.count = count or Evicted()

    def begin(self) -> list[Slot]:
        """Begin a demand. Returns the slots it empties ("none" only)."""
        self.tick += 1
        if self.eviction != "none":
            return []
        emptied = [slot for slot in self.slots if slot.expert is not None and not slot.pins]
        for slot in emptied:
            self.drop(slot)
        return emptied

    def pin(self, expert: int) -> Slot | None:
        """The slot of a demanded expert, held until ``release``; None if it has none."""
        slot = self.where.get(expert)
        if slot is not None:
            slot.pins += 1
            self._name(slot, demanded=True)
        return slot

    def release(self, slot: Slot) -> None:
        slot.pins -= 1
        assert slot.pins >= 0

    def admit(self, expert: int, demanded: bool, spare: frozenset[int] = frozenset()) -> Slot | None:
        """Give ``expert`` a slot, by eviction if need be; demanded: and pin it. None if every slot is taken.

        spare: experts that a prefetch must not evict.
        """
        assert expert not in self.where
        free = (s for s in self.slots if not s.pins and (s.expert is None or s.expert not in spare))
        slot = min(free, key=lambda s: self._worth(s, demanded), default=None)
        if slot is None:
            return None
        if slot.expert is not None:
            self.drop(slot)
        slot.expert, slot.uses, slot.speculative = expert, 0, not demanded
        self.where[expert] = slot
        slot.pins = int(demanded)
        self._name(slot, demanded)
        return slot

    def drop(self, slot: Slot) -> None:
        """Put the expert of an unpinned slot out."""
        assert slot.expert is not None and not slot.pins
        self.count.evictions += 1
        self.count.unused += slot.speculative
        del self.where[slot.expert]
        slot.expert, slot.speculative = None, False

    def _worth(self, slot: Slot, demanded: bool) -> tuple[int, ...]:
        """The least is evicted. A prefetch that the demand at hand does not name was wrong: first to go."""
        kind = 0 if slot.expert is None else 1 if demanded and slot.speculative else 2
        return (kind, slot.tick, slot.uses, slot.order) if self.eviction == "least-stale" else (kind, slot.order)

    def _name(self, slot: Slot, demanded: bool) -> None:
        self.order += 1
        slot.tick, slot.order = self.tick, self.order
        if demanded:
            slot.uses += 1
            slot.speculative = False
