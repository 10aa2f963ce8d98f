"""Anthropic's Messages: the official client against a real server, whole and as a stream, with tools both ways."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from calls import CALLS, THINKING, TOOLS, answering, thinking, written
from servers import NAME, USER, Server

from specdec.serve.tools import HERMES

anthropic = pytest.importorskip("anthropic", reason="anthropic is not installed")
PATH = "/v1/messages"
BODY: dict[str, Any] = {"model": NAME, "messages": USER, "max_tokens": 24}
GREEDY: dict[str, Any] = {"extra_body": {"temperature": 0}}  # the client has no such parameter
FUNCTIONS = [tool["function"] for tool in TOOLS[:2]]
GIVEN: Any = [{"name": f["name"], "description": f["description"], "input_schema": f["parameters"]} for f in FUNCTIONS]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with thinking() as running:
        yield running


def client_of(server: Server, key: str = "secret") -> Any:
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0)


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with client_of(server) as made:
        yield made


def names(events: list[Any]) -> list[str]:
    """The events, those in a row that are alike once; the client's own are left out."""
    own = {"text", "thinking", "signature", "input_json"}
    found = [event.type for event in events if event.type not in own]
    return [name for n, name in enumerate(found) if not n or name != found[n - 1]]


BLOCK = ["content_block_start", "content_block_delta", "content_block_stop"]


def test_a_message_whole_and_streamed(client: Any, server: Server) -> None:
    how = BODY | GREEDY | {"system": "Be brief.", "metadata": {"user_id": "me"}}
    whole = client.messages.create(**how)
    [block] = whole.content
    assert whole.type == "message" and whole.role == "assistant" and whole.model == NAME and whole.id[:4] == "msg_"
    assert block.type == "text" and len(block.text) == whole.usage.output_tokens == 24
    assert whole.stop_reason == "max_tokens" and whole.stop_sequence is None and whole._request_id[:4] == "req_"
    with client.messages.stream(**how) as stream:
        events = list(stream)
        same = stream.get_final_message()
    assert same.content[0].text == block.text and same.stop_reason == "max_tokens"
    assert same.usage.output_tokens == 24
    counted = client.messages.count_tokens(model=NAME, messages=USER, system="Be brief.").input_tokens
    assert counted == whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    assert names(events) == ["message_start", *BLOCK, "message_delta", "message_stop"]
    chat = {"model": NAME, "messages": [{"role": "system", "content": "Be brief."}, *USER], "max_tokens": 24}
    headers = {"x-api-key": "secret"}
    other = server.post("/v1/chat/completions", chat | {"temperature": 0}, headers=headers)
    assert other.json()["choices"][0]["message"]["content"] == block.text


def test_the_stream_has_pings_and_names_its_events(server: Server) -> None:
    streamed = server.post(PATH, BODY | {"stream": True, "temperature": 0}, headers={"x-api-key": "secret"})
    lines = streamed.text.split("\n\n")
    assert lines.pop() == ""
    parsed = [line.split("\ndata: ") for line in lines]
    assert all(head == f"event: {json.loads(data)['type']}" for head, data in parsed)
    assert [head.removeprefix("event: ") for head, _ in parsed[:3]] == ["message_start", "ping", "content_block_start"]


def test_stop_sequences_end_it_and_are_named(client: Any) -> None:
    text = client.messages.create(**BODY, **GREEDY).content[0].text
    stop = text[5]
    found = client.messages.create(**BODY, **GREEDY, stop_sequences=["\0", stop, *"\1\2\3\4\5\6"])
    assert found.stop_reason == "stop_sequence" and found.stop_sequence == stop
    assert "".join(block.text for block in found.content) == text[: text.index(stop)]


def test_an_answer_goes_on_with_the_assistants_last_message(client: Any, server: Server) -> None:
    begun = [*USER, {"role": "assistant", "content": "Red"}]
    counted = client.messages.count_tokens(model=NAME, messages=begun).input_tokens
    plain = client.messages.count_tokens(model=NAME, messages=USER).input_tokens
    assert counted == plain + len("[assistant]Red")
    text = client.messages.create(**BODY | {"messages": begun}, **GREEDY).content[0].text
    prompt = "[user]" + USER[0]["content"] + "[assistant]Red"
    body = {"model": NAME, "prompt": prompt, "max_tokens": 24, "temperature": 0}
    other = server.post("/v1/completions", body, headers={"Authorization": "Bearer secret"}).json()
    assert other["choices"][0]["text"] == text


def test_no_tokens_run_the_prompt_alone(client: Any) -> None:
    long = [{"role": "user", "content": "abcdefgh" * 20}]
    warm = client.messages.create(**BODY | {"messages": long, "max_tokens": 0})
    assert warm.content == [] and warm.usage.output_tokens == 0 and warm.stop_reason == "max_tokens"
    after = client.messages.create(**BODY | {"messages": long})
    assert after.usage.cache_read_input_tokens > 100 and after.usage.input_tokens < 80
    assert after.usage.model_extra["time_saved_ms"] >= 0


def test_calls_are_forced_streamed_and_answered(client: Any) -> None:
    how: Any = BODY | {"tools": GIVEN, "max_tokens": 300}
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "sum"}):
        whole = client.messages.create(**how, **GREEDY, tool_choice=choice)
        [call] = whole.content
        assert call.type == "tool_use" and whole.stop_reason == "tool_use" and call.id
        [tool] = [tool for tool in GIVEN if tool["name"] == call.name]
        assert set(call.input) == set(tool["input_schema"]["required"])
        with client.messages.stream(**how, **GREEDY, tool_choice=choice) as stream:
            events = list(stream)
            [same] = stream.get_final_message().content
        assert (same.name, same.input) == (call.name, call.input)
        assert names(events) == ["message_start", *BLOCK, "message_delta", "message_stop"]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "4"}]}
    again = [*USER, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(**how | {"messages": again, "max_tokens": 3}).usage.output_tokens == 3
    counted = client.messages.count_tokens(model=NAME, messages=again).input_tokens
    alike = client.messages.count_tokens(model=NAME, messages=again, tools=GIVEN).input_tokens
    assert counted == alike - len("weather;sum;")


def test_thoughts_text_and_parallel_calls_are_blocks() -> None:
    text = "<think>\nTwo things.\n</think>\n\nWell.\n" + written(HERMES, CALLS)
    with answering(text, template=THINKING) as other, client_of(other) as client:
        whole = client.messages.create(**BODY, tools=GIVEN)
        with client.messages.stream(**BODY, tools=GIVEN) as stream:
            events = list(stream)
            same = stream.get_final_message()
        results: Any = [{"type": "tool_result", "tool_use_id": b.id, "content": "4"} for b in whole.content[2:]]
        prompts, dumped = list[str](), [block.model_dump() for block in whole.content]
        assert any(value is None for block in dumped for value in block.values())  # such as ``toolset_name``
        for content in (whole.content, dumped):
            last = {"role": "user", "content": [*results, {"type": "text", "text": "Go on."}]}
            turns: Any = [*USER, {"role": "assistant", "content": content}, last]
            client.messages.create(**BODY | {"messages": turns}, tools=GIVEN)
            prompts.append(other.decoder.tokenizer.decode(other.engine.handles[-1].request.prompt))
    assert prompts[0] == prompts[1] and "Well." in prompts[0]
    kinds = ["thinking", "text", "tool_use", "tool_use"]
    for message in (whole, same):
        assert [block.type for block in message.content] == kinds and message.stop_reason == "tool_use"
        assert message.content[0].thinking == "Two things." and message.content[0].signature
        assert message.content[1].text == "Well."
        assert [(block.name, block.input) for block in message.content[2:]] == CALLS
    assert names(events) == ["message_start", *BLOCK * 4, "message_delta", "message_stop"]


def test_numbers_that_json_lacks_are_null() -> None:
    call = '<tool_call>\n{"name": "sum", "arguments": {"a": [NaN, 1e999, 2]}}\n</tool_call>'
    tool = {"name": "sum", "input_schema": {"type": "object"}}
    with answering(call) as server:
        response = server.post("/v1/messages", {"model": NAME, "messages": USER, "max_tokens": 9, "tools": [tool]})
    assert response.json()["content"][0]["input"] == {"a": [None, None, 2]}


def test_thinking_is_switched_by_the_templates_argument(client: Any) -> None:
    def count(**how: Any) -> int:
        return client.messages.count_tokens(model=NAME, messages=USER, **how).input_tokens

    assert count(thinking={"type": "disabled"}) == count() + len("<think></think>")
    thought = {"type": "enabled", "budget_tokens": 1024}
    assert count(thinking=thought) == count()
    raw = client.messages.with_raw_response.create(model=NAME, messages=USER, max_tokens=4, thinking=thought)
    assert raw.headers["x-specdec-ignored"] == "budget_tokens"


def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).display_name == NAME


def test_turns_of_one_role_in_a_row_are_one() -> None:
    call = {"type": "tool_use", "id": "x", "name": "sum", "input": {}}
    results = [{"type": "tool_result", "tool_use_id": id, "content": "4"} for id in "xy"]
    apart: Any = [
        *({"role": "user", "content": text} for text in ("a", "b")),
        {"role": "assistant", "content": "Well."},
        *({"role": "assistant", "content": [call | {"id": id}]} for id in "xy"),
        *({"role": "user", "content": [result]} for result in results),
    ]
    joined: Any = [
        {"role": "user", "content": [{"type": "text", "text": text} for text in ("a", "b")]},
        {"role": "assistant", "content": [{"type": "text", "text": "Well."}, call, call | {"id": "y"}]},
        {"role": "user", "content": results},
    ]
    with answering("ok") as other, client_of(other) as client:
        prompts = list[str]()
        for messages in (apart, joined):
            client.messages.create(**BODY | {"messages": messages}, tools=GIVEN)
            prompts.append(other.decoder.tokenizer.decode(other.engine.handles[-1].request.prompt))
    assert prompts[0] == prompts[1] and prompts[0].count("[user]") == 1


FORM = {"type": "json_schema", "schema": {"type": "object"}}
RESULT = {"type": "tool_result", "tool_use_id": "x", "content": "4"}
CALL = {"type": "tool_use", "id": "x", "name": "sum", "input": {}}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unsupported member": ({"mcp_servers": [{}]}, "parameter 'mcp_servers' is not supported"),
    "a format with tools": ({"tools": GIVEN, "output_config": {"format": FORM}}, "'tools' cannot be combined"),
    "a prompt that is too long": (
        {"messages": [{"role": "user", "content": "x" * 2000}]},
        "prompt is too long: 2006 tokens > 1023 maximum",
    ),
    "a prompt that is much too long": (
        {"messages": [{"role": "user", "content": "x" * 100_000}]},
        "prompt is too long: the prompt has 100000 characters",
    ),
    "a call of the system": ({"messages": [{"role": "system", "content": [CALL]}]}, "the role system"),
    "an image": ({"messages": [{"role": "user", "content": [IMAGE]}]}, "'messages.0.content.0': Input tag 'image'"),
    "a call of the user": ({"messages": [{"role": "user", "content": [CALL]}]}, "does not belong to the role user"),
    "a result of the assistant": ({"messages": [{"role": "assistant", "content": [RESULT]}]}, "the role assistant"),
    "a server's tool": ({"tools": [{"type": "web_search_20250305", "name": "web"}]}, "it must be 'custom'"),
    "a choice without a name": ({"tools": GIVEN, "tool_choice": {"type": "tool"}}, "takes a name with the type tool"),
    "an argument that the template lacks": ({"chat_template_kwargs": {"colour": 1}}, "has no argument 'colour'"),
    "a call that is text": (
        {"messages": [{"role": "assistant", "content": [CALL | {"input": "x"}]}]},
        "'messages.0.content.0.input'",
    ),
    "a number in a result": (
        {"messages": [{"role": "user", "content": [RESULT | {"content": [{"type": 5, "text": "a"}]}]}]},
        "'messages.0.content.0.content.0.type'",
    ),
}


def refusal(response: httpx.Response, status: int, kind: str) -> str:
    found = response.json()
    assert response.status_code == status, found
    assert set(found) == {"type", "error", "request_id"} and found["type"] == "error"
    assert found["request_id"] == response.headers["request-id"] and found["error"]["type"] == kind
    assert "\n" not in found["error"]["message"]
    return str(found["error"]["message"])


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused_in_the_protocols_form(server: Server, case: str) -> None:
    body, says = WRONG[case]
    response = server.post(PATH, BODY | body, headers={"x-api-key": "secret"})
    assert says in refusal(response, 400, "invalid_request_error")


def test_errors_are_those_of_the_client(server: Server, client: Any) -> None:
    with pytest.raises(anthropic.NotFoundError, match="there is no model 'other'"):
        client.messages.create(**BODY | {"model": "other"})
    with client_of(server, "wrong") as wrong, pytest.raises(anthropic.AuthenticationError) as refused:
        wrong.messages.create(**BODY)
    assert refused.value.body["error"]["type"] == "authentication_error"
    headers = {"x-api-key": "secret", "Content-Type": "application/json"}
    refusal(httpx.post(server.url + PATH, content=b"\xff{", headers=headers), 400, "invalid_request_error")
    refusal(httpx.post(server.url + PATH, content=b"{}", headers=headers | {"Host": "evil.example"}), 421,
            "invalid_request_error")  # fmt: skip
    refusal(httpx.get(server.url + PATH, headers=headers), 405, "invalid_request_error")
    refusal(httpx.post(server.url + PATH + "/batches", json={}, headers=headers), 404, "not_found_error")
    large = httpx.post(server.url + PATH, content=b" " * (5 * 2**20), headers=headers)
    refusal(large, 413, "request_too_large")


def test_a_fault_in_a_stream_is_its_event() -> None:
    with answering("ab", end="error") as other, client_of(other) as client:
        with pytest.raises(anthropic.APIStatusError, match="decoding failed") as found:
            list(client.messages.create(**BODY, stream=True))
        with pytest.raises(anthropic.InternalServerError, match="decoding failed"):
            client.messages.create(**BODY)
    assert found.value.body["error"]["type"] == "api_error"
