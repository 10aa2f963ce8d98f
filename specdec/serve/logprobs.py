"""Log-probabilities of tokens in the shapes of OpenAI's two endpoints, and the bytes and text of a token."""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from specdec.engine.logprobs import TokenLogprob

MIN_LOGPROB = -9999.0  # instead of minus infinity, which JSON lacks
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


def chat_logprobs(tokenizer: Any, scored: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return the member ``logprobs`` of a choice of ``/v1/chat/completions``, for the tokens ``scored``.

    scored: the tokens with their log-probabilities (natural logarithms) and those of the likeliest tokens there.
    tokenizer: gives the tokens' texts and bytes.
    """
    content = []
    for token_id, logprob, top in scored:
        likely = [_entry(tokenizer, *each) for each in top]
        content.append(_entry(tokenizer, token_id, logprob) | {"top_logprobs": likely})
    return {"content": content, "refusal": None}


def _entry(tokenizer: Any, token_id: int, logprob: float) -> dict[str, Any]:
    found = token_bytes(tokenizer, token_id)
    return {"token": found.decode("utf-8", "replace"), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(found)}


class TextOffsets:
    """Where the tokens of a text begin in it, in characters. Tokens that are not in the text take no place.

    tokenizer: gives the tokens' bytes. text: returns the text as far as it is known.
    """

    def __init__(self, tokenizer: Any, text: Callable[[], str]) -> None:
        self.tokenizer, self.text, self.count = tokenizer, text, 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be several tokens

    def next(self, token_id: int) -> int:
        """Return the offset of the next token of the text, whose id is ``token_id``."""
        begin, found = self.count, token_bytes(self.tokenizer, token_id)
        if token_id in self.tokenizer.added_tokens_decoder and not self.text().startswith(found.decode(), begin):
            return begin  # a special token that is not shown
        piece = self.decoder.decode(found)
        if not begin and piece.startswith(" ") and self.text()[:1] not in ("", " "):  # the tokenizer has put it there
            piece = piece[1:]
        self.count += len(piece)
        return begin


def completion_logprobs(
    tokenizer: Any, scored: Sequence[TokenLogprob], offsets: TextOffsets, first: int | None = None
) -> dict[str, Any]:
    """Return the member ``logprobs`` of a choice of ``/v1/completions``.

    scored: the tokens with their log-probabilities. tokenizer: gives the tokens' texts.
    offsets: counts the tokens of this call and the calls before.
    first: id of the first token of a prompt, which has no log-probability; None: the prompt is not included.
    """
    found: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    rows: list[tuple[int, float | None, list[tuple[int, float]]]] = [] if first is None else [(first, None, [])]
    for token_id, logprob, top in [*rows, *scored]:
        name, likely = token_text(tokenizer, token_id), dict[str, float]()
        for other, share in [*top, *([(token_id, logprob)] if top and logprob is not None else [])]:
            likely.setdefault(token_text(tokenizer, other), max(share, MIN_LOGPROB))
        found["text_offset"].append(offsets.next(token_id))
        found["token_logprobs"].append(None if logprob is None else max(logprob, MIN_LOGPROB))
        found["tokens"].append(name)
        found["top_logprobs"].append(likely or None)
    return found


def token_text(tokenizer: Any, token_id: int) -> str:
    """Return the token ``token_id`` as a dictionary key.

    It is its text, or its bytes, such as ``bytes:\\xe2\\x82``, if the token is a part of a character.
    """
    found = token_bytes(tokenizer, token_id)
    try:
        return found.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


@functools.lru_cache(1 << 16)  # an answer has thousands of tokens, few of them different
def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """Return the bytes of the token ``token_id``, which may be a part of a UTF-8 character; b"" for an unknown id."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if piece is None:  # the output head is wider than the vocabulary
        return b""
    if token_id in tokenizer.added_tokens_decoder:
        return str(piece).encode()
    if match := _BYTE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    if "ByteLevel" in str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", "")):
        alphabet = _byte_level_alphabet()
        if all(character in alphabet for character in piece):
            return bytes(alphabet[character] for character in piece)
    return str(piece).replace("\u2581", " ").encode()


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """Return {character: byte} of the alphabet in which byte-level BPE vocabularies are written."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these stand for themselves
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
