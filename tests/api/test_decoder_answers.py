"""Several answers, seeds, chats and plain prompts, the model's own sampling, and calls on an event loop."""

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from specdec import SpecDecError, SpecDecoder
from specdec.api.decoder import _shared
from specdec.engine.engine import Engine

HOT: dict[str, Any] = {"temperature": 1.5, "max_new_tokens": 12}
CHAT = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture(scope="module")
def decoder(folder: Path) -> SpecDecoder:
    return SpecDecoder.from_pretrained(folder, "prompt-lookup", device="cpu", dtype="float32")


def test_several_answers_differ_and_each_is_that_of_its_place(decoder: SpecDecoder) -> None:
    found = decoder.generate("Name three", n=3, seed=5, **HOT)
    assert len({each.text for each in found}) == 3
    assert decoder.generate("Name three", seed=5, **HOT).text == found[0].text
    batch = decoder.generate_batch(["Name three", "Why?"], n=2, seed=5, **HOT)
    assert [each.text for each in batch[:2]] == [each.text for each in found[:2]] and len(batch) == 4
    plain = decoder.with_drafter("none").generate("Name three", n=3, seed=5, **HOT)
    assert [each.token_ids for each in plain] == [each.token_ids for each in found]
    with pytest.raises(SpecDecError, match="n must be greater than or equal to 1; got 0"):
        decoder.generate("Name three", n=0)


def test_without_a_seed_each_call_draws_another_text(decoder: SpecDecoder) -> None:
    assert len({decoder.generate("Name three", **HOT).text for _ in range(3)}) == 3
    assert len({decoder.generate("Name three", seed=None, **HOT).text for _ in range(3)}) == 3
    assert len({decoder.generate("Name three", seed=0, **HOT).text for _ in range(3)}) == 1
    assert len({decoder.generate("Name three", max_new_tokens=12).text for _ in range(2)}) == 1


def test_chats_get_the_template_and_plain_prompts_unless_told(decoder: SpecDecoder) -> None:
    chat = decoder.chat(CHAT, max_new_tokens=12).token_ids
    assert decoder.generate(CHAT, max_new_tokens=12).token_ids == chat
    assert decoder.generate(CHAT[0]["content"], max_new_tokens=12).token_ids == chat
    plain = decoder.generate(CHAT[0]["content"], apply_chat_template=False, max_new_tokens=12).token_ids
    assert plain != chat
    assert len(decoder.chat(CHAT, n=2, **HOT)) == 2
    with pytest.raises(SpecDecError, match="messages must be a list of mappings"):
        decoder.chat("Name three colours.")  # type: ignore[arg-type]


def test_the_models_own_sampling_is_used_where_asked_for(decoder: SpecDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    own = GenerationConfig(do_sample=True, temperature=1.5, top_p=0.9)
    monkeypatch.setattr(decoder.model, "generation_config", own)
    how: dict[str, Any] = {"max_new_tokens": 12, "seed": 3}
    greedy = decoder.generate("Name three", **how).token_ids
    drawn = decoder.generate("Name three", use_model_defaults=True, **how).token_ids
    wanted = decoder.generate("Name three", temperature=1.5, top_p=0.9, top_k=50, **how).token_ids
    assert drawn == wanted != greedy
    assert decoder.generate("Name three", use_model_defaults=True, temperature=0.0, **how).token_ids == greedy
    own.do_sample = False
    assert decoder.generate("Name three", use_model_defaults=True, **how).token_ids == greedy


def test_calls_on_an_event_loop_are_decoded_together(decoder: SpecDecoder) -> None:
    prompts = ["Name three", "Why is", "One, two,"]
    how: dict[str, Any] = {"max_new_tokens": 12, "seed": 7, "temperature": 0.8}
    wanted = [decoder.generate(prompt, **how) for prompt in prompts]

    async def stream(prompt: str) -> str:
        return "".join([piece async for piece in decoder.astream(prompt, **how)])

    async def both() -> tuple[list[Any], list[str], Any]:
        found = await asyncio.gather(*(decoder.agenerate(prompt, **how) for prompt in prompts))
        texts = await asyncio.gather(*map(stream, prompts))
        many = await asyncio.gather(*(decoder.agenerate([5], max_new_tokens=1) for _ in range(300)))
        assert all(len(each.token_ids) == 1 for each in many)  # as many as a caller likes wait for their turn
        return found, texts, await decoder.agenerate(CHAT, stop=["e"], logprobs=1, num_speculative_tokens=0)

    found, texts, last = asyncio.run(both())
    assert [each.token_ids for each in found] == [each.token_ids for each in wanted]
    assert texts == [each.text for each in wanted] and "e" not in last.text and last.logprobs
    assert _shared[decoder].engine is None  # so that others may use the drafter
    assert decoder.generate("Why is", **how).token_ids == wanted[1].token_ids


def test_a_stream_that_is_left_ends_its_request(decoder: SpecDecoder) -> None:
    async def first() -> str:
        pieces = decoder.astream("Name three", max_new_tokens=2000)
        async for piece in pieces:
            await pieces.aclose()  # type: ignore[attr-defined]
            return piece
        return ""

    async def cancelled() -> None:
        task = asyncio.create_task(decoder.agenerate("Name three", max_new_tokens=2000))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert asyncio.run(first())
    asyncio.run(cancelled())
    assert _shared[decoder].engine is None
    with pytest.raises(SpecDecError, match="temperature must be greater than or equal to 0; got -1"):
        asyncio.run(decoder.agenerate("Why is", temperature=-1))


def test_a_stream_that_is_left_at_the_end_of_the_loop_closes_quietly(decoder: SpecDecoder, caplog) -> None:
    async def left() -> None:
        async for _ in decoder.astream("Name three", max_new_tokens=2000):
            break

    asyncio.run(left())
    assert not caplog.records
    assert decoder.generate("Name three", max_new_tokens=3).token_ids


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stream_whose_loop_is_closed_beneath_it_ends(decoder: SpecDecoder) -> None:
    async def first() -> AsyncIterator[str]:
        pieces = decoder.astream("Name three", max_new_tokens=2000)
        await anext(pieces)
        return pieces

    loop = asyncio.new_event_loop()
    pieces = loop.run_until_complete(first())
    loop.close()
    del pieces
    gc.collect()
    for _ in range(600):
        if _shared[decoder].engine is None:
            break
        time.sleep(0.1)
    assert decoder.generate("Name three", max_new_tokens=3).token_ids


def test_turns_of_a_chat_on_an_event_loop_run_what_is_new_only(decoder: SpecDecoder) -> None:
    decoder = decoder.with_drafter("prompt-lookup")

    async def turns() -> list[int]:
        prompt, cached = list(range(5, 60)), list[int]()
        for _ in range(3):
            out = await decoder.agenerate(prompt, max_new_tokens=4, ignore_eos=True)
            prompt = [*prompt, *out.token_ids, 7]
            cached.append(out.metrics.num_cached_tokens)
        return cached

    first, *later = asyncio.run(turns())
    assert first == 0 and later == [58, 63]


@pytest.mark.parametrize("moment", ["start", "close"])
def test_a_call_that_is_cancelled_while_its_engine_starts_or_closes_leaves_none_open(
    decoder: SpecDecoder, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    async def cancelled() -> None:
        loop, told, make = asyncio.get_running_loop(), threading.Event(), decoder._start_shared

        def cancel() -> None:  # and go on only when the loop has done so
            loop.call_soon_threadsafe(lambda: (task.cancel(), told.set()))
            assert told.wait(60)

        def engine() -> Engine:
            if moment == "start":
                cancel()
            made = make()
            close = made.close
            if moment == "close":
                made.close = lambda: (cancel(), close())  # type: ignore[method-assign, assignment]
            return made

        monkeypatch.setattr(decoder, "_start_shared", engine)
        task = asyncio.create_task(decoder.agenerate("Name three", max_new_tokens=3))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert _shared[decoder].engine is None and not _shared[decoder].users

    asyncio.run(cancelled())
    assert decoder.generate("Name three", max_new_tokens=3).token_ids
