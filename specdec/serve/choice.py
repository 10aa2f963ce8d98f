"""One choice of a response: a request of the engine, its text as it comes, and when it came."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from specdec.api.pieces import REASONS, Answer, Piece
from specdec.base.errors import ConstraintError
from specdec.engine.logprobs import TokenLogprob
from specdec.engine.request import Handle
from specdec.serve.errors import ApiError
from specdec.serve.metrics import Metrics


class Choice:
    """The request behind ``handle``. Times are on the clock of ``time.perf_counter``."""

    def __init__(
        self,
        index: int,
        handle: Handle,
        prompt: list[int],
        tokenizer: Any,
        stops: Sequence[str],
        metrics: Metrics,
        shown: Sequence[str] = (),
    ) -> None:
        self.index, self.handle, self.prompt, self.metrics = index, handle, prompt, metrics
        self.tokenizer, self.answer = tokenizer, Answer(tokenizer, stops, shown)
        self.sent = self.place = (
            0  # tokens whose log-probabilities have been sent, and the place in the text after them
        )
        self.began = time.perf_counter()
        self.first = self.last = 0.0  # when tokens came

    async def pieces(self, each: bool = False) -> AsyncIterator[Piece]:
        """The text, step by step; ``each``: token by token. The last piece has a finish reason.

        Raises ApiError if the engine cannot go on. Leaving early cancels the request.
        """
        try:
            async for event in self.handle:
                self._time(len(event.tokens))
                if event.finish_reason is not None and event.finish_reason not in REASONS:
                    raise _failed(event.finish_reason, event.error)
                for piece in self.answer.read(event, each):
                    yield piece
        finally:
            self.close()

    def scored(self, start: int) -> list[TokenLogprob]:
        """The log-probabilities of the tokens from number ``start`` on."""
        return self.handle.request.token_logprobs[start : self.answer.count]

    def close(self) -> None:
        """The request is not needed any more; one that is over stays as it is."""
        self.handle.cancel()

    def _time(self, tokens: int) -> None:
        if tokens:
            now = time.perf_counter()
            self.metrics.came(tokens, now - (self.last or self.began), first=not self.first)
            self.first, self.last = self.first or now, now


def _failed(finished: str, error: BaseException | None) -> ApiError:
    if finished == "cancelled":
        return ApiError(503, "the server is shutting down; try again later")
    if isinstance(error, ConstraintError):
        return ApiError(400, str(error), code="invalid_value")
    return ApiError(500, f"decoding failed: {error}")
