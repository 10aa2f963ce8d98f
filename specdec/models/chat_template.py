"""Render chat templates by jinja2 in a sandbox, with the names and filters that transformers gives to templates.

A template is code by the author of a model, so it is not trusted and sees only plain JSON values. A test compares the
rendered texts with those of transformers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

REASONING = "reasoning_content", "thinking", "reasoning"  # names of a message's reasoning; templates read the first
MARK = "CONTINUE_FINAL_MESSAGE_TAG "  # follows the text that the answer continues


def render(
    template: str,
    messages: Sequence[Any],
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **more: Any,
) -> str:
    """Return the text of a chat, rendered by the Jinja ``template``.

    template: the text of the template, which is not trusted.
    messages: mappings such as {"role": "user", "content": "..."}. They are not changed.
    tools, documents: JSON values for the template; None: there are none.
    add_generation_prompt: whether the text ends with the opening of the assistant's next message.
    continue_final_message: whether the text ends within the last message, which the answer continues.
    more: further variables of the template, by name.
    Raises ValueError for a chat without messages, and for one whose last message cannot be continued. Errors of the
    template itself (``jinja2.TemplateError`` and others) pass through.
    """
    if not messages:
        raise ValueError("the chat has no messages")
    if continue_final_message and add_generation_prompt:
        raise ValueError("the last message cannot be continued after the prompt of a new one")
    compiled = _compiled(template)
    chat = [_with_reasoning({k: v for k, v in _plain(message).items() if v is not None}) for message in messages]
    last = _mark_last(chat[-1], template) if continue_final_message else ""
    text = compiled.render(
        messages=chat,
        tools=_plain(tools),
        documents=_plain(documents),
        add_generation_prompt=add_generation_prompt,
        **_plain(more),
    )
    return _until_mark(text, last) if continue_final_message else text


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    found = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _mark_last(message: dict[str, Any], template: str) -> str:
    content = message.get("content")
    if content is None or "content" not in template:
        raise ValueError("the last message has no content to continue")
    if isinstance(content, str):
        message["content"] = content + MARK
        return content
    for block in reversed(content):
        if "text" in block:
            text = str(block["text"])
            block["text"] = text + MARK
            return text
    raise ValueError("the last message has no text to continue")


def _until_mark(text: str, last: str) -> str:
    if last.strip() not in text or MARK.strip() not in text:
        raise ValueError("the template leaves out a part of the last message, so it cannot be continued")
    at = text.rindex(MARK.strip())
    return text[:at] if text[at : at + len(MARK)] == MARK else text[:at].rstrip()  # it strips messages


def _plain(value: Any) -> Any:
    """Return ``value`` converted to plain JSON types, recursively.

    Objects of other types have methods that a sandboxed template could call. An object that is no text, number, mapping
    or list becomes a text with the name of its type.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


# --- jinja -----------------------------------------------------------------------------------------------------------


class _Generation(Extension):
    """A jinja2 extension: the tag ``{% generation %} ... {% endgeneration %}``, which renders its content unchanged.

    Templates mark the assistant's answers with it, for training.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        return str(caller())


class _Dict:
    """The name ``dict`` in templates: can be called like the class and has ``fromkeys``, and nothing else of it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """The function ``namespace`` in templates: an object with attributes that a template may set.

    Raises jinja2's SecurityError for an attribute name with a leading underscore.
    """

    def __init__(*args: Any, **kwargs: Any) -> None:  # as jinja's: "self" may be an attribute
        self, fields = args[0], dict(*args[1:], **kwargs)
        for name in fields:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, fields)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute '{name}'")


def _refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(16)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)
