"""One choice of a response: a request of the engine, its text as it is generated, its latencies, and its events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from specdec.api.text import REASONS, AnswerText, Detokenizer, Piece
from specdec.base.errors import ConstraintError
from specdec.engine.logprobs import TokenLogprob
from specdec.engine.request import Handle
from specdec.serve.errors import ApiError
from specdec.serve.metrics import Metrics


class ResponseChoice:
    """The choice with number ``index``.

    started, first_token_at, last_token_at: times of ``time.perf_counter``; 0.0 before there are tokens.
    logprobs_sent, text_offset: tokens whose log-probabilities have been sent, and the length of their text.
    """

    def __init__(
        self,
        index: int,
        handle: Handle,
        prompt: list[int],
        text: Detokenizer,
        metrics: Metrics,
    ) -> None:
        self.index, self.handle, self.prompt, self.metrics = index, handle, prompt, metrics
        self.tokenizer, self.answer = text.tokenizer, AnswerText(text)
        self.logprobs_sent = self.text_offset = 0
        self.started = time.perf_counter()
        self.first_token_at = self.last_token_at = 0.0

    async def pieces(self, per_token: bool = False) -> AsyncIterator[Piece]:
        """The text, a piece per step or ``per_token``. The last piece has a finish reason.

        Raises ApiError if the engine fails. Leaving the loop early cancels the request.
        """
        try:
            async for event in self.handle:
                self._record_latency(len(event.tokens))
                if event.finish_reason is not None and event.finish_reason not in REASONS:
                    raise _failure(event.finish_reason, event.error)
                for piece in self.answer.read(event, per_token):
                    yield piece
        finally:
            self.close()

    def logprobs(self, start: int) -> list[TokenLogprob]:
        """The log-probabilities of the new tokens from number ``start`` on."""
        return self.handle.request.token_logprobs[start : self.answer.num_tokens]

    def close(self) -> None:
        """Cancel the request, unless it has finished."""
        self.handle.cancel()

    def _record_latency(self, tokens: int) -> None:
        if tokens:
            now = time.perf_counter()
            self.metrics.record_tokens(tokens, now - (self.last_token_at or self.started), not self.first_token_at)
            self.first_token_at, self.last_token_at = self.first_token_at or now, now


def _failure(finished: str, error: BaseException | None) -> ApiError:
    if finished == "cancelled":
        return ApiError(503, "the server is shutting down; try again later")
    if isinstance(error, ConstraintError):
        return ApiError(400, str(error), code="invalid_value")
    return ApiError(500, f"decoding failed: {error}")


async def merge_pieces(
    choices: Sequence[ResponseChoice], per_token: bool
) -> AsyncIterator[tuple[ResponseChoice, Piece]]:
    """The pieces of all choices, in the order in which they are generated."""
    if len(choices) == 1:
        async for piece in choices[0].pieces(per_token):
            yield choices[0], piece
        return
    arrived: asyncio.Queue[tuple[ResponseChoice, Piece] | Exception | None] = asyncio.Queue(maxsize=len(choices))

    async def forward(choice: ResponseChoice) -> None:
        try:
            async for piece in choice.pieces(per_token):
                await arrived.put((choice, piece))
            await arrived.put(None)
        except Exception as error:
            await arrived.put(error)

    tasks = [asyncio.create_task(forward(choice)) for choice in choices]
    try:
        running = len(tasks)
        while running:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
