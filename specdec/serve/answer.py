"""What a client gets for a request, in any protocol: how its answers are read, its counts, and its figures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from anyio.to_thread import run_sync
from pydantic_core import to_json

from specdec.serve.choice import ResponseChoice, merge_pieces
from specdec.serve.errors import ApiError
from specdec.serve.events import sse
from specdec.serve.parts import AnswerParser, Block
from specdec.serve.request import GenerationRequest
from specdec.speculation.constraints import CompiledConstraint

Events = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Prepared:
    """A request that is ready to run: token ids of its prompts, the constraint on its answers, and how these are read.

    parser: makes the reader of an answer. shown: special tokens that have to be in its text.
    echoes: the texts of the prompts, if they come before the answers.
    """

    asked: GenerationRequest
    prompts: list[list[int]]
    constraint: CompiledConstraint | None
    parser: Callable[[], AnswerParser]
    shown: Sequence[str] = ()
    echoes: Sequence[str] = ()


class Answer(ABC):
    """The answer to a request."""

    def __init__(self, prepared: Prepared, choices: list[ResponseChoice], model: str) -> None:
        self.prepared, self.asked, self.choices, self.model = prepared, prepared.asked, choices, model

    @abstractmethod
    async def json(self) -> bytes:
        """The whole answer, once all choices have finished."""

    @abstractmethod
    def events(self) -> AsyncIterator[bytes]:
        """The answer as a stream."""

    async def _finished(self) -> None:
        async for _ in merge_pieces(self.choices, per_token=False):
            pass

    def counts(self) -> tuple[int, int, int]:
        """Prompt tokens, those of them that were cached, and new tokens. A prompt counts once for its choices."""
        prompts = {id(choice.prompt): choice for choice in self.choices}.values()
        cached = sum(choice.handle.metrics.num_cached_tokens for choice in prompts)
        return sum(len(c.prompt) for c in prompts), cached, sum(c.answer.num_tokens for c in self.choices)

    def time_saved(self) -> dict[str, int]:
        """About how many milliseconds the cached tokens would have taken; no protocol has a place of its own for it."""
        return {"time_saved_ms": round(1e3 * sum(choice.handle.metrics.saved_seconds for choice in self.choices))}

    def summary(self) -> str:
        """The end of the request's line in the log."""
        (before, _, new), steps = self.counts(), sum(c.handle.metrics.num_spec_steps for c in self.choices)
        accepted = sum(c.handle.metrics.num_accepted_draft_tokens for c in self.choices)
        length = 1 + accepted / steps if steps else 1.0
        reasons = "+".join(sorted({c.answer.finish or "cancelled" for c in self.choices}))
        return f"{before} prompt + {new} new tokens, {length:.2f} per step, {reasons}"

    def metrics(self) -> dict[str, Any]:
        """The member ``metrics``, unless the client wants none."""
        if not self.asked.include_metrics:
            return {}
        return {"metrics": _response_metrics(self.choices, self.asked.per_step_metrics)}


def _response_metrics(choices: Sequence[ResponseChoice], per_step: bool) -> dict[str, Any]:
    """The ``metrics`` of a response with one choice. As in vLLM there are none for several choices."""
    if len(choices) != 1:
        return {"speculative_decoding": None}
    choice, metrics = choices[0], choices[0].handle.metrics
    seconds, gaps = choice.last_token_at - choice.first_token_at, choice.answer.num_tokens - 1
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

    def __init__(self, prepared: Prepared, choices: list[ResponseChoice], model: str) -> None:
        super().__init__(prepared, choices, model)
        [self.choice] = self.choices
        self.parser, self.blocks = prepared.parser(), list[Block]()

    async def json(self) -> bytes:
        await self._finished()
        return await run_sync(self._whole)

    def _whole(self) -> bytes:
        for _ in self._read(self.choice.answer.text, last=True):
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
        """The events of more text."""
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
        """The whole answer."""

    @abstractmethod
    def begin(self) -> Events:
        """Events before the first block."""

    @abstractmethod
    def begin_block(self, block: Block) -> Events:
        """Events of a new block, which is empty."""

    @abstractmethod
    def delta(self, block: Block, text: str) -> Events:
        """Events of new text at the end of a block."""

    @abstractmethod
    def end_block(self, block: Block, last: bool = False) -> Events:
        """Events of a block that is complete, or that was cut, if it is the last one."""

    @abstractmethod
    def end(self) -> Events:
        """Events after the last block."""

    @abstractmethod
    def failure(self, error: ApiError) -> dict[str, Any]:
        """The event of an error."""
