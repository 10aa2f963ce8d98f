"""Requests come and go at any time; each gets the tokens that a quiet engine gives it alone."""

import asyncio
import math
import threading
from contextlib import suppress
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scripted import Clock, Scripted
from spies import noted
from targets import target_of
from tiny import tiny_model
from transformers import PreTrainedModel
from zoo import PROMPTS, finish, new_tokens, plain_engine, step, together

from specdec import SpecDecError, SpecDecoder
from specdec.base.errors import QueueFullError
from specdec.drafters.none import NoDrafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.engine import batch, memory, scheduler
from specdec.engine.depth import AutoDepth, FixedDepth
from specdec.engine.depth.costs import Costs
from specdec.engine.depth.policy import MAX_FIXED_DEPTH
from specdec.engine.engine import Engine
from specdec.engine.memory import cache_sizes
from specdec.engine.request import Handle, Request, Status
from specdec.kvcache.cache import KVCache
from specdec.kvcache.prefix import MAX_PREFIXES, PrefixStore
from specdec.runtimes.target import Target, TokenCosts
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation.sampling import RowSampler, SamplingParams
from specdec.verifiers.exact import ExactVerifier


def alone(target: Target, request: Request) -> tuple[list[int], str | None]:
    own = Request(request.prompt, request.max_new_tokens, request.sampler, eos=request.eos)
    finish(plain_engine(target), own)
    return new_tokens(own), own.finish_reason


def test_texts_of_one_scope_are_not_gone_on_with_in_another(llama: PreTrainedModel) -> None:
    target = TransformersTarget(llama)
    engine = plain_engine(target, prefixes=PrefixStore())
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


def test_kept_texts_count_what_they_hold_and_hold_little() -> None:
    target = target_of("native")
    token_bytes, _ = cache_sizes(target)
    engine = plain_engine(target, kv_memory=600 * token_bytes, prefixes=PrefixStore())
    for first in range(5, 45):
        engine.submit(Request([first, *range(10, 30)], 4))  # room for many more tokens is made for each
        finish(engine)
        kept = engine.scheduler.memory.prefixes.entries
        held = [buffers(prefix.cache) for prefix in kept]
        assert sum(held) == engine.stats().kv_bytes <= 600 * token_bytes
    assert len(kept) > 8


@pytest.mark.parametrize("runtime", ["transformers", "native"])
def test_running_rows_count_what_they_hold(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers have room for what is to come, and where rows are padded, each holds as much as the longest."""
    monkeypatch.setattr("specdec.kvcache.cache.BLOCK", 16)
    target = target_of(runtime)
    memory = 400 * cache_sizes(target)[0]
    requests = [Request([5 + n, *range(3, 96 if n == 3 else 10)], 28) for n in range(12)]
    engine = plain_engine(target, max_rows=8, kv_memory=memory, prefixes=PrefixStore())
    for request in requests:
        engine.submit(request)
    most = 0
    for _ in engine.steps():
        scheduled = engine.scheduler
        caches = [engine.batch.cache, scheduled.prefilling.cache]
        caches += [prefix.cache for prefix in scheduled.memory.prefixes.entries]
        held = sum(map(buffers, filter(None, caches)))
        assert held == engine.stats().kv_bytes <= memory
        most = max(most, engine.stats().running)
    assert most >= 3 and all(new_tokens(request) == alone(target, request)[0] for request in requests)


def buffers(cache: KVCache) -> int:
    """Return the bytes of what the rows hold, slot by slot."""
    return sum(x[..., : row.held, :].nbytes for row in cache.entries for x in row.buffers.values())


def test_rows_that_grow_and_later_turns_copy_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row grows far beyond what was expected, beside one that began later; the next turns go on in its buffer."""
    monkeypatch.setattr("specdec.kvcache.cache.BLOCK", 16)
    monkeypatch.setattr(memory, "NEW_SLOTS", 8)
    target = target_of("native")
    limits: Any = {"prefixes": PrefixStore(), "kv_memory": 1000 * cache_sizes(target)[0]}
    engine = Engine(target, PromptLookupDrafter(), ExactVerifier(), FixedDepth(4), **limits)
    first, other = Request([*range(3, 20)], 60), Request([*range(50, 60), 3, 3], 40)
    engine.submit(first)
    step(engine)
    begins = {engine.batch.cache.data[0].data_ptr()}
    finish(engine, other)
    for _ in range(2):
        text = [*first.ids, 7, 8]
        turn = Request(text, 20)
        engine.submit(turn)
        step(engine)
        begins.add(engine.batch.cache.data[0].data_ptr())
        finish(engine)
        assert turn.metrics.num_cached_tokens >= len(text) - 4 and new_tokens(turn) == alone(target, turn)[0]
        first = turn
    assert len(begins) == 1 and new_tokens(other) == alone(target, other)[0]
    assert engine.stats().kv_bytes == sum(buffers(prefix.cache) for prefix in engine.scheduler.memory.prefixes.entries)


@pytest.mark.parametrize("reuse", [True, False])
def test_a_prompt_in_the_background_waits_for_others_which_begin_with_it(llama, reuse, monkeypatch) -> None:
    monkeypatch.setattr(scheduler, "TIMED", 8)
    target = TransformersTarget(llama)
    engine = plain_engine(target, prefill_chunk=16, max_rows=1, prefixes=PrefixStore() if reuse else None)
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
    engine = plain_engine(TransformersTarget(llama), prefill_chunk=8, prefixes=PrefixStore())
    warm, asked = Request(list(range(3, 60)), 0), Request([9, 8, 7], 3)
    warm.background = True
    handle = engine.submit(warm)
    step(engine)
    engine.submit(asked)
    step(engine)
    handle.cancel()
    finish(engine)
    assert warm.finish_reason == "cancelled" and asked.finish_reason == "length" and not engine.scheduler.running


def test_a_prompt_that_is_cancelled_while_it_runs_leaves_what_it_has(llama: PreTrainedModel) -> None:
    """Else a reader that leaves would take a cached text along, with which the prompt began."""
    engine = plain_engine(TransformersTarget(llama), prefill_chunk=8, prefixes=PrefixStore())
    text = [3 + n * n % 90 for n in range(60)]
    finish(engine, Request(text, 1))
    left = Request([*text, *[90] * 30], 4)
    handle = engine.submit(left)
    step(engine)
    assert left.status is Status.PREFILL and not engine.scheduler.memory.prefixes.entries
    handle.cancel()
    step(engine)
    later = Request([*text, 91, 92], 1)
    finish(engine, later)
    assert later.metrics.num_cached_tokens == 60


def test_running_rows_wait_for_a_bounded_part_of_a_prompt(llama: PreTrainedModel, monkeypatch) -> None:
    target = TransformersTarget(llama)
    parts = noted(monkeypatch, batch, "run_tokens", lambda target, cache, rows, *more: sum(map(len, rows)))
    engine = plain_engine(target, prefill_chunk=8)
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


@pytest.fixture
def decoder(llama: PreTrainedModel) -> SpecDecoder:
    return SpecDecoder(llama, None, "prompt-lookup", runtime="transformers")


def test_closing_ends_what_runs_and_draining_lets_it_end(decoder: SpecDecoder) -> None:
    for drain, reason in ((False, "cancelled"), (True, "length")):
        engine = decoder.engine(max_rows=1)
        handles = [engine.submit(Request(PROMPTS[0], 100)) for _ in range(2)]
        engine.close(drain=drain)
        ends = [[event.finish_reason for event in handle][-1] for handle in handles]
        assert ends == [reason] * 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("place", [0, 5])
@pytest.mark.parametrize("what", ["KeyError: 'mine'", "must return logits of the shape"])
def test_a_logits_processor_that_fails_ends_its_own_request_alone(
    llama: PreTrainedModel, temperature: float, place: int, what: str
) -> None:
    def broken(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor | None:
        if ids.shape[1] < len(PROMPTS[0]) + place:
            return scores
        if "mine" in what:
            raise KeyError("mine")
        scores[:, 5] = 9.0
        return None

    engine = plain_engine(TransformersTarget(llama))
    params = SamplingParams(temperature=temperature, seed=3)
    rows = [Request(PROMPTS[0], 12, RowSampler(params, own)) for own in ((), [broken])]
    for row in rows:
        engine.submit(row)
    finish(engine)
    alone = Request(PROMPTS[0], 12, RowSampler(params))
    finish(plain_engine(TransformersTarget(llama)), alone)
    assert new_tokens(rows[0]) == new_tokens(alone) and new_tokens(rows[1]) == new_tokens(alone)[:place]
    assert rows[1].finish_reason == "error" and what in str(rows[1].error)


def test_a_full_queue_refuses_and_a_cancelled_request_makes_room(llama: PreTrainedModel) -> None:
    engine = plain_engine(TransformersTarget(llama), max_rows=1, max_waiting=1)
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


def test_a_client_that_fills_the_queue_keeps_no_other_out(llama: PreTrainedModel) -> None:
    engine = plain_engine(TransformersTarget(llama), max_rows=1, max_waiting=4)

    def taken(*senders: str) -> int:
        handles = list[Handle]()
        with suppress(QueueFullError):
            handles += (engine.submit(Request(PROMPTS[0], 9, sender=sender)) for sender in senders)
        return len(handles)

    assert taken(*["robot"] * 9) == 5  # one for the free row
    assert taken(*["ann"] * 9) == 2  # an equal share
    assert taken("robot") == 0
    assert taken(*"bcdefgh") == 2 and taken("i") == 0  # all together at most twice the limit
    finish(engine)


def test_of_a_reader_who_does_not_read_one_event_waits(llama: PreTrainedModel) -> None:
    engine = plain_engine(TransformersTarget(llama))
    request = Request(PROMPTS[0], 20)
    handle = engine.submit(request)
    finish(engine)
    events = list(handle)
    assert [event.tokens for event in events] == [new_tokens(request)] and events[0].finish_reason == "length"


def test_a_step_that_fails_ends_what_runs_and_the_engine_goes_on(decoder: SpecDecoder, monkeypatch) -> None:
    engine, layers = decoder.engine(), decoder.target.layers

    monkeypatch.setattr(decoder.target, "layers", Mock(side_effect=MemoryError("no memory")))
    [event] = engine.submit(Request(PROMPTS[0], 9))
    assert event.finish_reason == "error" and "MemoryError: no memory" in str(event.error)
    monkeypatch.setattr(decoder.target, "layers", layers)
    assert [event.finish_reason for event in engine.submit(Request(PROMPTS[0], 9))][-1] == "length"
    engine.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_thread_has_failed_is_closed_and_nobody_waits(decoder: SpecDecoder, monkeypatch) -> None:
    engine, go = decoder.engine(), threading.Event()
    monkeypatch.setattr(engine, "_step", lambda: go.wait(300) and 1 / 0)
    monkeypatch.setattr(engine, "_fail", Mock(side_effect=MemoryError("also here")))
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


def test_a_loop_that_is_closed_ends_no_request(llama: PreTrainedModel) -> None:
    engine = plain_engine(TransformersTarget(llama))

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


def test_a_request_in_the_background_is_answered_under_load(llama: PreTrainedModel, monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(scheduler, "time", clock)
    monkeypatch.setattr("specdec.engine.engine.time", clock)
    engine = plain_engine(TransformersTarget(llama), max_rows=1)
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


def test_a_request_drafts_no_deeper_than_an_engine_may() -> None:
    """And its time is not compared with that of plain steps, which the policy has not estimated for it."""
    target, asked = TransformersTarget(tiny_model(max_position_embeddings=1024)), list[int]()
    drafter = Scripted(lambda row, limit: asked.append(limit) or [])  # type: ignore[func-returns-value]
    policy = AutoDepth(earlier=Costs(passes=[math.log(10)]))
    engine = Engine(target, drafter, ExactVerifier(), policy)
    finish(engine, request := Request([5, 6, 7], 200, num_speculative_tokens=100_000))
    assert max(asked) == MAX_FIXED_DEPTH
    assert request.metrics.draft_saved_seconds < 20  # its last step cannot draft, and the policy chooses that


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


def test_the_text_used_least_recently_goes_first() -> None:
    def one(count: int) -> KVCache:
        cache = KVCache(1, 1)
        cache.entries[0].count = count
        return cache

    store = PrefixStore()
    for ids in ([1, 2, 3], [4, 5], [6]):
        store.add(ids, one(len(ids)))
    assert store.longest([1, 2, 9])[1] == 2
    assert store.drop() and [prefix.ids for prefix in store.entries] == [[6], [1, 2, 3]]
    store.add([6, 7, 8], one(3))
    assert [prefix.ids for prefix in store.entries] == [[1, 2, 3], [6, 7, 8]]
    for n in range(9, 9 + MAX_PREFIXES):
        store.add([n], one(1))
    assert len(store.entries) == MAX_PREFIXES and store.entries[0].ids == [9]


def test_a_request_says_where_it_is(llama: PreTrainedModel) -> None:
    engine = plain_engine(TransformersTarget(llama), max_rows=1, prefill_chunk=4)
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
    engine = plain_engine(target, kv_memory=1 << 20, prefill_chunk=chunk, prefixes=PrefixStore())
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


def test_an_admission_leaves_room_for_the_next_step_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.kvcache.cache.BLOCK", 16)
    for place in (scheduler, memory):
        monkeypatch.setattr(place, "HEADROOM", 0)
        monkeypatch.setattr(place, "DRAFTED", 24)
    target = target_of("native")
    most, preemptions = 112 * cache_sizes(target)[0], 0
    engine = plain_engine(target, max_rows=4, kv_memory=most)
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
    """The scopes of requests, or their senders, in the order in which these end; at most ``rows`` run at once."""
    engine = plain_engine(TransformersTarget(tiny_model()), max_rows=rows)
    for request in requests:
        engine.submit(request)
    ended = [row for events in engine.steps() for row, _ in events if row.finish_reason]
    assert not engine.stats().preemptions
    return [str(row.scope or row.sender) for row in ended]


def asked(scope: str, **how: Any) -> Request:
    return Request([5, 6, 7], 2, scope=scope, **how)


def test_the_queue_is_fair_between_scopes() -> None:
    many = [asked("a") for _ in range(5)]
    assert order(*many, asked("b"), asked("b"), asked("c")) == [*"abcabaaa"]
    assert sorted(order(*[asked("a") for _ in range(5)], asked("b"), rows=2)[:2]) == ["a", "b"]


def test_the_queue_is_fair_between_senders_of_one_scope() -> None:
    requests = [Request([5, 6, 7], 2 + (n == 4), sender="ab"[n == 4]) for n in range(5)]
    assert order(*requests) == [*"abaaa"]


def test_a_request_that_gave_way_once_makes_room_like_any_other(llama: PreTrainedModel) -> None:
    engine = plain_engine(TransformersTarget(llama), max_rows=3, kv_memory=1 << 20, prefixes=PrefixStore())
    for n in range(3):
        engine.submit(Request([5 + n, 6, 7], 60, sender="a"))
    step(engine)
    engine.scheduler.memory.limit = 0
    step(engine)
    engine.scheduler.memory.limit = 1 << 20
    step(engine)
    assert engine.stats().running == 3 and (before := engine.stats().preemptions)
    engine.submit(late := Request([9, 8], 5, sender="b"))
    for _ in range(8):
        step(engine)
    assert late.finish_reason and engine.stats().preemptions == before + 1
    engine.close()


@pytest.mark.parametrize("reuse", [False, True])
def test_who_holds_all_rows_makes_room_for_others(reuse: bool, llama: PreTrainedModel) -> None:
    target = TransformersTarget(llama)
    engine = plain_engine(target, max_rows=4, prefixes=PrefixStore() if reuse else None)
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
    rows = [Request([5, 6, 7], 9, sender="a", priority=1) for _ in range(2)]
    assert order(*rows, Request([5, 6, 7], 2, sender="b"), rows=2) == [*"aab"]


def test_a_higher_priority_is_first_and_a_scope_has_so_many_rows() -> None:
    assert order(*[asked("a") for _ in range(3)], asked("b", priority=1), asked("b", priority=1)) == [*"bbaaa"]
    few = [asked("a", scope_rows=1) for _ in range(3)]
    engine = plain_engine(TransformersTarget(tiny_model()), max_rows=4)
    for request in (*few, asked("b")):
        engine.submit(request)
    for _ in engine.steps():
        scopes = [row.scope for row in (*engine.batch.rows, *engine.scheduler.prefilling.rows)]
        assert scopes.count("a") <= 1
    assert all(request.finish_reason == "length" for request in few)


def first_tokens(engine: Engine, requests: list[Request]) -> list[int]:
    """The step in which each request gets its first token."""
    found = dict[Request, int]()
    for n, events in enumerate(engine.steps()):
        for request, _ in events:
            found.setdefault(request, n)
    return [found[request] for request in requests]


def test_a_request_that_waits_for_anothers_prompt_holds_up_no_third(llama: PreTrainedModel) -> None:
    engine = plain_engine(TransformersTarget(llama), prefill_chunk=16, prefixes=PrefixStore())
    shared = [3 + n % 90 for n in range(100)]
    requests = [Request([*shared, 5], 4), Request([*shared, 6], 4), Request([7, 8, 9], 4)]
    for request in requests:
        engine.submit(request)
    first, second, third = first_tokens(engine, requests)
    assert third == 0 < first < second


def test_a_short_prompt_does_not_wait_for_the_whole_of_a_longer_one(llama: PreTrainedModel) -> None:
    engine = plain_engine(TransformersTarget(llama), prefill_chunk=16)
    engine.submit(Request([5, 6, 7], 60))
    step(engine)
    requests = [Request([3 + n % 90 for n in range(100)], 4), Request(list(range(5, 15)), 4)]
    for request in requests:
        engine.submit(request)
    long, short = first_tokens(engine, requests)
    assert short <= 2 and 5 <= long <= 9
