"""The choices of a response: requests of the engine, with their text as it is generated, and their latencies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from specdec.api.text import REASONS, Piece, text_of
from specdec.base.errors import ConstraintError
from specdec.engine.logprobs import TokenLogprob
from specdec.engine.request import Handle
from specdec.serve.errors import ApiError
from specdec.serve.metrics import Metrics


class Choice:
    """A request of the engine as a choice of a response.

    index: number of the choice. text: of the request.
    started, first_token_at, last_token_at: times of ``time.perf_counter``; 0.0 before there are tokens.
    logprobs_sent: number of tokens whose log-probabilities have been sent. text_offset: characters of their text.
    """

    def __init__(self, index: int, handle: Handle, metrics: Metrics) -> None:
        self.index = index
        self.handle = handle
        self.metrics = metrics
        self.text = text_of(handle.request)
        self.logprobs_sent = self.text_offset = 0
        self.started = time.perf_counter()
        self.first_token_at = self.last_token_at = 0.0

    async def pieces(self, per_token: bool = False) -> AsyncIterator[Piece]:
        """Yield the text, a piece per step or ``per_token``. The last piece has a finish reason.

        Raises ApiError if the engine fails. Leaving the loop early cancels the request.
        """
        try:
            async for event in self.handle:
                self._record_latency(len(event.tokens))
                if event.finish_reason is not None and event.finish_reason not in REASONS:
                    raise _failure(event.finish_reason, event.error)
                for piece in self.text.read(event, per_token):
                    yield piece
        finally:
            self.close()

    def logprobs(self, start: int) -> list[TokenLogprob]:
        """Return the log-probabilities of the new tokens from number ``start`` on."""
        return self.handle.request.token_logprobs[start : self.text.num_read]

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


async def merge_pieces(choices: Sequence[Choice], per_token: bool) -> AsyncIterator[tuple[Choice, Piece]]:
    """Yield the pieces of all choices, in the order in which they are generated."""
    if len(choices) == 1:
        async for piece in choices[0].pieces(per_token):
            yield choices[0], piece
        return
    arrived: asyncio.Queue[tuple[Choice, Piece] | Exception | None] = asyncio.Queue(maxsize=len(choices))

    async def forward(choice: Choice) -> None:
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
