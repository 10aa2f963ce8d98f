"""How families of models write tool calls: a class for each, with a reader and what a grammar of forced calls needs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from specdec.base.errors import SpecDecError
from specdec.serve.parts import BETWEEN, TEXT, THOUGHT, AnswerParser, Format, Part, Parts, Schemas, new_id
from specdec.speculation.constraints import JSON_FORM, REASONING, Grammar

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
THOUGHTS = (REASONING, ("[THINK]", "[/THINK]"), ("<|channel>thought\n", "<channel|>"))  # marks around reasoning
BARE = re.compile(r".[^{}\[\],:]*(?=[{}\[\],:])", re.DOTALL)  # a key, or a value that is no text, in Gemma's calls
Terminal = Callable[[str], str]


class CallFormat(Format):
    """A format with tools.

    before, after: text around a call. tail: the text after its arguments. forceable: whether there is a grammar.
    """

    before = after = tail = ""
    forceable = True

    def head(self, name: str) -> str:
        """The text before the arguments of a call."""
        raise NotImplementedError

    def arguments(self, rule: str, schema: dict[str, Any], text: Terminal) -> list[str]:
        """The grammar of arguments."""
        return [f"{rule}: %json {json.dumps(schema | {'x-guidance': JSON_FORM})}"]


class JsonCalls(CallFormat):
    """Each call is a JSON object. key: of its arguments. end: text after the calls of a mark."""

    key, end, tail = "arguments", "", "}"

    def head(self, name: str) -> str:
        return f'{{"name": "{name}", "{self.key}": '

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
    """Qwen's, too."""

    marks, end = ("<tool_call>",), "</tool_call>"
    special = "<tool_call>", "</tool_call>"
    before, after = "<tool_call>\n", "\n</tool_call>"


class Mistral(JsonCalls):
    marks = special = ("[TOOL_CALLS]",)
    before, after = "[TOOL_CALLS][", "]"


class Llama(JsonCalls):
    """An answer that is a JSON object is a call."""

    marks = special = ("<|python_tag|>",)
    key = "parameters"

    def read(self, answer: AnswerParser) -> Parts[None]:
        source = answer.source
        while answer.tools and not (start := source.text.lstrip()) and not source.last:
            yield None
        if answer.tools and start.startswith("{"):
            yield from self.calls(answer, "")
        yield from answer.text()


class MistralNamed(CallFormat):
    """Since Mistral Small 3.1: the name comes before the arguments."""

    marks, separator = ("[TOOL_CALLS]",), "[ARGS]"
    special = "[TOOL_CALLS]", "[ARGS]"
    before = "[TOOL_CALLS]"

    def head(self, name: str) -> str:
        return name + self.separator

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


class QwenXml(CallFormat):
    """Qwen3-Coder's: each argument is an element. One of a schema of the type string is text as it is, others JSON."""

    marks = "<tool_call>", "<function="
    special = "<tool_call>", "</tool_call>"
    before, after, tail = "<tool_call>\n", "\n</tool_call>", "</function>"
    end = "\n</parameter>\n"

    def head(self, name: str) -> str:
        return f"<function={name}>\n"

    def calls(self, answer: AnswerParser, mark: str) -> Parts[None]:
        source = answer.source
        if mark != "<function=":
            yield from source.skip()
            if not (yield from source.starts("<function=")):
                return
        name = (yield from source.upto(">")).strip()
        if name not in answer.tools:
            yield TEXT(f"<function={name}>")
            return
        members, make, between = (answer.tools[name] or {}).get("properties"), partial(_call, name, new_id()), "{"
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

    def _value(self, answer: AnswerParser, make: Callable[[str], Part], kinds: set[str]) -> Parts[None]:
        source, ends = answer.source, ("\n</parameter>", "</parameter>")
        yield from source.starts("\n")
        if not kinds or "string" in kinds:
            yield make('"')
            yield from source.pass_on(lambda text: make(_escaped(text)), *ends, strip=False)
            yield make('"')
            return
        value = (yield from source.upto(ends[1])).strip()
        yield make(value if _is_json(value) else json.dumps(value, ensure_ascii=False))

    def arguments(self, rule: str, schema: dict[str, Any], text: Terminal) -> list[str]:
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        members, required, lines = schema.get("properties") or {}, schema.get("required") or [], list[str]()
        if not isinstance(members, dict) or not isinstance(required, list):
            raise SpecDecError(
                "the parameters of a tool are no JSON schema: 'properties' is an object, 'required' a list"
            )
        for n, (key, value) in enumerate(members.items()):
            one, kind = f"{rule}_{n}", types(value)
            lines.append(f"{one}: {text(f'<parameter={key}>' + chr(10))} {one}_value")
            choices = value.get("enum") if isinstance(value, dict) else None
            if isinstance(choices, list) and all(isinstance(choice, str) for choice in choices):
                lines.append(f"{one}_value: " + " | ".join(text(choice + self.end) for choice in choices))
            elif kind == {"string"}:
                lines.append(f"{one}_value[suffix={json.dumps(self.end)}]: /(?s:.*)/")
            else:
                own = (value | shared if isinstance(value, dict) else shared) | {"x-guidance": JSON_FORM}
                lines += [f"{one}_value: {one}_json {text(self.end)}", f"{one}_json: %json {json.dumps(own)}"]
        parts = [f"{rule}_{n}" + ("" if key in required else "?") for n, key in enumerate(members)]
        return [f"{rule}: {' '.join(parts) or json.dumps('')}", *lines]


class Gemma(CallFormat):
    """Names and keys are bare, and texts between quotes of their own."""

    forceable = False

    def __init__(self, begin: str, end: str, quote: str) -> None:
        self.marks, self.end, self.quote, self.special = (begin,), end, quote, (begin, end, quote)

    def calls(self, answer: AnswerParser, mark: str) -> Parts[None]:
        source = answer.source
        yield from source.skip()
        if not (yield from source.starts("call:")):
            return
        name = (yield from source.upto("{")).strip()
        if name not in answer.tools:
            yield TEXT(f"call:{name}{{")
            return
        make, depth = partial(_call, name, new_id()), 1
        yield make("{")
        while depth and (source.text or not source.last):
            sign = yield from source.starts(self.quote, *"{}[],:")
            if sign == self.quote:
                yield make('"')
                yield from source.pass_on(lambda text: make(_escaped(text)), self.quote, strip=False)
                yield make('"')
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


class Harmony(CallFormat):
    """gpt-oss: the whole answer is messages in channels, reasoning in ``analysis``, calls where they name a tool."""

    begins, ends = ("<|channel|>", "<|start|>"), ("<|end|>", "<|call|>", "<|return|>")
    special = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", *ends

    def head(self, name: str) -> str:
        return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"

    def read(self, answer: AnswerParser) -> Parts[None]:
        source = answer.source
        while source.text or not source.last:
            begun = yield from source.starts(*self.begins)
            if not begun and not (yield from source.pass_on(TEXT, *self.begins)):
                break
            header = yield from source.upto("<|message|>")
            to, make = re.search(r"to=(?:functions\.)?([\w-]+)", header), TEXT
            if to is not None and to[1] in answer.tools:
                make = partial(_call, to[1], new_id())
                yield make("")
            elif "analysis" in header:
                make = THOUGHT
            yield from source.pass_on(make, *self.ends)


PLAIN, HERMES, MISTRAL, MISTRAL_NAMED, LLAMA = Format(), Hermes(), Mistral(), MistralNamed(), Llama()
QWEN_XML, HARMONY = QwenXml(), Harmony()
GEMMA = Gemma("<|tool_call>", "<tool_call|>", '<|"|>')
FUNCTION_GEMMA = Gemma("<start_function_call>", "<end_function_call>", "<escape>")


@dataclass(frozen=True)
class ChatTemplate:
    """What is read from a chat template. arguments: words in it by which a client may set variables."""

    form: Format
    thoughts: tuple[str, str] | None
    arguments: frozenset[str]


def find_format(template: str) -> Format:
    """The format that a chat template asks for; ``PLAIN`` if it has no tools or an unknown format."""
    if "<|channel|>" in template and "<|message|>" in template:
        return HARMONY
    if "tools" not in template or "<arg_key>" in template:
        return PLAIN
    for found in (GEMMA, FUNCTION_GEMMA):
        if found.marks[0] in template:
            return found
    if HERMES.marks[0] in template:
        return QWEN_XML if "<function=" in template else HERMES
    if MISTRAL.marks[0] in template and "[CALL_ID]" not in template:
        return MISTRAL_NAMED if MISTRAL_NAMED.separator in template else MISTRAL
    return LLAMA if '"parameters"' in template and "ipython" in template else PLAIN


def find_thoughts(template: str) -> tuple[str, str] | None:
    """The marks around reasoning in a chat template; None without reasoning."""
    return next((marks for marks in THOUGHTS if marks[1] in template), None)


def tool_grammar(form: CallFormat, tools: Schemas, tokenizer: Any) -> Grammar:
    """A grammar of one call."""

    def text(given: str) -> str:
        return _grammar_text(given, form.special, tokenizer)

    lines = [f"start: {text(form.before)} call {text(form.after)}"]
    lines.append("call: " + " | ".join(f"call_{n}" for n in range(len(tools))))
    for n, (name, schema) in enumerate(tools.items()):
        lines.append(f"call_{n}: {text(form.head(name))} arguments_{n} {text(form.tail)}")
        lines += form.arguments(f"arguments_{n}", schema or NO_ARGUMENTS, text)
    return Grammar("\n".join(lines))


def _grammar_text(text: str, marks: Sequence[str], tokenizer: Any) -> str:
    """``text`` as a terminal of a grammar. Those ``marks`` that are added tokens match by token id."""
    parts = re.split("(" + "|".join(map(re.escape, marks)) + ")", text) if marks else [text]
    found = []
    for part in filter(None, parts):
        token = tokenizer.convert_tokens_to_ids(part) if part in marks else None
        added = token is not None and str(tokenizer.added_tokens_decoder.get(token)) == part
        found.append(f"<[{token}]>" if added else json.dumps(part))
    return " ".join(found)


def types(schema: Any) -> set[str]:
    """The JSON types that a schema names at its top."""
    if not isinstance(schema, dict):
        return set()
    own, others = schema.get("type"), [schema.get(key) for key in ("anyOf", "oneOf")]
    found = {each for each in (own if isinstance(own, list) else [own]) if isinstance(each, str)}
    return found.union(*(types(each) for other in others if isinstance(other, list) for each in other))


def _call(name: str, id: str, text: str) -> Part:
    return Part("call", text, name, id)


def _escaped(text: str) -> str:
    """``text`` as a part of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
