"""What the server says at its start that clients can ask of the model."""

from __future__ import annotations

import pytest
from tiny_tokenizers import Bytes, special_tokenizer

from specdec.serve import abilities

HERMES = "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}<tool_call>{% endif %}"
CASES = {
    None: "chat: no, tools: no, reasoning: no",
    "{{ messages[0].content }}": "chat: yes, tools: no, reasoning: no",
    HERMES: "chat: yes, tools: yes, reasoning: no",
    HERMES + "<think></think>": "chat: yes, tools: yes, reasoning: yes",
}


@pytest.mark.parametrize("template", CASES)
def test_a_line_says_what_the_template_has(template: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abilities, "find_spec", lambda name: None)
    tokenizer = special_tokenizer("greedy")
    tokenizer.chat_template = template
    assert abilities.abilities(tokenizer) == CASES[template] + ", structured output: no"


def test_structured_output_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abilities, "find_spec", lambda name: name)
    assert abilities.abilities(Bytes()).endswith(", structured output: yes")
