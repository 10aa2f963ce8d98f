"""The parts of an answer: reasoning, text and tool calls, read from its text as it arrives. Knows no protocol."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

from pydantic_core import from_json

from specdec.api.text import num_held

Kind = Literal["reasoning", "text", "call"]
Schemas = Mapping[str, dict[str, Any] | None]  # of the arguments of tools, by name; None: no arguments
T = TypeVar("T")
BETWEEN = " \t\r\n,;[]"  # characters that may separate two calls
FENCE = "```"
FENCED = ("", "json", "tool_call", "tool_code")  # names of fences in which a call may be
MEMBERS = {"name", "arguments", "parameters"}  # of a call without marks; the description of a tool has more
LONGEST_FENCE = 2**16  # characters of a fenced call
LONGEST_HEAD = 256  # characters of it before its name
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([\w-]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*')
HALF_PAIR = re.compile("[\ud800-\udfff]")
_SIGN = re.compile(r'\\.|["{}\[\]]', re.DOTALL)  # an escaped character, a quote or a bracket
NAME = re.compile(r'"name"\s*:\s*"([\w-]*)("?)')


@dataclass
class Part:
    """A part of an answer: some output of one kind, as a piece that has just arrived or (merged) as a whole.

    kind: "reasoning", "text" or "call" (of a tool).
    text: the text; for a call, its arguments as JSON text, or a piece of them.
    name, id: the tool's name and the call's id; "" for the other kinds.
    begins: whether it is the first part of its call.
    """

    kind: Kind
    text: str
    name: str = ""
    id: str = ""
    begins: bool = False

    def takes(self, part: Part) -> bool:
        """Return whether ``part`` continues this one: it has the same kind, and begins no new call."""
        return (self.kind, self.id) == (part.kind, part.id)


Parts = Generator[Part | None, None, T]  # None: more text is needed
Make = Callable[[str], Part]
TEXT, THOUGHT = partial(Part, "text"), partial(Part, "reasoning")


def merged(parts: Iterable[Part]) -> list[Part]:
    """Join adjacent parts of one kind (of one call, for calls), and return the results as new objects, in order."""
    blocks = list[Part]()
    for part in parts:
        if not blocks or not blocks[-1].takes(part):
            blocks.append(replace(part, text=""))
        blocks[-1].text += part.text
    return blocks


def new_id() -> str:
    """Return a random id of a call: nine letters and digits, as Mistral's templates require."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class Source:
    """The text of an answer that has arrived and is not parsed yet.

    A mark is a text such as ``<tool_call>`` that stands before or after a call. To take text is to remove it from
    ``text``. The methods are generators, which a parser runs by ``yield from``. They yield parts of the answer, and
    None to wait until more text has been added to ``text``. What "return" says is the value of ``yield from``.

    text: the text that has arrived and was not taken yet.
    last: whether ``text`` is complete, so that no more is added.
    space: the white space before the last mark that ``pass_on`` found, which it dropped.
    """

    def __init__(self) -> None:
        self.text = ""
        self.last = False
        self.space = ""

    def skip(self, characters: str | None = None) -> Parts[None]:
        """Take and drop text up to the first character that is none of ``characters``, and wait until that has arrived.

        characters: the characters to drop; None: white space.
        """
        while not (rest := self.text.lstrip(characters)) and not self.last:
            yield None
        self.text = rest

    def starts(self, *marks: str) -> Parts[str]:
        """Take and return the first of ``marks`` with which the text begins; return "" if it begins with none of them.

        Waits while the text that has arrived is only a part of a mark.
        """
        while True:
            if mark := next((mark for mark in marks if self.text.startswith(mark)), ""):
                self.text = self.text.removeprefix(mark)
                return mark
            if self.last or not any(mark.startswith(self.text) for mark in marks):
                return ""
            yield None

    def upto(self, mark: str) -> Parts[str]:
        """Take the text up to and with ``mark``; return it without the mark, or all text if the mark never comes."""
        while mark not in self.text and not self.last:
            yield None
        before, _, self.text = self.text.partition(mark)
        return before

    def quote(self, make: Make, *marks: str) -> Parts[None]:
        """Yield the text before the first of ``marks`` as parts of one JSON string, quotes included; take the mark.

        make: makes a part from a piece of the string.
        """
        yield make('"')
        yield from self.pass_on(lambda text: make(json.dumps(text, ensure_ascii=False)[1:-1]), *marks, strip=False)
        yield make('"')

    def pass_on(self, make: Make, *marks: str, strip: bool = True) -> Parts[str]:
        """Take the text up to the first of ``marks`` and yield it as parts, as it arrives; take and return the mark.

        If none of the marks comes, yield all text up to the answer's end, and return "".

        make: makes a part of the answer from a piece of text.
        marks: the texts at which to stop.
        strip: whether to drop white space at the end of the text before the mark, and keep it in ``space``.
        """
        while True:
            at, mark = min(((n, mark) for mark in marks if (n := self.text.find(mark)) >= 0), default=(0, ""))
            if mark:
                before, self.text = self.text[:at], self.text[at + len(mark) :]
            else:
                held = 0 if self.last else num_held(self.text, marks)
                before = self.text[: len(self.text) - held]
            if strip and marks and (mark or not self.last):
                before, self.space = before.rstrip(), before[len(before.rstrip()) :]
            if not mark:
                self.text = self.text[len(before) :]
            if before:
                yield make(before)
            if mark or self.last:
                return mark
            yield None


class Format:
    """Base class of the formats in which families of models write tool calls within the text of an answer.

    Its methods read from ``answer.source``, where ``answer`` is the parser of one answer. They are generators of parts,
    and of None to wait for more text. A subclass sets ``marks`` and implements ``calls``. An object has no state, so
    all answers share it.

    marks: texts that begin calls.
    special: special tokens that have to stay in the text.
    """

    marks: tuple[str, ...] = ()
    special: tuple[str, ...] = ()

    def read(self, answer: AnswerParser) -> Parts[None]:
        """Parse the text of an answer after its reasoning; yield its parts, or None to wait for more text.

        answer: the parser of the answer, from whose ``source`` the text is taken.
        """
        yield from answer.text()

    def calls(self, answer: AnswerParser, mark: str) -> Parts[None]:
        """Parse the tool calls that follow a mark; yield their parts, or None to wait for more text.

        answer: the parser of the answer, from whose ``source`` the text is taken.
        mark: the text of ``marks`` that was found; it has been taken already.
        """
        raise NotImplementedError


class AnswerParser:
    """Splits the text of an answer, as it arrives, into parts.

    The methods but ``push`` are generators like those of ``Source``, which read from ``source``.
    form: the format in which the model writes calls.
    tools: the tools that may be called; a call of another name is text. None: there are no tools.
    single: whether to drop calls after the first.
    reasoning: the marks around reasoning, with which the answer may begin; None: the model does not reason.
    inside: whether the answer begins inside reasoning, after its first mark.
    source: the text that is not parsed yet.
    called: the ids of the calls so far, in the order in which they have begun.
    """

    def __init__(
        self,
        form: Format,
        tools: Schemas | None = None,
        single: bool = False,
        reasoning: tuple[str, str] | None = None,
        inside: bool = False,
    ) -> None:
        self.form = form
        self.tools = tools or {}
        self.single = single
        self.source = Source()
        self.called = list[str]()
        self.reader = self._read(reasoning, inside)

    def push(self, text: str, last: bool = False) -> list[Part]:
        """Parse ``text``, which follows what came before; return the parts that are known now.

        last: whether the text is complete.
        """
        self.source.text += text
        self.source.last = last
        found = list[Part]()
        while (part := next(self.reader, None)) is not None:
            if part.kind == "call":
                if self.single and self.called and part.id != self.called[0]:
                    continue
                if part.id not in self.called:
                    part.begins = True
                    self.called.append(part.id)
            found.append(part)
        return found

    def _read(self, reasoning: tuple[str, str] | None, inside: bool) -> Parts[None]:
        source = self.source
        if reasoning is not None:
            begin = reasoning[0]
            while not source.last and (text := source.text.lstrip()) != begin and begin.startswith(text):
                yield None
            if inside or source.text.lstrip().startswith(begin):
                source.text = source.text.lstrip().removeprefix(begin)
                yield from source.skip()
                yield from source.pass_on(THOUGHT, reasoning[1])
                yield from source.skip()
        yield from self.form.read(self)

    def text(self) -> Parts[None]:
        """Parse text with calls in it, up to the end of the answer; yield its parts, or None to wait for more text."""
        source = self.source
        marks = (*self.form.marks, FENCE) if self.tools else ()
        if self.tools:
            yield from self._bare()
        while mark := (yield from source.pass_on(TEXT, *marks)):
            if mark == FENCE:
                yield from self._fence(source.space + FENCE)
            else:
                yield from self.form.calls(self, mark)

    def _bare(self) -> Parts[None]:
        """Take an answer that consists of calls without marks: plain JSON, in backticks, or in doubled braces.

        Yield the calls; None while the text that has arrived may still become such an answer. Take nothing of others.
        """
        source = self.source
        while not source.last and self._may_be_bare(source.text.lstrip()):
            yield None
        text = source.text.strip().strip("`").strip()
        if text.startswith("{{") and text.endswith("}}"):
            text = text[1:-1]
        if not source.text.lstrip().startswith(FENCE) and (calls := self._fenced_calls(text)):
            source.text = ""
            yield from calls

    def _may_be_bare(self, text: str) -> bool:
        if text.startswith(self.form.marks):
            return False
        bare = not text.startswith(FENCE) and self._may_be_calls("", text.lstrip("`"))
        return bare and len(text) <= LONGEST_FENCE

    def _fence(self, begun: str) -> Parts[None]:
        """Parse a fenced block: calls if it has only JSON objects that call tools, else text.

        begun: the text that has been taken already, the mark of the fence and the white space before it.
        """
        source = self.source
        while True:
            kind, line, body = source.text.partition("\n")
            end = body.find("\n" + FENCE)
            open_ = self._may_be_calls(kind.strip(), body) if line else any(k.startswith(kind.strip()) for k in FENCED)
            if source.last or end >= 0 or not open_ or len(body) > LONGEST_FENCE:
                break
            yield None
        if open_ and (calls := self._fenced_calls(body if end < 0 else body[:end])):
            source.text = "" if end < 0 else body[end + 1 + len(FENCE) :]
            yield from calls
            yield from source.skip()
            return
        yield TEXT(begun)
        mark = yield from source.pass_on(TEXT, "\n" + FENCE, *self.form.marks, strip=False)
        if mark in self.form.marks:
            yield from self.form.calls(self, mark)
        elif mark:
            yield TEXT(mark)

    def _may_be_calls(self, kind: str, body: str) -> bool:
        """Return whether a fenced block of language ``kind`` that begins with ``body`` may consist of calls."""
        if kind not in FENCED or body.lstrip()[:1] not in ("", "{", "["):
            return False
        name = NAME.search(body)
        return name[1] in self.tools if name and name[2] else len(body) < LONGEST_HEAD

    def _fenced_calls(self, text: str) -> list[Part]:
        """Return the calls in the ``text`` of a fenced block; [] if there is anything else in it.

        Each call is one part, with all of its arguments.
        """
        found, decoder, text = list[Any](), json.JSONDecoder(), text.strip()
        try:
            while text:
                value, end = decoder.raw_decode(text)
                found += value if isinstance(value, list) else [value]
                text = text[end:].lstrip(BETWEEN)
        except (ValueError, RecursionError):
            return []
        calls = [call for value in found if (call := call_of(value, self.tools)) and value.keys() <= MEMBERS]
        return [_whole_call(*call) for call in calls] if len(calls) == len(found) else []

    def begin_call(self, name: str, written: str) -> Parts[Make | None]:
        """Begin a call of the tool ``name``; return the function that makes its parts from pieces of its arguments.

        Like "return" in ``Source``, this is the value of ``yield from``. Return None if there is no such tool; then
        ``written``, the call's text so far, is yielded as text.
        """
        if name in self.tools:
            return partial(Part, "call", name=name, id=new_id())
        yield TEXT(written)
        return None

    def json_call(self, name: str = "") -> Parts[None]:
        """Parse a call that is a JSON object; an object that calls no tool is text.

        name: the tool's name, if it came before the object; else "".
        """
        call = _JsonCall(self.tools, name)
        while True:
            taken = call.take(self.source.text)
            self.source.text = self.source.text[taken:]
            yield from call.parts()
            if call.complete or self.source.last:
                break
            yield None
        if not call.begun:
            yield TEXT(call.raw)


class _JsonCall:
    """Parser of a call that is a JSON object with a name and arguments, as its text arrives.

    tools: the tools that may be called. id: the id of the call, which all its parts have.
    named: the name, if it came before the object, which then holds only the arguments; else "". The attribute says
        whether there is one.
    raw: the text so far.
    read: number of characters of ``raw`` that have been parsed.
    depth: number of brackets that are open at ``read``.
    quoted: whether ``read`` is inside a string.
    head: the text up to the arguments; None: it has not arrived.
    end: index in ``raw`` at which the arguments end; 0: not known yet.
    sent: index in ``raw`` up to which ``parts`` has returned the arguments.
    begun: whether ``parts`` has returned anything.
    complete: whether the object has ended.
    """

    def __init__(self, tools: Schemas, named: str) -> None:
        self.tools = tools
        self.id = new_id()
        self.named = bool(named)
        self.raw = ""
        self.read = 0
        self.depth = 0
        self.sent = 0
        self.end = 0
        self.quoted = False
        self.complete = False
        self.begun = False
        self.head: re.Match[str] | None = None
        if named:
            self.take(f'{{"name": "{named}", "arguments": ')

    def take(self, text: str) -> int:
        """Parse ``text``, the next text of the answer; return the number of its characters that belong to the call.

        It is less than the length of ``text`` if the call ends in it; ``complete`` is then True.
        """
        before = len(self.raw)
        self.raw += text
        for sign in _SIGN.finditer(self.raw, self.read):
            self.read = sign.end()
            if sign[0] == '"':
                self.quoted = not self.quoted
            elif self.quoted or sign[0][0] == "\\":
                continue
            elif sign[0] in "{[":
                self.depth += 1
                if self.depth == 2 and self.head is None:
                    self._begin_arguments(sign.start())
            else:
                self.depth -= 1
                if self.depth == 1 and self.head is not None and not self.end:
                    self.end = self.read
                if not self.depth or (self.named and self.end):
                    self.complete, self.raw = True, self.raw[: self.read]
                    return self.read - before
        self.read = max(self.read, len(self.raw) - self.raw.endswith("\\"))
        return len(text)

    def _begin_arguments(self, place: int) -> None:
        head = _HEAD.fullmatch(self.raw, endpos=place)
        if head is not None and head[1] in self.tools and self.raw[place] == "{":
            self.head, self.sent = head, head.end()

    def parts(self) -> Iterator[Part]:
        """Yield the parts of the call that have arrived since the last call of this method."""
        if self.head is not None:
            end = self.end or len(self.raw)
            if end > self.sent or not self.begun:
                self.begun = True
                yield Part("call", self.raw[self.sent : end], self.head[1], self.id)
                self.sent = end
        elif self.complete and (found := self._whole()) is not None:
            self.begun = True
            yield _whole_call(*found, self.id)

    def _whole(self) -> tuple[str, dict[str, Any]] | None:
        """Return name and arguments of a complete object in which the name comes last; None: it calls no tool."""
        try:
            return call_of(json.loads(self.raw), self.tools)
        except (ValueError, RecursionError):
            return None


def call_of(value: Any, tools: Schemas) -> tuple[str, dict[str, Any]] | None:
    """Return (tool name, arguments) of the JSON ``value`` if it calls one of ``tools``; None: it calls none."""
    if not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
    return (name, arguments) if isinstance(name, str) and name in tools and isinstance(arguments, dict) else None


def _whole_call(name: str, arguments: Any, id: str = "") -> Part:
    return Part("call", json_text(arguments), name, id or new_id())


def json_text(value: Any, **how: Any) -> str:
    """Return ``value`` as JSON text, in which half a surrogate pair, which UTF-8 cannot encode, stays escaped.

    how: further arguments of ``json.dumps``.
    """
    text = json.dumps(value, ensure_ascii=False, **how)
    return json.dumps(value, **how) if HALF_PAIR.search(text) else text


def begun_object(text: str) -> dict[str, Any]:
    """Parse the beginning of a JSON object, and return its members so far.

    The last member may be cut: a string or a number then has the characters that are there, a list or an object the
    values that are there. Other cut values, such as "tru", and cut names are left out.

    text: JSON text of an object, whole or cut anywhere; "" counts as {}.

    Returns {} if the text is not the beginning of a JSON object.
    """
    try:
        found = from_json(text or "{}", allow_partial="trailing-strings")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
