"""What a client gets for a request, in any protocol: how its answers are read, its counts, and its figures."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any

from anyio.to_thread import run_sync
from pydantic_core import to_json

from specdec.api.text import REASONS, Piece, text_of
from specdec.base.errors import ConstraintError
from specdec.engine.request import Event, Handle
from specdec.serve.errors import ApiError
from specdec.serve.events import sse
from specdec.serve.metrics import Metrics
from specdec.serve.parts import Part
from specdec.serve.request import GenerationRequest

Events = Iterator[dict[str, Any]]


class Answer(ABC):
    """Base class of the answer to a client's request, in one of the protocols.

    A choice is one generated text; a request has ``n`` of them for each prompt, numbered from 0. A piece is text that a
    choice got in one step or by one token. A subclass implements ``json``, the whole answer, and ``events``, the
    streamed one.

    asked: the client's request.
    handles: the handles of the engine's requests, one for each choice, by the choice's number.
    counters: the server's metrics, which count tokens as they are read.
    texts: the text of each choice, as far as it has been read.
    parsers: for each choice, the parser that splits its text into parts.
    """

    def __init__(self, asked: GenerationRequest, handles: Sequence[Handle], counters: Metrics) -> None:
        self.asked = asked
        self.handles = handles
        self.counters = counters
        self.texts = [text_of(handle.request) for handle in handles]
        self.parsers = [asked.new_parser() for _ in handles]

    @abstractmethod
    async def json(self) -> bytes:
        """Read all choices to their ends, and return the whole answer as JSON. Raises ApiError if the engine fails."""

    @abstractmethod
    def events(self) -> AsyncIterator[bytes]:
        """Yield the bytes of the server-sent events of a streamed answer. An ApiError becomes the last event."""

    async def _pieces(self, number: int = 0, per_token: bool = False) -> AsyncIterator[Piece]:
        """Yield the text of choice ``number``, in pieces. The last piece has a finish reason.

        Raises ApiError if the engine fails. Leaving the loop early cancels the choice.
        per_token: whether there is a piece for each token instead of each step.
        """
        handle, latest = self.handles[number], 0.0
        try:
            async for event in handle:
                if event.tokens:
                    now = time.perf_counter()
                    seconds = now - (latest or handle.request.submit_time)
                    self.counters.record_tokens(len(event.tokens), seconds, first=not latest)
                    latest = now
                if event.finish_reason is not None and event.finish_reason not in REASONS:
                    raise _failure(event)
                for piece in self.texts[number].read(event, per_token):
                    yield piece
        finally:
            handle.cancel()

    async def _all_pieces(self, per_token: bool = False) -> AsyncIterator[tuple[int, Piece]]:
        """Yield (number of a choice, piece of its text) for all choices, in the order in which they are generated.

        per_token: whether there is a piece for each token instead of each step. Raises ApiError if the engine fails.
        """
        if len(self.handles) == 1:
            async for piece in self._pieces(0, per_token):
                yield 0, piece
            return
        arrived: asyncio.Queue[tuple[int, Piece] | Exception] = asyncio.Queue(maxsize=len(self.handles))

        async def forward(number: int) -> None:
            try:
                async for piece in self._pieces(number, per_token):
                    await arrived.put((number, piece))
            except Exception as error:
                await arrived.put(error)

        tasks = [asyncio.create_task(forward(number)) for number in range(len(self.handles))]
        try:
            running = len(tasks)
            while running:
                item = await arrived.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                running -= item[1].finish is not None
        finally:
            for task in tasks:
                task.cancel()

    async def _finished(self) -> None:
        """Read all choices to their ends. Raises ApiError if the engine fails."""
        async for _ in self._all_pieces():
            pass

    def counts(self) -> tuple[int, int, int]:
        """Return (prompt tokens, cached ones among them, new tokens), the numbers over all choices so far.

        A prompt counts once for all its choices. New tokens count when they are read.
        """
        prompts = [handle.metrics for handle in self.handles[:: self.asked.n]]  # later choices go on with it
        cached = sum(metrics.num_cached_tokens for metrics in prompts)
        return sum(metrics.num_prompt_tokens for metrics in prompts), cached, sum(text.num_read for text in self.texts)

    def time_saved(self) -> dict[str, int]:
        """Return {"time_saved_ms": milliseconds that cached prompt tokens saved (an estimate)}, a part of ``usage``."""
        return {"time_saved_ms": round(1e3 * sum(handle.metrics.saved_seconds for handle in self.handles))}

    def summary(self) -> str:
        """Return the end of the request's line in the log: numbers of tokens, tokens per step, finish reasons."""
        (before, _, new), figures = self.counts(), [handle.metrics for handle in self.handles]
        steps = sum(metrics.num_spec_steps for metrics in figures)
        accepted = sum(metrics.num_accepted_draft_tokens for metrics in figures)
        length = 1 + accepted / steps if steps else 1.0
        reasons = "+".join(sorted({text.finish_reason or "cancelled" for text in self.texts}))
        return f"{before} prompt + {new} new tokens, {length:.2f} per step, {reasons}"

    def metrics(self) -> dict[str, Any]:
        """Return {"metrics": figures} of the request for the response; {} if the client has not asked for them.

        The figures are times in milliseconds, ``tokens_per_second``, and ``speculative_decoding``: the fields of
        ``RequestMetrics`` about drafts. None stands for what one token alone cannot give.
        For several choices the only figure is {"speculative_decoding": None} (as in vLLM).
        """
        if not self.asked.include_metrics:
            return {}
        if len(self.handles) > 1:
            return {"metrics": {"speculative_decoding": None}}
        [metrics], [text] = [handle.metrics for handle in self.handles], self.texts
        seconds, gaps = metrics.last_token_seconds - metrics.first_token_seconds, text.num_read - 1
        deepest, histogram = max(metrics.per_step_drafted, default=0), metrics.acceptance_histogram
        names = ["num_spec_steps", "num_draft_tokens", "num_accepted_draft_tokens", "mean_acceptance_length"]
        names += ["draft_acceptance_rate", "num_drafted_steps", "accepted_by_source"]
        if self.asked.per_step_metrics:
            names += ["per_step_drafted", "per_step_accepted"]
        speculation = {name: getattr(metrics, name) for name in names} | {
            "num_spec_tokens": deepest,
            "time_saved_ms": round(1e3 * metrics.draft_saved_seconds),
            "note": metrics.draft_note,
            "acceptance_histogram": histogram + [0] * (deepest + 1 - len(histogram)),
        }
        return {
            "metrics": {
                "time_to_first_token_ms": 1e3 * metrics.first_token_seconds,
                "generation_time_ms": 1e3 * seconds,
                "queue_time_ms": 1e3 * metrics.queue_seconds,
                "mean_itl_ms": 1e3 * seconds / gaps if gaps > 0 else None,
                "tokens_per_second": gaps / seconds if seconds > 0 else None,
                "speculative_decoding": speculation,
            }
        }


def _failure(event: Event) -> ApiError:
    """Return (not raise) the error that a client gets for ``event``, by which a request failed or was cancelled.

    It has the status 503 for a cancellation, 400 for a constraint that cannot be met, and 500 for other errors.
    """
    if event.finish_reason == "cancelled":
        return ApiError(503, "the server is shutting down; try again later")
    if isinstance(event.error, ConstraintError):
        return ApiError(400, str(event.error), code="invalid_value")
    return ApiError(500, f"decoding failed: {event.error}")


class BlockAnswer(Answer):
    """Base class of an answer with one choice, which is streamed as blocks of reasoning, text and calls.

    A block is a ``Part`` with all text of its kind up to the next block. The protocols name its states: it begins
    empty, grows by deltas and ends. A subclass returns the events for each, as JSON objects whose ``type`` is the
    event's name; ``events`` of this class calls its methods in the stream's order, ``json`` only ``result``.
    text: the text of the choice so far.
    blocks: the blocks so far, the last of which may still grow.
    """

    def __init__(self, asked: GenerationRequest, handles: Sequence[Handle], counters: Metrics) -> None:
        super().__init__(asked, handles, counters)
        [self.text] = self.texts
        self.blocks = list[Part]()

    async def json(self) -> bytes:
        await self._finished()
        return await run_sync(self._whole)

    def _whole(self) -> bytes:
        for _ in self._read(self.text.text, last=True):
            pass
        return to_json(self.result() | self.metrics(), inf_nan_mode="null")

    async def events(self) -> AsyncIterator[bytes]:
        try:
            for event in self.begin():
                yield self._written(event)
            async for piece in self._pieces():
                for event in self._read(piece.text, last=piece.finish is not None):
                    yield self._written(event)
            for event in [*(self.end_block(self.blocks[-1], last=True) if self.blocks else ()), *self.end()]:
                yield self._written(event)
        except ApiError as error:
            yield self._written(self.failure(error))

    def _read(self, text: str, last: bool) -> Events:
        """Parse new text of the answer, add it to ``blocks``, and yield the events that report it to the client.

        text: the text that follows what was read before. last: whether no more text follows.
        """
        for part in self.parsers[0].push(text, last):
            if not self.blocks or not self.blocks[-1].takes(part):
                if self.blocks:
                    yield from self.end_block(self.blocks[-1])
                self.blocks.append(replace(part, text=""))
                yield from self.begin_block(self.blocks[-1])
            if part.text:
                self.blocks[-1].text += part.text
                yield from self.delta(self.blocks[-1], part.text)

    @property
    def _index(self) -> int:
        return len(self.blocks) - 1

    def _written(self, event: dict[str, Any]) -> bytes:
        return b"event: " + str(event["type"]).encode() + b"\n" + sse(event)

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """Return the whole answer, made of ``blocks``, as a JSON object of the protocol.

        It is called after the last text was read; the caller adds the member ``metrics``.
        """

    @abstractmethod
    def begin(self) -> Events:
        """Return the protocol's events that come before any text, such as "message_start"."""

    @abstractmethod
    def begin_block(self, block: Part) -> Events:
        """Return the events for the start of ``block``, the last of ``blocks``, which has no text yet."""

    @abstractmethod
    def delta(self, block: Part, text: str) -> Events:
        """Return the events that tell the client of new text.

        block: the last block, which has all of its text so far. text: the new piece at its end.
        """

    @abstractmethod
    def end_block(self, block: Part, last: bool = False) -> Events:
        """Return the events for the end of ``block``, the last of ``blocks`` so far.

        last: whether no block follows; the limit on new tokens may have cut it.
        """

    @abstractmethod
    def end(self) -> Events:
        """Return the protocol's events that come after the last block and end the stream, such as "message_stop".

        They report the finish reason and the numbers of tokens.
        """

    @abstractmethod
    def failure(self, error: ApiError) -> dict[str, Any]:
        """Return the event that reports ``error`` and ends the stream, as a JSON object with its ``type``."""
