"""The expert store: slots in fast memory, a cache per layer, and one thread that loads what is demanded or foreseen.

Demands come first, then what is foreseen, by layers in the order of their demands: between any two chunks the thread
turns to what is now the foremost, and takes up the other again afterwards; a demand hurries the prefetch that is being
read. An expert that is foreseen puts out another one only as its loading begins: until then forecasts may change, and
what there is no time for costs nothing. A failed prefetch is forgotten; the demand that follows reads anew. One thread,
so that a slot given to another expert is never written by two. Should it end, whoever waits for it hears why.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from specdec.errors import SpecDecError
from specdec.experts.cache import Evicted, LayerCache, Slot
from specdec.experts.packed import Index
from specdec.experts.tiers import CHUNK, Tier

ALIKE = 0.05  # needs so far apart are one: among the least needed, the cache's own order of eviction decides
FADES = 0.98  # how much of its weight a transfer has in the measured speed when the next one has been made
APART = 4 << 20  # bytes of experts below which those that are there are not computed with before the others are, too

Group = list[tuple[int, int]]  # experts and the numbers of their slots
Event = tuple[str, int, tuple[int, ...], tuple[int, ...]]  # "use" or "prefetch", row, experts, those to spare


@dataclass
class Counters(Evicted):
    """What a store has done. Experts are counted per layer and demand (one pass over any number of tokens).

    demanded = hits + misses; hits = in_time + late: there when demanded, or on their way by a prefetch. prefetched:
    begun ahead. bytes_demand, bytes_prefetch: read for either (what a demand took over in mid-transfer counts for
    both). stall_seconds: the model waited. failed: prefetches that did. misses_alone, alone_seconds: misses if nothing
    were loaded ahead, and the waiting for them, reckoned by ``byte_seconds``.
    """

    demands: int = 0
    demanded: int = 0
    in_time: int = 0
    late: int = 0
    misses: int = 0
    prefetched: int = 0
    failed: int = 0
    bytes_demand: int = 0
    bytes_prefetch: int = 0
    stall_seconds: float = 0.0
    misses_alone: int = 0
    alone_seconds: float = 0.0

    @property
    def hits(self) -> int:
        return self.in_time + self.late

    @property
    def bytes(self) -> int:
        return self.bytes_demand + self.bytes_prefetch

    def since(self, earlier: Counters) -> Counters:
        old = asdict(earlier)
        return Counters(**{name: value - old[name] for name, value in asdict(self).items()})


class _Job:
    """Loading of one block into one slot."""

    def __init__(self, block: int, memory: Tensor, demanded: bool) -> None:
        self.block, self.memory, self.demanded = block, memory, demanded
        self.done = 0  # bytes
        self.ready = self.cancelled = False
        self.error: Exception | None = None


@dataclass
class Foreseen:
    """What a layer will need.

    need: of each of its E experts, any unit. wanted: those worth loading, the most needed first. margin: by how much
    more one must be needed than another that it puts out. due: when the layer demands them; the least is loaded first.
    patience: bytes; a layer that lacks no more has time enough later, when more is known.
    """

    need: list[float]
    wanted: list[int]
    margin: float = 0.0
    due: float = 0.0
    patience: float = 0.0

    def keeps(self, there: Collection[int], expert: int) -> frozenset[int]:
        """Those ``there`` that ``expert`` must not put out: all but the least needed, if these are clearly less so."""
        need = self.need
        least = min(need[expert] - self.margin, min(map(need.__getitem__, there), default=0.0) + ALIKE)
        return frozenset(other for other in there if need[other] >= least)


class ExpertStore:
    """Experts of the packed file ``index`` in at most ``budget`` bytes of fast memory, loaded through ``tier``.

    budget: bytes (int), or a share of all experts (float <= 1). top_k: experts that one token needs of a layer.
    Raises SpecDecError if a layer's part of the budget holds fewer.
    """

    def __init__(self, index: Index, tier: Tier, budget: float, top_k: int, eviction: str = "lru") -> None:
        self.index, self.tier, self.stride = index, tier, index.stride
        self.budget, rows = budget_bytes(budget, index), len(index.layers)
        per_layer = slots_per_layer(budget, index, top_k)
        self.memory = tier.slots(rows * per_layer).unflatten(0, (rows, per_layer))  # (rows, S, stride)
        # Per row: gate and up [S, 2 F, D], down [S, D, F] of all its slots.
        self.weights: list[tuple[Tensor, Tensor]] = [index.views(slots) for slots in self.memory]
        self.places = [list(slots) for slots in self.memory]  # uint8 [stride] each
        self.counters = Counters()
        self.caches = [LayerCache(per_layer, eviction, self.counters) for _ in range(rows)]
        self.jobs: list[list[_Job | None]] = [[None] * per_layer for _ in range(rows)]
        self.trace: list[Event] | None = None  # set to a list to record
        self._recent: list[list[int]] = [[] for _ in range(rows)]  # what each cache would hold without prefetching
        self._demands: deque[_Job] = deque()
        self._foreseen: dict[int, Foreseen] = {}  # by row
        self._reading: _Job | None = None
        self._pace = 0.0, 0.0  # seconds, and the bytes loaded in them, of late
        self._resting = True
        self._change = threading.Condition()
        self._closed = False
        self._ended: SpecDecError | None = None  # why the thread did, unasked
        self._thread = threading.Thread(target=self._run, name="experts", daemon=True)
        self._thread.start()

    @property
    def resident_bytes(self) -> int:
        """Fast memory taken: all slots, filled or not."""
        return self.memory.numel()

    @property
    def byte_seconds(self) -> float:
        """What loading a byte takes, of late; 0 before anything was loaded."""
        spent, loaded = self._pace
        return spent / loaded if loaded else 0.0

    @property
    def resting(self) -> bool:
        """Whether there is nothing to load."""
        with self._change:
            return self._resting

    @contextmanager
    def demand(self, row: int, experts: Sequence[int]) -> Iterator[Iterator[Group]]:
        """Request ``experts`` (ascending) of a layer for computing with them now; iterate over what it enters with.

        What is missing is being loaded from then on. Groups of experts come as they are there, the cached ones first,
        with their slots in ``weights[row]``, and are held until the end. More experts than slots pass through one by
        one, each held until the next is asked for.
        """
        cache = self.caches[row]
        held: deque[tuple[int, Slot]] = deque()
        with self._change:
            self._record("use", row, experts)
            self._foreseen.pop(row, None)
            for emptied in cache.begin():
                self._abandon(row, emptied)
            held += [(expert, slot) for expert in experts if (slot := cache.pin(expert)) is not None]
            there = {expert for expert, _ in held}
            missing = deque(expert for expert in experts if expert not in there)
            count = self.counters
            count.demands, count.demanded = count.demands + 1, count.demanded + len(experts)
            count.misses += len(missing)
            late = [job for _, slot in held if not (job := self._job(row, slot)).ready]
            for job in late:
                self._urge(job)
            count.in_time, count.late = count.in_time + len(held) - len(late), count.late + len(late)
            alone = self._alone(row, experts)
            count.misses_alone += alone
            count.alone_seconds += alone * self.stride * self.byte_seconds
            held += self._admit(row, missing)
        try:
            yield self._together(row, held) if len(experts) <= len(cache.slots) else self._in_turn(row, held, missing)
        finally:
            with self._change:
                for _, slot in held:
                    cache.release(slot)

    def _alone(self, row: int, experts: Sequence[int]) -> int:
        """How many of ``experts`` a cache (LRU) would lack that is asked for demands only."""
        recent = self._recent[row]
        missing = [expert for expert in experts if expert not in recent]
        there = [expert for expert in experts if expert in recent]
        older = [expert for expert in recent if expert not in there]
        self._recent[row] = (older + there + missing)[-len(self.caches[row].slots) :]
        return len(missing)

    def _together(self, row: int, held: Sequence[tuple[int, Slot]]) -> Iterator[Group]:
        waiting, places = [(expert, slot, self._job(row, slot)) for expert, slot in held], self.places[row]
        if len(waiting) * self.stride < APART:
            for _, _, job in waiting:
                self._wait([job])
        while waiting:
            there = [each for each in waiting if each[2].ready]
            if not there:
                self._wait([job for _, _, job in waiting])
                continue
            for _, slot, _ in there:
                self.tier.acquire(places[slot.number])
            yield [(expert, slot.number) for expert, slot, _ in there]
            for _, slot, _ in there:
                self.tier.release(places[slot.number])
            waiting = [each for each in waiting if each not in there]

    def _in_turn(self, row: int, held: deque[tuple[int, Slot]], missing: deque[int]) -> Iterator[Group]:
        cache, places = self.caches[row], self.places[row]
        while held:  # in an order that does not depend on time, as what they evict depends on it
            expert, slot = held[0]
            self._wait([self._job(row, slot)])
            self.tier.acquire(places[slot.number])
            yield [(expert, slot.number)]
            self.tier.release(places[slot.number])
            with self._change:
                held.popleft()
                cache.release(slot)
                held += self._admit(row, missing)

    def foresee(self, seen: dict[int, Foreseen]) -> None:
        """Load ahead of its next demand what a row is foreseen to need; takes the place of what was before, by row.

        Never puts out an expert in use or demanded, nor one that is needed as much.
        """
        with self._change:
            self._foreseen |= seen
            if self._resting and not all(self._ready(row, e) for row, each in seen.items() for e in each.wanted):
                self._resting = False
                self._change.notify_all()

    def close(self) -> None:
        """End the thread and free the slots. The store is of no use afterwards."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()
        self.tier.close()
        self.memory, self.weights, self.places = self.memory.new_empty(0), [], []

    # -- under the lock -----------------------------------------------------------------------------------------

    def _record(self, what: str, row: int, experts: Sequence[int], spare: frozenset[int] = frozenset()) -> None:
        if self.trace is not None:
            self.trace.append((what, row, tuple(experts), tuple(sorted(spare))))

    def _ready(self, row: int, expert: int) -> bool:
        slot = self.caches[row].where.get(expert)
        return slot is not None and self._job(row, slot).ready

    def _job(self, row: int, slot: Slot) -> _Job:
        job = self.jobs[row][slot.number]
        assert job is not None
        return job

    def _admit(self, row: int, missing: deque[int]) -> deque[tuple[int, Slot]]:
        admitted: deque[tuple[int, Slot]] = deque()
        while missing and (slot := self.caches[row].admit(missing[0], demanded=True)) is not None:
            self._start(row, slot, demanded=True)
            admitted.append((missing.popleft(), slot))
        return admitted

    def _start(self, row: int, slot: Slot, demanded: bool) -> _Job:
        self._abandon(row, slot)
        assert slot.expert is not None
        job = _Job(row * self.index.num_experts + slot.expert, self.places[row][slot.number], demanded)
        self.jobs[row][slot.number] = job
        if demanded:
            self._urge(job)
        return job

    def _abandon(self, row: int, slot: Slot) -> None:
        """What is still being loaded into the slot is of no use any more."""
        job = self.jobs[row][slot.number]
        if job is not None and not job.ready:
            job.cancelled = True
            if job in self._demands:
                self._demands.remove(job)

    def _urge(self, job: _Job) -> None:
        if job not in self._demands:
            self._demands.append(job)
        if self._reading not in (None, *self._demands):
            self.tier.hurry()
        self._resting = False
        self._change.notify_all()

    def _foremost(self) -> _Job | None:
        """What to load now."""
        if self._demands:
            return self._demands[0]
        for row, seen in sorted(self._foreseen.items(), key=lambda each: each[1].due):
            job = self._ahead(row, seen)
            if job is not None:
                return job
            del self._foreseen[row]  # it has all it can have
        return None

    def _ahead(self, row: int, seen: Foreseen) -> _Job | None:
        """The most needed of what the row foresees and has not, begun now if it was not before."""
        cache = self.caches[row]
        if seen.patience and sum(not self._ready(row, e) for e in seen.wanted) * self.stride <= seen.patience:
            return None
        for expert in seen.wanted:
            slot = cache.where.get(expert)
            if slot is not None:
                if not (job := self._job(row, slot)).ready:
                    return job
                continue
            spare = seen.keeps(cache.where, expert)
            slot = cache.admit(expert, demanded=False, spare=spare)
            if slot is None:
                return None
            self._record("prefetch", row, (expert,), spare)
            self.counters.prefetched += 1
            return self._start(row, slot, demanded=False)
        return None

    # -- waiting and loading --------------------------------------------------------------------------------------

    def _wait(self, jobs: list[_Job]) -> None:
        """Until one of ``jobs`` is ready. Raises what made one of them fail."""
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

    def _run(self) -> None:
        """The thread."""
        try:
            self._load()
        except BaseException as error:  # a fault of ours
            with self._change:
                self._ended = SpecDecError(f"loading of experts has ended ({error!r}); make a new decoder")
                self._change.notify_all()

    def _load(self) -> None:
        """One chunk of the foremost job at a time."""
        done: tuple[_Job, int, Exception | None] | None = None
        while True:
            with self._change:
                self._reading = None
                if done is not None and not done[0].cancelled:
                    self._finish(*done)
                while (job := self._foremost()) is None and not self._closed:
                    self._resting = True
                    self._change.notify_all()
                    self._change.wait()
                if job is None or self._closed:
                    return
                self._reading, urgent = job, job in self._demands
                start, stop = job.done, min(job.done + CHUNK, self.stride)
            began, error = time.perf_counter(), None
            try:
                reached = self.tier.read(job.block, job.memory, start, stop)
                if not (isinstance(reached, int) and start < reached <= stop):
                    raise ValueError(f"the slow memory was asked for bytes {start} to {stop}, and came to {reached}")
                stop = reached
            except SpecDecError as refused:
                error = refused
            except Exception as failed:  # of whatever type: the waiting model has to hear of it
                error = SpecDecError(f"loading {self.index.name(job.block)} failed: {_reason(failed)}")
            done = job, stop, error
            if error is None:
                spent = time.perf_counter() - began
                self._pace = FADES * self._pace[0] + spent, FADES * self._pace[1] + stop - start
            count = self.counters  # these are this thread's alone
            if urgent:
                count.bytes_demand += stop - start
            else:
                count.bytes_prefetch += stop - start

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
            if urgent:  # demanded meanwhile: begun anew
                job.done, job.demanded = 0, True
                return
            self._forget(job)
        if urgent:
            self._demands.remove(job)
        self._change.notify_all()

    def _forget(self, job: _Job) -> None:
        """Empty the slot of a job that failed; one that is pinned is emptied by the error that its user gets."""
        row, expert = divmod(job.block, self.index.num_experts)
        self._foreseen.pop(row, None)  # it would be tried again and again
        slot = self.caches[row].where[expert]
        if slot.pins:
            del self.caches[row].where[expert]
            slot.expert, slot.speculative = None, False
        else:
            self.caches[row].drop(slot)


def budget_bytes(budget: float, index: Index) -> int:
    """Bytes of an expert cache given as a share (float in (0, 1]) or as bytes (int). Raises SpecDecError for others."""
    if isinstance(budget, int) and budget > 1:
        return budget
    if not 0 < budget <= 1:
        raise SpecDecError(f"an expert cache is a share in (0, 1] or a number of bytes; got {budget}")
    return int(budget * index.total_bytes + 0.5)


def slots_per_layer(budget: float, index: Index, top_k: int) -> int:
    """Experts of each layer that ``budget`` holds. Raises SpecDecError for fewer than one token needs."""
    size, rows = budget_bytes(budget, index), len(index.layers)
    per_layer = min(size // (rows * index.stride), index.num_experts)
    if per_layer < top_k:
        least = rows * top_k * index.stride
        raise SpecDecError(
            f"an expert cache of {size / 1e6:.4g} MB holds {per_layer} experts per layer, but one token "
            f"needs {top_k}; give at least {least / index.total_bytes:.3g} ({least / 1e6:.4g} MB)"
        )
    return per_layer


def _reason(error: Exception) -> Any:
    return getattr(error, "strerror", None) or error
