"""Responses and stream chunks of the two endpoints, with log-probabilities, in OpenAI's shape; metrics in vLLM's."""

from __future__ import annotations

import functools
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from pydantic_core import to_json
from transformers.convert_slow_tokenizer import bytes_to_unicode

from specdec import __version__
from specdec.api.text import Piece
from specdec.engine.request import TokenLogprob
from specdec.serve.choice import DONE, ResponseChoice, merge_pieces, sse
from specdec.serve.errors import ApiError
from specdec.serve.schema import GenerationBody, StreamOptions
from specdec.serve.tools import ChatParser, ToolFormat, merge_deltas

LARGE = 10_000  # log-probabilities of a choice; writing more of them takes tens of milliseconds


class Chat:
    """The shape of ``/v1/chat/completions``.

    tool_format, names: how the model writes tool calls, and the names of the tools; None and () without tools.
    single: keep only the first call. forced: the answer consists of calls.
    """

    id_prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, tool_format: ToolFormat | None, names: Sequence[str], single: bool, forced: bool) -> None:
        self.tool_format, self.names, self.single, self.forced = tool_format, names, single, forced
        self.parsers: dict[int, ChatParser] = {}

    def parser(self, choice: ResponseChoice) -> ChatParser:
        if choice.index not in self.parsers:
            rule = choice.handle.request.sampler.constraint
            inside, may_reason = (False, False) if rule is None else (rule.inside, rule.may_reason)
            parser = ChatParser(self.tool_format, self.names, self.single, inside, may_reason, self.forced)
            self.parsers[choice.index] = parser
        return self.parsers[choice.index]

    def first_delta(self, choice: ResponseChoice) -> dict[str, Any] | None:
        """The content of a choice's first chunk."""
        return {"delta": {"role": "assistant", "content": ""}}

    def deltas(self, choice: ResponseChoice, piece: Piece) -> list[dict[str, Any]]:
        found = self.parser(choice).push(piece.text, last=piece.finish is not None)
        return [{"delta": delta} for delta in found]

    def last_delta(self) -> dict[str, Any]:
        """The content of the chunk with the finish reason."""
        return {"delta": {}}

    def content(self, choice: ResponseChoice) -> dict[str, Any]:
        """The content of a choice in a whole response."""
        deltas = self.parser(choice).push(choice.answer.text, last=True)
        return {"message": {"role": "assistant", "refusal": None} | merge_deltas(deltas)}

    def finish_reason(self, choice: ResponseChoice) -> str | None:
        called = choice.answer.finish == "stop" and self.parser(choice).calls
        return "tool_calls" if called else choice.answer.finish

    def logprobs(self, choice: ResponseChoice, start: int) -> dict[str, Any]:
        """Log-probabilities of the new tokens from number ``start`` on."""
        return chat_logprobs(choice.tokenizer, choice.logprobs(start))


class Completion:
    """The shape of ``/v1/completions``. echoes: a prompt text for each choice, put before its answer; () for none."""

    id_prefix = "cmpl"
    object = chunk_object = "text_completion"

    def __init__(self, echoes: Sequence[str]) -> None:
        self.echoes = echoes

    def first_delta(self, choice: ResponseChoice) -> dict[str, Any] | None:
        return {"text": self.echoes[choice.index]} if self.echoes else None

    def deltas(self, choice: ResponseChoice, piece: Piece) -> list[dict[str, Any]]:
        return [{"text": piece.text}] if piece.text else []

    def last_delta(self) -> dict[str, Any]:
        return {"text": ""}

    def content(self, choice: ResponseChoice) -> dict[str, Any]:
        return {"text": (self.echoes[choice.index] if self.echoes else "") + choice.answer.text}

    def finish_reason(self, choice: ResponseChoice) -> str | None:
        return choice.answer.finish

    def logprobs(self, choice: ResponseChoice, start: int) -> dict[str, Any]:
        """Log-probabilities of the new tokens from number ``start`` on; at 0 an echoed prompt's come first."""
        echoed = bool(self.echoes) and not start
        scored = [*(choice.handle.request.prompt_token_logprobs if echoed else []), *choice.logprobs(start)]
        first = choice.prompt[0] if echoed else None
        found, choice.text_offset = completion_logprobs(choice.tokenizer, scored, first, choice.text_offset)
        return found


class Response:
    """The response to a request, whole or as a stream."""

    def __init__(
        self, shape: Chat | Completion, model: str, choices: Sequence[ResponseChoice], body: GenerationBody
    ) -> None:
        self.shape, self.choices, self.body = shape, list(choices), body
        self.head = {
            "id": f"{shape.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"specdec-{__version__}",
        }

    async def json(
        self, in_thread: Callable[[bool, Callable[[ResponseChoice], bytes], ResponseChoice], Awaitable[bytes]]
    ) -> bytes:
        """The whole response, once all choices have finished. in_thread: ``BodyReader.in_thread``."""
        async for _ in merge_pieces(self.choices, per_token=False):
            pass
        per_token = 0 if self.body.num_logprobs is None else 1 + self.body.num_logprobs
        choices = [await in_thread(per_token * c.answer.num_tokens > LARGE, self._written, c) for c in self.choices]
        head, rest = {"object": self.shape.object}, {"usage": self.usage()} | self._metrics()
        return to_json(self.head | head)[:-1] + b',"choices":[' + b",".join(choices) + b"]," + to_json(rest)[1:]

    def _written(self, choice: ResponseChoice) -> bytes:
        return to_json(self._choice(choice, self.shape.content(choice), self.shape.finish_reason(choice)))

    async def events(self) -> AsyncIterator[bytes]:
        """The stream: a first chunk per choice, the text, the usage if requested, and ``[DONE]``."""
        options = self.body.stream_options or StreamOptions()
        more: dict[str, Any] = {"usage": None} if options.include_usage else {}
        running = len(self.choices)
        try:
            for choice in self.choices:
                if (first := self.shape.first_delta(choice)) is not None:
                    yield self._chunk(choice, first, None, more)
            async for choice, piece in merge_pieces(self.choices, options.include_draft_depth):
                depth = {"draft_depth": piece.depth} if options.include_draft_depth else {}
                for delta in self.shape.deltas(choice, piece):
                    yield self._chunk(choice, delta | depth, None, more)
                if piece.finish is None:
                    continue
                running -= 1
                end = self._metrics() if not running and not options.include_usage else {}
                yield self._chunk(choice, self.shape.last_delta(), self.shape.finish_reason(choice), more | end)
            if options.include_usage:
                yield sse(self._chunk_head() | {"choices": [], "usage": self.usage()} | self._metrics())
        except ApiError as error:
            yield sse(error.body())
        yield DONE

    def usage(self) -> dict[str, Any]:
        prompts = {id(choice.prompt): choice for choice in self.choices}  # a prompt counts once for its choices
        before, new = sum(len(c.prompt) for c in prompts.values()), sum(c.answer.num_tokens for c in self.choices)
        return {
            "prompt_tokens": before,
            "completion_tokens": new,
            "total_tokens": before + new,
            "prompt_tokens_details": {
                "cached_tokens": sum(c.handle.metrics.num_cached_tokens for c in prompts.values())
            },
        }

    def summary(self) -> str:
        """The end of the request's line in the log."""
        usage, steps = self.usage(), sum(c.handle.metrics.num_spec_steps for c in self.choices)
        accepted = sum(c.handle.metrics.num_accepted_draft_tokens for c in self.choices)
        length = 1 + accepted / steps if steps else 1.0
        reasons = "+".join(sorted({c.answer.finish or "cancelled" for c in self.choices}))
        return f"{usage['prompt_tokens']} + {usage['completion_tokens']} tokens, {length:.2f} a step, {reasons}"

    def _metrics(self) -> dict[str, Any]:
        if not self.body.include_metrics:
            return {}
        return {"metrics": _response_metrics(self.choices, self.body.per_step_metrics)}

    def _chunk_head(self) -> dict[str, Any]:
        return self.head | {"object": self.shape.chunk_object}

    def _chunk(
        self, choice: ResponseChoice, content: dict[str, Any], finish: str | None, more: dict[str, Any]
    ) -> bytes:
        return sse(self._chunk_head() | {"choices": [self._choice(choice, content, finish)]} | more)

    def _choice(self, choice: ResponseChoice, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": choice.index, **content, "logprobs": self._logprobs(choice), "finish_reason": finish}

    def _logprobs(self, choice: ResponseChoice) -> dict[str, Any] | None:
        """Log-probabilities of the tokens since the last call."""
        start, end = choice.logprobs_sent, choice.answer.num_tokens
        if self.body.num_logprobs is None or (start == end and (start or choice.answer.finish is None)):
            return None
        choice.logprobs_sent = end
        return self.shape.logprobs(choice, start)


def _response_metrics(choices: list[ResponseChoice], per_step: bool) -> dict[str, Any]:
    """The ``metrics`` of a response with one choice. As in vLLM there are none for several choices."""
    if len(choices) != 1:
        return {"speculative_decoding": None}
    choice, metrics = choices[0], choices[0].handle.metrics
    seconds, gaps = choice.last_token_at - choice.first_token_at, choice.answer.num_tokens - 1
    deepest, histogram = max(metrics.per_step_drafted, default=0), metrics.acceptance_histogram
    names = ("num_spec_steps", "num_draft_tokens", "num_accepted_draft_tokens", "mean_acceptance_length")
    speculation: dict[str, Any] = {
        "num_spec_tokens": deepest,
        **{name: getattr(metrics, name) for name in (*names, "draft_acceptance_rate")},
        "acceptance_histogram": histogram + [0] * (deepest + 1 - len(histogram)),
    }
    if per_step:
        speculation |= {name: list(getattr(metrics, name)) for name in ("per_step_drafted", "per_step_accepted")}
    return {
        "time_to_first_token_ms": 1e3 * (choice.first_token_at - choice.started),
        "generation_time_ms": 1e3 * seconds,
        "queue_time_ms": 1e3 * metrics.queue_seconds,
        "mean_itl_ms": 1e3 * seconds / gaps if gaps > 0 else None,
        "tokens_per_second": gaps / seconds if seconds > 0 else None,
        "speculative_decoding": speculation,
    }


MIN_LOGPROB = -9999.0  # instead of minus infinity, which JSON lacks
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


def chat_logprobs(tokenizer: Any, scored: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The ``logprobs`` of a choice of ``/v1/chat/completions``."""
    content = []
    for token_id, logprob, top in scored:
        likely = [_entry(tokenizer, *each) for each in top]
        content.append(_entry(tokenizer, token_id, logprob) | {"top_logprobs": likely})
    return {"content": content, "refusal": None}


def _entry(tokenizer: Any, token_id: int, logprob: float) -> dict[str, Any]:
    found = token_bytes(tokenizer, token_id)
    return {"token": found.decode("utf-8", "replace"), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(found)}


def completion_logprobs(
    tokenizer: Any, scored: Sequence[TokenLogprob], first: int | None = None, offset: int = 0
) -> tuple[dict[str, Any], int]:
    """The ``logprobs`` of a choice of ``/v1/completions``, and the offset of the text after them.

    first: the first token of a prompt, which has no log-probability; None if the prompt is not included.
    offset: characters of text before these tokens.
    """
    found: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    rows: list[tuple[int, float | None, list[tuple[int, float]]]] = [] if first is None else [(first, None, [])]
    for token_id, logprob, top in [*rows, *scored]:
        name, likely = token_text(tokenizer, token_id), dict[str, float]()
        for other, share in [*top, *([(token_id, logprob)] if top and logprob is not None else [])]:
            likely.setdefault(token_text(tokenizer, other), max(share, MIN_LOGPROB))
        found["text_offset"].append(offset)
        found["token_logprobs"].append(None if logprob is None else max(logprob, MIN_LOGPROB))
        found["tokens"].append(name)
        found["top_logprobs"].append(likely or None)
        offset += len(token_bytes(tokenizer, token_id).decode("utf-8", "ignore"))
    return found, offset


def token_text(tokenizer: Any, token_id: int) -> str:
    """A token as a dictionary key: its text, or ``bytes:`` and its bytes if it is a part of a character."""
    found = token_bytes(tokenizer, token_id)
    try:
        return found.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


@functools.lru_cache(1 << 16)  # an answer has thousands of tokens, few of them different
def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """The bytes of a token."""
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
    """The byte of each character of byte-level vocabularies."""
    return {character: byte for byte, character in bytes_to_unicode().items()}
