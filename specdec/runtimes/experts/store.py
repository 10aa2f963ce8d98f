"""The expert store: slots in fast memory, an LRU cache per layer, and one thread that loads experts.

Demands are loaded first, then forecasts in the order in which layers need them; the thread chooses again after each
chunk. A forecast evicts an expert only when its own loading begins, so a forecast that comes too late costs nothing. A
failed prefetch is dropped, and the demand that follows reads again. One thread loads, so two loads never write the same
slot. A forked child starts its own thread.
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from torch import Tensor

from specdec.base.errors import SpecDecError
from specdec.runtimes.experts.cache import Counters, LayerCache, Slot
from specdec.runtimes.experts.packed import Index
from specdec.runtimes.experts.tiers import CHUNK, Tier

SAME_NEED = 0.05  # experts whose needs differ by less are evicted in LRU order
OVERLAP_FROM = 4 << 20  # computing begins before all experts are ready for demands of so many bytes

Group = list[tuple[int, int]]  # experts, and the numbers of their slots


@dataclass(eq=False)
class _Job:
    """Loading of one block into one slot."""

    block: int
    memory: Tensor
    demanded: bool
    done: int = 0  # bytes
    ready: bool = False
    cancelled: bool = False
    error: Exception | None = None


@dataclass
class Forecast:
    """The expected needs of a layer.

    need: of each of its E experts.
    wanted: the experts worth loading, the most needed first.
    margin: by how much an expert's need must exceed that of one it evicts.
    due: when the layer demands them; the least is loaded first.
    """

    need: list[float]
    wanted: list[int]
    margin: float = 0.0
    due: float = 0.0

    def keep(self, cached: Collection[int], expert: int) -> frozenset[int]:
        """The experts of ``cached`` that ``expert`` must not evict: all but the clearly less needed."""
        least = min((self.need[other] for other in cached), default=0.0)
        limit = min(self.need[expert] - self.margin, least + SAME_NEED)
        return frozenset(other for other in cached if self.need[other] >= limit)


class ExpertStore:
    """Experts of the packed file ``index`` in at most ``budget`` bytes of fast memory, loaded through ``tier``.

    Raises SpecDecError if a layer's part of the budget holds fewer than ``top_k`` experts.

    budget: bytes (int), or a share of all experts (float <= 1).
    top_k: number of a layer's experts that one token needs.
    weights: by row, gate and up [S, 2 F, D] and down [S, D, F] of all slots.
    """

    def __init__(self, index: Index, tier: Tier, budget: float, top_k: int) -> None:
        self.index, self.tier, self.stride = index, tier, index.stride
        self.budget, rows = budget_bytes(budget, index.total_bytes), len(index.layers)
        per_layer = slots_per_layer(budget, index.shape, top_k)
        self.memory = tier.slots(rows * per_layer).unflatten(0, (rows, per_layer))  # (rows, S, stride)
        self.weights: list[tuple[Tensor, Tensor]] = [index.views(slots) for slots in self.memory]
        self.places = [list(slots) for slots in self.memory]  # uint8 [stride] each
        self.counters = Counters()
        self.caches = [LayerCache(per_layer, self.counters) for _ in range(rows)]
        self._demands: deque[_Job] = deque()
        self._forecasts: dict[int, Forecast] = {}  # by row
        self._change = threading.Condition()
        self._idle, self._closed = True, False
        self._ended: SpecDecError | None = None  # why the thread has ended before ``close``
        self._start_thread()
        _open.add(self)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all slots, filled or not."""
        return self.memory.numel()

    @contextmanager
    def demand(self, row: int, experts: Sequence[int]) -> Iterator[Iterator[Group]]:
        """Request ``experts`` (ascending) of a layer; the context is an iterator over groups of them that are ready.

        Missing experts are loaded. Groups have their slots in ``weights[row]`` and are pinned until the end. If there
        are more experts than slots, they come one by one, each pinned until the next is requested.
        """
        cache, held = self.caches[row], list[tuple[int, Slot]]()
        with self._change:
            self._forecasts.pop(row, None)
            cached = [expert for expert in experts if expert in cache.where]
            waiting = deque([*cached, *(expert for expert in experts if expert not in cache.where)])
            count, late = self.counters, sum(not self._ready(row, expert) for expert in cached)
            count.demanded += len(experts)
            count.in_time, count.late = count.in_time + len(cached) - late, count.late + late
            count.misses += len(experts) - len(cached)
            self._hold(row, waiting, held)
        try:
            yield self._groups(row, waiting, held)
        finally:
            with self._change:
                for _, slot in held:
                    cache.release(slot)

    def prefetch(self, forecasts: dict[int, Forecast]) -> None:
        """Load experts before they are demanded; replaces the rows' earlier forecasts.

        Never evicts an expert in use or demanded, nor one that is needed as much.
        """
        with self._change:
            self._forecasts |= forecasts
            if self._idle and not all(self._ready(row, e) for row, each in forecasts.items() for e in each.wanted):
                self._wake()

    def close(self) -> None:
        """End the thread and free the slots."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()
        self.tier.close()
        self.memory, self.weights, self.places = self.memory.new_empty(0), [], []

    def _groups(self, row: int, waiting: deque[int], held: list[tuple[int, Slot]]) -> Iterator[Group]:
        cache, places, todo = self.caches[row], self.places[row], list(held)
        if not waiting and len(todo) * self.stride < OVERLAP_FROM:
            for _, slot in todo:
                self._wait([slot.job])
        while todo:
            # While experts wait for a slot, the order, which decides what they evict, must not depend on time.
            group = todo[:1] if waiting else [each for each in todo if each[1].job.ready]
            self._wait([slot.job for _, slot in group or todo])
            if not group:
                continue
            for _, slot in group:
                self.tier.acquire(places[slot.number])
            yield [(expert, slot.number) for expert, slot in group]
            for _, slot in group:
                self.tier.release(places[slot.number])
            todo = [each for each in todo if each not in group]
            if waiting:
                with self._change:
                    cache.release(held.pop(0)[1])
                    todo += self._hold(row, waiting, held)

    # -- under the lock -----------------------------------------------------------------------------------------

    def _ready(self, row: int, expert: int) -> bool:
        slot = self.caches[row].where.get(expert)
        return slot is not None and slot.job.ready

    def _hold(self, row: int, waiting: deque[int], held: list[tuple[int, Slot]]) -> list[tuple[int, Slot]]:
        """Pin the first experts of ``waiting``, as many as there are slots, and move them to ``held``."""
        cache, first = self.caches[row], len(held)
        while waiting:
            slot = cache.pin(waiting[0])
            if slot is None:
                slot = cache.admit(waiting[0], demanded=True)
                if slot is None:
                    break
                self._start_job(row, slot, demanded=True)
            if not slot.job.ready and slot.job not in self._demands:
                self._demands.append(slot.job)
                self._wake()
            held.append((waiting.popleft(), slot))
        return held[first:]

    def _start_job(self, row: int, slot: Slot, demanded: bool) -> _Job:
        """Load the slot's expert; cancel what is being loaded into the slot."""
        if slot.job is not None and not slot.job.ready:
            slot.job.cancelled = True
            with suppress(ValueError):
                self._demands.remove(slot.job)
        assert slot.expert is not None
        job = _Job(row * self.index.num_experts + slot.expert, self.places[row][slot.number], demanded)
        slot.job = job
        return job

    def _wake(self) -> None:
        if not (self._thread.is_alive() or self._ended or self._closed):
            self._start_thread()  # this process was forked, without the thread
        self._idle = False
        self._change.notify_all()

    def _next_job(self) -> _Job | None:
        """The job to work on now."""
        if self._demands:
            return self._demands[0]
        for row, forecast in sorted(self._forecasts.items(), key=lambda each: each[1].due):
            job = self._next_prefetch(row, forecast)
            if job is not None:
                return job
            del self._forecasts[row]  # there is nothing left to load for it
        return None

    def _next_prefetch(self, row: int, forecast: Forecast) -> _Job | None:
        """The job of the most needed expert of the forecast that is not ready."""
        cache = self.caches[row]
        for expert in forecast.wanted:
            slot = cache.where.get(expert)
            if slot is None:
                return self._begin_prefetch(row, expert, forecast.keep(cache.where, expert))
            if not slot.job.ready:
                return slot.job  # type: ignore[no-any-return]
        return None

    def _begin_prefetch(self, row: int, expert: int, keep: frozenset[int]) -> _Job | None:
        slot = self.caches[row].admit(expert, demanded=False, keep=keep)
        if slot is None:
            return None
        self.counters.prefetched += 1
        return self._start_job(row, slot, demanded=False)

    # -- waiting and loading --------------------------------------------------------------------------------------

    def _wait(self, jobs: list[_Job]) -> None:
        """Wait until one of ``jobs`` is ready. Raises the error of a job that failed."""
        if any(job.ready for job in jobs):
            return
        start = time.perf_counter()
        with self._change:
            while not (self._ended or any(job.ready or job.error for job in jobs)):
                self._change.wait()
            self.counters.stall_seconds += time.perf_counter() - start
        for error in (*(job.error for job in jobs), self._ended):
            if error is not None:
                raise error

    def _start_thread(self) -> None:
        self._thread = threading.Thread(target=self._run, name="experts", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        """The thread."""
        try:
            self._load()
        except BaseException as error:  # a bug: the model must not wait forever
            with self._change:
                self._ended = SpecDecError(f"loading of experts has ended ({error!r}); make a new decoder")
                self._change.notify_all()

    def _load(self) -> None:
        """Load one chunk of the most urgent job at a time."""
        done: tuple[_Job, int, Exception | None] | None = None
        while True:
            with self._change:
                if done is not None and not done[0].cancelled:
                    self._finish(*done)
                while (job := self._next_job()) is None and not self._closed:
                    self._idle = True
                    self._change.notify_all()
                    self._change.wait()
                if job is None or self._closed:
                    return
                urgent, start, stop = job in self._demands, job.done, min(job.done + CHUNK, self.stride)
            error = None
            try:
                stop = self.tier.read(job.block, job.memory, start, stop)
            except SpecDecError as refused:
                error = refused
            except Exception as failed:  # the waiting model must get it
                reason = getattr(failed, "strerror", None) or failed
                error = SpecDecError(f"loading {self.index.name(job.block)} failed: {reason}")
            done = job, stop, error
            if urgent:  # these counters are this thread's alone
                self.counters.bytes_demand += stop - start
            else:
                self.counters.bytes_prefetch += stop - start

    def _finish(self, job: _Job, stop: int, error: Exception | None) -> None:
        urgent = job in self._demands
        if error is None:
            job.done = stop
            if stop < self.stride:
                return
            job.ready = True
        elif job.demanded:
            job.error = error
            self._forget(job)
        else:
            self.counters.failed += 1
            if urgent:  # demanded meanwhile: read again
                job.done, job.demanded = 0, True
                return
            self._forget(job)
        if urgent:
            self._demands.remove(job)
        self._change.notify_all()

    def _forget(self, job: _Job) -> None:
        """Empty the slot of a failed job. A user that has pinned it gets the error, and releases it."""
        row, expert = divmod(job.block, self.index.num_experts)
        self._forecasts.pop(row, None)  # else it would be tried again and again
        slot = self.caches[row].where[expert]
        if slot.pins:
            del self.caches[row].where[expert]
            slot.expert, slot.prefetched = None, False
        else:
            self.caches[row].evict(slot)


# A fork copies locks in their state, so they are acquired before it and released after it.
_open: weakref.WeakSet[ExpertStore] = weakref.WeakSet()
_forking: list[ExpertStore] = []


def _before_fork() -> None:
    _forking.extend(_open)
    for store in _forking:
        store._change.acquire()


def _after_fork() -> None:
    while _forking:
        _forking.pop()._change.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


def budget_bytes(budget: float, total: int) -> int:
    """Bytes of an expert cache given as a share (float in (0, 1]) or as bytes (int). Raises SpecDecError for others."""
    if isinstance(budget, int) and budget > 1:
        return budget
    if not 0 < budget <= 1:
        raise SpecDecError(f"an expert cache is a share in (0, 1] or a number of bytes; got {budget}")
    return int(budget * total + 0.5)


def slots_per_layer(budget: float, shape: tuple[int, int, int], top_k: int) -> int:
    """Experts of each layer that ``budget`` holds. Raises SpecDecError for fewer than one token needs.

    shape: number of layers, of experts of each, and bytes of an expert.
    """
    size, (rows, experts, each) = budget_bytes(budget, math.prod(shape)), shape
    per_layer = min(size // (rows * each), experts)
    if per_layer < top_k:
        least = rows * top_k * each
        raise SpecDecError(
            f"an expert cache of {size / 1e6:.4g} MB holds {per_layer} experts per layer, but one token "
            f"needs {top_k}; give at least {least / math.prod(shape):.3g} ({least / 1e6:.4g} MB)"
        )
    return per_layer
