"""Text appears as soon as it is certain, adds up to the whole, and ends before a stop string."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

from specdec.errors import SpecDecError
from specdec.text import Detokenizer, encode


class Bytes:
    """A tokenizer whose tokens are UTF-8 bytes: characters may be split between tokens."""

    chat_template = None

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def __call__(self, text: str, add_special_tokens: bool = True):
        return type("Encoding", (), {"input_ids": list(text.encode())})


class Chat(Bytes):
    chat_template = "yes"

    def apply_chat_template(self, messages, add_generation_prompt: bool, tokenize: bool) -> str:
        if any(m["role"] == "tool" for m in messages):
            raise ValueError("no tools")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def feed(text: str, stop: list[str] = []) -> tuple[list[str], Detokenizer]:  # noqa: B006
    detokenizer = Detokenizer(Bytes(), stop)
    pieces = []
    for byte in text.encode():
        detokenizer.push(byte)
        pieces.append(detokenizer.take())
        if detokenizer.stopped:
            break
    pieces.append(detokenizer.finish())
    return pieces, detokenizer


@pytest.mark.parametrize("text", ["plain", "naïve café – ∑ 🙂!", "日本語", "ends with half � sign"])
def test_pieces_add_up_and_never_show_half_a_character(text: str) -> None:
    pieces, detokenizer = feed(text)
    assert "".join(pieces) == detokenizer.text == text
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


def test_text_ends_before_the_first_stop_string() -> None:
    pieces, detokenizer = feed("one two.\n\nthree", ["\n\n", "three"])
    assert "".join(pieces) == "one two." and detokenizer.stopped
    assert detokenizer.ids == list(b"one two.\n\n")


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none() -> None:
    detokenizer = Detokenizer(Bytes(), ["END"])

    def piece(byte: int) -> str:
        detokenizer.push(byte)
        return detokenizer.take()

    assert [piece(b) for b in b"aENx"] == ["a", "", "", "ENx"]
    assert [piece(b) for b in b"yE"] == ["y", ""] and detokenizer.finish() == "E"


def test_text_that_nobody_asks_for_is_read_in_one_piece_at_the_end() -> None:
    tokenizer = Bytes()
    tokenizer.decode = Mock(side_effect=tokenizer.decode)  # type: ignore[method-assign]
    detokenizer = Detokenizer(tokenizer)
    for byte in "naïve".encode():
        detokenizer.push(byte)
    assert not tokenizer.decode.called
    assert detokenizer.finish() == "naïve" and tokenizer.decode.call_count == 1


def test_prompts_of_every_kind_become_ids() -> None:
    assert encode(Bytes(), "ab") == [97, 98]
    assert encode(Chat(), "a") == list(b"<user>a<assistant>")
    assert encode(Chat(), "a", system="s") == list(b"<system>s<user>a<assistant>")
    assert encode(Chat(), "a", chat=False) == [97]
    assert encode(Chat(), [{"role": "user", "content": "a"}]) == list(b"<user>a<assistant>")
    assert encode(None, torch.tensor([[5, 6]])) == encode(None, [5, 6]) == [5, 6]


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "options", "message"),
    [
        (Bytes(), "", {}, "empty"),
        (Bytes(), "  \n", {}, "empty"),
        (Bytes(), [], {}, "empty"),
        (None, "text", {}, "tokenizer"),
        (Bytes(), "a", {"chat": True}, "no chat template"),
        (Bytes(), "a", {"system": "s"}, "needs a chat template"),
        (Chat(), [{"role": "tool", "content": "a"}], {}, "no tools"),
        (Bytes(), torch.ones(2, 3), {}, "generate_batch"),
    ],
)
def test_unusable_prompts_are_refused(tokenizer, prompt, options, message) -> None:
    with pytest.raises(SpecDecError, match=message):
        encode(tokenizer, prompt, **options)
