"""What a client gets for a request, in any protocol: how its answers are read, its counts, and its figures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from anyio.to_thread import run_sync
from pydantic_core import to_json

from specdec.serve.choice import Choice, merge_pieces
from specdec.serve.errors import ApiError
from specdec.serve.events import sse
from specdec.serve.parts import Block
from specdec.serve.request import GenerationRequest

Events = Iterator[dict[str, Any]]


class Answer(ABC):
    """The answer to a request."""

    def __init__(self, asked: GenerationRequest, choices: list[Choice], model: str) -> None:
        self.asked, self.choices, self.model = asked, choices, model

    @abstractmethod
    async def json(self) -> bytes:
        """Return the whole answer, once all choices have finished."""

    @abstractmethod
    def events(self) -> AsyncIterator[bytes]:
        """Return the answer as a stream."""

    async def _finished(self) -> None:
        async for _ in merge_pieces(self.choices, per_token=False):
            pass

    def counts(self) -> tuple[int, int, int]:
        """Return the numbers of prompt tokens, of cached ones among them, and of new tokens.

        A prompt counts once for all its choices.
        """
        prompts = [choice.handle.metrics for choice in self.choices[self.asked.n - 1 :: self.asked.n]]
        cached = sum(metrics.num_cached_tokens for metrics in prompts)
        new = sum(choice.text.num_read for choice in self.choices)
        return sum(metrics.num_prompt_tokens for metrics in prompts), cached, new

    def time_saved(self) -> dict[str, int]:
        """Return about how many milliseconds the cached tokens would have taken, as a member of ``usage``."""
        return {"time_saved_ms": round(1e3 * sum(choice.handle.metrics.saved_seconds for choice in self.choices))}

    def summary(self) -> str:
        """Return the end of the request's line in the log."""
        (before, _, new), steps = self.counts(), sum(c.handle.metrics.num_spec_steps for c in self.choices)
        accepted = sum(c.handle.metrics.num_accepted_draft_tokens for c in self.choices)
        length = 1 + accepted / steps if steps else 1.0
        reasons = "+".join(sorted({c.text.finish_reason or "cancelled" for c in self.choices}))
        return f"{before} prompt + {new} new tokens, {length:.2f} per step, {reasons}"

    def metrics(self) -> dict[str, Any]:
        """Return the member ``metrics``, unless the client wants none."""
        if not self.asked.include_metrics:
            return {}
        return {"metrics": _response_metrics(self.choices, self.asked.per_step_metrics)}


def _response_metrics(choices: Sequence[Choice], per_step: bool) -> dict[str, Any]:
    """Return the ``metrics`` of a response with one choice. As in vLLM there are none for several choices."""
    if len(choices) != 1:
        return {"speculative_decoding": None}
    choice, metrics = choices[0], choices[0].handle.metrics
    seconds, gaps = choice.last_token_at - choice.first_token_at, choice.text.num_read - 1
    deepest, histogram = max(metrics.per_step_drafted, default=0), metrics.acceptance_histogram
    names = ("num_spec_steps", "num_draft_tokens", "num_accepted_draft_tokens", "mean_acceptance_length")
    speculation: dict[str, Any] = {
        "num_spec_tokens": deepest,
        **{name: getattr(metrics, name) for name in (*names, "draft_acceptance_rate", "num_drafted_steps")},
        "accepted_by_source": metrics.accepted_by_source,
        "time_saved_ms": round(1e3 * metrics.draft_saved_seconds),
        "note": metrics.draft_note,
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


class BlockAnswer(Answer):
    """An answer with one choice, written block by block.

    A subclass returns the events of each; their ``type`` is their name. blocks: so far.
    """

    def __init__(self, asked: GenerationRequest, choices: list[Choice], model: str) -> None:
        super().__init__(asked, choices, model)
        [self.choice] = self.choices
        self.parser, self.blocks = asked.new_parser(), list[Block]()

    async def json(self) -> bytes:
        await self._finished()
        return await run_sync(self._whole)

    def _whole(self) -> bytes:
        for _ in self._read(self.choice.text.text, last=True):
            pass
        return to_json(self.result() | self.metrics())

    async def events(self) -> AsyncIterator[bytes]:
        try:
            for event in self.begin():
                yield self._written(event)
            async for piece in self.choice.pieces():
                for event in self._read(piece.text, last=piece.finish is not None):
                    yield self._written(event)
            for event in [*(self.end_block(self.blocks[-1], last=True) if self.blocks else ()), *self.end()]:
                yield self._written(event)
        except ApiError as error:
            yield self._written(self.failure(error))

    def _read(self, text: str, last: bool) -> Events:
        """Yield the events of more text."""
        for part in self.parser.push(text, last):
            if not self.blocks or not self.blocks[-1].takes(part):
                if self.blocks:
                    yield from self.end_block(self.blocks[-1])
                self.blocks.append(Block(part.kind, "", part.name, part.id))
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
        """Return the whole answer."""

    @abstractmethod
    def begin(self) -> Events:
        """Return events before the first block."""

    @abstractmethod
    def begin_block(self, block: Block) -> Events:
        """Return events of a new block, which is empty."""

    @abstractmethod
    def delta(self, block: Block, text: str) -> Events:
        """Return events of new text at the end of a block."""

    @abstractmethod
    def end_block(self, block: Block, last: bool = False) -> Events:
        """Return events of a block that is complete, or that was cut, if it is the last one."""

    @abstractmethod
    def end(self) -> Events:
        """Return events after the last block."""

    @abstractmethod
    def failure(self, error: ApiError) -> dict[str, Any]:
        """Return the event of an error."""
