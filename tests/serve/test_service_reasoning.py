"""Reasoning in chats: apart from the answer, whole and as a stream, and switched by the template's own argument."""

from typing import Any

import pytest
from calls import THINKING, answering
from servers import USER, events

TEXT = "<think>\nRed, green.\n</think>\n\nThree."
EFFORT = "{{ messages[0].content }}{% if reasoning_effort %}[{{ reasoning_effort }}]{% endif %}"
OPEN = "{{ messages[0].content }}<think>\n{# </think> #}"


@pytest.mark.parametrize(("text", "template"), [(TEXT, THINKING), (TEXT.removeprefix("<think>\n"), OPEN)])
def test_reasoning_is_apart_from_the_answer(text: str, template: str) -> None:
    with answering(text, template=template) as server:
        message = server.chat().json()["choices"][0]["message"]
        deltas = [chunk["choices"][0]["delta"] for chunk in events(server.chat(stream=True))]
        back = server.chat(messages=[*USER, message, *USER])
    assert message["reasoning_content"] == "Red, green." and message["content"] == "Three."
    for name in ("reasoning_content", "content"):
        assert "".join(delta.get(name, "") for delta in deltas) == message[name]
    assert back.status_code == 200


# How the templates of Qwen3.5's small models, which think if they are told to, and of Ministral 3 end or mark thoughts.
OFF = (
    "{{ messages[0].content }}<think>\n"
    "{% if enable_thinking is not defined or not enable_thinking %}\n</think>\n\n{% endif %}"
)
MARKED = "{{ messages[0].content }}{# [THINK] [/THINK] #}"


@pytest.mark.parametrize(
    ("text", "template", "how", "reasoning"),
    [
        ("Three.", OFF, {}, None),
        ("Red, green.\n</think>\n\nThree.", OFF, {"chat_template_kwargs": {"enable_thinking": True}}, "Red, green."),
        ("Red, green.\n</think>\n\nThree.", OFF, {"reasoning_effort": "high"}, "Red, green."),
        ("[THINK]Red, green.[/THINK]Three.", MARKED, {}, "Red, green."),
        ("Three.", MARKED, {}, None),
    ],
)
def test_reasoning_of_small_models(text: str, template: str, how: dict[str, Any], reasoning: str | None) -> None:
    with answering(text, template=template) as server:
        message = server.chat(**how).json()["choices"][0]["message"]
    assert message.get("reasoning_content") == reasoning and message["content"] == "Three."


def test_documents_are_given_to_a_template_that_has_them() -> None:
    """As Granite's; another template has no such argument."""
    template = "{% for each in documents or [] %}{{ each.text }}{% endfor %}{{ messages[0].content }}"
    given = {"chat_template_kwargs": {"documents": [{"text": "abc"}]}}
    with answering("A", template=template) as server:
        counts = [server.chat(**each).json()["usage"]["prompt_tokens"] for each in ({}, given)]
    assert counts[1] == counts[0] + 3
    with answering("A") as server:
        assert server.chat(**given).status_code == 400


def test_thoughts_of_a_message_are_given_to_the_template() -> None:
    template = "{% for m in messages %}{{ m.content }}{{ m.reasoning_content or '' }}{% endfor %}"
    with answering("A", template=template) as server:
        thought = {"role": "assistant", "content": "b", "reasoning_content": "cd"}
        found = server.chat(messages=[{"role": "user", "content": "a"}, thought])
    assert found.json()["usage"]["prompt_tokens"] == 4


@pytest.mark.parametrize(
    ("template", "how", "more"),
    [
        (THINKING, {"reasoning_effort": "none"}, "<think></think>"),
        (THINKING, {"reasoning_effort": "high"}, ""),
        (THINKING, {"chat_template_kwargs": {"enable_thinking": False}}, "<think></think>"),
        (THINKING, {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, ""),
        (EFFORT, {"reasoning_effort": "low"}, "[low]"),
        (EFFORT, {"reasoning_effort": "minimal"}, "[low]"),
        ("{{ messages[0].content }}", {"reasoning_effort": "low"}, ""),
    ],
)
def test_it_is_switched_by_the_templates_argument(template: str, how: dict[str, Any], more: str) -> None:
    with answering("A", template=template) as server:
        counts = [server.chat(**each).json()["usage"]["prompt_tokens"] for each in ({}, how)]
    assert counts[1] == counts[0] + len(more)


@pytest.mark.parametrize("name", ["colour", "tokenize", "tools", "messages", "chat_template", "add_generation_prompt"])
def test_other_arguments_are_refused(name: str) -> None:
    with answering("A", template=THINKING + "{{ add_generation_prompt }}") as server:
        found = server.chat(chat_template_kwargs={name: 1})
    assert found.status_code == 400 and found.json()["error"]["param"] == "chat_template_kwargs"
