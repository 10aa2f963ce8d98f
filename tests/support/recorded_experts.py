"""A store of experts that records what is asked of it, an offline replay of that, and a predictor that is wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.runtimes.experts.packed import Index
from specdec.runtimes.experts.predict import Needs, Predictor
from specdec.runtimes.experts.store import ExpertStore, Group

Event = tuple[str, int, tuple[int, ...], tuple[int, ...]]  # "use" or "prefetch", row, experts, those not to evict


class RecordingStore(ExpertStore):
    """Records its demands and prefetches in ``trace``. caching: whether experts are kept from demand to demand."""

    def __init__(self, index: Index, tier: Any, budget: float, top_k: int, caching: bool = True) -> None:
        self.trace: list[Event] = []
        self.caching = caching
        super().__init__(index, tier, budget, top_k)

    @contextmanager
    def demand(self, row: int, experts: Sequence[int]) -> Iterator[Iterator[Group]]:
        with ExitStack() as stack:
            with self._change:
                self.trace.append(("use", row, tuple(experts), ()))
                for slot in () if self.caching else self.caches[row].slots:
                    if slot.expert is not None and not slot.pins:
                        self.caches[row].evict(slot)
                groups = stack.enter_context(super().demand(row, experts))
            yield groups

    def _begin_prefetch(self, row: int, expert: int, keep: frozenset[int]) -> Any:
        job = super()._begin_prefetch(row, expert, keep)
        if job is not None:
            self.trace.append(("prefetch", row, (expert,), tuple(sorted(keep))))
        return job


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


@dataclass
class Replayed:
    """Counts as ``Counters`` does: hits are experts that had a slot when they were demanded."""

    demanded: int = 0
    hits: int = 0
    prefetched: int = 0
    evictions: int = 0
    unused: int = 0


def replay(trace: Sequence[Event], slots: int) -> Replayed:
    """Run ``trace`` through LRU caches of ``slots`` experts per layer.

    Written apart from the store's cache, so that agreement of the two means something: no slots, pins or threads, only
    lists of experts from least to most recently used.
    """
    out = Replayed()
    held: dict[int, dict[int, bool]] = defaultdict(dict)  # experts, least recently used first: whether prefetched

    def use(row: int, expert: int, prefetched: bool) -> None:
        prefetched = prefetched and held[row].pop(expert, True)
        held[row].pop(expert, None)
        held[row][expert] = prefetched

    def room(row: int, keep: set[int], demanded: bool) -> bool:
        """Make room for one expert without evicting any of ``keep``; whether there is some."""
        entries = held[row]
        if len(entries) < slots:
            return True
        loose = [e for e in entries if e not in keep]
        if not loose:
            return False
        victim = next((e for e in loose if demanded and entries[e]), loose[0])
        out.evictions += 1
        out.unused += entries.pop(victim)
        return True

    for kind, row, experts, keep in trace:
        if kind == "prefetch":
            for expert in experts:
                known = expert in held[row]
                if not known and not room(row, set(keep), False):
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
            if room(row, set(busy), True):
                use(row, missing[0], prefetched=False)
                busy.append(missing.pop(0))
            else:
                busy.pop(0)
    return out


def settle(store: ExpertStore) -> None:
    """Wait until an expert store has loaded all that is demanded and forecast."""
    with store._change:
        assert store._change.wait_for(lambda: store._idle, 60)
