"""Experts in slow memory: caches and stores by their invariants."""

from __future__ import annotations

import errno
import os
import signal
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_experts import RecordingStore, replay, settle

from specdec.base.errors import SpecDecError
from specdec.runtimes.experts import packed, tiers
from specdec.runtimes.experts.cache import LayerCache
from specdec.runtimes.experts.store import ExpertStore, Forecast, budget_bytes

EXPERTS, ROWS = 6, 2
INDEX = packed.Index("0", "float32", list(range(ROWS)), EXPERTS, 4, 3, [0] * ROWS * EXPERTS)


class Shelf:
    """A tier in memory: block b is filled with the byte b, at most ``chunk`` bytes a read.

    ``gate`` holds reads back; ``broken`` blocks raise.
    """

    note, chunk = "", tiers.CHUNK

    def __init__(self) -> None:
        self.held = threading.Semaphore(0)  # reads that came to a closed gate
        self.reads: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.broken: dict[int, list[Exception]] = {}

    def slots(self, count):
        return tiers.aligned(count, INDEX.stride)

    def read(self, block, slot, start, stop):
        if not self.gate.is_set():
            self.held.release()
        self.gate.wait()
        self.reads.append(block)
        if self.broken.get(block):
            raise self.broken[block].pop(0)
        stop = min(stop, start + self.chunk)
        slot[start:stop] = block
        return stop

    def acquire(self, slot): ...

    def release(self, slot): ...

    def close(self): ...


@pytest.fixture
def shelf():
    return Shelf()


@pytest.fixture
def store(shelf):
    made = ExpertStore(INDEX, shelf, ROWS * 3 * INDEX.stride, 2)
    yield made
    shelf.gate.set()
    made.close()


def use(store: ExpertStore, row: int, experts: list[int]) -> list[int]:
    """Demand experts, look at what is in their slots, and return them in the order they came."""
    order = []
    with store.demand(row, experts) as groups:
        for expert, slot in (pair for group in groups for pair in group):
            block, weights = row * INDEX.num_experts + expert, store.weights[row]
            assert all(bool((each[slot].view(torch.uint8) == block).all()) for each in weights)
            order.append(expert)
    return order


def prefetch(store: ExpertStore, row: int, experts: list[int], spare=(), due: float = 0.0) -> None:
    """Have experts loaded ahead, the first ones first, but not in the place of those to spare."""
    need = [2.0 if expert in spare else 0.0 for expert in range(EXPERTS)]
    for place, expert in enumerate(experts):
        need[expert] = 1 - place / 100
    store.prefetch({row: Forecast(need, experts, due=due)})


def check(store: ExpertStore, slots: int) -> None:
    count, caches = store.counters, store.caches
    inside = sum(len(cache.where) for cache in caches)
    assert store.resident_bytes <= store.budget
    assert inside <= ROWS * slots and not any(slot.pins for cache in caches for slot in cache.slots)
    assert count.in_time + count.late + count.misses == count.demanded
    assert count.misses + count.prefetched == count.evictions + inside
    assert all(cache.where[s.expert] is s for cache in caches for s in cache.slots if s.expert is not None)


SET = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS, unique=True)
CALLS = st.lists(
    st.tuples(st.sampled_from(("use", "prefetch")), st.integers(0, ROWS - 1), SET, SET), min_size=1, max_size=40
)


@settings(max_examples=60, deadline=None)
@given(CALLS, st.integers(1, EXPERTS), st.booleans(), st.booleans())
def test_every_byte_is_accounted_for_and_a_replay_agrees(calls, slots, chunked, in_time):
    shelf = Shelf()
    shelf.chunk = 4096 if chunked else tiers.CHUNK
    store = RecordingStore(INDEX, shelf, ROWS * slots * INDEX.stride, 1)
    try:
        for kind, row, experts, spare in calls:
            before = set(store.caches[row].where)
            if kind == "use":
                assert sorted(use(store, row, sorted(experts))) == sorted(experts)
            else:
                prefetch(store, row, experts, spare)
                if in_time:
                    settle(store)
            with store._change:
                if kind == "prefetch":
                    assert before & {*spare} - {*experts} <= set(store.caches[row].where)
                check(store, slots)
        settle(store)
        count = store.counters
        same = replay(store.trace, slots)
        assert (same.demanded, same.hits, same.prefetched) == (count.demanded, count.hits, count.prefetched)
        assert (same.evictions, same.unused) == (count.evictions, count.unused)
    finally:
        store.close()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, EXPERTS - 1)), max_size=60), st.integers(1, 4))
def test_experts_that_are_pinned_stay_in_the_cache(steps, slots):
    cache, pinned = LayerCache(slots), {}
    for action, expert in steps:
        if action == 0 and expert in cache.where:
            pinned[expert] = cache.pin(expert)
        elif action == 1 and expert in pinned:
            slot = pinned.pop(expert)
            while slot.pins:
                cache.release(slot)
        elif action >= 2 and expert not in cache.where:
            slot = cache.admit(expert, demanded=action == 3)
            assert (slot is None) == (len(pinned) == slots)
            if slot is not None and action == 3:
                pinned[expert] = slot
        assert all(cache.where.get(e) is slot and slot.expert == e for e, slot in pinned.items())


def begun(store: ExpertStore) -> None:
    """Wait until a read is held back by the gate."""
    assert store.tier.held.acquire(timeout=300)


def open_on_demand(store: ExpertStore) -> None:
    """Open the gate once an expert is demanded."""

    def wait() -> None:
        with store._change:
            store._change.wait_for(lambda: store._demands, 60)
        store.tier.gate.set()

    threading.Thread(target=wait).start()


def failed(store: ExpertStore) -> None:
    """Wait until a prefetch has failed."""
    with store._change:
        assert store._change.wait_for(lambda: store.counters.failed, 60)


def test_demands_overtake_prefetches(store, shelf):
    shelf.gate.clear()
    prefetch(store, 0, [0, 1])
    begun(store)
    open_on_demand(store)
    assert use(store, 1, [4]) == [4]
    assert shelf.reads[:2] == [0, 10]
    settle(store)
    assert use(store, 0, [0, 1]) and store.counters.misses == 1


def test_what_is_due_first_is_loaded_first(store, shelf):
    shelf.gate.clear()
    prefetch(store, 1, [3, 4], due=2)
    begun(store)
    prefetch(store, 0, [1, 0], due=1)
    shelf.gate.set()
    settle(store)
    assert shelf.reads == [9, 1, 0, 10]


def test_what_there_was_no_time_for_puts_nothing_out(store, shelf):
    use(store, 0, [0, 1, 2])
    shelf.gate.clear()
    prefetch(store, 0, [3, 4, 5])
    begun(store)
    assert set(store.caches[0].where) == {1, 2, 3}
    assert use(store, 0, [1, 2]) == [1, 2]  # while 3 is still being read
    shelf.gate.set()
    settle(store)
    assert shelf.reads == [0, 1, 2, 3] and store.counters.prefetched == 1


def test_a_forecast_takes_the_place_of_the_one_before(store, shelf):
    shelf.gate.clear()
    prefetch(store, 0, [3, 4])
    begun(store)
    prefetch(store, 0, [5])
    shelf.gate.set()
    settle(store)
    assert shelf.reads == [3, 5]


def test_one_that_is_needed_as_much_stays(store, shelf):
    use(store, 0, [0, 1, 2])
    store.prefetch({0: Forecast([0.2, 0.5, 0.9, 0.6, 0.4, 0.7], [2, 5, 3], margin=0.15)})
    settle(store)
    assert set(store.caches[0].where) == {1, 2, 5}  # 5 for 0; but 3 is not needed clearly more than 1


def test_a_chunked_prefetch_gives_way_between_chunks(shelf):
    index = packed.Index("0", "float32", [0], 4, 64, 64, [0] * 4)  # 12 chunks of 4096
    shelf.slots = lambda count: tiers.aligned(count, index.stride)
    shelf.chunk = 4096
    store = ExpertStore(index, shelf, 2 * index.stride, 1)
    shelf.gate.clear()
    prefetch(store, 0, [0])
    begun(store)
    open_on_demand(store)
    with store.demand(0, [1]) as stream:
        assert [expert for group in stream for expert, _ in group] == [1]
    first = shelf.reads.index(1)
    assert first == 1 and shelf.reads[first : first + 12] == [1] * 12
    store.close()


def test_a_prefetch_puts_out_nothing_that_is_in_use(store):
    use(store, 0, [0, 1, 2])
    with store.demand(0, [0, 1]) as stream:
        next(stream)
        prefetch(store, 0, [4, 5])
        settle(store)
        assert set(store.caches[0].where) == {0, 1, 4}


def test_more_experts_than_slots_pass_through(store):
    assert use(store, 0, [0, 1]) == [0, 1]
    assert sorted(use(store, 0, list(range(EXPERTS)))) == list(range(EXPERTS))
    assert store.counters.in_time == 2


def test_a_failed_prefetch_is_forgotten_and_read_anew_on_demand(store, shelf):
    shelf.broken[3] = [OSError(errno.EIO, "Input/output error")]
    prefetch(store, 0, [3])
    failed(store)
    settle(store)
    assert 3 not in store.caches[0].where and shelf.reads == [3]
    assert use(store, 0, [3]) == [3]


def test_a_prefetch_that_fails_after_it_was_demanded_is_tried_again(store, shelf):
    shelf.broken[3] = [OSError(errno.EIO, "Input/output error")]
    shelf.gate.clear()
    prefetch(store, 0, [3])
    begun(store)
    open_on_demand(store)
    assert use(store, 0, [3]) == [3] and shelf.reads == [3, 3]


def test_a_failed_demand_is_one_line_and_the_store_goes_on(store, shelf):
    shelf.broken[3] = [OSError(errno.EIO, "Input/output error")]
    with pytest.raises(SpecDecError, match="loading expert 3 of layer 0 failed: Input/output error"):
        use(store, 0, [2, 3, 4])
    assert not any(slot.pins for slot in store.caches[0].slots)
    assert use(store, 0, [2, 3, 4]) == [2, 4, 3]


def test_a_demand_on_a_thread_that_has_ended_raises_the_reason(store, monkeypatch):
    assert use(store, 0, [0]) == [0]
    monkeypatch.setattr(store, "_finish", lambda *_: 1 / 0)
    monkeypatch.setattr("threading.excepthook", lambda _: pytest.fail("the thread ended silently"))
    for experts in ([1], [2]):
        with pytest.raises(
            SpecDecError, match=r"loading of experts has ended \(ZeroDivisionError.*; make a new decoder"
        ):
            use(store, 0, experts)
    prefetch(store, 1, [5])
    assert use(store, 0, [0]) == [0]  # what is there stays
    assert not store._thread.is_alive() and not any(slot.pins for slot in store.caches[0].slots)


def test_an_iteration_that_is_given_up_holds_nothing(store):
    with store.demand(0, [0, 1]) as stream:
        next(stream)
    with store.demand(0, [0, 1]):
        pass
    assert not any(slot.pins for slot in store.caches[0].slots)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("loading", [False, True])
def test_a_forked_child_loads_experts_too(store, shelf, loading):
    use(store, 0, [0, 1])
    if loading:  # the thread is in the middle of a read, and the child does not inherit it
        shelf.gate.clear()
        prefetch(store, 1, [3])
        begun(store)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)  # a child that waits for ever is ended, and is a failure
            shelf.gate.set()
            status = int((use(store, 0, [0, 1]), use(store, 1, [3]), use(store, 0, [4])) != ([0, 1], [3], [4]))
            store.close()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    shelf.gate.set()
    assert use(store, 1, [3]) == [3]  # and the parent goes on


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_waits_until_the_loading_thread_has_left_its_lock(store):
    """Else the child has a lock that nobody will ever release, around a state that is half changed."""
    entered, leave, real = threading.Event(), threading.Event(), store._finish

    def finish(*args):
        if not entered.is_set():
            entered.set()
            leave.wait(0.5)  # a fork that does not wait happens here
        real(*args)

    store._finish = finish
    prefetch(store, 0, [0])
    assert entered.wait(300)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)
            status = int(use(store, 0, [0, 1]) != [0, 1])
        finally:
            os._exit(status)
    leave.set()
    assert os.waitpid(child, 0)[1] == 0
    assert use(store, 0, [0]) == [0] and store.counters.in_time == 1


def test_no_cache_keeps_nothing():
    shelf = Shelf()
    store = RecordingStore(INDEX, shelf, ROWS * 2 * INDEX.stride, 2, caching=False)
    for _ in range(3):
        use(store, 0, [0, 1])
    assert store.counters.hits == 0 and shelf.reads == [0, 1] * 3
    store.close()


@pytest.mark.parametrize("budget", [0, -1, 1.5, 0.0])
def test_a_budget_that_is_neither_share_nor_bytes_is_refused(budget):
    with pytest.raises(SpecDecError, match="share in"):
        budget_bytes(budget, INDEX.total_bytes)


def test_a_cache_smaller_than_one_token_is_refused():
    with pytest.raises(SpecDecError, match=r"holds 1 experts per layer, but one token needs 2; give at least 0.333"):
        ExpertStore(INDEX, Shelf(), 0.2, 2)
