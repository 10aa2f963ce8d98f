"""Tool calls: read from every form however the text is cut, made by grammars, and served to the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from servers import NAME, USER, Replay, Server, byte_tokenizer, events, serving, stand_in
from tiny import tiny_model
from tiny_tokenizers import letters
from zoo import EOS

from specdec import SpecDecoder
from specdec.engine.request import Event
from specdec.serve.tools import (
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_NAMED,
    ChatParser,
    ToolFormat,
    find_format,
    merge_deltas,
    tool_grammar,
)
from specdec.speculation.constraints import ConstraintState, compile_constraint

pytest.importorskip("llguidance", reason="llguidance is not installed")
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
SUM = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}, "b": {"enum": [3, 4]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any] | None] = {"weather": WEATHER, "sum": SUM, "now": None}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": f"the {name}"} | ({"parameters": s} if s else {})}
    for name, s in SCHEMAS.items()
]
FORMS = [HERMES, MISTRAL, MISTRAL_NAMED, LLAMA]
CALLS = [("weather", {"city": "Rome", "days": 3}), ("sum", {"a": 1, "b": 4})]
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function.arguments.city }}</tool_call>{% endfor %}{% endfor %}"
)


def written(form: ToolFormat, calls: list[tuple[str, dict[str, Any]]]) -> str:
    bodies = [json.dumps({"name": name, form.arguments: arguments}) for name, arguments in calls]
    if form.separator:
        bodies = [name + form.separator + json.dumps(arguments) for name, arguments in calls]
    return form.first + form.between.join(form.before + body + form.after for body in bodies) + form.last


def read(text: str, size: int, form: ToolFormat | None, **how: Any) -> tuple[dict[str, Any], int]:
    parser = ChatParser(form, list(SCHEMAS), **how)
    deltas = [delta for at in range(0, len(text), size) for delta in parser.push(text[at : at + size])]
    return merge_deltas(deltas + parser.push("", last=True)), parser.calls


def calls_of(message: dict[str, Any]) -> list[tuple[str, Any]]:
    found = [call["function"] for call in message.get("tool_calls", ())]
    return [(call["name"], json.loads(call["arguments"])) for call in found]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_calls_are_read_however_the_text_comes(form: ToolFormat, size: int) -> None:
    message, count = read(written(form, CALLS), size, form)
    assert calls_of(message) == CALLS and message["content"] is None and count == 2
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    single, _ = read(written(form, CALLS), size, form, single=True)
    assert calls_of(single) == CALLS[:1]
    other = '{"arguments": {"a": 1, "b": 3}, "id": "x", "name": "sum"}'
    text = form.first + form.before + other + form.after + form.last
    assert form.separator or calls_of(read(text, size, form)[0]) == [("sum", {"a": 1, "b": 3})]
    for odd in ("[TOOL_CALLS]nobody[ARGS]{}", "[TOOL_CALLS]sum[ARGS]7", "[TOOL_CALLS]su"):
        message, count = read(odd, size, MISTRAL_NAMED)
        assert message["content"] == odd.removeprefix("[TOOL_CALLS]") and not count
    quoted = [("weather", {"city": 'a"}{<tool_call>\\', "days": []})]
    assert calls_of(read(written(form, quoted), size, form)[0]) == quoted
    for answer in (
        "It is warm.\n\nVery < warm. ",
        "  [1, 2]",
        '{"name": "nobody", "arguments": {"a": {}}}',
        "",
        "<tool_",
    ):
        message, count = read(answer, size, form)
        assert message["content"].strip() == answer.strip() and not count
    if form.mark:
        message, _ = read("Let me see.\n" + written(form, CALLS), size, form)
        assert calls_of(message) == CALLS and message["content"] == "Let me see."
    cut, _ = read(written(form, CALLS[:1])[: len(form.first + form.before) + 45], size, form)
    assert cut["tool_calls"][0]["function"]["name"] == "weather"


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_reasoning_is_told_apart(size: int) -> None:
    assert read("ab</think>\n\n{}", size, None, inside=True)[0] == {"content": "{}", "reasoning_content": "ab"}
    assert read("<think>ab</think>{}", size, None, may_reason=True)[0] == {"content": "{}", "reasoning_content": "ab"}
    assert read("<thin", size, None, may_reason=True)[0] == {"content": "<thin"}
    assert read("<think>a</thi", size, None, may_reason=True)[0] == {"content": "", "reasoning_content": "a</thi"}
    assert read("{}</think>", size, None)[0] == {"content": "{}</think>"}


def test_forms_are_found_in_templates() -> None:
    assert find_format("tools <tool_call>") is HERMES and find_format("tools [TOOL_CALLS]") is MISTRAL
    assert (
        find_format("tools [TOOL_CALLS] [ARGS]") is MISTRAL_NAMED
        and find_format("tools [TOOL_CALLS] [CALL_ID]") is None
    )
    assert find_format('tools Environment: ipython "parameters"') is LLAMA
    assert find_format("<tool_call>") is find_format("tools") is find_format("tools <tool_call><function=x>") is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("special", [False, True])
def test_grammars_take_what_is_in_the_form_and_nothing_else(form: ToolFormat, special: bool) -> None:
    tokenizer = letters()
    if form.mark:
        tokenizer.add_tokens([form.mark, *filter(None, [form.separator])], special_tokens=special)
    tokenizer.add_tokens(["\n"])

    def state(several: bool) -> ConstraintState:
        grammar = tool_grammar(form, SCHEMAS, several, tokenizer)
        return compile_constraint(grammar, tokenizer, 100, frozenset([EOS])).state(())

    def ends(text: str, several: bool = True) -> bool:
        mask = state(several).mask(tokenizer(text).input_ids)
        return mask is not None and bool(mask[EOS])

    assert ends(written(form, CALLS)) and ends(written(form, [("now", {})])) and ends(written(form, CALLS[:1]), False)
    assert not ends(written(form, CALLS), False) and not ends(written(form, [("sum", {"a": 1})]))
    assert not ends(written(form, [("weather", {"city": "Rome", "days": 10})])) and not ends("hello")


# --- the server ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    tokenizer = letters()
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "\n"])
    tokenizer.chat_template = TEMPLATE
    model = tiny_model(vocab_size=100, max_position_embeddings=512)
    with serving(SpecDecoder(model, tokenizer, "prompt-lookup", runtime="reference")) as running:
        yield running


def test_the_official_client_gets_the_calls_it_forces(server: Server) -> None:
    how: Any = {"model": NAME, "messages": USER, "tools": TOOLS[:2], "max_tokens": 300}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        for seed, choice in enumerate(["required", {"type": "function", "function": {"name": "sum"}}] * 2):
            how |= {"seed": seed, "tool_choice": choice, "parallel_tool_calls": False}
            answer = client.chat.completions.create(**how).choices[0]
            assert answer.finish_reason == "tool_calls" and answer.message.content is None
            [call] = answer.message.tool_calls
            name, arguments = call.function.name, json.loads(call.function.arguments)
            assert name == "sum" or choice == "required"
            assert set(arguments) == set(SCHEMAS[name]["properties"])  # type: ignore[index]
            deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(stream=True, **how)]
            parts = [part for delta in deltas for part in delta.tool_calls or ()]
            assert parts[0].function.name == name and parts[0].id and len(parts) > 2
            assert json.loads("".join(part.function.arguments for part in parts)) == arguments
        again: Any = [*USER, answer.message, {"role": "tool", "tool_call_id": call.id, "content": "4"}]
        assert client.chat.completions.create(model=NAME, messages=again, max_tokens=3).choices[0].message.content


def test_detokenising_keeps_special_tokens(server: Server) -> None:
    tokens = [2, *server.post("/tokenize", {"prompt": "ab"}).json()["tokens"]]
    assert server.post("/detokenize", {"tokens": tokens}).json() == {"prompt": "<eos>ab"}


def test_calls_with_names_before_their_arguments_are_forced_and_streamed() -> None:
    tokenizer = letters()
    tokenizer.add_tokens(["[TOOL_CALLS]", "[ARGS]"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE.replace("<tool_call>", "[TOOL_CALLS]").replace("</tool_call>", "[ARGS]")
    model = tiny_model(vocab_size=99, max_position_embeddings=512)
    body: dict[str, Any] = {"tools": TOOLS[:2], "tool_choice": "required", "n": 4, "seed": 1, "max_tokens": 300}
    with serving(SpecDecoder(model, tokenizer, "prompt-lookup", runtime="reference")) as other:
        whole = other.chat(**body).json()["choices"]
        chunks = [chunk["choices"][0] for chunk in events(other.chat(stream=True, **body))]
    for choice in whole:
        calls = calls_of(choice["message"])
        assert choice["finish_reason"] == "tool_calls" and calls and choice["message"]["content"] is None
        deltas = [chunk["delta"] for chunk in chunks if chunk["index"] == choice["index"]]
        assert calls_of(merge_deltas([delta for delta in deltas if "tool_calls" in delta])) == calls
        assert all(set(arguments) == set(SCHEMAS[name]["properties"]) for name, arguments in calls)  # type: ignore[index]


def test_a_forced_call_that_is_cut_is_a_call(server: Server) -> None:
    forced: dict[str, Any] = {"type": "function", "function": {"name": "sum"}}
    body: dict[str, Any] = {"tools": TOOLS[:2], "seed": 1}
    lengths = set()
    for limit in (1, 4, 12, 25, 34, 38):
        answer = server.chat(**body, tool_choice=forced, max_tokens=limit).json()["choices"][0]
        [call] = answer["message"]["tool_calls"]
        assert call["function"]["name"] == "sum" and call["id"] and answer["message"]["content"] is None
        assert answer["finish_reason"] == "length"
        streamed = events(server.chat(**body, tool_choice=forced, max_tokens=limit, stream=True))
        deltas = [chunk["choices"][0]["delta"] for chunk in streamed]
        same = merge_deltas([delta for delta in deltas if "tool_calls" in delta])["tool_calls"][0]["function"]
        assert same == call["function"] and not any(delta.get("content") for delta in deltas)
        lengths.add(len(call["function"]["arguments"]))
    assert 0 in lengths and max(lengths) > 0
    unclear = server.chat(**body, tool_choice="required", max_tokens=3).json()["choices"][0]
    assert unclear["finish_reason"] == "length" and unclear["message"]["content"] == ""


@pytest.mark.parametrize(
    ("form", "text", "name"),
    [
        (HERMES, '<tool_call>\n{"name": "w', "weather"),
        (HERMES, '<think>"name": "now"</think><tool_call>\n{"name": "sum", "arg', "sum"),
        (HERMES, '<tool_call>\n{"name": "', None),
        (LLAMA, '{"name": "no', "now"),
        (MISTRAL_NAMED, "[TOOL_CALLS]su", "sum"),
        (MISTRAL_NAMED, "[TOOL_CALLS]sum[ARGS]", "sum"),
    ],
)
def test_the_name_of_a_call_that_is_cut_is_told_where_it_is_certain(
    form: ToolFormat, text: str, name: str | None
) -> None:
    message, _ = read(text, 5, form, forced=True, may_reason=True)
    assert [call["function"]["name"] for call in message.get("tool_calls", [])] == ([name] if name else [])
    assert not message["content"]


def test_several_calls_come_where_they_may(server: Server) -> None:
    rows = server.chat(tools=TOOLS[2:], tool_choice="required", n=16, seed=1, max_tokens=300).json()["choices"]
    counts = {len(row["message"]["tool_calls"]) for row in rows if row["finish_reason"] == "tool_calls"}
    assert 1 in counts and max(counts) > 1


def test_tools_that_the_model_may_call(server: Server) -> None:
    prompt = server.chat(tools=TOOLS, max_tokens=1).json()["usage"]["prompt_tokens"]
    none = server.chat(tools=TOOLS, tool_choice="none", max_tokens=1).json()["usage"]["prompt_tokens"]
    assert prompt == none + len("weather;sum;now;")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    text = "Well.\n" + written(HERMES, CALLS)
    ids = tokenizer(text).input_ids
    script = [Event(ids[n : n + 5], depths=[0] * len(ids[n : n + 5])) for n in range(0, len(ids), 5)]
    with serving(stand_in(tokenizer), Replay(lambda request: [*script, Event([], "eos")])) as other:
        answer = other.chat(tools=TOOLS, tool_choice="auto").json()["choices"][0]
        plain = other.chat().json()["choices"][0]
    assert calls_of(answer["message"]) == CALLS and answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] == "Well."
    assert plain["message"]["content"] == text and "tool_calls" not in plain["message"]


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "the same name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "not in tools"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "leave one out"),
        ({"tools": TOOLS, "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "pattern"),
        ({"messages": [{"role": "tool", "tool_call_id": "x"}]}, "needs content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "the role tool and tool_call_id"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "x", "arguments": "["}}]}
                ]
            },
            "JSON object",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "a", "parameters": {"enum": []}}}],
                "tool_choice": "required",
            },
            "cannot be used",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "a", "parameters": {"$ref": "#"}}}],
                "tool_choice": "required",
            },
            "the grammar cannot be used: it allows no text",
        ),
    ],
)
def test_what_is_refused_of_tools(server: Server, body: dict[str, Any], what: str) -> None:
    found = server.chat(**body)
    assert found.status_code == 400 and what in found.json()["error"]["message"]


def test_a_template_without_tools_is_refused(server: Server) -> None:
    tokenizer = byte_tokenizer()
    with serving(stand_in(tokenizer), Replay(lambda request: [Event([65], "eos", depths=[0])])) as other:
        found = other.chat(tools=TOOLS)
        assert other.chat(tools=TOOLS, tool_choice="none").status_code == 200
    assert found.status_code == 400 and found.json()["error"]["param"] == "tools"
