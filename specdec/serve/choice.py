"""One choice of a response: a request of the engine, its text as it comes, and what it took."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.api.text import Detokenizer
from specdec.engine.request import Handle
from specdec.serve.errors import ApiError
from specdec.serve.metrics import Metrics

REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Piece:
    """New text. depth: of its last token in a draft, 0 if the model chose it itself. finish: OpenAI's reason."""

    text: str
    depth: int = 0
    finish: str | None = None


class Choice:
    """Text and figures of the request behind ``handle``. Times are on the clock of ``time.perf_counter``."""

    def __init__(
        self, index: int, handle: Handle, prompt: list[int], tokenizer: Any, stops: Sequence[str], metrics: Metrics
    ) -> None:
        self.index, self.handle, self.prompt = index, handle, prompt
        self.detokenizer = Detokenizer(tokenizer, stops)
        self.began = time.perf_counter()
        self.first = self.last = 0.0  # when tokens came
        self.finish: str | None = None
        self.metrics = metrics

    @property
    def count(self) -> int:
        """New tokens so far."""
        return len(self.detokenizer.ids)

    async def pieces(self, each: bool = False) -> AsyncIterator[Piece]:
        """The text, step by step; ``each``: token by token. The last one has a finish reason.

        Raises ApiError if the engine cannot go on. Leaving early cancels the request.
        """
        try:
            async for event in self.handle:
                self._time(len(event.tokens))
                ended = event.finished is not None
                if ended and event.finished not in REASONS:
                    raise _failed(event.finished, event.error)
                for n, token in enumerate(event.tokens):
                    self.detokenizer.push(token)
                    if each and not (ended and n == len(event.tokens) - 1):
                        depth = n + 1 if n < event.accepted else 0
                        if text := self.detokenizer.take():
                            yield Piece(text, depth)
                if ended:
                    self.finish = REASONS[event.finished]
                    depth = len(event.tokens) if event.tokens and len(event.tokens) <= event.accepted else 0
                    yield Piece(self.detokenizer.finish(), depth, self.finish)
                elif not each and (text := self.detokenizer.take()):
                    yield Piece(text)
        finally:
            self.close()

    def close(self) -> None:
        """The request is not needed any more; one that is over stays as it is."""
        self.handle.cancel()

    def _time(self, tokens: int) -> None:
        if not tokens:
            return
        now = time.perf_counter()
        self.metrics.came(tokens, now - (self.last or self.began), first=not self.first)
        self.first, self.last = self.first or now, now


def _failed(finished: str, error: BaseException | None) -> ApiError:
    if finished == "cancelled":
        return ApiError(503, "the server is shutting down; try again later")
    return ApiError(500, f"decoding failed: {error}")
