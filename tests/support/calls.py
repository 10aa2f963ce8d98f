"""Tools, calls of tools in the formats of models, and servers whose model answers with a given text."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from servers import Replay, Server, byte_tokenizer, serving, stand_in
from tiny import tiny_model
from tiny_tokenizers import letters

from specdec import SpecDecoder
from specdec.engine.request import Event
from specdec.serve.parts import AnswerParser, Format, merged
from specdec.serve.tools import HERMES, LLAMA, MISTRAL, MISTRAL_NAMED

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
CALLS = [("weather", {"city": "Rome", "days": 3}), ("sum", {"a": 1, "b": 4})]
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function.arguments.city }}</tool_call>{% endfor %}{% endfor %}"
)
THINKING = TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"


# Of a format whose arguments are JSON: what stands before a call and after it, and what a call is.
FORMS = {
    HERMES: ("<tool_call>\n", '{"name": "%s", "arguments": %s}', "\n</tool_call>"),
    MISTRAL: ("[TOOL_CALLS][", '{"name": "%s", "arguments": %s}', "]"),
    MISTRAL_NAMED: ("[TOOL_CALLS]", "%s[ARGS]%s", ""),
    LLAMA: ("", '{"name": "%s", "parameters": %s}', ""),
}


def written(form: Format, calls: list[tuple[str, dict[str, Any]]]) -> str:
    before, call, after = FORMS[form]
    bodies = [call % (name, json.dumps(arguments)) for name, arguments in calls]
    if form in (MISTRAL, LLAMA):
        return before + "; ".join(bodies) + after
    return "\n".join(before + body + after for body in bodies)


def read(text: str, size: int, form: Format, tools: Any = SCHEMAS, **how: Any) -> list[tuple[str, ...]]:
    """Parse a model's text that arrives in pieces of ``size`` characters; return its blocks.

    A block is (kind, text), or ("call", name, arguments as JSON text) for a call of a tool.
    """
    parser = AnswerParser(form, tools, **how)
    parts = [part for at in range(0, len(text), size) for part in parser.push(text[at : at + size])]
    blocks = merged(parts + parser.push("", last=True))
    assert len({block.id for block in blocks if block.kind == "call"}) == len(parser.called)
    return [(b.kind, b.name, b.text) if b.kind == "call" else (b.kind, b.text) for b in blocks]


def calls_of(blocks: list[tuple[str, ...]]) -> list[tuple[str, Any]]:
    return [(block[1], json.loads(block[2])) for block in blocks if block[0] == "call"]


@contextmanager
def answering(*texts: str, template: str = TEMPLATE, end: str = "eos", **settings: Any) -> Iterator[Server]:
    """Return a server whose model answers requests with ``texts`` in turn, five tokens (bytes) per step."""
    tokenizer, turn = byte_tokenizer(), iter(range(10**6))
    tokenizer.chat_template = template

    def script(request: Any) -> list[Event]:
        ids = tokenizer(texts[next(turn) % len(texts)]).input_ids if texts else []
        steps = [ids[n : n + 5] for n in range(0, len(ids), 5)]
        return [*(Event(step, depths=[0] * len(step)) for step in steps), Event([], end)]

    with serving(stand_in(tokenizer), Replay(script), **settings) as running:
        yield running


@contextmanager
def thinking() -> Iterator[Server]:
    """Run a server of a tiny model whose template has marks for calls and thinking; its API key is "secret"."""
    tokenizer = letters()
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "\n"])
    tokenizer.chat_template = THINKING
    model = tiny_model(vocab_size=100, max_position_embeddings=1024)
    with serving(SpecDecoder(model, tokenizer, "prompt-lookup", runtime="transformers"), api_key="secret") as running:
        yield running
