"""Bodies that are large in every way: what they count is bounded first, and nothing of it is done on the event loop."""

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from servers import NAME, USER, Replay, Server, byte_tokenizer, serving, stand_in
from spies import noted

from specdec.engine.request import Event
from specdec.serve import bodies, service
from specdec.serve.chat import OpenAIAnswer
from specdec.serve.messages import MessagesBody
from specdec.serve.responses import ResponsesBody
from specdec.serve.schema import ChatBody, CompletionBody, DetokenizeBody

MANY = 20_000
CHAT, COMPLETION = {"model": NAME, "messages": USER}, {"model": NAME, "prompt": "a"}
MESSAGE, RESPONSE = CHAT | {"max_tokens": 1}, {"model": NAME, "input": "a"}
RESULT: dict[str, Any] = {"type": "tool_result", "tool_use_id": "x"}
KEYS = {f"key {i}": 0 for i in range(MANY)}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    engine = Replay(lambda request: [Event([65], "length", depths=[0])])
    with serving(stand_in(byte_tokenizer()), engine) as running:
        yield running


WRONG: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "messages": (ChatBody, CHAT | {"messages": [0] * MANY}),
    "more messages": (ChatBody, CHAT | {"messages": USER * MANY}),
    "parts": (ChatBody, CHAT | {"messages": [{"role": "user", "content": [0] * MANY}]}),
    "calls": (ChatBody, CHAT | {"messages": [{"role": "assistant", "tool_calls": [{}] * MANY}]}),
    "tools": (ChatBody, CHAT | {"tools": [0] * MANY}),
    "stops": (ChatBody, CHAT | {"stop": [""] * MANY}),
    "biases": (ChatBody, CHAT | {"logit_bias": KEYS}),
    "more prompts": (CompletionBody, COMPLETION | {"prompt": ["a"] * MANY}),
    "ids": (CompletionBody, COMPLETION | {"prompt": [-1] * MANY}),
    "tokens": (DetokenizeBody, {"tokens": ["a"] * MANY}),
    "turns": (MessagesBody, MESSAGE | {"messages": [0] * MANY}),
    "blocks": (MessagesBody, MESSAGE | {"messages": [{"role": "user", "content": [0] * MANY}]}),
    "blocks of a result": (
        MessagesBody,
        MESSAGE | {"messages": [{"role": "user", "content": [RESULT | {"content": [{}] * MANY}]}]},
    ),
    "tools of a message": (MessagesBody, MESSAGE | {"tools": [{}] * MANY}),
    "sequences": (MessagesBody, MESSAGE | {"stop_sequences": [""] * MANY}),
    "items": (ResponsesBody, RESPONSE | {"input": [0] * MANY}),
    "parts of an item": (ResponsesBody, RESPONSE | {"input": [{"role": "user", "content": [0] * MANY}]}),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_many_times_is_found_once(case: str) -> None:
    model, body = WRONG[case]
    with pytest.raises(ValidationError) as found:
        model.model_validate(body)
    assert found.value.error_count() < 50


@pytest.mark.parametrize("more", [{"n": 2**40, "echo": True}, {"prompt": ["a"] * 65}])
def test_choices_are_counted_before_anything_is_made(server: Server, more: dict[str, Any], monkeypatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(service.Service, "encode_text", lambda self, prompt: made.append(prompt))
    monkeypatch.setattr("specdec.serve.answer.Answer.__init__", made.append)
    response = server.complete(**more)
    assert response.status_code == 400 and response.json()["error"]["param"] == "n" and made == []


def test_ids_are_counted_before_they_are_looked_at(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "encode", None)
    monkeypatch.setattr(server.decoder.tokenizer, "decode", None, raising=False)
    for response in (server.complete(prompt=[5] * 5000), server.post("/detokenize", {"tokens": [5] * 5000})):
        assert response.status_code == 400 and "5000" in response.json()["error"]["message"]


def test_bodies_are_read_and_worked_on_in_other_threads(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.Service, "decode", lambda self, ids, *how: "a")
    places = (bodies, "from_json"), (service, "encode"), (service.Service, "submit"), (service.Service, "decode")
    seen = [noted(monkeypatch, *place, lambda *given: threading.current_thread()) for place in places]
    assert server.complete(prompt="a", max_tokens=1).status_code == 200
    server.post("/detokenize", {"tokens": [5]})
    assert all(seen) and server.thread not in itertools.chain(*seen)


@pytest.mark.parametrize("n", [1, 3])
def test_large_answers_are_written_in_other_threads(server: Server, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = noted(monkeypatch, OpenAIAnswer, "_written", lambda *given: threading.current_thread())
    answer = server.complete(n=n, max_tokens=1).json()
    assert [choice["text"] for choice in answer["choices"]] == ["b"] * n and answer["usage"]["completion_tokens"] == n
    assert answer["object"] == "text_completion" and seen and server.thread not in seen


def test_log_probabilities_are_counted_before_anything_is_made(server: Server) -> None:
    error = server.complete(n=64, max_tokens=4096, logprobs=20).json()["error"]
    assert error["param"] == "logprobs" and "set max_tokens" in error["message"]
    echoed = server.complete(prompt=[5] * 4000, n=64, echo=True, max_tokens=0, logprobs=20)  # and those of prompts
    assert echoed.json()["error"]["param"] == "logprobs"
