"""Tool calls: read from every form however the text is cut, made by grammars, and served to the official client."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from calls import CALLS, FORMS, SCHEMAS, TEMPLATE, THINKING, TOOLS, answering, calls_of, read, written
from servers import NAME, USER, Replay, Server, byte_tokenizer, serving, stand_in
from tiny import tiny_model
from tiny_tokenizers import letters
from zoo import EOS

from specdec import SpecDecoder
from specdec.engine.request import Event
from specdec.serve.parts import AnswerParser, Format
from specdec.serve.tools import (
    FUNCTION_GEMMA,
    GEMMA,
    HARMONY,
    HERMES,
    LFM,
    LLAMA,
    MISTRAL,
    MISTRAL_NAMED,
    PLAIN,
    QWEN_XML,
    abilities,
    find_format,
    find_thoughts,
    tool_grammar,
)
from specdec.speculation.constraints import REASONING, compile_constraint

pytest.importorskip("llguidance", reason="llguidance is not installed")
SIZES = pytest.mark.parametrize("size", [1, 5, 1000])


@pytest.mark.parametrize("form", FORMS)
@SIZES
def test_calls_are_read_however_the_text_comes(form: Format, size: int) -> None:
    blocks = read(written(form, CALLS), size, form)
    assert calls_of(blocks) == CALLS and len(blocks) == 2
    assert calls_of(read(written(form, CALLS), size, form, single=True)) == CALLS[:1]
    before, _, after = FORMS[form]
    for name, calls in (('"sum"', [("sum", {"a": 1})]), ('["sum"]', []), ('{"sum": 1}', []), ("null", [])):
        other = before + f'{{"arguments": {{"a": 1}}, "id": "x", "name": {name}}}' + after
        assert form is MISTRAL_NAMED or calls_of(read(other, size, form)) == calls
    for odd in ("[TOOL_CALLS]nobody[ARGS]{}", "[TOOL_CALLS]sum[ARGS]7", "[TOOL_CALLS]su"):
        assert "".join(text for _, text in read(odd, size, MISTRAL_NAMED)) == odd.removeprefix("[TOOL_CALLS]")
    quoted = [("weather", {"city": 'a"}{<tool_call>\\', "days": []})]
    assert calls_of(read(written(form, quoted), size, form)) == quoted
    for answer in (
        "It is warm.\n\nVery < warm. ",
        "  [1, 2]",
        '{"name": "nobody", "arguments": {"a": {}}}',
        "",
        "<tool_",
    ):
        blocks = read(answer, size, form)
        assert "".join(text for _, text in blocks).strip() == answer.strip()
    if form is not LLAMA:
        blocks = read("Let me see.\n" + written(form, CALLS), size, form)
        assert calls_of(blocks) == CALLS and blocks[0] == ("text", "Let me see.")
    cut = read(written(form, CALLS[:1])[: len(before) + 45], size, form)
    assert cut[0][:2] == ("call", "weather")


# What models write, as their templates show it, and what it means.
HARMONIC = (
    "<|channel|>analysis<|message|>Look it up.<|end|><|start|>assistant<|channel|>commentary<|message|>One moment."
    "<|end|><|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    '{"city":"Oslo","days":2}<|call|>'
)
XML = (
    'I\'ll look.\n\n<tool_call>\n<function=write>\n<parameter=path>\na "b".py\n</parameter>\n<parameter=text>\n'
    "def f():\n    return '<x>'\n\n</parameter>\n<parameter=mode>\n420\n</parameter>\n<parameter=opts>\n"
    '{"sync": true}\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>'
)
GEMMAS = '<|tool_call>call:write{path:<|"|>a "b".py<|"|>,mode:420,opts:{d:[1,<|"|>x:{<|"|>],sync:true}}<tool_call|>'
PYTHON = "write(path='a \"b\".py', mode=420, opts={'sync': True, 'to': None})"
ODD = "[now(1)]", "now", "[now(a=b'x')]", "[now(a=1e999)]", "now(a=print(1))", "[now(**{'a': 1})]", "-" * 9000 + "1", ""
WRITTEN = {"path": 'a "b".py', "text": "def f():\n    return '<x>'\n", "mode": 420, "opts": {"sync": True}}
Blocks = list[tuple[str, ...]]
RECORDED: list[tuple[Format, str, Blocks, list[tuple[str, Any]]]] = [
    (HARMONY, HARMONIC, [("reasoning", "Look it up."), ("text", "One moment.")],
     [("weather", {"city": "Oslo", "days": 2})]),
    (HARMONY, "<|channel|>final<|message|>It is warm.", [("text", "It is warm.")], []),
    (HARMONY, "<|channel|>analysis<|message|>It is", [("reasoning", "It is")], []),
    (HARMONY, "<|channel|>commentary to=functions.nobody <|message|>{}<|call|>", [("text", "{}")], []),
    (HARMONY, "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}<|call|>", [], [("now", {})]),
    (HARMONY, "It is warm.", [("text", "It is warm.")], []),
    (QWEN_XML, XML, [("text", "I'll look.")], [("write", WRITTEN), ("now", {})]),
    (QWEN_XML, XML.replace("<tool_call>\n", ""), [("text", "I'll look.")], [("write", WRITTEN), ("now", {})]),
    (QWEN_XML, "<tool_call>\n<function=rm>\n</function>", [("text", "<function=rm>\n</function>")], []),
    (GEMMA, GEMMAS, [], [("write", {"path": 'a "b".py', "mode": 420, "opts": {"d": [1, "x:{"], "sync": True}})]),
    (GEMMA, "<|tool_call>call:now{}<tool_call|><|tool_call>call:now{}<tool_call|>", [], [("now", {})] * 2),
    (GEMMA, "Well. <|tool_call>call:nobody{a:1}", [("text", "Well.call:nobody{a:1}")], []),
    (FUNCTION_GEMMA, "<start_function_call>call:weather{city:<escape>Rome<escape>,days:3}<end_function_call>",
     [], [("weather", {"city": "Rome", "days": 3})]),
    (LLAMA, '<|python_tag|>{"name": "now", "parameters": {}}', [], [("now", {})]),
    (LFM, f"<|tool_call_start|>[{PYTHON}, now()]<|tool_call_end|>It is warm.", [("text", "It is warm.")],
     [("write", {"path": 'a "b".py', "mode": 420, "opts": {"sync": True, "to": None}}), ("now", {})]),
    (LFM, "Well. <|tool_call_start|>now()", [("text", "Well.")], [("now", {})]),
    (LFM, '<|tool_call_start|>[{"name": "now", "arguments": {}}]<|tool_call_end|>', [], [("now", {})]),
    (LFM, '[{"name": "now", "arguments": {}}]', [], [("now", {})]),
    *[(LFM, f"<|tool_call_start|>{odd}<|tool_call_end|>", [("text", odd)], []) for odd in ODD],
    (LFM, "<|tool_call_start|>[rm(path='/')]<|tool_call_end|>", [("text", "rm({\"path\": \"/\"})")], []),
]  # fmt: skip
OPTIONS = {"anyOf": [{"type": "object"}, {"type": "null"}]}
MEMBERS = {"path": {"type": "string"}, "text": {"type": "string"}, "mode": {"type": "integer"}, "opts": OPTIONS}
WRITE: dict[str, Any] = {"write": {"type": "object", "properties": MEMBERS}}


@pytest.mark.parametrize("case", range(len(RECORDED)))
@SIZES
def test_recorded_answers_are_read(case: int, size: int) -> None:
    form, text, others, calls = RECORDED[case]
    blocks = read(text, size, form, SCHEMAS | WRITE)
    assert [block for block in blocks if block[0] != "call"] == others
    assert calls_of(blocks) == calls


def test_arguments_are_streamed() -> None:
    """Of a long text in a call, what has come is known before its end."""
    for form, begin in (
        (HERMES, '<tool_call>\n{"name": "write", "arguments": {"text": "'),
        (MISTRAL, '[TOOL_CALLS][{"name": "write", "arguments": {"text": "'),
        (MISTRAL_NAMED, '[TOOL_CALLS]write[ARGS]{"text": "'),
        (QWEN_XML, "<tool_call>\n<function=write>\n<parameter=text>\n"),
        (GEMMA, '<|tool_call>call:write{text:<|"|>'),
        (HARMONY, '<|channel|>commentary to=functions.write <|constrain|>json<|message|>{"text":"'),
    ):
        parser = AnswerParser(form, WRITE)
        parts = [part for letter in begin + "a long text" for part in parser.push(letter)]
        assert parts[0].name == "write" and "a long text" in "".join(part.text for part in parts)
        assert len(parts) > len("a long text")


FENCED: list[tuple[str, Blocks]] = [
    ('Well:\n```json\n{"name": "sum", "arguments": {"a": 1, "b": 4}}\n```\nDone.',
     [("text", "Well:"), ("call", "sum", '{"a": 1, "b": 4}'), ("text", "Done.")]),
    ('```\n{"name": "now", "arguments": {}}\n{"name": "now", "parameters": {}}\n```', [("call", "now", "{}")] * 2),
    ('```json\n{"name": "now"}', [("call", "now", "{}")]),
    ('```json\n{"name": "sum", "description": "adds", "parameters": {"type": "object"}}\n```', []),
    ('```json\n{"name": "sum", "arguments": [1]}\n```', []),
    ('```json\n{"name": "nobody", "arguments": {}}\n``` and more', []),
    ('a \n```python\nprint("""x""")\n```\n\n```json\n[1]\n``` b', []),
    ('```json\n{"name": 7}\n```', []),
    ('{"arguments": {"a": "\\ud83d"}, "name": "sum"}', [("call", "sum", '{"a": "\\ud83d"}')]),
    ("```json\n{\n```", []),
    ('{"name": "now", "arguments": {}}', [("call", "now", "{}")]),
    ('{{"name": "sum", "arguments": {"a": 1, "b": 4}}}\n', [("call", "sum", '{"a": 1, "b": 4}')]),
    ('`{"name": "now", "arguments": {}}`', [("call", "now", "{}")]),
    ('{"name": "now", "arguments": {}} is what I call', []),
    ("`x` is {", []),
    ("```", []),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(FENCED)))
@SIZES
def test_a_fenced_object_is_a_call_if_it_is_nothing_else(case: int, size: int) -> None:
    text, blocks = FENCED[case]
    assert read(text, size, HERMES) == (blocks or [("text", text)])


@pytest.mark.parametrize("member", ["required", "properties", "enum", "type", "anyOf", "items"])
def test_an_odd_schema_breaks_nothing(member: str) -> None:
    text, schema = '```json\n{"name": "odd", "arguments": {"a": [1]}}\n```', {member: 5}
    assert len(read(text, 5, HERMES, {"odd": schema})) == 1
    xml = "<tool_call>\n<function=odd>\n<parameter=a>\n[1]\n</parameter>\n</function>\n</tool_call>"
    assert len(read(xml, 5, QWEN_XML, {"odd": schema})) == 1


@SIZES
def test_reasoning_is_told_apart(size: int) -> None:
    how: Any = {"tools": None, "reasoning": REASONING}
    assert read("ab\n</think>\n\n{}", size, PLAIN, inside=True, **how) == [("reasoning", "ab"), ("text", "{}")]
    assert read("<think>\nab</think>{}", size, PLAIN, **how) == [("reasoning", "ab"), ("text", "{}")]
    assert read("<thin", size, PLAIN, **how) == [("text", "<thin")]
    assert read("<think>a</thi", size, PLAIN, **how) == [("reasoning", "a</thi")]
    assert read("{}</think>", size, PLAIN, None) == [("text", "{}</think>")]
    thought = read("<think>a</think>\n" + written(HERMES, CALLS), size, HERMES, reasoning=REASONING)
    assert thought[0] == ("reasoning", "a") and calls_of(thought) == CALLS


def test_forms_are_found_in_templates() -> None:
    assert find_format("tools <tool_call>") is HERMES and find_format("tools [TOOL_CALLS]") is MISTRAL
    assert find_format("tools [TOOL_CALLS] [ARGS]") is MISTRAL_NAMED
    assert find_format("tools [TOOL_CALLS] [CALL_ID]") is PLAIN
    assert find_format('tools Environment: ipython "parameters"') is LLAMA
    assert find_format("tools <tool_call><function=x>") is QWEN_XML
    assert find_format("tools <|tool_call>") is GEMMA and find_format("tools <start_function_call>") is FUNCTION_GEMMA
    assert find_format("<|channel|> <|message|>") is HARMONY
    assert find_format("tools List of tools: <|tool_list_start|>[") is find_format("tools List of tools: [") is LFM
    assert find_format("<tool_call>") is find_format("tools") is find_format("tools <tool_call><arg_key>") is PLAIN
    assert find_thoughts("x </think>") == REASONING and find_thoughts("x") is None


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "chat: no, tools: no, reasoning: no"),
        ("{{ messages[0].content }}", "chat: yes, tools: no, reasoning: no"),
        (TEMPLATE, "chat: yes, tools: yes, reasoning: no"),
        (TEMPLATE + "<think></think>", "chat: yes, tools: yes, reasoning: yes"),
    ],
)
def test_a_line_says_what_clients_can_ask_for(template: str | None, says: str) -> None:
    tokenizer = letters()
    tokenizer.chat_template = template
    assert abilities(tokenizer) == says + ", structured output: yes"


def test_a_grammar_takes_a_call_and_nothing_else() -> None:
    tokenizer = letters()
    grammar = compile_constraint(tool_grammar(SCHEMAS), tokenizer, 97, frozenset([EOS]))

    def ends(name: str, arguments: dict[str, Any], more: str = "") -> bool:
        text = json.dumps({"name": name, "arguments": arguments}) + more
        mask = grammar.state(()).mask(tokenizer(text).input_ids)
        return mask is not None and bool(mask[EOS])

    assert ends("now", {}) and ends(*CALLS[0]) and not ends(*CALLS[0], " ") and not ends("nobody", {})
    assert not ends("sum", {"a": 1}) and not ends("weather", {"city": "Rome", "days": 10})


@pytest.mark.parametrize(
    "schema", [{}, {"properties": {"a": {"type": "integer"}}}, {"$defs": {}}, {"type": ["object", "null"]},
    {"anyOf": [{"type": "object"}, {"type": "null"}]}]
)  # fmt: skip
def test_arguments_of_a_call_are_an_object_whatever_else_a_schema_allows(schema: dict[str, Any]) -> None:
    tokenizer = letters()
    grammar = compile_constraint(tool_grammar({"f": schema}), tokenizer, 97, frozenset([EOS]))
    for arguments in ("{}", '"x"', "null", "[1]", "3"):
        mask = grammar.state(()).mask(tokenizer(f'{{"name": "f", "arguments": {arguments}}}').input_ids)
        assert (mask is not None and bool(mask[EOS])) == (arguments == "{}")


def called(message: dict[str, Any]) -> list[tuple[str, Any]]:
    found = [call["function"] for call in message.get("tool_calls", ())]
    return [(call["name"], json.loads(call["arguments"])) for call in found]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    tokenizer = letters()
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "\n"])
    tokenizer.chat_template = TEMPLATE
    model = tiny_model(vocab_size=100, max_position_embeddings=512)
    with serving(SpecDecoder(model, tokenizer, "prompt-lookup", runtime="transformers")) as running:
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
            assert parts[0].function.name == name and parts[0].id and len(parts) > 1
            assert json.loads("".join(part.function.arguments for part in parts)) == arguments
        again: Any = [*USER, answer.message, {"role": "tool", "tool_call_id": call.id, "content": "4"}]
        answered = client.chat.completions.create(model=NAME, messages=again, max_tokens=3)
        assert answered.usage and answered.usage.completion_tokens


def test_detokenising_keeps_special_tokens(server: Server) -> None:
    tokens = [2, *server.post("/tokenize", {"prompt": "ab"}).json()["tokens"]]
    assert server.post("/detokenize", {"tokens": tokens}).json() == {"prompt": "<eos>ab"}


def test_tools_that_the_model_may_call(server: Server) -> None:
    prompt = server.chat(tools=TOOLS, max_tokens=1).json()["usage"]["prompt_tokens"]
    none = server.chat(tools=TOOLS, tool_choice="none", max_tokens=1).json()["usage"]["prompt_tokens"]
    assert prompt == none + len("weather;sum;now;")
    text = "Well.\n" + written(HERMES, CALLS)
    with answering(text) as other:
        answer, same = other.chat(tools=TOOLS, tool_choice="auto", n=2).json()["choices"]
        plain = other.chat().json()["choices"][0]
    assert called(answer["message"]) == CALLS and answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] == "Well." and called(same["message"]) == CALLS
    assert plain["message"]["content"] == text and "tool_calls" not in plain["message"]


def test_marks_of_calls_are_hidden_without_tools_and_channels_are_always_read() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", *HARMONY.special]})
    for template, text, says in (
        (TEMPLATE + "<tool_call>", "a<tool_call>b", "ab"),
        ("{{ messages[0].content }}<|channel|><|message|>", "<|channel|>final<|message|>a", "a"),
    ):
        tokenizer.chat_template = template
        ids = tokenizer(text).input_ids
        engine = Replay(lambda request, ids=ids: [Event(ids, depths=[0] * len(ids)), Event([], "eos")])  # type: ignore[misc]
        with serving(stand_in(tokenizer, vocab=1000), engine) as other:
            assert other.chat().json()["choices"][0]["message"]["content"] == says


def given(parameters: Any) -> dict[str, Any]:
    tool = {"type": "function", "function": {"name": "a", "parameters": {"type": "object"} | parameters}}
    return {"tools": [tool], "tool_choice": "required"}


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "the same name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "not in tools"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "leave one out"),
        ({"tools": TOOLS, "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "'tools' cannot be combined with a format"),
        ({"tools": TOOLS, "structured_outputs": {"regex": "a"}}, "'tools' cannot be combined with a format"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "pattern"),
        (given({"enum": []}), "cannot be used"),
        (given({"$ref": "#"}), "the grammar cannot be used"),
        (given({"properties": [1]}), "the grammar cannot be used"),
        (given({"properties": {"a": {}}, "required": 5}), "the grammar cannot be used"),
        (given({"properties": {"a": 5}}), "the grammar cannot be used"),
    ],
)
def test_what_is_refused_of_tools(server: Server, body: dict[str, Any], what: str) -> None:
    found = server.chat(**body)
    assert found.status_code == 400 and what in found.json()["error"]["message"], found.text


def test_a_format_goes_with_tools_that_must_not_be_called(server: Server) -> None:
    form = {"response_format": {"type": "json_object", "schema": {"enum": [{}]}}}
    found = server.chat(tools=TOOLS, tool_choice="none", **form).json()["choices"][0]
    assert found["message"]["content"] == "{}"


def test_any_is_a_name_of_required(server: Server) -> None:
    for path, body in (("/v1/chat/completions", {"messages": USER}), ("/v1/responses", {"input": "a"})):
        error = server.post(path, body | {"tool_choice": "any"}).json()["error"]
        assert error["message"] == "tool_choice needs tools"


LEVELS = 180  # about as many as a body may have
SENT: list[tuple[Any, str]] = [  # arguments of a call that clients send back, and those that the template gets
    ('{"city": "Rome"}', "Rome"),
    ({"city": "Rome"}, "Rome"),
    ('{"city": "Rome", "da', "Rome"),
    ('{"city": "Ro', "Ro"),
    ("city=Rome", ""),
    ("[1]", ""),
    ("", ""),
    (None, ""),
    ('{"city":' * 600 + "1" + "}" * 600, ""),
    ('{"city":' * 100_000, ""),
    ('{"city":' * LEVELS, "{'city': " * (LEVELS - 2) + "{}" + "}" * (LEVELS - 2)),
    (json.loads('{"city":' * LEVELS + '"Rome"' + "}" * LEVELS),
     "{'city': " * (LEVELS - 1) + "'Rome'" + "}" * (LEVELS - 1)),
]  # fmt: skip


def test_a_call_is_taken_back_whatever_its_arguments() -> None:
    with answering("ok") as other:
        for sent, city in SENT:
            call = {"id": "x", "type": "function", "function": {"name": "weather", "arguments": sent}}
            found = other.chat(messages=[*USER, {"role": "assistant", "content": None, "tool_calls": [call]}])
            assert found.status_code == 200, found.text
            prompt = other.decoder.tokenizer.decode(other.engine.handles[-1].request.prompt)
            assert prompt.endswith(f"[assistant]<tool_call>{city}</tool_call>"), (sent, prompt)


def test_tokens_of_a_chat_with_tools_and_arguments_are_counted() -> None:
    more: dict[str, Any] = {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}
    with answering("ok", template=THINKING) as other:
        for given in ({}, more, more | {"tool_choice": "none"}, {"add_generation_prompt": True}):
            count = other.post("/tokenize", {"messages": USER} | given).json()["count"]
            assert count == other.chat(**given).json()["usage"]["prompt_tokens"]
        assert other.post("/tokenize", {"messages": USER, "enable_thinking": False}).status_code == 400
    with answering("ok", template="{{ messages[0].content }}") as other:
        assert other.post("/tokenize", {"messages": USER, "tools": TOOLS}).status_code == 400


def test_a_template_without_tools_is_refused(server: Server) -> None:
    with answering("A", template="{{ messages[0].content }}") as other:
        found = other.chat(tools=TOOLS)
        assert other.chat(tools=TOOLS, tool_choice="none").status_code == 200
    assert found.status_code == 400 and found.json()["error"]["param"] == "tools"
