"""OpenAI's Responses: the official client and the agents' package, tools both ways, earlier responses, refusals."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from calls import CALLS, SCHEMAS, THINKING, TOOLS, answering, thinking, written
from servers import NAME, Server, byte_tokenizer

from specdec.engine.request import TokenLogprob
from specdec.serve import responses
from specdec.serve.logprobs import TokenFinder
from specdec.serve.responses import Store
from specdec.serve.tools import HERMES

PATH = "/v1/responses"
ASK = "Name three colours."
BODY: dict[str, Any] = {"model": NAME, "input": ASK, "max_output_tokens": 24}
GIVEN: Any = [{"type": "function", "strict": None, **tool["function"]} for tool in TOOLS[:2]]
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with thinking() as running:
        yield running


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with client_of(server) as made:
        yield made


def streamed(client: openai.OpenAI, **how: Any) -> tuple[list[str], Any]:
    """The names of the events, those in a row that are alike once, and the response at the end."""
    events = list(client.responses.create(stream=True, **how))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type.removeprefix("response.") for event in events]
    return [name for n, name in enumerate(names) if not n or name != names[n - 1]], events[-1].response


ADDED, DONE = "output_item.added", "output_item.done"
TEXT = [ADDED, "content_part.added", "output_text.delta", "output_text.done", "content_part.done", DONE]
THOUGHT = [name.replace("output_text", "reasoning_text") for name in TEXT]
CALL = [ADDED, "function_call_arguments.delta", "function_call_arguments.done", DONE]


def test_a_response_whole_and_streamed(client: openai.OpenAI, server: Server) -> None:
    how: Any = BODY | {"temperature": 0, "instructions": "Be brief.", "metadata": {"a": "b"}}
    whole = client.responses.create(**how)
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.output[0].type == "message" and len(whole.output_text) == 24 == whole.usage.output_tokens
    assert whole.metadata == {"a": "b"} and whole.instructions == "Be brief." and whole.error is None
    names, same = streamed(client, **how)
    assert names == ["created", "in_progress", *TEXT, "incomplete"] and same.output_text == whole.output_text
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASK}]
    other = client.chat.completions.create(model=NAME, messages=chat, max_tokens=24, temperature=0)  # type: ignore[arg-type]
    assert other.choices[0].message.content == whole.output_text
    assert other.usage.prompt_tokens == whole.usage.input_tokens


def test_log_probabilities_are_those_of_the_text(client: openai.OpenAI) -> None:
    how: Any = BODY | {"temperature": 0}
    scored: Any = {"max_tokens": 24, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    chat = client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": ASK}], **scored)

    def rounded(entries: Any) -> list[Any]:
        """Without the last digits, which depend on how much of the prompt was cached."""
        tops = [[(top.token, round(top.logprob, 3)) for top in each.top_logprobs] for each in entries]
        return [(e.token, e.bytes, round(e.logprob, 3), top) for e, top in zip(entries, tops, strict=True)]

    expected = rounded(chat.choices[0].logprobs.content)  # type: ignore[union-attr]
    asked: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = client.responses.create(**how, **asked)
    events = list(client.responses.create(**how, **asked, stream=True))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    for response in (whole, events[-1].response):  # type: ignore[union-attr]
        assert rounded(response.output[0].content[0].logprobs) == expected
        assert response.top_logprobs == 2
    assert [each.token for delta in deltas for each in delta.logprobs] == [each[0] for each in expected]
    assert len(deltas) > 3 and all("".join(e.token for e in delta.logprobs) == delta.delta for delta in deltas)
    few = client.responses.create(**how, include=["message.output_text.logprobs"]).output[0].content[0].logprobs  # type: ignore[union-attr]
    assert [each.token for each in few] == [each[0] for each in expected] and few[0].top_logprobs == []
    assert client.responses.create(**how).output[0].content[0].logprobs == []  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [1, 2, 100])
def test_tokens_of_parts_are_found_between_marks(size: int) -> None:
    """What is between the parts, and a token of which a part has only some characters."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["\n\nW", "l.\n"])
    text, parts = "<think>a b</think>\n\nWéll.\n<call>{}</call>ok", ["a b", "Wé", "ll.", "ok", "not there"]
    ids, finder, taken = tokenizer(text).input_ids, TokenFinder(tokenizer), list[str]()
    for at in range(0, len(ids), size):
        finder.extend([TokenLogprob(each, -0.5, []) for each in ids[at : at + size]])
        while parts[len(taken)].encode() in bytes(finder.answer):
            found = finder.take(parts[len(taken)])
            taken.append(bytes(byte for each in found for byte in each["bytes"]).decode())
    assert taken == ["a b", "\n\nWé", "ll.\n", "ok"] and finder.take("not there") == []


def test_a_response_goes_on_from_an_earlier_one(client: openai.OpenAI) -> None:
    first = client.responses.create(**BODY, temperature=0, instructions="Be brief.")
    second = client.responses.create(**BODY | {"input": "And two more."}, previous_response_id=first.id, temperature=0)
    items: Any = [{"role": "user", "content": ASK}, *first.output, {"role": "user", "content": "And two more."}]
    same = client.responses.create(**BODY | {"input": items}, temperature=0)
    assert second.output_text == same.output_text and second.usage.input_tokens == same.usage.input_tokens
    assert second.previous_response_id == first.id
    third = client.responses.create(**BODY | {"input": "x"}, previous_response_id=second.id, stream=True)
    last = list(third)[-1].response
    assert last.usage.input_tokens > second.usage.input_tokens
    assert client.responses.retrieve(last.id).output_text == last.output_text


def test_what_is_not_stored_is_not_there(client: openai.OpenAI) -> None:
    unstored = client.responses.create(**BODY, store=False)
    stored = client.responses.create(**BODY)
    client.responses.delete(stored.id)
    for response in (unstored, stored):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(**BODY, previous_response_id=response.id)
        assert refused.value.code == "previous_response_not_found" and refused.value.param == "previous_response_id"


def test_a_store_keeps_the_last_of_each_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "MAX_STORED", 3)
    monkeypatch.setattr(responses, "MAX_STORED_BYTES", 1000)
    store = Store()
    empty = b'{"output":[]}'
    for n in range(5):
        store.put("a", str(n), empty, [])
    store.put("b", "0", b"y", [])
    assert store.get("b", "0") == (b"y", b"[]") and store.before("a", None) == []
    with pytest.raises(Exception, match="no response '4'"):
        store.before("b", "4")
    assert [*store.kept["a"]] == ["2", "3", "4"]
    store.before("a", "2")  # it is used, so others go first
    store.put("a", "5", b"x", [])
    assert [*store.kept["a"]] == ["4", "2", "5"]
    store.put("a", "6", b"z" * 997, [])
    assert [*store.kept["a"]] == ["6"]
    store.put("a", "7", b"z" * 2000, [])
    assert [*store.kept["a"]] == [] and [*store.kept["b"]] == ["0"]


def test_a_store_holds_no_more_memory_than_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "MAX_STORED_BYTES", 10**6)
    store = Store()
    tracemalloc.start()
    try:
        for n in range(40):
            store.put("a", str(n), b'{"output":[]}', [{"role": "user", "content": ""} for _ in range(2000)])
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(store.kept["a"]) > 5 and held < 1.5 * 10**6
    assert store.before("a", "39")[1999] == {"role": "user", "content": ""}


def test_calls_are_forced_streamed_and_answered(client: openai.OpenAI) -> None:
    how: Any = BODY | {"tools": GIVEN, "max_output_tokens": 300, "temperature": 0, "parallel_tool_calls": False}
    for choice in ("required", {"type": "function", "name": "sum"}):
        whole = client.responses.create(**how, tool_choice=choice)
        [call] = whole.output
        assert call.type == "function_call" and whole.status == "completed" and call.call_id
        assert set(json.loads(call.arguments)) == set(SCHEMAS[call.name]["required"])  # type: ignore[index]
        names, same = streamed(client, **how, tool_choice=choice)
        assert names == ["created", "in_progress", *CALL, "completed"]
        assert same.output[0].arguments == call.arguments and same.output[0].name == call.name
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "4"}
    after = client.responses.create(**how | {"input": [result], "max_output_tokens": 3}, previous_response_id=whole.id)
    items = [{"role": "user", "content": ASK}, call, result]
    same = client.responses.create(**how | {"input": items, "max_output_tokens": 3})
    assert after.usage.input_tokens == same.usage.input_tokens and after.output_text == same.output_text


def test_a_response_that_ends_in_a_cut_call_is_continued() -> None:
    text = "<tool_call>\n" + HERMES.head("sum") + '{"a": 1, "b'
    with answering(text, "ok", end="length") as other, client_of(other) as client:
        how: Any = BODY | {"tools": GIVEN}
        events = list(client.responses.create(**how, stream=True))
        first = events[-1].response  # type: ignore[union-attr]
        [done] = [event.item for event in events if event.type == "response.output_item.done"]
        assert first.status == done.status == first.output[0].status == "incomplete"
        [call] = first.output
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "4"}
        for given in (result, {"role": "user", "content": "Go on."}):
            after = client.responses.create(**how | {"input": [given]}, previous_response_id=first.id)
            prompt = other.engine.handles[-1].request.prompt
            client.responses.create(**how | {"input": [{"role": "user", "content": ASK}, call, given]})
            assert after.output_text == "ok" or other.engine.handles[-1].request.prompt == prompt


@pytest.mark.parametrize("cut", [False, True])
def test_only_the_last_item_of_a_cut_stream_is_incomplete(cut: bool) -> None:
    text = "<think>\nTwo things.\n</think>\n\nWell."
    with answering(text, template=THINKING, end="length" if cut else "eos") as other, client_of(other) as client:
        events = list(client.responses.create(**BODY, stream=True))
    ended = [event.item.status for event in events if event.type == "response.output_item.done"]
    assert ended == ["completed", "incomplete" if cut else "completed"]


def test_input_is_counted(client: openai.OpenAI) -> None:
    first = client.responses.create(**BODY, instructions="Be brief.")
    count = client.responses.input_tokens.count
    counted = count(model=NAME, input=ASK, instructions="Be brief.")
    assert counted.input_tokens == first.usage.input_tokens and counted.object == "response.input_tokens"
    assert count(input=ASK, tools=GIVEN, model=NAME).input_tokens > count(input=ASK).input_tokens
    second = client.responses.create(**BODY, previous_response_id=first.id)
    assert count(input=ASK, previous_response_id=first.id).input_tokens == second.usage.input_tokens
    assert count(previous_response_id=first.id).input_tokens == second.usage.input_tokens - len("[user]" + ASK)
    with pytest.raises(openai.BadRequestError, match="'input'"):
        count(model=NAME)
    with pytest.raises(openai.NotFoundError):
        count(model="other", input=ASK)


def test_items_of_the_input_are_listed(client: openai.OpenAI) -> None:
    first = client.responses.create(**BODY, include=["message.output_text.logprobs"])
    call = {"type": "function_call", "call_id": "c", "name": "sum", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": "4"}
    more: Any = [{"role": "developer", "content": "Be brief."}, call, result]
    second = client.responses.create(**BODY | {"input": more}, previous_response_id=first.id)
    items = list(client.responses.input_items.list(second.id, order="asc", limit=2))  # several pages
    assert [item.type for item in items] == ["message", "message", "message", "function_call", "function_call_output"]
    assert [getattr(item, "role", None) for item in items] == ["user", "assistant", "developer", None, None]
    assert items[0].content[0].text == ASK and items[0].content[0].type == "input_text"  # type: ignore[union-attr]
    assert items[1].content[0].text == first.output_text and items[1].id == first.output[0].id  # type: ignore[union-attr]
    assert items[1].content[0].logprobs == []  # type: ignore[union-attr]
    assert items[3].arguments == "{}" and items[4].output == "4"  # type: ignore[union-attr]
    ids = [item.id for item in items]
    assert len(set(ids)) == 5
    page = client.responses.input_items.list(second.id, after=ids[3], limit=2)
    assert [item.id for item in page.data] == [ids[2], ids[1]] and page.has_more
    again = client.responses.create(**BODY | {"input": items})  # they are an input, too
    assert again.usage.input_tokens == second.usage.input_tokens
    for wrong in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "x"}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.input_items.list(second.id, **wrong)  # type: ignore[arg-type]
        assert [refused.value.param] == [*wrong]
    with pytest.raises(openai.NotFoundError):
        client.responses.input_items.list("resp_x")


def test_text_has_the_form_that_is_asked_for(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form: Any = {"format": {"type": "json_schema", "name": "number", "schema": schema, "strict": True}}
    found = client.responses.create(**BODY, text=form)
    assert json.loads(found.output_text)["a"] in (1, 2) and found.status == "completed"
    assert found.text.format.type == "json_schema"


def test_reasoning_text_and_parallel_calls_are_items() -> None:
    text = "<think>\nTwo things.\n</think>\n\nWell.\n" + written(HERMES, CALLS)
    with answering(text, template=THINKING) as other, client_of(other) as client:
        whole = client.responses.create(**BODY, tools=GIVEN)
        names, same = streamed(client, **BODY, tools=GIVEN)
        results = [{"type": "function_call_output", "call_id": i.call_id, "output": "4"} for i in whole.output[2:]]
        after = client.responses.create(**BODY | {"input": results}, tools=GIVEN, previous_response_id=whole.id)
        kept = other.engine.handles[-1].request.prompt
    for response in (whole, same):
        assert [item.type for item in response.output] == ["reasoning", "message", *["function_call"] * 2]
        assert response.output[0].content[0].text == "Two things." and response.output_text == "Well."
        assert [(item.name, json.loads(item.arguments)) for item in response.output[2:]] == CALLS
        assert response.usage.output_tokens_details.reasoning_tokens == len("Two things.")
    assert names == ["created", "in_progress", *THOUGHT, *TEXT, *CALL * 2, "completed"]
    assert after.status == "completed"
    prompt = other.decoder.tokenizer.decode(kept)
    assert (
        prompt
        == f"weather;sum;[user]{ASK}[assistant]Well.<tool_call>Rome</tool_call><tool_call></tool_call>[tool]4[tool]4"
    )


# --- refusals --------------------------------------------------------------------------------------------------------

RESULT = {"type": "function_call_output", "call_id": "x", "output": "4"}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({"input": None}, "input"),
    "an image": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input",
    ),
    "an item of another type": ({"input": [{"type": "web_search_call"}]}, "items of the type 'web_search_call'"),
    "a role": ({"input": [{"role": "tool", "content": "x"}]}, "input"),
    "a result without a call": ({"input": [RESULT]}, "no such call is before it"),
    "a call that is no JSON": (
        {"input": [{"type": "function_call", "call_id": "x", "name": "sum", "arguments": "["}]},
        "JSON object",
    ),
    "an unknown response": ({"previous_response_id": "resp_x"}, "there is no response 'resp_x'"),
    "a background": ({"background": True}, "'background'"),
    "a conversation": ({"conversation": "c"}, "'conversation'"),
    "a truncation": ({"truncation": "auto"}, "'truncation'"),
    "too many log-probabilities": ({"top_logprobs": 21}, "'top_logprobs'"),
    "a hosted tool": ({"tools": [{"type": "web_search"}]}, "tools of the type 'web_search'"),
    "a choice without tools": ({"tool_choice": "required"}, "tool_choice needs tools"),
    "a schema that allows nothing": (
        {"tools": [{"type": "function", "name": "a", "parameters": {"enum": []}}], "tool_choice": "required"},
        "cannot be used",
    ),
    "an unsupported member": ({"max_tool_calls": 2}, "parameter 'max_tool_calls'"),
    "a part of a number": ({"input": [{"role": "user", "content": [5]}]}, "'input.0.content.0': it must be an object"),
    "items in a number": ({"input": 5}, "'input': it must be a valid string or a valid list"),
}


@pytest.mark.parametrize("kind", [["x" * 10**5], {"x" * 10**5: 1}, "x" * 10**5])
def test_a_message_of_an_error_is_short(server: Server, kind: Any) -> None:
    for path, body in (
        (PATH, {"input": [{"type": kind}]}),
        ("/v1/messages", {"messages": [{"content": [{"type": kind}]}]}),
    ):
        response = server.post(path, {"model": NAME} | body, headers=KEY)
        assert response.status_code == 400 and len(response.text) < 1000


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused(server: Server, case: str) -> None:
    body, says = WRONG[case]
    response = server.post(PATH, BODY | body, headers=KEY)
    assert response.status_code == 400 and set(response.json()) == {"error"}, response.text
    error = response.json()["error"]
    assert says in error["message"] and response.headers["x-request-id"]
    assert not {"messages", "max_tokens", "response_format"} & {str(error["param"]).partition(".")[0]}
    for ours in ("Item", "Body", "Text", "list[", "lambda", "'messages", "max_tokens"):
        assert ours not in error["message"], error


def test_a_limit_of_the_server_names_the_clients_parameter() -> None:
    with answering("ab", max_tokens=8) as other:
        error = other.post(PATH, BODY).json()["error"]
    assert error["param"] == "max_output_tokens" and "24 new tokens exceed" in error["message"]


def test_a_fault_in_a_stream_is_its_last_event() -> None:
    with answering("ab", end="error") as other, client_of(other) as client:
        events = list(client.responses.create(**BODY, stream=True))
        with pytest.raises(openai.InternalServerError, match="decoding failed"):
            client.responses.create(**BODY)
    assert events[-1].type == "response.failed" and "decoding failed" in events[-1].response.error.message
