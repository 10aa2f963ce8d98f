"""Tool calls: the form in which a model writes them, the grammar that makes it do so, and reading them as they come."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.speculation.constraints import JSON_FORM, REASONING, Grammar

BETWEEN = " \t\r\n,;[]"  # what may stand between two calls
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([\w-]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*')

_NAME = re.compile(r'"name"\s*:\s*"([\w-]*)("?)')


@dataclass(frozen=True)
class ToolForm:
    """How a family of models writes calls: ``first`` of all, ``before`` and ``after`` each, ``between`` two, ``last``.

    mark: what calls are known by; "": an answer that is JSON is a call. end: what ends a call that began with the mark.
    arguments: what the arguments are called. named: what stands between a name and its arguments; "": both are in one
    JSON object.
    """

    mark: str
    first: str = ""
    before: str = ""
    between: str = ""
    after: str = ""
    last: str = ""
    end: str = ""
    arguments: str = "arguments"
    named: str = ""


# Qwen's, too
HERMES = ToolForm("<tool_call>", "", "<tool_call>\n", "\n", "\n</tool_call>", "", "</tool_call>")
MISTRAL = ToolForm("[TOOL_CALLS]", "[TOOL_CALLS][", between=", ", last="]")
MISTRAL_NAMED = ToolForm("[TOOL_CALLS]", before="[TOOL_CALLS]", named="[ARGS]")  # since Mistral Small 3.1
LLAMA = ToolForm("", between="; ", arguments="parameters")


def shown_of(form: ToolForm | None, constrained: bool) -> list[str]:
    """What ``ChatParser`` looks for in a text, be it a special token or not."""
    marks = [] if form is None else [mark for mark in (form.mark, form.end, form.named) if mark]
    return [*marks, *REASONING] if constrained else marks


def form_of(template: str) -> ToolForm | None:
    """The form that a chat template asks for; None: it has no tools, or another form."""
    if "tools" not in template:
        return None
    if HERMES.mark in template and "<function=" not in template:
        return HERMES
    if MISTRAL.mark in template and "[CALL_ID]" not in template:
        return MISTRAL_NAMED if MISTRAL_NAMED.named in template else MISTRAL
    return LLAMA if '"parameters"' in template and "ipython" in template else None


def grammar_of(form: ToolForm, tools: dict[str, dict[str, Any] | None], several: bool, tokenizer: Any) -> Grammar:
    """One call of ``tools`` (their arguments' schemas by name), or ``several``."""

    def text(given: str) -> str:
        return _text(given, shown_of(form, constrained=False), tokenizer)

    more = f"({text(form.between)} call)*" if several else ""
    lines = [f"start: {text(form.first)} call {more} {text(form.last)}"]
    lines.append(f"call: {text(form.before)} body {text(form.after)}")
    lines.append("body: " + " | ".join(f"call_{n}" for n in range(len(tools))))
    for n, (name, schema) in enumerate(tools.items()):
        head, tail = f'{{"name": "{name}", "{form.arguments}": ', '"}"'
        if form.named:
            head, tail = name + form.named, ""
        lines.append(f"call_{n}: {text(head)} arguments_{n} {tail}")
        lines.append(f"arguments_{n}: %json {json.dumps((schema or NO_ARGUMENTS) | {'x-guidance': JSON_FORM})}")
    return Grammar("\n".join(lines))


def _text(text: str, marks: Sequence[str], tokenizer: Any) -> str:
    """``text`` in a grammar. Those of ``marks`` that are added tokens are tokens there, not text."""
    parts = re.split("(" + "|".join(map(re.escape, marks)) + ")", text) if marks else [text]
    found = []
    for part in filter(None, parts):
        token = tokenizer.convert_tokens_to_ids(part) if part in marks else None
        added = token is not None and str(tokenizer.added_tokens_decoder.get(token)) == part
        found.append(f"<[{token}]>" if added else json.dumps(part))
    return " ".join(found)


class _Call:
    """A call that is being read: a JSON object with a name and arguments; or, of one that is ``named``, the latter."""

    def __init__(self, index: int, names: Collection[str], named: str = "") -> None:
        self.index, self.names, self.raw, self.named = index, names, "", bool(named)
        self.depth = self.sent = self.end = 0  # end: of the arguments in the raw text
        self.quoted = self.escaped = self.complete = False
        self.head: re.Match[str] | None = None
        self.announced = False
        if named:
            self.take(f'{{"name": "{named}", "arguments": ')

    def take(self, text: str) -> int:
        """Read on; return how many characters belong to the call."""
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
        """What has become certain of the call since the last time."""
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
        """Name and arguments of a call with its parts in another order."""
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
    """Nine letters and digits: all that Mistral's templates take."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class ChatParser:
    """The parts of an answer as its text comes: reasoning, content, tool calls. Each is a delta of OpenAI's interface.

    form: None reads no calls. names: of the tools; what calls another one is content. single: calls after the first are
    left out. inside, may_reason: the text begins in a block of reasoning, or may begin with one. forced: the answer is
    calls, so it has no content; one that is cut before its arguments is a call if its name is certain.
    """

    def __init__(
        self,
        form: ToolForm | None = None,
        names: Collection[str] = (),
        single: bool = False,
        inside: bool = False,
        may_reason: bool = False,
        forced: bool = False,
    ) -> None:
        self.form, self.names, self.single, self.reasoning, self.may_reason = form, names, single, inside, may_reason
        self.forced, self.answer = forced, ""  # the text so far, of calls that are forced
        self.buffer, self.calls = "", 0
        self.call: _Call | None = None
        self.calling = self.begun = False  # between the calls; some content has come
        self.answered = False  # a block of reasoning has just ended: white space after it is no content

    def push(self, text: str, last: bool = False) -> list[dict[str, Any]]:
        """Take in text; ``last``: no more comes."""
        self.buffer += text
        found = list[dict[str, Any]]()
        while (part := self._next(last)) is not None:
            found += part
        if not self.forced:
            return found
        self.answer += "" if self.calls else text
        return [delta for delta in found if "content" not in delta] + (self._cut() if last else [])

    def _cut(self) -> list[dict[str, Any]]:
        """The call of an answer that has ended before the arguments of its first one."""
        assert self.form is not None
        text = self.answer.rpartition(REASONING[1])[2]
        if self.form.named:
            name, closed, _ = text.partition(self.form.mark)[2].lstrip().partition(self.form.named)
        else:
            head = _NAME.search(text)
            name, closed = (head[1], head[2]) if head else ("", "")
        certain = [each for each in self.names if each == name or (not closed and each.startswith(name))]
        if self.calls or len(certain) != 1:
            return []
        self.calls = 1
        return [_Call(0, self.names).opening(certain[0])]

    def _next(self, last: bool) -> list[dict[str, Any]] | None:
        """Read one part of the buffer; None if more has to come first."""
        if self.may_reason:
            return self._first(last)
        if self.reasoning:
            return self._reasoning(last)
        if self.call is not None:
            return self._in_call(self.call, last)
        if self.calling:
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
            self.reasoning, self.answered, self.buffer = False, True, after
        else:
            before, self.buffer = _certain(before, REASONING[1], last)
        return [{"reasoning_content": before}] if before else ([] if mark else None)

    def _content(self, last: bool) -> list[dict[str, Any]] | None:
        mark = None if self.form is None else self.form.mark
        if self.answered:
            self.buffer = self.buffer.lstrip()
            if not self.buffer:
                return None
            self.answered = False
        if mark == "" and not self.begun:  # the first character tells
            if not (text := self.buffer.lstrip()):
                return None
            self.begun, self.calling = True, text[0] == "{"
            return []
        before, found, after = self.buffer.partition(mark) if mark else (self.buffer, "", "")
        if found:
            self.calling, self.buffer = True, after
            before = before.rstrip()
        elif mark:
            before, self.buffer = _certain(before, mark, last)
        else:
            self.buffer = ""
        return [{"content": before}] if before else ([] if found else None)

    def _between(self, last: bool) -> list[dict[str, Any]] | None:
        assert self.form is not None
        if self.form.named:
            return self._named(self.form.named, last)
        text, end = self.buffer.lstrip(BETWEEN), self.form.end
        if end and text.startswith(end):
            self.calling, self.buffer = False, text.removeprefix(end)
            if not self.buffer.strip() and self.calls:
                self.buffer = ""
            return []
        if not text or (end and not last and end.startswith(text)):
            return None
        if text[0] == "{":
            self.call, self.buffer = _Call(self.calls, self.names), text
        else:
            self.calling, self.begun = False, True
        return []

    def _named(self, between: str, last: bool) -> list[dict[str, Any]] | None:
        """A name and the beginning of its arguments."""
        text = self.buffer.lstrip()
        for name in self.names:
            head, rest = name + between, text.removeprefix(name + between).lstrip()
            if text.startswith(head) and rest.startswith("{"):
                self.call, self.calling, self.buffer = _Call(self.calls, self.names, name), False, rest
                return []
            if not last and (head.startswith(text) or (text.startswith(head) and not rest)):
                return None
        self.calling, self.begun = False, True
        return []

    def _in_call(self, call: _Call, last: bool) -> list[dict[str, Any]] | None:
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


def _certain(text: str, mark: str, last: bool) -> tuple[str, str]:
    """``text`` without, and with only, the end that white space or the beginning of ``mark`` may be."""
    if last:
        return text, ""
    hold = max((n for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)
    certain = text[: len(text) - hold].rstrip()
    return certain, text[len(certain) :]


def message_of(deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The parts of a whole message."""
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
