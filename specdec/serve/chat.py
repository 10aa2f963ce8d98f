"""Answers of OpenAI's ``/v1/chat/completions`` and ``/v1/completions``, with figures in vLLM's schema."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial
from typing import Any

from anyio.to_thread import run_sync
from pydantic_core import to_json

from specdec import __version__
from specdec.api.text import Piece
from specdec.engine.request import Handle
from specdec.serve.answer import Answer
from specdec.serve.errors import ApiError
from specdec.serve.events import DONE, sse
from specdec.serve.logprobs import TextOffsets, chat_logprobs, completion_logprobs
from specdec.serve.metrics import Metrics
from specdec.serve.parts import Part, merged
from specdec.serve.request import GenerationRequest


class OpenAIAnswer(Answer):
    """An answer in the format of ``/v1/chat/completions``, or of ``/v1/completions`` if the request has no chat.

    chat: whether the format is that of chats.
    head, chunk_head: members that all answers have, whole or as chunks of a stream: id, object, created, model, ...
    scored: for each choice, the number of tokens whose log-probabilities have been sent.
    offsets: for each choice, where its tokens begin in its text.
    """

    def __init__(self, asked: GenerationRequest, handles: Sequence[Handle], counters: Metrics) -> None:
        super().__init__(asked, handles, counters)
        self.chat = asked.chat is not None
        self.head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if self.chat else "text_completion",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": f"specdec-{__version__}",
        }
        self.chunk_head = self.head | ({"object": "chat.completion.chunk"} if self.chat else {})
        self.scored = [0] * len(handles)
        self.offsets = [TextOffsets(text.tokenizer, partial(self._shown, b)) for b, text in enumerate(self.texts)]

    async def json(self) -> bytes:
        await self._finished()
        choices = [await run_sync(self._written, number) for number in range(len(self.handles))]
        rest = to_json({"usage": self.usage()} | self.metrics())
        return to_json(self.head)[:-1] + b',"choices":[' + b",".join(choices) + b"]," + rest[1:]

    def _written(self, number: int) -> bytes:
        """Return the entry of ``choices`` for choice ``number``, whose text has been read to its end, as JSON."""
        if self.chat:
            parts = self.parsers[number].push(self.texts[number].text, last=True)
            content: dict[str, Any] = {"message": {"role": "assistant", "refusal": None} | message(parts)}
        else:
            content = {"text": self._shown(number)}
        return to_json(self._choice(number, content, self._finish_reason(number)))

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the stream: a first chunk per choice, the text, the usage if requested, and ``[DONE]``."""
        more: dict[str, Any] = {"usage": None} if self.asked.include_usage else {}
        running = len(self.handles)
        try:
            for number in range(running if self.chat or self.asked.echo else 0):
                text = {"delta": {"role": "assistant", "content": ""}} if self.chat else {"text": self._echo(number)}
                yield self._chunk(number, text, None, more)
            async for number, piece in self._all_pieces(self.asked.include_draft_depth):
                depth = {"draft_depth": piece.depth} if self.asked.include_draft_depth else {}
                for content in self._contents(number, piece):
                    yield self._chunk(number, content | depth, None, more)
                if piece.finish is None:
                    continue
                running -= 1
                end = self.metrics() if not running and not self.asked.include_usage else {}
                last: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
                yield self._chunk(number, last, self._finish_reason(number), more | end)
            if self.asked.include_usage:
                yield sse(self.chunk_head | {"choices": [], "usage": self.usage()} | self.metrics())
        except ApiError as error:
            yield sse(error.body())
        yield DONE

    def usage(self) -> dict[str, Any]:
        """Return the value of the response's member ``usage``: numbers of prompt, new, all and cached tokens."""
        before, cached, new = self.counts()
        return {
            "prompt_tokens": before,
            "completion_tokens": new,
            "total_tokens": before + new,
            "prompt_tokens_details": {"cached_tokens": cached} | self.time_saved(),
        }

    def _echo(self, number: int) -> str:
        """Return the prompt's text if it comes before the answer of choice ``number``, else ""."""
        return self.asked.echoes[number // self.asked.n] if self.asked.echo else ""

    def _shown(self, number: int) -> str:
        """Return the text of choice ``number`` so far, with the prompt if that comes before it."""
        return self._echo(number) + self.texts[number].text

    def _contents(self, number: int, piece: Piece) -> list[dict[str, Any]]:
        """Return for each chunk to send its {"delta": ...}, or {"text": ...} without a chat.

        number: number of the choice. piece: its new text, which may be several parts, or only the start of one.
        """
        if not self.chat:
            return [{"text": piece.text}] if piece.text else []
        parser = self.parsers[number]
        return [{"delta": _delta(part, parser.called)} for part in parser.push(piece.text, piece.finish is not None)]

    def _finish_reason(self, number: int) -> str | None:
        reason = self.texts[number].finish_reason
        return "tool_calls" if reason == "stop" and self.parsers[number].called else reason

    def _chunk(self, number: int, content: dict[str, Any], finish: str | None, more: dict[str, Any]) -> bytes:
        return sse(self.chunk_head | {"choices": [self._choice(number, content, finish)]} | more)

    def _choice(self, number: int, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": number, **content, "logprobs": self._logprobs(number), "finish_reason": finish}

    def _logprobs(self, number: int) -> dict[str, Any] | None:
        """Return the member ``logprobs`` of choice ``number``, for its tokens read since the last call.

        An echoed prompt comes first. None: the client wants none, or there is no new token.
        """
        text, request, start = self.texts[number], self.handles[number].request, self.scored[number]
        end = self.scored[number] = text.num_read
        if self.asked.num_logprobs is None or (start == end and (start or text.finish_reason is None)):
            return None
        tokens = request.token_logprobs[start:end]
        if self.chat:
            return chat_logprobs(text.tokenizer, tokens)
        first = None
        if self.asked.echo and not start:
            first, tokens = request.prompt[0], [*request.prompt_token_logprobs, *tokens]
        return completion_logprobs(text.tokenizer, tokens, self.offsets[number], first)


def _delta(part: Part, calls: Sequence[str]) -> dict[str, Any]:
    """Return ``part``, a piece of an answer, as the value of the member ``delta`` of a chunk.

    calls: ids of all calls so far, in order; the place of the call's id in it is its ``index``.
    """
    if part.kind != "call":
        return {"content" if part.kind == "text" else "reasoning_content": part.text}
    call = _call(part) if part.begins else {"function": {"arguments": part.text}}
    return {"tool_calls": [{"index": calls.index(part.id)} | call]}


def _call(part: Part) -> dict[str, Any]:
    return {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": part.text}}


def message(parts: Iterable[Part]) -> dict[str, Any]:
    """Return {member: value} of the assistant's message that ``parts``, those of a whole answer, make.

    ``content`` is text, or None if there are only calls; ``reasoning_content`` and ``tool_calls`` may be missing.
    """
    blocks = merged(parts)
    text, reasoning = ("".join(b.text for b in blocks if b.kind == kind) for kind in ("text", "reasoning"))
    calls = [_call(block) for block in blocks if block.kind == "call"]
    found: dict[str, Any] = {"content": text or (None if calls else "")}
    found |= {"reasoning_content": reasoning} if reasoning else {}
    return found | ({"tool_calls": calls} if calls else {})
