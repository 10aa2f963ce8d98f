"""Answers of OpenAI's ``/v1/chat/completions`` and ``/v1/completions``, with figures in vLLM's schema."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from typing import Any

from anyio.to_thread import run_sync
from pydantic_core import to_json

from specdec import __version__
from specdec.api.text import Piece
from specdec.serve.answer import Answer
from specdec.serve.choice import Choice, merge_pieces
from specdec.serve.errors import ApiError
from specdec.serve.events import DONE, sse
from specdec.serve.logprobs import chat_logprobs, completion_logprobs
from specdec.serve.parts import AnswerParser, Part, merged
from specdec.serve.request import GenerationRequest


class Chat:
    """The shape of ``/v1/chat/completions``."""

    id_prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, asked: GenerationRequest) -> None:
        self.parsers = defaultdict[int, AnswerParser](asked.new_parser)  # by the number of the choice
        self.begun = defaultdict[int, list[str]](list)  # ids of the calls that have been sent

    def first_delta(self, choice: Choice) -> dict[str, Any] | None:
        """Return the content of a choice's first chunk."""
        return {"delta": {"role": "assistant", "content": ""}}

    def deltas(self, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        parts = self.parsers[choice.index].push(piece.text, last=piece.finish is not None)
        return [{"delta": _delta(part, self.begun[choice.index])} for part in parts]

    def last_delta(self) -> dict[str, Any]:
        """Return the content of the chunk with the finish reason."""
        return {"delta": {}}

    def content(self, choice: Choice) -> dict[str, Any]:
        """Return the content of a choice in a whole response."""
        parts = self.parsers[choice.index].push(choice.text.text, last=True)
        return {"message": {"role": "assistant", "refusal": None} | message(parts)}

    def finish_reason(self, choice: Choice) -> str | None:
        called = choice.text.finish_reason == "stop" and self.parsers[choice.index].called
        return "tool_calls" if called else choice.text.finish_reason

    def logprobs(self, choice: Choice, start: int) -> dict[str, Any]:
        """Return log-probabilities of the new tokens from number ``start`` on."""
        return chat_logprobs(choice.text.tokenizer, choice.logprobs(start))


def _delta(part: Part, calls: list[str]) -> dict[str, Any]:
    """Return a part as a delta. calls: ids of those that have begun."""
    if part.kind != "call":
        return {"content" if part.kind == "text" else "reasoning_content": part.text}
    if part.id in calls:
        return {"tool_calls": [{"index": calls.index(part.id), "function": {"arguments": part.text}}]}
    calls.append(part.id)
    function = {"name": part.name, "arguments": part.text}
    return {"tool_calls": [{"index": len(calls) - 1, "id": part.id, "type": "function", "function": function}]}


def message(parts: Iterable[Part]) -> dict[str, Any]:
    """Return the content of the message that consists of ``parts``."""
    blocks = merged(parts)
    text, reasoning = ("".join(b.text for b in blocks if b.kind == kind) for kind in ("text", "reasoning"))
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.text}}
        for block in blocks
        if block.kind == "call"
    ]
    found: dict[str, Any] = {"content": text or (None if calls else "")}
    found |= {"reasoning_content": reasoning} if reasoning else {}
    return found | ({"tool_calls": calls} if calls else {})


class Completion:
    """The shape of ``/v1/completions``. echoes: the text before the answer of each choice; none without ``echo``."""

    id_prefix = "cmpl"
    object = chunk_object = "text_completion"

    def __init__(self, asked: GenerationRequest) -> None:
        self.echoes = [text for text in asked.echoes for _ in range(asked.n)]

    def first_delta(self, choice: Choice) -> dict[str, Any] | None:
        return {"text": self.echoes[choice.index]} if self.echoes else None

    def deltas(self, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        return [{"text": piece.text}] if piece.text else []

    def last_delta(self) -> dict[str, Any]:
        return {"text": ""}

    def content(self, choice: Choice) -> dict[str, Any]:
        return {"text": (self.echoes[choice.index] if self.echoes else "") + choice.text.text}

    def finish_reason(self, choice: Choice) -> str | None:
        return choice.text.finish_reason

    def logprobs(self, choice: Choice, start: int) -> dict[str, Any]:
        """Return log-probabilities of the new tokens from number ``start`` on; at 0 an echoed prompt's come first."""
        echoed = bool(self.echoes) and not start
        scored = [*(choice.handle.request.prompt_token_logprobs if echoed else []), *choice.logprobs(start)]
        first = choice.handle.request.prompt[0] if echoed else None
        found, choice.text_offset = completion_logprobs(choice.text.tokenizer, scored, first, choice.text_offset)
        return found


class OpenAIAnswer(Answer):
    """An answer in one of the two shapes."""

    def __init__(self, asked: GenerationRequest, choices: list[Choice], model: str) -> None:
        super().__init__(asked, choices, model)
        shape = self.shape = (Completion if self.asked.chat is None else Chat)(asked)
        self.head = {
            "id": f"{shape.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"specdec-{__version__}",
        }

    async def json(self) -> bytes:
        await self._finished()
        choices = [await run_sync(self._written, choice) for choice in self.choices]
        head, rest = {"object": self.shape.object}, {"usage": self.usage()} | self.metrics()
        return to_json(self.head | head)[:-1] + b',"choices":[' + b",".join(choices) + b"]," + to_json(rest)[1:]

    def _written(self, choice: Choice) -> bytes:
        return to_json(self._choice(choice, self.shape.content(choice), self.shape.finish_reason(choice)))

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the stream: a first chunk per choice, the text, the usage if requested, and ``[DONE]``."""
        more: dict[str, Any] = {"usage": None} if self.asked.include_usage else {}
        running = len(self.choices)
        try:
            for choice in self.choices:
                if (first := self.shape.first_delta(choice)) is not None:
                    yield self._chunk(choice, first, None, more)
            async for choice, piece in merge_pieces(self.choices, self.asked.include_draft_depth):
                depth = {"draft_depth": piece.depth} if self.asked.include_draft_depth else {}
                for delta in self.shape.deltas(choice, piece):
                    yield self._chunk(choice, delta | depth, None, more)
                if piece.finish is None:
                    continue
                running -= 1
                end = self.metrics() if not running and not self.asked.include_usage else {}
                yield self._chunk(choice, self.shape.last_delta(), self.shape.finish_reason(choice), more | end)
            if self.asked.include_usage:
                yield sse(self._chunk_head() | {"choices": [], "usage": self.usage()} | self.metrics())
        except ApiError as error:
            yield sse(error.body())
        yield DONE

    def usage(self) -> dict[str, Any]:
        before, cached, new = self.counts()
        return {
            "prompt_tokens": before,
            "completion_tokens": new,
            "total_tokens": before + new,
            "prompt_tokens_details": {"cached_tokens": cached} | self.time_saved(),
        }

    def _chunk_head(self) -> dict[str, Any]:
        return self.head | {"object": self.shape.chunk_object}

    def _chunk(self, choice: Choice, content: dict[str, Any], finish: str | None, more: dict[str, Any]) -> bytes:
        return sse(self._chunk_head() | {"choices": [self._choice(choice, content, finish)]} | more)

    def _choice(self, choice: Choice, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": choice.index, **content, "logprobs": self._logprobs(choice), "finish_reason": finish}

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        """Return log-probabilities of the tokens since the last call."""
        start, end = choice.logprobs_sent, choice.text.num_read
        if self.asked.num_logprobs is None or (start == end and (start or choice.text.finish_reason is None)):
            return None
        choice.logprobs_sent = end
        return self.shape.logprobs(choice, start)
