"""Log-probabilities in the two shapes of OpenAI's interface, and the text and bytes of single tokens."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from specdec.engine.logprobs import TokenLogprob

LEAST = -9999.0  # in place of minus infinity, which JSON lacks
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


def of_chat(tokenizer: Any, scored: Sequence[TokenLogprob]) -> dict[str, Any]:
    """As ``/v1/chat/completions`` has them."""
    content = []
    for token_id, logprob, top in scored:
        likely = [_entry(tokenizer, *each) for each in top]
        content.append(_entry(tokenizer, token_id, logprob) | {"top_logprobs": likely})
    return {"content": content, "refusal": None}


def _entry(tokenizer: Any, token_id: int, logprob: float) -> dict[str, Any]:
    found = token_bytes(tokenizer, token_id)
    return {"token": found.decode("utf-8", "replace"), "logprob": max(logprob, LEAST), "bytes": list(found)}


def of_completion(
    tokenizer: Any, scored: Sequence[TokenLogprob], first: int | None = None, offset: int = 0
) -> tuple[dict[str, Any], int]:
    """As ``/v1/completions`` has them, and where the text after them begins.

    first: a token before these, which nothing predicts. offset: where their text begins.
    """
    found: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    rows: list[tuple[int, float | None, list[tuple[int, float]]]] = [] if first is None else [(first, None, [])]
    for token_id, logprob, top in [*rows, *scored]:
        name, likely = token_text(tokenizer, token_id), dict[str, float]()
        for other, share in [*top, *([(token_id, logprob)] if top and logprob is not None else [])]:
            likely.setdefault(token_text(tokenizer, other), max(share, LEAST))
        found["text_offset"].append(offset)
        found["token_logprobs"].append(None if logprob is None else max(logprob, LEAST))
        found["tokens"].append(name)
        found["top_logprobs"].append(likely or None)
        offset += len(token_bytes(tokenizer, token_id).decode("utf-8", "ignore"))
    return found, offset


def token_text(tokenizer: Any, token_id: int) -> str:
    """A token as a key: its text, or ``bytes:`` and its bytes where it is a part of a character."""
    found = token_bytes(tokenizer, token_id)
    try:
        return found.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


@functools.lru_cache(1 << 16)  # an answer has thousands of them, and few different ones
def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """The bytes that a token stands for."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if piece is None:  # the output head is wider than the vocabulary
        return b""
    if token_id in tokenizer.added_tokens_decoder:
        return str(piece).encode()
    if match := _BYTE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    if "ByteLevel" in str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", "")):
        known = _bytes_of_characters()
        if all(character in known for character in piece):
            return bytes(known[character] for character in piece)
    return str(piece).replace("\u2581", " ").encode()


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """The characters by which byte-level vocabularies write bytes: printable ones stand for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}
