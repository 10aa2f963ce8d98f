"""OpenAI's Responses: the official client and the agents' package, tools both ways, refusals."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from calls import CALLS, SCHEMAS, THINKING, TOOLS, answering, thinking, written
from servers import NAME, Server

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


def result_of(call: Any) -> Any:
    return {"type": "function_call_output", "call_id": call.call_id, "output": "4"}


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
    items = [{"role": "user", "content": ASK}, call, result_of(call)]
    after = client.responses.create(**how | {"input": items, "max_output_tokens": 3})
    assert after.usage.input_tokens > whole.usage.input_tokens and after.usage.output_tokens == 3


def test_a_response_that_ends_in_a_cut_call_is_continued() -> None:
    text = '<tool_call>\n{"name": "sum", "arguments": {"a": 1, "b'
    with answering(text, "ok", end="length") as other, client_of(other) as client:
        how: Any = BODY | {"tools": GIVEN}
        events = list(client.responses.create(**how, stream=True))
        first = events[-1].response  # type: ignore[union-attr]
        [done] = [event.item for event in events if event.type == "response.output_item.done"]
        assert first.status == done.status == first.output[0].status == "incomplete"
        [call] = first.output
        for given in (result_of(call), {"role": "user", "content": "Go on."}):
            after = client.responses.create(**how | {"input": [{"role": "user", "content": ASK}, call, given]})
            assert after.status == "incomplete" and after.usage.input_tokens > first.usage.input_tokens


@pytest.mark.parametrize("cut", [False, True])
def test_only_the_last_item_of_a_cut_stream_is_incomplete(cut: bool) -> None:
    text = "<think>\nTwo things.\n</think>\n\nWell."
    with answering(text, template=THINKING, end="length" if cut else "eos") as other, client_of(other) as client:
        events = list(client.responses.create(**BODY, stream=True))
    ended = [event.item.status for event in events if event.type == "response.output_item.done"]
    assert ended == ["completed", "incomplete" if cut else "completed"]


def test_text_has_the_form_that_is_asked_for(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form: Any = {"format": {"type": "json_schema", "name": "number", "schema": schema, "strict": True}}
    found = client.responses.create(**BODY, text=form)
    assert json.loads(found.output_text)["a"] in (1, 2) and found.status == "completed"
    same = client.responses.create(**BODY, text={"format": form["format"] | {"type": "json_object"}})
    assert json.loads(same.output_text)["a"] in (1, 2)


def test_reasoning_text_and_parallel_calls_are_items() -> None:
    text = "<think>\nTwo things.\n</think>\n\nWell.\n" + written(HERMES, CALLS)
    with answering(text, template=THINKING) as other, client_of(other) as client:
        whole = client.responses.create(**BODY, tools=GIVEN)
        names, same = streamed(client, **BODY, tools=GIVEN)
        items: Any = [{"role": "user", "content": ASK}, *whole.output, *map(result_of, whole.output[2:])]
        after = client.responses.create(**BODY | {"input": items}, tools=GIVEN)
        kept = other.engine.handles[-1].request.prompt
    for response in (whole, same):
        assert [item.type for item in response.output] == ["reasoning", "message", *["function_call"] * 2]
        assert response.output[0].content[0].text == "Two things." and response.output_text == "Well."
        assert [(item.name, json.loads(item.arguments)) for item in response.output[2:]] == CALLS
        assert response.usage.output_tokens_details.reasoning_tokens == len("Two things.")
    assert names == ["created", "in_progress", *THOUGHT, *TEXT, *CALL * 2, "completed"]
    assert after.status == "completed"
    called = "<tool_call>Rome</tool_call><tool_call></tool_call>[tool]4[tool]4"
    assert other.decoder.tokenizer.decode(kept) == f"weather;sum;[user]{ASK}[assistant]Well.{called}"


@pytest.mark.slow  # importing the package takes seconds
def test_openais_agents_call_a_tool(server: Server) -> None:
    agents = pytest.importorskip("agents", reason="openai-agents is not installed")
    called = list[tuple[int, int]]()

    @agents.function_tool
    def add(a: Literal[1, 2], b: Literal[3, 4]) -> str:
        """Add two numbers."""
        called.append((a, b))
        return "sum"

    agents.set_tracing_disabled(True)

    async def run() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
            model = agents.OpenAIResponsesModel(model=NAME, openai_client=client)
            settings = agents.ModelSettings(tool_choice="required", max_tokens=300, parallel_tool_calls=False)
            agent = agents.Agent(
                name="a", model=model, tools=[add], model_settings=settings, tool_use_behavior="stop_on_first_tool"
            )
            return (await agents.Runner.run(agent, "1 + 4?")).final_output

    assert asyncio.run(run()) == "sum" and len(called) == 1


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an image": ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "'input.0.content.0.type': it"),
    "an item of another type": ({"input": [{"type": "web_search_call"}]}, "'input.0': Input tag 'web_search_call'"),
    "an earlier response": ({"previous_response_id": "resp_x"}, "'previous_response_id'"),
    "a verbosity": ({"text": {"verbosity": "low"}}, "'text.verbosity' is not supported"),
    "a truncation": ({"truncation": "auto"}, "'truncation'"),
    "a hosted tool": ({"tools": [{"type": "web_search"}]}, "'tools.0.type': it must be 'function'"),
    "a part of a number": ({"input": [{"role": "user", "content": [5]}]}, "'input.0.content.0': it must be an object"),
    "items in a number": ({"input": 5}, "'input': it must be a valid string or a valid list"),
    "a format with tools": (
        {"tools": GIVEN, "text": {"format": {"type": "json_object"}}},
        "'tools' cannot be combined",
    ),
    "a choice without tools": ({"tool_choice": "required"}, "tool_choice needs tools"),
}


def test_a_message_of_an_error_is_short(server: Server) -> None:
    for kind in ({"x" * 10**5: 1}, "x" * 10**5):
        response = server.post(PATH, {"model": NAME, "input": [{"type": kind}]}, headers=KEY)
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
