"""How families of models write tool calls: a class for each, which reads them; and the grammar of forced calls."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from specdec.serve.parts import (
    BETWEEN,
    LONGEST_FENCE,
    TEXT,
    THOUGHT,
    AnswerParser,
    Format,
    Make,
    Part,
    Parts,
    Schemas,
    json_text,
    new_id,
)
from specdec.speculation.constraints import JSON_FORM, REASONING, Grammar

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
THOUGHTS = (REASONING, ("[THINK]", "[/THINK]"), ("<|channel>thought\n", "<channel|>"))  # marks around reasoning
BARE = re.compile(r".[^{}\[\],:]*(?=[{}\[\],:])", re.DOTALL)  # a key, or a value that is no text, in Gemma's calls


class JsonCalls(Format):
    """Base class of formats in which each call is a JSON object after a mark. A subclass sets ``marks`` and ``end``.

    end: text after the calls of a mark; "": none.
    """

    end = ""

    def calls(self, answer: AnswerParser, mark: str) -> Parts[None]:
        source = answer.source
        while True:
            yield from source.skip(BETWEEN)
            if not source.text.startswith("{"):
                break
            yield from answer.json_call()
        if self.end and (yield from source.starts(self.end)):
            yield from source.skip()


class Hermes(JsonCalls):
    """The format of Hermes and Qwen: JSON objects between ``<tool_call>`` and ``</tool_call>``."""

    marks, end = ("<tool_call>",), "</tool_call>"
    special = "<tool_call>", "</tool_call>"


class Mistral(JsonCalls):
    """The format of tool calls of Mistral models before Mistral Small 3.1: ``[TOOL_CALLS]`` and a list of JSON objects.

    An object has the tool's name and its arguments. ``MistralNamed`` is the later format.
    """

    marks = special = ("[TOOL_CALLS]",)


class Llama(JsonCalls):
    """The format of Llama 3, in which an answer that is a JSON object is a call. Forced calls of all models use it.

    The mark ``<|python_tag|>`` may stand before the object.
    """

    marks = special = ("<|python_tag|>",)

    def read(self, answer: AnswerParser) -> Parts[None]:
        source = answer.source
        while answer.tools and not (start := source.text.lstrip()) and not source.last:
            yield None
        if answer.tools and start.startswith("{"):
            yield from self.calls(answer, "")
        yield from answer.text()


class MistralNamed(Format):
    """The format since Mistral Small 3.1: ``[TOOL_CALLS]NAME[ARGS]`` and the JSON object of the arguments."""

    marks, separator = ("[TOOL_CALLS]",), "[ARGS]"
    special = "[TOOL_CALLS]", "[ARGS]"

    def calls(self, answer: AnswerParser, mark: str) -> Parts[None]:
        source = answer.source
        yield from source.skip()
        found = yield from source.starts(*(name + self.separator for name in answer.tools))
        if found:
            yield from source.skip()
        if found and source.text.startswith("{"):
            yield from answer.json_call(found.removesuffix(self.separator))
            yield from source.skip()
        elif found:
            yield TEXT(found)


class QwenXml(Format):
    """The format of Qwen3-Coder: ``<function=NAME>`` with ``<parameter=KEY>VALUE</parameter>`` for each argument.

    A value is plain text unless the tool's schema has only other types there: then it is JSON. ``<tool_call>`` may
    enclose the call.
    """

    marks = "<tool_call>", "<function="
    special = "<tool_call>", "</tool_call>"

    def calls(self, answer: AnswerParser, mark: str) -> Parts[None]:
        source = answer.source
        if mark != "<function=":
            yield from source.skip()
            if not (yield from source.starts("<function=")):
                return
        name = (yield from source.upto(">")).strip()
        make = yield from answer.begin_call(name, f"<function={name}>")
        if make is None:
            return
        members, between = (answer.tools[name] or {}).get("properties"), "{"
        while True:
            yield from source.skip()
            if not (yield from source.starts("<parameter=")):
                break
            key = (yield from source.upto(">")).strip()
            yield make(f"{between}{json.dumps(key, ensure_ascii=False)}: ")
            yield from self._value(answer, make, types(members.get(key)) if isinstance(members, dict) else set())
            between = ", "
        yield make("{}" if between == "{" else "}")
        for end in ("</function>", "</tool_call>"):
            if (yield from source.starts(end)):
                yield from source.skip()

    def _value(self, answer: AnswerParser, make: Make, kinds: set[str]) -> Parts[None]:
        source, ends = answer.source, ("\n</parameter>", "</parameter>")
        yield from source.starts("\n")
        if not kinds or "string" in kinds:
            yield from source.quote(make, *ends)
            return
        value = (yield from source.upto(ends[1])).strip()
        yield make(value if _is_json(value) else json.dumps(value, ensure_ascii=False))


class Lfm(JsonCalls):
    """The format of LFM2: a list of Python calls with literals as keyword arguments, or of JSON objects.

    The list stands between ``<|tool_call_start|>`` and ``<|tool_call_end|>``.
    """

    marks, end = ("<|tool_call_start|>",), "<|tool_call_end|>"
    special = "<|tool_call_start|>", "<|tool_call_end|>"

    def calls(self, answer: AnswerParser, mark: str) -> Parts[None]:
        source = answer.source
        while not (start := source.text.lstrip(BETWEEN)) and not source.last:
            yield None
        if start.startswith("{"):
            yield from super().calls(answer, mark)
            return
        text = yield from source.upto(self.end)
        found = python_calls(text)
        for name, arguments in found or []:
            if make := (yield from answer.begin_call(name, f"{name}({arguments})")):
                yield make(arguments)
        if found is None:
            yield TEXT(text)
        yield from source.skip()


class Gemma(Format):
    """The format of Gemma, ``call:NAME{KEY:VALUE,...}``, in which keys have no quotes and strings have special ones.

    begin, end: marks around a call. quote: mark before and after a string.
    """

    def __init__(self, begin: str, end: str, quote: str) -> None:
        self.marks = (begin,)
        self.end = end
        self.quote = quote
        self.special = (begin, end, quote)

    def calls(self, answer: AnswerParser, mark: str) -> Parts[None]:
        source = answer.source
        yield from source.skip()
        if not (yield from source.starts("call:")):
            return
        name = (yield from source.upto("{")).strip()
        make, depth = (yield from answer.begin_call(name, f"call:{name}{{")), 1
        if make is None:
            return
        yield make("{")
        while depth and (source.text or not source.last):
            sign = yield from source.starts(self.quote, *"{}[],:")
            if sign == self.quote:
                yield from source.quote(make, self.quote)
            elif sign:
                depth += (sign in "{[") - (sign in "}]")
                yield make(sign + " " * (sign in ",:"))
            elif source.text:
                while not (word := BARE.match(source.text)) and not source.last:
                    yield None
                found = word[0] if word else source.text
                source.text = source.text[len(found) :]
                literal = not source.text.startswith(":") and _is_json(found)
                yield make(found.strip() if literal else json.dumps(found.strip(), ensure_ascii=False))
        if (yield from source.starts(self.end)):
            yield from source.skip()


class Harmony(Format):
    """The format of gpt-oss: an answer of several messages, each with a header that names a channel or a tool.

    Messages in the channel ``analysis`` are reasoning, those to a tool are calls, and all others are text.
    """

    begins, ends = ("<|channel|>", "<|start|>"), ("<|end|>", "<|call|>", "<|return|>")
    special = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", *ends

    def read(self, answer: AnswerParser) -> Parts[None]:
        source = answer.source
        while source.text or not source.last:
            begun = yield from source.starts(*self.begins)
            if not begun and not (yield from source.pass_on(TEXT, *self.begins)):
                break
            header = yield from source.upto("<|message|>")
            to, make = re.search(r"to=(?:functions\.)?([\w-]+)", header), TEXT
            if to is not None and to[1] in answer.tools:
                make = partial(Part, "call", name=to[1], id=new_id())
                yield make("")
            elif "analysis" in header:
                make = THOUGHT
            yield from source.pass_on(make, *self.ends)


PLAIN, HERMES, MISTRAL, MISTRAL_NAMED, LLAMA = Format(), Hermes(), Mistral(), MistralNamed(), Llama()
QWEN_XML, HARMONY, LFM = QwenXml(), Harmony(), Lfm()
GEMMA = Gemma("<|tool_call>", "<tool_call|>", '<|"|>')
FUNCTION_GEMMA = Gemma("<start_function_call>", "<end_function_call>", "<escape>")


@dataclass(frozen=True)
class ChatTemplate:
    """What a chat template supports.

    form: the format of its tool calls. thoughts: the marks before and after reasoning; None: it has no reasoning.
    arguments: names of the variables in it that a client may set.
    """

    form: Format  # of tool calls
    thoughts: tuple[str, str] | None  # marks before and after reasoning; None: it has no reasoning
    arguments: frozenset[str]


def find_format(template: str) -> Format:
    """Return the format in which models with this chat template write tool calls.

    It is ``PLAIN`` if the template has no tools or an unknown format.
    """
    if "<|channel|>" in template and "<|message|>" in template:
        return HARMONY
    if "tools" not in template or "<arg_key>" in template:
        return PLAIN
    for found in (GEMMA, FUNCTION_GEMMA):
        if found.marks[0] in template:
            return found
    if "List of tools: " in template:
        return LFM
    if HERMES.marks[0] in template:
        return QWEN_XML if "<function=" in template else HERMES
    if MISTRAL.marks[0] in template and "[CALL_ID]" not in template:
        return MISTRAL_NAMED if MISTRAL_NAMED.separator in template else MISTRAL
    return LLAMA if '"parameters"' in template and "ipython" in template else PLAIN


def find_thoughts(template: str) -> tuple[str, str] | None:
    """Return the marks before and after reasoning in the text of a chat template, such as ("<think>", "</think>").

    None: it has no reasoning.
    """
    return next((marks for marks in THOUGHTS if marks[1] in template), None)


def abilities(tokenizer: Any) -> str:
    """Return one line that says what clients can ask of a model, such as "chat: yes, tools: no, ...".

    It names chat, tools, reasoning and structured output.
    """
    chats = bool(getattr(tokenizer, "chat_template", None))
    template = str(tokenizer.get_chat_template(tools=[{}])) if chats else ""
    found = {
        "chat": chats,
        "tools": find_format(template) is not PLAIN,
        "reasoning": find_thoughts(template) is not None,
        "structured output": find_spec("llguidance") is not None,
    }
    return ", ".join(f"{name}: {'yes' if has else 'no'}" for name, has in found.items())


def tool_grammar(tools: Schemas) -> Grammar:
    """Return a grammar (Lark's notation) of one call, of any of ``tools``: {"name": ..., "arguments": ...} in JSON.

    The model's own format of calls does not matter (as in vLLM). tools: name -> JSON schema of the arguments.
    """
    lines = ["start: " + " | ".join(f"call_{n}" for n in range(len(tools)))]
    for n, (name, schema) in enumerate(tools.items()):
        head = json.dumps(f'{{"name": "{name}", "arguments": ')
        lines.append(f'call_{n}: {head} arguments_{n} "}}"')
        own = schema or NO_ARGUMENTS
        if not isinstance(own.get("type"), str):  # it names none, or several: arguments are always an object
            own = own | {"type": "object"}
        lines.append(f"arguments_{n}: %json {json.dumps(own | {'x-guidance': JSON_FORM})}")
    return Grammar("\n".join(lines))


def python_calls(text: str) -> list[tuple[str, str]] | None:
    """Return (name, arguments as JSON text) of each Python call in ``text``, which is a list of calls or one call.

    None: there is anything else in it.
    """
    try:
        body = ast.parse(text.strip(), mode="eval").body if len(text) <= LONGEST_FENCE else None
        found = list[tuple[str, str]]()
        for call in body.elts if isinstance(body, ast.List) else [body]:
            if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
                return None
            arguments = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
            found.append((ast.unparse(call.func), json_text(arguments, allow_nan=False)))
        return found
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def types(schema: Any) -> set[str]:
    """Return the JSON types, such as "string", that a JSON schema names at its top, or in ``anyOf`` and ``oneOf``.

    The set is empty if the schema names none.
    """
    if not isinstance(schema, dict):
        return set()
    own, others = schema.get("type"), [schema.get(key) for key in ("anyOf", "oneOf")]
    found = {each for each in (own if isinstance(own, list) else [own]) if isinstance(each, str)}
    return found.union(*(types(each) for other in others if isinstance(other, list) for each in other))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
