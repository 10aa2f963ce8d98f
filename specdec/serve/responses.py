"""Responses and chunks of the two endpoints, in OpenAI's shape."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from pydantic_core import to_json

from specdec import __version__
from specdec.api.pieces import Piece
from specdec.serve import logprobs, speculation
from specdec.serve.choice import Choice
from specdec.serve.errors import ApiError
from specdec.serve.schema import Sampling, StreamOptions
from specdec.serve.streaming import DONE, event, merged
from specdec.serve.tools import ChatParser, ToolForm, message_of

LARGE = 10_000  # log-probabilities of a choice, which take tens of milliseconds to write


class Chat:
    """Shapes of ``/v1/chat/completions``. form, names: of tool calls, if there are tools; single: at most one call.

    forced: the answer is calls.
    """

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, form: ToolForm | None = None, names: Sequence[str] = (), single: bool = False, forced: bool = False
    ) -> None:
        self.form, self.names, self.single, self.forced = form, names, single, forced
        self.parsers: dict[int, ChatParser] = {}

    def parser(self, choice: Choice) -> ChatParser:
        if choice.index not in self.parsers:
            rule = choice.handle.request.sampler.constraint
            inside, may_reason = (False, False) if rule is None else (rule.inside, rule.may_reason)
            parser = ChatParser(self.form, self.names, self.single, inside, may_reason, self.forced)
            self.parsers[choice.index] = parser
        return self.parsers[choice.index]

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """What a stream begins with, for each choice."""
        return {"delta": {"role": "assistant", "content": ""}}

    def logprobs(self, choice: Choice, start: int) -> dict[str, Any]:
        """Those of the tokens from number ``start`` on."""
        return logprobs.of_chat(choice.tokenizer, choice.scored(start))

    def deltas(self, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        found = self.parser(choice).push(piece.text, last=piece.finish is not None)
        return [{"delta": delta} for delta in found]

    def nothing(self) -> dict[str, Any]:
        return {"delta": {}}

    def full(self, choice: Choice) -> dict[str, Any]:
        deltas = self.parser(choice).push(choice.answer.text, last=True)
        return {"message": {"role": "assistant", "refusal": None} | message_of(deltas)}

    def finish(self, choice: Choice) -> str | None:
        called = choice.answer.finish == "stop" and self.parser(choice).calls
        return "tool_calls" if called else choice.answer.finish


class Completion:
    """Shapes of ``/v1/completions``. echoes: the prompts' texts, by choice, where they come before the answer."""

    prefix = "cmpl"
    whole = part = "text_completion"

    def __init__(self, echoes: Sequence[str] = ()) -> None:
        self.echoes = echoes

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        return {"text": self.echoes[choice.index]} if self.echoes else None

    def logprobs(self, choice: Choice, start: int) -> dict[str, Any]:
        """Those of the tokens from number ``start`` on; before the first come the prompt's, where it is repeated."""
        before = choice.handle.request.prompt_token_logprobs if self.echoes and not start else []
        first = choice.prompt[0] if self.echoes and not start else None
        scored = [*before, *choice.scored(start)]
        found, choice.place = logprobs.of_completion(choice.tokenizer, scored, first, choice.place)
        return found

    def deltas(self, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        return [{"text": piece.text}] if piece.text else []

    def nothing(self) -> dict[str, Any]:
        return {"text": ""}

    def finish(self, choice: Choice) -> str | None:
        return choice.answer.finish

    def full(self, choice: Choice) -> dict[str, Any]:
        return {"text": (self.echoes[choice.index] if self.echoes else "") + choice.answer.text}


class Response:
    """The answer to one request with ``choices``, whole or as a stream."""

    def __init__(self, shape: Chat | Completion, model: str, choices: Sequence[Choice], body: Sampling) -> None:
        self.shape, self.choices, self.body = shape, list(choices), body
        self.head = {
            "id": f"{shape.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"specdec-{__version__}",
        }

    async def whole(self, work: Callable[[bool, Callable[[Choice], bytes], Choice], Awaitable[bytes]]) -> bytes:
        """The response as JSON, once all choices have ended. work: ``Intake.work``."""
        async for _ in merged(self.choices, each=False):
            pass
        scored = 0 if self.body.top is None else 1 + self.body.top
        choices = [await work(scored * c.answer.count > LARGE, self._written, c) for c in self.choices]
        head, rest = {"object": self.shape.whole}, {"usage": self.usage()} | self._metrics()
        return to_json(self.head | head)[:-1] + b',"choices":[' + b",".join(choices) + b"]," + to_json(rest)[1:]

    def _written(self, choice: Choice) -> bytes:
        return to_json(self._choice(choice, self.shape.full(choice), self.shape.finish(choice)))

    async def stream(self) -> AsyncIterator[bytes]:
        """Events: openings, pieces, the usage if it is asked for, and the end."""
        options = self.body.stream_options or StreamOptions()
        more: dict[str, Any] = {"usage": None} if options.include_usage else {}
        left = len(self.choices)
        try:
            for choice in self.choices:
                if (opening := self.shape.opening(choice)) is not None:
                    yield self._chunk(choice, opening, None, more)
            async for choice, piece in merged(self.choices, options.include_draft_depth):
                depth = {"draft_depth": piece.depth} if options.include_draft_depth else {}
                for delta in self.shape.deltas(choice, piece):
                    yield self._chunk(choice, delta | depth, None, more)
                if piece.finish is None:
                    continue
                left -= 1
                end = self._metrics() if not left and not options.include_usage else {}
                yield self._chunk(choice, self.shape.nothing(), self.shape.finish(choice), more | end)
            if options.include_usage:
                yield event(self._part() | {"choices": [], "usage": self.usage()} | self._metrics())
        except ApiError as error:
            yield event(error.body())
        yield DONE

    def usage(self) -> dict[str, Any]:
        prompts = {id(choice.prompt): choice for choice in self.choices}  # the choices of a prompt count it once
        before, new = sum(len(c.prompt) for c in prompts.values()), sum(c.answer.count for c in self.choices)
        cached = sum(c.handle.metrics.num_cached_tokens for c in prompts.values())
        details = {"cached_tokens": cached}
        return {
            "prompt_tokens": before,
            "completion_tokens": new,
            "total_tokens": before + new,
            "prompt_tokens_details": details,
        }

    def summary(self) -> str:
        """For the log: what this request was."""
        usage, steps = self.usage(), sum(c.handle.metrics.num_spec_steps for c in self.choices)
        accepted = sum(c.handle.metrics.num_accepted_draft_tokens for c in self.choices)
        length = 1 + accepted / steps if steps else 1.0
        reasons = "+".join(sorted({c.answer.finish or "cancelled" for c in self.choices}))
        return f"{usage['prompt_tokens']} + {usage['completion_tokens']} tokens, {length:.2f} a step, {reasons}"

    def _metrics(self) -> dict[str, Any]:
        if not self.body.include_metrics:
            return {}
        return {"metrics": speculation.of_response(self.choices, self.body.per_step_metrics)}

    def _part(self) -> dict[str, Any]:
        return self.head | {"object": self.shape.part}

    def _chunk(self, choice: Choice, content: dict[str, Any], finish: str | None, more: dict[str, Any]) -> bytes:
        return event(self._part() | {"choices": [self._choice(choice, content, finish)]} | more)

    def _choice(self, choice: Choice, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": choice.index, **content, "logprobs": self._logprobs(choice), "finish_reason": finish}

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        """Those of the tokens that have come since they were last asked for."""
        start, end = choice.sent, choice.answer.count
        if self.body.top is None or (start == end and choice.answer.finish is None) or (start and start == end):
            return None
        choice.sent = end
        return self.shape.logprobs(choice, start)
