"""Tool calls: the format in which a model writes them, a grammar that forces them, and an incremental parser."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.speculation.constraints import JSON_FORM, REASONING, Grammar

BETWEEN = " \t\r\n,;[]"  # characters that may separate two calls
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([\w-]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*')
_NAME = re.compile(r'"name"\s*:\s*"([\w-]*)("?)')


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes tool calls.

    mark: text that begins the calls; "": an answer that is a JSON object is a call.
    first, last: text before the first call and after the last one.
    before, after: text around each call. between: text between two calls.
    end: text that ends calls which began with the mark.
    arguments: the JSON key of the arguments.
    separator: text between a name and its arguments; "": both are in one JSON object.
    """

    mark: str
    first: str = ""
    before: str = ""
    between: str = ""
    after: str = ""
    last: str = ""
    end: str = ""
    arguments: str = "arguments"
    separator: str = ""


# Qwen's, too
HERMES = ToolFormat("<tool_call>", "", "<tool_call>\n", "\n", "\n</tool_call>", "", "</tool_call>")
MISTRAL = ToolFormat("[TOOL_CALLS]", "[TOOL_CALLS][", between=", ", last="]")
MISTRAL_NAMED = ToolFormat("[TOOL_CALLS]", before="[TOOL_CALLS]", separator="[ARGS]")  # since Mistral Small 3.1
LLAMA = ToolFormat("", between="; ", arguments="parameters")


def kept_special_tokens(tool_format: ToolFormat | None, constrained: bool) -> list[str]:
    """The special tokens that ``ChatParser`` needs in the text. constrained: the answer has a constraint."""
    marks = (tool_format.mark, tool_format.end, tool_format.separator) if tool_format is not None else ()
    return [*filter(None, marks), *(REASONING if constrained else ())]


def find_format(template: str) -> ToolFormat | None:
    """The format that a chat template asks for; None if it has no tools or an unknown format."""
    if "tools" not in template:
        return None
    if HERMES.mark in template and "<function=" not in template:
        return HERMES
    if MISTRAL.mark in template and "[CALL_ID]" not in template:
        return MISTRAL_NAMED if MISTRAL_NAMED.separator in template else MISTRAL
    return LLAMA if '"parameters"' in template and "ipython" in template else None


def tool_grammar(
    tool_format: ToolFormat, tools: dict[str, dict[str, Any] | None], several: bool, tokenizer: Any
) -> Grammar:
    """A grammar of one call, or of ``several``. tools: the schema of the arguments by name; None without arguments."""

    def text(given: str) -> str:
        return _grammar_text(given, kept_special_tokens(tool_format, constrained=False), tokenizer)

    more = f"({text(tool_format.between)} call)*" if several else ""
    lines = [f"start: {text(tool_format.first)} call {more} {text(tool_format.last)}"]
    lines.append(f"call: {text(tool_format.before)} body {text(tool_format.after)}")
    lines.append("body: " + " | ".join(f"call_{n}" for n in range(len(tools))))
    for n, (name, schema) in enumerate(tools.items()):
        head, tail = f'{{"name": "{name}", "{tool_format.arguments}": ', '"}"'
        if tool_format.separator:
            head, tail = name + tool_format.separator, ""
        lines.append(f"call_{n}: {text(head)} arguments_{n} {tail}")
        lines.append(f"arguments_{n}: %json {json.dumps((schema or NO_ARGUMENTS) | {'x-guidance': JSON_FORM})}")
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


class _CallParser:
    """Parses one call: a JSON object with a name and arguments.

    named: the name, if it came before the object, which then holds the arguments alone.
    raw: the text so far. sent: the end of the arguments that ``deltas`` has returned. end: of the arguments, or 0.
    """

    def __init__(self, index: int, names: Collection[str], named: str = "") -> None:
        self.index, self.names, self.raw, self.named = index, names, "", bool(named)
        self.depth = self.sent = self.end = 0
        self.quoted = self.escaped = self.complete = False
        self.head: re.Match[str] | None = None
        self.announced = False
        if named:
            self.take(f'{{"name": "{named}", "arguments": ')

    def take(self, text: str) -> int:
        """Parse more text; return how many of its characters belong to the call."""
        before = len(self.raw)
        self.raw += text
        for end, character in enumerate(text, start=before + 1):
            if self.escaped:
                self.escaped = False
            elif self.quoted:
                self.escaped, self.quoted = character == "\\", character != '"'
            elif character == '"':
                self.quoted = True
            elif character in "{[":
                self.depth += 1
                if self.depth == 2 and self.head is None:
                    self._begin_arguments(end - 1)
            elif character in "}]":
                self.depth -= 1
                if self.depth == 1 and self.head is not None and not self.end:
                    self.end = end
                if not self.depth or (self.named and self.end):
                    self.complete, self.raw = True, self.raw[:end]
                    return end - before
        return len(text)

    def _begin_arguments(self, place: int) -> None:
        head = _HEAD.fullmatch(self.raw, endpos=place)
        if head is not None and head[1] in self.names and self.raw[place] == "{":
            self.head, self.sent = head, head.end()

    def deltas(self) -> Iterator[dict[str, Any]]:
        """The new parts of the call since the last time."""
        if self.head is None:
            if self.complete and (found := self._whole()) is not None:
                yield self.opening(*found)
            return
        if not self.announced:
            yield self.opening(self.head[1])
        end = self.end or len(self.raw)
        if end > self.sent:
            yield {"tool_calls": [{"index": self.index, "function": {"arguments": self.raw[self.sent : end]}}]}
            self.sent = end

    def _whole(self) -> tuple[str, str] | None:
        """Name and arguments of a call that has them in another order."""
        try:
            found = json.loads(self.raw)
            name, arguments = found["name"], found.get("arguments", found.get("parameters", {}))
        except (ValueError, KeyError, RecursionError):
            return None
        if name not in self.names or not isinstance(arguments, dict):
            return None
        return name, json.dumps(arguments, ensure_ascii=False)

    def opening(self, name: str, arguments: str = "") -> dict[str, Any]:
        """The first delta of the call."""
        self.announced = True
        function = {"name": name, "arguments": arguments}
        return {"tool_calls": [{"index": self.index, "id": _new_id(), "type": "function", "function": function}]}


def _new_id() -> str:
    """Nine letters and digits, as Mistral's templates require."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class ChatParser:
    """Splits the text of an answer, as it arrives, into OpenAI's deltas: reasoning, content and tool calls.

    tool_format: None parses no calls.
    names: of the tools; a call of another name is content.
    single: drop calls after the first.
    inside, may_reason: the text begins within a block of reasoning, or may begin with one.
    forced: the answer consists of calls and has no content. A call that is cut before its arguments counts if its name
        is certain.
    """

    def __init__(
        self,
        tool_format: ToolFormat | None = None,
        names: Collection[str] = (),
        single: bool = False,
        inside: bool = False,
        may_reason: bool = False,
        forced: bool = False,
    ) -> None:
        self.tool_format, self.names, self.single = tool_format, names, single
        self.reasoning, self.may_reason, self.forced = inside, may_reason, forced
        self.answer = ""  # the text so far, if calls are forced
        self.buffer = ""  # text that is not parsed yet
        self.calls = 0
        self.call: _CallParser | None = None
        self.between_calls = self.has_content = False
        self.after_reasoning = False  # a block of reasoning has just ended, and white space after it is no content

    def push(self, text: str, last: bool = False) -> list[dict[str, Any]]:
        """Parse more text; return its deltas. last: the text is complete."""
        self.buffer += text
        found = list[dict[str, Any]]()
        while (part := self._next(last)) is not None:
            found += part
        if not self.forced:
            return found
        self.answer += "" if self.calls else text
        return [delta for delta in found if "content" not in delta] + (self._cut_call() if last else [])

    def _cut_call(self) -> list[dict[str, Any]]:
        """The call of an answer that was cut before the arguments of its first call."""
        assert self.tool_format is not None
        text = self.answer.rpartition(REASONING[1])[2]
        if self.tool_format.separator:
            name, closed, _ = text.partition(self.tool_format.mark)[2].lstrip().partition(self.tool_format.separator)
        else:
            head = _NAME.search(text)
            name, closed = (head[1], head[2]) if head else ("", "")
        certain = [each for each in self.names if each == name or (not closed and each.startswith(name))]
        if self.calls or len(certain) != 1:
            return []
        self.calls = 1
        return [_CallParser(0, self.names).opening(certain[0])]

    def _next(self, last: bool) -> list[dict[str, Any]] | None:
        """Parse one part of the buffer; None if that needs more text."""
        if self.may_reason:
            return self._first(last)
        if self.reasoning:
            return self._reasoning(last)
        if self.call is not None:
            return self._in_call(self.call, last)
        if self.between_calls:
            return self._between(last)
        return self._content(last)

    def _first(self, last: bool) -> list[dict[str, Any]] | None:
        text, mark = self.buffer.lstrip(), REASONING[0]
        if not last and mark.startswith(text):
            return None
        self.may_reason = False
        if text.startswith(mark):
            self.reasoning, self.buffer = True, text.removeprefix(mark)
        return []

    def _reasoning(self, last: bool) -> list[dict[str, Any]] | None:
        before, mark, after = self.buffer.partition(REASONING[1])
        if mark:
            self.reasoning, self.after_reasoning, self.buffer = False, True, after
        else:
            before, self.buffer = _split_before_mark(before, REASONING[1], last)
        return [{"reasoning_content": before}] if before else ([] if mark else None)

    def _content(self, last: bool) -> list[dict[str, Any]] | None:
        mark = None if self.tool_format is None else self.tool_format.mark
        if self.after_reasoning:
            self.buffer = self.buffer.lstrip()
            if not self.buffer:
                return None
            self.after_reasoning = False
        if mark == "" and not self.has_content:  # the first character decides
            if not (text := self.buffer.lstrip()):
                return None
            self.has_content, self.between_calls = True, text[0] == "{"
            return []
        before, found, after = self.buffer.partition(mark) if mark else (self.buffer, "", "")
        if found:
            self.between_calls, self.buffer = True, after
            before = before.rstrip()
        elif mark:
            before, self.buffer = _split_before_mark(before, mark, last)
        else:
            self.buffer = ""
        return [{"content": before}] if before else ([] if found else None)

    def _between(self, last: bool) -> list[dict[str, Any]] | None:
        assert self.tool_format is not None
        if self.tool_format.separator:
            return self._named(self.tool_format.separator, last)
        text, end = self.buffer.lstrip(BETWEEN), self.tool_format.end
        if end and text.startswith(end):
            self.between_calls, self.buffer = False, text.removeprefix(end)
            if not self.buffer.strip() and self.calls:
                self.buffer = ""
            return []
        if not text or (end and not last and end.startswith(text)):
            return None
        if text[0] == "{":
            self.call, self.buffer = _CallParser(self.calls, self.names), text
        else:
            self.between_calls, self.has_content = False, True
        return []

    def _named(self, between: str, last: bool) -> list[dict[str, Any]] | None:
        """Parse a name and the beginning of its arguments."""
        text = self.buffer.lstrip()
        for name in self.names:
            head, rest = name + between, text.removeprefix(name + between).lstrip()
            if text.startswith(head) and rest.startswith("{"):
                self.call, self.between_calls, self.buffer = _CallParser(self.calls, self.names, name), False, rest
                return []
            if not last and (head.startswith(text) or (text.startswith(head) and not rest)):
                return None
        self.between_calls, self.has_content = False, True
        return []

    def _in_call(self, call: _CallParser, last: bool) -> list[dict[str, Any]] | None:
        taken = call.take(self.buffer)
        self.buffer = self.buffer[taken:]
        found = [] if self.single and self.calls else list(call.deltas())
        if not call.complete and not last:
            return found or None
        self.call = None
        if call.announced:
            self.calls += 1
        elif not (self.single and self.calls):
            found.append({"content": call.raw})
        return found


def _split_before_mark(text: str, mark: str, last: bool) -> tuple[str, str]:
    """Split off an end of ``text`` that may be the beginning of ``mark``, with the white space before it."""
    if last:
        return text, ""
    hold = max((n for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)
    before = text[: len(text) - hold].rstrip()
    return before, text[len(before) :]


def merge_deltas(deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The message that consists of ``deltas``."""
    content = "".join(delta.get("content", "") for delta in deltas)
    reasoning = "".join(delta.get("reasoning_content", "") for delta in deltas)
    calls: dict[int, dict[str, Any]] = {}
    for part in (part for delta in deltas for part in delta.get("tool_calls", ())):
        if "id" in part:
            calls[part["index"]] = {key: part[key] for key in ("id", "type")} | {"function": dict(part["function"])}
        else:
            calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    found: dict[str, Any] = {"content": content or (None if calls else "")}
    if reasoning:
        found["reasoning_content"] = reasoning
    return found | ({"tool_calls": list(calls.values())} if calls else {})
