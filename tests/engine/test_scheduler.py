"""Requests come and go at any time; each gets the tokens that a quiet engine gives it alone."""

from __future__ import annotations

import asyncio
import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from scripted import Clock, Scripted
from tiny import tiny_model
from transformers import PreTrainedModel
from zoo import PROMPTS, finish, new_tokens, run, step, together

from specdec import SpecDecError, SpecDecoder
from specdec.base.errors import QueueFullError
from specdec.drafters.none import NoDrafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.engine import batch, memory, scheduler
from specdec.engine.depth import AutoDepth, FixedDepth
from specdec.engine.engine import Engine
from specdec.engine.memory import PrefillBatch, cache_sizes
from specdec.engine.request import Handle, Request, Status
from specdec.kvcache.cache import KVCache
from specdec.kvcache.prefix import MAX_PREFIXES, PrefixStore
from specdec.runtimes.native import library
from specdec.runtimes.native.target import NativeTarget
from specdec.runtimes.target import Target, TokenCosts
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation.drafter import Drafter
from specdec.verifiers.exact import ExactVerifier

needs_native = pytest.mark.skipif(not library.runs(), reason="there are no native kernels here")


def alone(target: Target, request: Request) -> tuple[list[int], str | None]:
    own = Request(request.prompt, request.max_new_tokens, request.sampler, eos=request.eos)
    together(target, NoDrafter(), [own], FixedDepth(0))
    return new_tokens(own), own.finish_reason


def test_texts_of_one_scope_are_not_gone_on_with_in_another(llama: PreTrainedModel) -> None:
    target = TransformersTarget(llama)
    engine = Engine(target, NoDrafter(), ExactVerifier(), FixedDepth(0), prefixes=PrefixStore())
    prompt, known = list(range(3, 60)), []
    for scope in (None, "a", "b", "a", None):
        request = Request(prompt, 3, scope=scope)
        finish(engine, request)
        known.append(request.metrics.num_cached_tokens)
    assert known == [0, 0, 0, 56, 56]
    running = Request(prompt[:40], 30, scope="c")  # nor do running texts serve others, whose prompts wait for none
    engine.submit(running)
    step(engine)
    both = [Request(prompt[:41], 3, scope=scope) for scope in ("d", "c", "e")]
    finish(engine, *both)
    assert [request.metrics.num_cached_tokens for request in both] == [0, 40, 0]
    engine.close()


@needs_native
def test_kept_texts_count_what_they_hold_and_hold_little() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    target = NativeTarget(tiny_model("llama", **sizes).bfloat16())
    token_bytes, _ = cache_sizes(target)
    engine = Engine(
        target, NoDrafter(), ExactVerifier(), FixedDepth(0), kv_memory=600 * token_bytes, prefixes=PrefixStore()
    )
    for first in range(5, 45):
        engine.submit(Request([first, *range(10, 30)], 4))  # room for many more tokens is made for each
        finish(engine)
        kept = engine.scheduler.memory.prefixes.entries
        held = [data.nbytes for prefix in kept for data in prefix.cache.data if data is not None]  # type: ignore[attr-defined]
        assert sum(held) == engine.stats().kv_bytes <= 600 * token_bytes
    assert len(kept) > 8


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_native)])
def test_running_rows_count_what_they_hold(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers have room for what is to come, and where rows are padded, each holds as much as the longest."""
    monkeypatch.setattr("specdec.kvcache.cache.BLOCK", 16)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    target = (
        NativeTarget(tiny_model("llama", **sizes).bfloat16()) if native else TransformersTarget(tiny_model("llama"))
    )
    memory = 400 * cache_sizes(target)[0]
    requests = [Request([5 + n, *range(3, 96 if n == 3 else 10)], 28) for n in range(12)]
    engine = Engine(
        target, NoDrafter(), ExactVerifier(), FixedDepth(0), max_rows=8, kv_memory=memory, prefixes=PrefixStore()
    )
    for request in requests:
        engine.submit(request)
    most = 0
    for _ in engine.steps():
        scheduled = engine.scheduler
        caches = [engine.batch.cache, scheduled.prefilling.cache]
        held = sum(
            map(buffers, [*filter(None, caches), *(prefix.cache for prefix in scheduled.memory.prefixes.entries)])
        )
        assert held == engine.stats().kv_bytes <= memory
        most = max(most, engine.stats().running)
    assert most >= 3 and all(new_tokens(request) == alone(target, request)[0] for request in requests)


def buffers(cache: KVCache) -> int:
    """Bytes."""
    return sum(buffer.nbytes for row in cache.entries for buffer in row.buffers.values())


def test_a_longer_text_begins_where_an_earlier_one_ended(llama: PreTrainedModel) -> None:
    """The next turn of a chat reads only what is new, and so does a request beside a running one."""
    target, drafter = TransformersTarget(llama), PromptLookupDrafter()
    engine = Engine(target, drafter, ExactVerifier(), FixedDepth(3), prefixes=PrefixStore())
    first = Request(list(range(3, 40)), 12)
    finish(engine, first)
    second = Request([*first.ids, 50, 51, 52], 12)
    engine.submit(second)
    step(engine)
    beside = Request([*second.prompt[:30], 60], 12)
    finish(engine, beside)
    assert second.metrics.num_cached_tokens == len(first.ids) - 1 and beside.metrics.num_cached_tokens == 30
    for request in (second, beside):
        assert new_tokens(request) == alone(target, request)[0]


@pytest.mark.parametrize("reuse", [True, False])
def test_a_prompt_in_the_background_waits_for_others_which_begin_with_it(
    llama: PreTrainedModel, reuse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "TIMED", 8)
    target = TransformersTarget(llama)
    engine = Engine(
        target,
        NoDrafter(),
        ExactVerifier(),
        FixedDepth(0),
        prefill_chunk=16,
        max_rows=1,
        prefixes=PrefixStore() if reuse else None,
    )
    prompt = [3 + n * n % 90 for n in range(80)]
    warm, asked, other = Request(prompt, 0), Request([*prompt[:30], 7, 8], 6), Request([9, 8, 7], 3)
    warm.background = True
    engine.submit(warm)
    step(engine)
    step(engine)
    assert warm.status is Status.PREFILL and engine.scheduler.prefilling.cache.rows == [32]
    engine.submit(asked)
    engine.submit(other)
    while asked.status is not Status.FINISHED or other.status is not Status.FINISHED:
        step(engine)
        assert warm.status is Status.WAITING
    finish(engine)
    assert warm.finish_reason == "length" and warm.metrics.num_cached_tokens == 0
    assert asked.metrics.num_cached_tokens == 30 * reuse
    assert (new_tokens(asked), asked.finish_reason) == alone(target, asked)
    last = Request([*prompt, 5], 3)
    engine.submit(last)
    finish(engine)
    assert last.metrics.num_cached_tokens == 80 * reuse and new_tokens(last) == alone(target, last)[0]
    saved = [request.metrics.saved_seconds for request in (warm, asked, other, last)]
    assert [seconds > 0 for seconds in saved] == [False, reuse, False, reuse]
    assert engine.stats().saved_seconds == sum(saved)


def test_a_background_request_that_is_cancelled_while_it_waits_is_gone(llama: PreTrainedModel) -> None:
    engine = Engine(
        TransformersTarget(llama), NoDrafter(), ExactVerifier(), FixedDepth(0), prefill_chunk=8, prefixes=PrefixStore()
    )
    warm, asked = Request(list(range(3, 60)), 0), Request([9, 8, 7], 3)
    warm.background = True
    handle = engine.submit(warm)
    step(engine)
    engine.submit(asked)
    step(engine)
    handle.cancel()
    finish(engine)
    assert warm.finish_reason == "cancelled" and asked.finish_reason == "length" and not engine.scheduler.running


def test_running_rows_wait_for_a_bounded_part_of_a_prompt(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, parts = TransformersTarget(llama), list[int]()
    run_tokens = batch.run_tokens

    def spy(target: Target, cache: Any, rows: list[list[int]], *more: Any) -> torch.Tensor:
        parts.append(sum(map(len, rows)))
        return run_tokens(target, cache, rows, *more)

    monkeypatch.setattr(batch, "run_tokens", spy)
    engine = Engine(target, NoDrafter(), ExactVerifier(), FixedDepth(0), prefill_chunk=8)
    running = Request(PROMPTS[0], 40)
    engine.submit(running)
    step(engine)
    parts.clear()
    for length in (50, 30):
        engine.submit(Request(list(range(3, 3 + length)), 4))
    went_on = 0
    while engine.scheduler.waiting or engine.scheduler.prefilling.rows:
        before = len(running.ids)
        step(engine)
        went_on += len(running.ids) == before + 1
    assert sum(parts) == 80 and max(parts) == 8 and went_on == len(parts)


def test_a_row_whose_drafts_fail_stops_while_its_neighbour_goes_on(llama: PreTrainedModel) -> None:
    target = TransformersTarget(llama)
    right = Request(PROMPTS[0], 60)
    together(target, NoDrafter(), [right], FixedDepth(0))

    def script(ids: list[int], limit: int) -> list[tuple[int, int]]:
        known = ids[: len(PROMPTS[0])] == PROMPTS[0]
        return [((right.ids[len(ids) + i] if known else 96) if len(ids) + i < 64 else 96, i) for i in range(limit)]

    requests = [Request(PROMPTS[0], 60), Request(PROMPTS[1], 60)]
    together(target, Scripted(script), requests, AutoDepth(token=TokenCosts(0.3), shares=(0.03,)))
    good, bad = (request.metrics for request in requests)
    beside = bad.per_step_drafted[: len(good.per_step_drafted)]
    assert sum(good.per_step_drafted) > 3 * sum(beside)


# -- threads, event loops and queues ----------------------------------------------------------------------------------


@pytest.fixture
def decoder(llama: PreTrainedModel) -> SpecDecoder:
    return SpecDecoder(llama, None, "prompt-lookup", runtime="transformers")


def test_requests_come_from_threads_and_from_an_event_loop(decoder: SpecDecoder) -> None:
    engine = decoder.engine(max_rows=3)
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        handle = engine.submit(Request(PROMPTS[number], 12))
        found[number] = [token for event in handle for token in event.tokens]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()

    async def ask_too() -> list[tuple[list[int], str | None]]:
        async def one(prompt: list[int]) -> tuple[list[int], str | None]:
            tokens, finished = list[int](), None
            async for event in engine.submit(Request(prompt, 12)):
                tokens, finished = tokens + event.tokens, event.finish_reason
            return tokens, finished

        return await asyncio.gather(*map(one, PROMPTS))

    results = asyncio.run(ask_too())
    for thread in threads:
        thread.join(300)
    engine.close(drain=True)
    for number, prompt in enumerate(PROMPTS):
        right = run(decoder.target, NoDrafter(), [prompt], 12, eos=None)[0][0]
        assert found[number] == right and results[number] == (right, "length")
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_bytes) == (0, 0, 0) and stats.steps > 0


def test_an_engine_has_the_drafter_to_itself_until_it_is_closed(decoder: SpecDecoder) -> None:
    engine = decoder.engine()
    with pytest.raises(SpecDecError, match="still open"):
        decoder.generate(PROMPTS[0])
    assert not engine.closed
    engine.close()
    assert engine.closed
    assert decoder.generate(PROMPTS[0], max_new_tokens=2).token_ids
    with pytest.raises(SpecDecError, match="the engine is closed"):
        engine.submit(Request(PROMPTS[0], 3))


def test_closing_ends_what_runs_and_draining_lets_it_end(decoder: SpecDecoder) -> None:
    for drain, reason in ((False, "cancelled"), (True, "length")):
        engine = decoder.engine(max_rows=1)
        handles = [engine.submit(Request(PROMPTS[0], 100)) for _ in range(2)]
        engine.close(drain=drain)
        ends = [[event.finish_reason for event in handle][-1] for handle in handles]
        assert ends == [reason] * 2


def test_a_full_queue_refuses_and_a_cancelled_request_makes_room(llama: PreTrainedModel) -> None:
    engine = Engine(TransformersTarget(llama), NoDrafter(), ExactVerifier(), FixedDepth(0), max_rows=1, max_waiting=1)
    handles = [engine.submit(Request(PROMPTS[0], 9)) for _ in range(2)]
    with pytest.raises(QueueFullError, match="requests are waiting already"):
        engine.submit(Request(PROMPTS[0], 9))
    handles[1].cancel()
    step(engine)
    assert [event.finish_reason for event in handles[1]] == ["cancelled"]
    third = engine.submit(Request(PROMPTS[1], 9))
    with pytest.raises(SpecDecError, match="this engine has no thread"):
        next(iter(third))
    handles[0].cancel()
    finish(engine)
    assert [event.finish_reason for event in third] == ["length"]


def test_of_a_reader_who_does_not_read_one_event_waits(llama: PreTrainedModel) -> None:
    engine = Engine(TransformersTarget(llama), NoDrafter(), ExactVerifier(), FixedDepth(0))
    request = Request(PROMPTS[0], 20)
    handle = engine.submit(request)
    finish(engine)
    events = list(handle)
    assert [event.tokens for event in events] == [new_tokens(request)] and events[0].finish_reason == "length"


def test_a_step_that_fails_ends_what_runs_and_the_engine_goes_on(
    decoder: SpecDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, layers = decoder.engine(), decoder.target.layers

    def broken(*arguments: Any) -> torch.Tensor:
        raise MemoryError("no memory")

    monkeypatch.setattr(decoder.target, "layers", broken)
    [event] = engine.submit(Request(PROMPTS[0], 9))
    assert event.finish_reason == "error" and "MemoryError: no memory" in str(event.error)
    monkeypatch.setattr(decoder.target, "layers", layers)
    assert [event.finish_reason for event in engine.submit(Request(PROMPTS[0], 9))][-1] == "length"
    engine.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_thread_has_failed_is_closed_and_nobody_waits(
    decoder: SpecDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: BaseException) -> None:
        raise MemoryError("also here")

    engine, go = decoder.engine(), threading.Event()
    monkeypatch.setattr(engine, "_step", lambda: go.wait(300) and 1 / 0)
    monkeypatch.setattr(engine, "_fail", fail)
    handles = [engine.submit(Request(PROMPTS[0], 3)) for _ in range(3)]
    found: list[str | None] = []

    async def read(handle: Handle) -> None:
        async for event in handle:
            found.append(event.finish_reason)

    def read_here(handle: Handle) -> None:
        found.extend(event.finish_reason for event in handle)

    readers = [threading.Thread(target=read_here, args=(handles[0],), daemon=True)]
    readers.append(threading.Thread(target=lambda: asyncio.run(read(handles[1])), daemon=True))
    for reader in readers:
        reader.start()
    go.set()
    for reader in readers:
        reader.join(300)
    read_here(handles[2])  # one that comes later
    assert found == ["error"] * 3 and "the engine has ended" in str(handles[0].request.error)
    assert engine.closed
    with pytest.raises(SpecDecError, match="the engine is closed"):
        engine.submit(Request(PROMPTS[0], 3))
    engine.close()


@pytest.mark.parametrize("where", ["new_cache", "begin", "load", "join"])
def test_an_admission_that_fails_ends_its_request_and_those_that_wait_go_on(
    where: str, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = TransformersTarget(llama)
    engine = Engine(target, NoDrafter(), ExactVerifier(), FixedDepth(0), max_rows=2, prefixes=PrefixStore())
    finish(engine, Request(PROMPTS[0], 3))
    owner, name = {
        "new_cache": (target, "new_cache"),
        "begin": (engine.batch, "begin"),
        "load": (PrefixStore, "take"),
        "join": (PrefillBatch, "add"),
    }[where]

    def broken(*arguments: Any, **named: Any) -> None:
        monkeypatch.undo()
        raise MemoryError("no memory")

    monkeypatch.setattr(owner, name, broken)
    same = engine.scheduler.memory.prefixes.entries[0].ids
    first, beside, waits = Request([*same, 5], 3), Request([9, 8, 7], 3), Request([3, 4], 3)
    handles = [engine.submit(request) for request in (first, beside, waits)]
    with pytest.raises(MemoryError):
        step(engine)
    ended = [request for request in (first, beside) if request.finish_reason]
    assert ended and all("MemoryError: no memory" in str(request.error) for request in ended)
    finish(engine)
    for handle in handles:
        assert [event.finish_reason for event in handle][-1] == ("error" if handle.request in ended else "length")
    assert waits.finish_reason == "length" and not engine.requests


def test_a_loop_that_is_closed_ends_no_request(llama: PreTrainedModel) -> None:
    engine = Engine(TransformersTarget(llama), NoDrafter(), ExactVerifier(), FixedDepth(0))

    class Closing(asyncio.SelectorEventLoop):
        """It is closed between the question and the call."""

        def is_closed(self) -> bool:
            return False

    async def leave(handle: Handle) -> None:
        async for _ in handle:
            break

    request = Request(PROMPTS[0], 6)
    handle, loop = engine.submit(request), Closing()
    step(engine)
    loop.run_until_complete(leave(handle))
    asyncio.SelectorEventLoop.close(loop)
    finish(engine)
    assert request.finish_reason == "length"


def test_a_request_in_the_background_is_answered_under_load(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(scheduler, "time", clock)
    monkeypatch.setattr("specdec.engine.engine.time", clock)
    engine = Engine(TransformersTarget(llama), NoDrafter(), ExactVerifier(), FixedDepth(0), max_rows=1)
    warm = Request(PROMPTS[0], 0, background=True)
    engine.submit(warm)
    for _ in range(60):  # there is always another request
        if not engine.scheduler.waiting or all(row is warm for row in engine.scheduler.waiting):
            engine.submit(Request(PROMPTS[1], 3))
            engine.submit(Request(PROMPTS[2], 3))
        step(engine)
        clock.now += 0.5
        assert (warm.finish_reason is None) or clock.now - warm.submit_time > scheduler.PATIENCE
    assert warm.finish_reason == "length"


def test_what_cannot_be_run_is_refused(decoder: SpecDecoder) -> None:
    engine = decoder.engine()
    for prompt, why in [
        ([3] * 128, "the prompt has 128 tokens"),
        ([], "the prompt is empty"),
        ([5, 97], "outside the model's vocabulary of 97"),
        ([5, 10**30], "outside the model's vocabulary of 97"),
        ([-1, 5], "outside the model's vocabulary of 97"),
    ]:
        with pytest.raises(SpecDecError, match=why):
            engine.submit(Request(prompt, 9))
    for name, value in [
        ("prompt", "abc"),
        ("prompt", [5, 2.0]),
        ("prompt", torch.tensor([5])),
        ("max_new_tokens", -1),
        ("max_new_tokens", 3.5),
        ("max_new_tokens", math.nan),
        ("max_new_tokens", "9"),
        ("eos", 2),
        ("eos", {"a"}),
        ("logprobs", -1),
        ("num_speculative_tokens", -1),
        ("scope", 3),
    ]:
        given: dict[str, Any] = {"prompt": [5], "max_new_tokens": 3, name: value}
        with pytest.raises(SpecDecError, match=rf"^{name}\S* must be"):
            Request(**given)
    handle = engine.submit(Request([np.int64(5), 6], np.int64(3)))  # type: ignore[list-item, arg-type]
    assert [event.finish_reason for event in handle][-1] == "length"
    with pytest.raises(SpecDecError, match="a request is run once"):
        engine.submit(handle.request)
    engine.close()


def test_events_say_which_tokens_were_drafted(llama: PreTrainedModel) -> None:
    target = TransformersTarget(llama)
    right = Request(PROMPTS[0], 9)
    together(target, NoDrafter(), [right], FixedDepth(0))
    drafter: Drafter = Scripted(
        lambda ids, limit: [(token, i) for i, token in enumerate(right.ids[len(ids) :][:limit])]
    )
    engine = Engine(target, drafter, ExactVerifier(), FixedDepth(3))
    handle = engine.submit(Request(PROMPTS[0], 9))
    events = [next(iter(handle)) for _ in engine.steps()]
    assert [(event.depths, event.accepted) for event in events] == [([0], 0), ([1, 2, 3, 0], 3), ([1, 2, 3, 0], 3)]


def test_the_text_used_least_recently_goes_first() -> None:
    def one(count: int) -> KVCache:
        cache = KVCache(1, 1)
        cache.entries[0].count = count
        return cache

    store = PrefixStore()
    for ids in ([1, 2, 3], [4, 5], [6]):
        store.add(ids, one(len(ids)))
    assert store.longest([1, 2, 9])[1] == 2 and store.longest([1, 2, 9], "another")[1] == 0
    assert store.drop() and [prefix.ids for prefix in store.entries] == [[6], [1, 2, 3]]
    store.add([6, 7, 8], one(3))
    assert [prefix.ids for prefix in store.entries] == [[1, 2, 3], [6, 7, 8]]
    for n in range(9, 9 + MAX_PREFIXES):
        store.add([n], one(1))
    assert len(store.entries) == MAX_PREFIXES and store.entries[0].ids == [9]


def test_a_request_says_where_it_is(llama: PreTrainedModel) -> None:
    engine = Engine(TransformersTarget(llama), NoDrafter(), ExactVerifier(), FixedDepth(0), max_rows=1, prefill_chunk=4)
    first, second = Request(list(range(3, 13)), 3), Request([5, 6, 7], 1)
    seen: list[tuple[str, str]] = []
    for request in (first, second):
        engine.submit(request)
    while engine.busy:
        seen.append((first.status, second.status))
        step(engine)
    seen.append((first.status, second.status))
    assert list(dict.fromkeys(a for a, _ in seen)) == ["waiting", "prefill", "running", "finished"]
    assert list(dict.fromkeys(b for _, b in seen)) == ["waiting", "finished"]  # its prompt and only token are one step
    with pytest.raises(ValueError, match="finished cannot become running"):
        first.set_status(Status.RUNNING)


@pytest.mark.parametrize(("chunk", "status"), [(8, "running"), (1, "prefill")])
def test_a_request_that_gives_way_waits_again(chunk: int, status: str, llama: PreTrainedModel) -> None:
    """Also a prompt where no row decodes."""
    target = TransformersTarget(llama)
    engine = Engine(
        target,
        NoDrafter(),
        ExactVerifier(),
        FixedDepth(0),
        kv_memory=1 << 20,
        prefill_chunk=chunk,
        prefixes=PrefixStore(),
    )
    rows = [Request([5, 6, 7], 4), Request([8, 9, 10], 4)]
    for row in rows:
        engine.submit(row)
    step(engine)
    assert [row.status for row in rows] == [status, status]
    engine.scheduler.memory.limit = 0
    step(engine)
    assert [row.status for row in rows] == [status, "waiting"] and engine.stats().preemptions == 1
    engine.scheduler.memory.limit = 1 << 20
    finish(engine)
    assert all((new_tokens(row), row.finish_reason) == alone(target, row) for row in rows)


@needs_native
def test_an_admission_leaves_room_for_the_next_step_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.kvcache.cache.BLOCK", 16)
    for place in (scheduler, memory):
        monkeypatch.setattr(place, "HEADROOM", 0)
        monkeypatch.setattr(place, "DRAFTED", 24)
    target = NativeTarget(tiny_model(hidden_size=64, head_dim=32, intermediate_size=96).bfloat16())
    most, preemptions = 112 * cache_sizes(target)[0], 0
    engine = Engine(target, NoDrafter(), ExactVerifier(), FixedDepth(0), max_rows=4, kv_memory=most)
    engine.submit(Request(list(range(3, 17)), 50))
    step(engine)
    for count in (5, 14, 23):
        engine.submit(Request(list(range(5, 14)), count))
    for _ in engine.steps():
        stats = engine.stats()
        assert stats.kv_bytes <= most or stats.running <= 1
        preemptions = stats.preemptions
    assert preemptions


def order(*requests: Request, rows: int = 1) -> list[str]:
    """The scopes of requests in the order in which these end, and at most ``rows`` at once."""
    target, ended = TransformersTarget(tiny_model()), list[str]()
    engine = Engine(target, NoDrafter(), ExactVerifier(), FixedDepth(0), max_rows=rows)
    for request in requests:
        engine.submit(request)
    for events in engine.steps():
        ended += [str(row.scope) for row, _ in events if row.finish_reason]
    return ended


def asked(scope: str, **how: Any) -> Request:
    return Request([5, 6, 7], 2, scope=scope, **how)


def test_the_queue_is_fair_between_scopes() -> None:
    many = [asked("a") for _ in range(5)]
    assert order(*many, asked("b"), asked("b"), asked("c")) == [*"abcabaaa"]
    assert sorted(order(*[asked("a") for _ in range(5)], asked("b"), rows=2)[:2]) == ["a", "b"]


def test_the_queue_is_fair_between_senders_of_one_scope() -> None:
    requests = [Request([5, 6, 7], 2 + (n == 4), sender="ab"[n == 4]) for n in range(5)]
    engine = Engine(TransformersTarget(tiny_model()), NoDrafter(), ExactVerifier(), FixedDepth(0), max_rows=1)
    for request in requests:
        engine.submit(request)
    ended = [row.sender for events in engine.steps() for row, _ in events if row.finish_reason]
    assert ended == [*"abaaa"]


@pytest.mark.parametrize("reuse", [False, True])
def test_who_holds_all_rows_makes_room_for_others(reuse: bool, llama: PreTrainedModel) -> None:
    target = TransformersTarget(llama)
    engine = Engine(
        target, NoDrafter(), ExactVerifier(), FixedDepth(0), max_rows=4, prefixes=PrefixStore() if reuse else None
    )
    many = [Request([5 + n, 6, 7], 40, sender="a") for n in range(6)]
    late = [Request([9 + n, 8], 10, sender="b") for n in range(4)]
    for request in many:
        engine.submit(request)
    for _ in range(3):
        step(engine)
    for request in late:
        engine.submit(request)
    ended = list[str | None]()
    for events in engine.steps():
        rows = (*engine.batch.rows, *engine.scheduler.prefilling.rows)
        assert len(rows) <= 4 and sum(row.sender == "b" for row in rows) <= 2  # no more than half
        ended += [row.sender for row, _ in events if row.finish_reason]
    assert ended == [*"bbbbaaaaaa"]
    assert all((new_tokens(row), row.finish_reason) == alone(target, row) for row in (*many, *late))


def test_a_lower_priority_takes_nobodys_row() -> None:
    engine = Engine(TransformersTarget(tiny_model()), NoDrafter(), ExactVerifier(), FixedDepth(0), max_rows=2)
    rows = [Request([5, 6, 7], 9, sender="a", priority=1) for _ in range(2)]
    for request in (*rows, Request([5, 6, 7], 2, sender="b")):
        engine.submit(request)
    ended = [row.sender for events in engine.steps() for row, _ in events if row.finish_reason]
    assert ended == [*"aab"] and not engine.stats().preemptions


def test_a_higher_priority_is_first_and_a_scope_has_so_many_rows() -> None:
    assert order(*[asked("a") for _ in range(3)], asked("b", priority=1), asked("b", priority=1)) == [*"bbaaa"]
    few = [asked("a", scope_rows=1) for _ in range(3)]
    engine = Engine(TransformersTarget(tiny_model()), NoDrafter(), ExactVerifier(), FixedDepth(0), max_rows=4)
    for request in (*few, asked("b")):
        engine.submit(request)
    for _ in engine.steps():
        scopes = [row.scope for row in (*engine.batch.rows, *engine.scheduler.prefilling.rows)]
        assert scopes.count("a") <= 1
    assert all(request.finish_reason == "length" for request in few)
