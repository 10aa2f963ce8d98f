"""A request, and what its sender holds of it: tokens as they come, figures, and a way to give it up."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, SkipValidation
from transformers import LogitsProcessor

from specdec.base.errors import SpecDecError
from specdec.base.options import SamplingParams
from specdec.base.settings import Whole, checked_class
from specdec.engine.logprobs import TokenLogprob
from specdec.engine.metrics import RequestMetrics
from specdec.runtimes.target import Target
from specdec.speculation.sampling import Chooser

Ids = Annotated[Sequence[Whole], Field(title="a list of token ids (whole numbers)")]


class Status(StrEnum):
    """Where a request is: in the queue, with its prompt under way, in the batch, or at its end."""

    WAITING = "waiting"
    PREFILL = "prefill"
    RUNNING = "running"
    FINISHED = "finished"


NEXT = {  # a preempted request waits again
    Status.WAITING: {Status.PREFILL, Status.FINISHED},
    Status.PREFILL: {Status.RUNNING, Status.WAITING, Status.FINISHED},
    Status.RUNNING: {Status.WAITING, Status.FINISHED},
    Status.FINISHED: {Status.FINISHED},  # the step that ended it may fail
}


@checked_class
@dataclass(eq=False)
class Request:
    """A row of the engine's batch.

    prompt: token ids. limit: most new tokens. params, processors, stream: how tokens are chosen; requests with one seed
    draw alike unless their streams differ. eos: tokens that end it. stop: called for each new token in order, where the
    engine runs; returns a finish reason, or None. draft: whether the drafter drafts for it. logprobs: how many of the
    likeliest tokens go with the log-probability of each new token; None: there are no log-probabilities.
    prompt_logprobs: those of the prompt's tokens from the second on, too. scope: only requests of the same scope go on
    from what has been run of it. Raises SpecDecError for what is not of its kind.
    """

    prompt: Ids
    limit: Annotated[Whole, Field(ge=0)]
    params: SamplingParams = field(default_factory=SamplingParams)
    processors: SkipValidation[Sequence[LogitsProcessor]] = ()
    stream: Annotated[Whole, Field(ge=0, le=2**64 - 1)] = 0
    eos: Annotated[frozenset[Whole], Field(title="a set of token ids")] = frozenset()
    stop: Callable[[int], str | None] | None = None
    draft: bool = True
    chooser: Chooser | None = None  # instead of params, processors and stream
    logprobs: Annotated[Whole, Field(ge=0)] | None = None
    prompt_logprobs: bool = False
    scope: str | None = None

    # What the engine keeps of it
    ids: list[int] = field(init=False)  # prompt and output; the last one, the root, is not yet cached
    metrics: RequestMetrics = field(init=False)
    memory: Any = field(init=False, default=None)  # the drafter's
    history: Any = field(init=False, default=None)  # the depth policy's
    status: Status = field(init=False, default=Status.WAITING)  # changed by ``enter`` alone
    finished: str | None = field(init=False, default=None)  # the reason, once it has ended
    error: SpecDecError | None = field(init=False, default=None)
    cancelled: bool = field(init=False, default=False)
    submitted: float = field(init=False, default=0.0)
    begun: dict[str, float] | None = field(init=False, default=None)  # the engine's ledger when it was admitted
    new: list[int] = field(init=False, default_factory=list)  # what the last step brought
    depths: list[int] = field(init=False, default_factory=list)  # of these tokens in their draft; 0: the model's own
    forks: set[int] = field(init=False, default_factory=set)  # tokens after which other texts go on differently
    handle: Handle | None = field(init=False, default=None)
    scored: list[TokenLogprob] = field(init=False, default_factory=list)  # the new tokens, where that is asked for
    prompt_scored: list[TokenLogprob] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.prompt = list(self.prompt)
        self.ids = list(self.prompt)
        self.metrics = RequestMetrics(len(self.prompt))
        if self.chooser is None:
            self.chooser = Chooser(self.params, self.processors, self.stream, start=len(self.prompt))

    @property
    def sampling(self) -> Chooser:
        assert self.chooser is not None
        return self.chooser

    @property
    def left(self) -> int:
        """Most tokens that may still come."""
        return self.limit - self.metrics.num_new_tokens

    @property
    def unscored(self) -> bool:
        """Whether log-probabilities of its prompt are still to come."""
        return self.prompt_logprobs and len(self.prompt_scored) < len(self.prompt) - 1

    def enter(self, status: Status) -> None:
        """The one place where the status changes."""
        if status not in NEXT[self.status]:
            raise ValueError(f"a request that is {self.status} cannot become {status}")
        self.status = status

    def finish(self, reason: str, error: SpecDecError | None = None) -> None:
        """It ends. reason: as in ``Event.finished``."""
        self.enter(Status.FINISHED)
        self.finished, self.error = reason, error

    def take(self, tokens: Sequence[int], depths: Sequence[int]) -> None:
        """Add ``new`` tokens, up to where plain decoding would end. Those left over are not the text's, whose cache
        must not have them either. depths: of the tokens in their draft."""
        self.new = []
        if not self.left:  # only the prompt is of interest
            self.finish("length")
            tokens = ()
        for token in tokens:
            if token < 0:  # the model's logits are not finite
                self.finish("error")
                break
            self.new.append(token)
            self.metrics.num_new_tokens += 1
            try:
                reason, error = self._reason(token), None
            except Exception as raised:  # of its stop rule: it must not end others
                reason, error = "error", failure(raised)
            if reason is not None:
                self.finish(reason, error)
                break
        self.ids += self.new
        self.depths = list(depths[: len(self.new)])
        self.sampling.noise.forget(len(self.ids))

    def settle(self, ledger: dict[str, float]) -> None:
        """The request has ended: its own ledger is what it has seen of the engine's."""
        begun = ledger if self.begun is None else self.begun
        self.metrics.ledger = {phase: seconds - begun.get(phase, 0.0) for phase, seconds in ledger.items()}

    def _reason(self, token: int) -> str | None:
        reason = None if self.stop is None else self.stop(token)
        if token in self.eos:
            return "eos"
        return reason or (None if self.left > 0 else "length")


def check_prompt(prompt: Sequence[int], target: Target) -> None:
    """Raise SpecDecError for token ids that ``target`` cannot go on from."""
    if not prompt:
        raise SpecDecError("the prompt is empty; give some token ids")
    if len(prompt) >= target.context:
        raise SpecDecError(
            f"the prompt has {len(prompt)} tokens; with at least one new token it does not fit the model's context of "
            f"{target.context}; shorten it"
        )
    if not 0 <= min(prompt) <= max(prompt) < target.vocab_size:
        raise SpecDecError(f"the prompt has token ids outside the model's vocabulary of {target.vocab_size}")


def failure(error: BaseException) -> SpecDecError:
    """The error that a request ends with."""
    if isinstance(error, SpecDecError):
        return error
    return SpecDecError(f"decoding failed ({type(error).__name__}: {error})")


@dataclass
class Event:
    """What has happened to a request since the last event.

    finished: "eos", "stop" (or another reason that its stop rule gives), "length", "cancelled", "error" (then there is
    an ``error``), or None: it goes on. depths: for each token, its depth in the draft that it was accepted from; 0: the
    model chose it itself.
    """

    tokens: list[int] = field(default_factory=list)
    finished: str | None = None
    error: SpecDecError | None = None
    depths: list[int] = field(default_factory=list)

    @property
    def accepted(self) -> int:
        """How many of the tokens, counted from the first, were drafted."""
        return next((n for n, depth in enumerate(self.depths) if not depth), len(self.depths))


PATIENCE = 1.0  # seconds after which a reader looks whether the engine is still there


class Handle:
    """The events of a request, to be iterated in a thread or on an event loop, by one reader.

    Of a reader that is slow, one event waits, which takes in what comes. advance: runs a step where no thread of the
    engine does; returns whether one does. It ends a request that none will serve any more.
    """

    def __init__(self, request: Request, advance: Callable[[Request], bool]) -> None:
        self.request, self._advance = request, advance
        self._pending: Event | None = None
        self._change = threading.Condition()
        self._waker: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._over = False

    @property
    def metrics(self) -> RequestMetrics:
        return self.request.metrics

    def cancel(self) -> None:
        """Give the request up: it is gone after the step under way. One that has ended stays as it is."""
        self.request.cancelled = True

    def put(self, tokens: list[int], depths: list[int]) -> None:
        """Add what a step has brought, and whether the request has ended by it. The reader is not woken yet."""
        with self._change:
            event = self._pending = self._pending or Event()
            event.tokens += tokens
            event.depths += depths
            event.finished, event.error = self.request.finished, self.request.error

    def wake(self) -> None:
        """Let the reader have what was put."""
        with self._change:
            self._change.notify_all()
            waker = self._waker
        if waker is not None:  # without the lock, which the one that wakes takes at once
            loop, flag = waker
            if not loop.is_closed():
                loop.call_soon_threadsafe(flag.set)

    def _take(self) -> Event | None:
        with self._change:
            event, self._pending = self._pending, None
            self._over = self._over or (event is not None and event.finished is not None)
            return event

    def __iter__(self) -> Iterator[Event]:
        while not self._over:
            if (event := self._take()) is not None:
                yield event
            elif self._advance(self.request):
                with self._change:
                    self._change.wait_for(lambda: self._pending is not None, PATIENCE)

    async def __aiter__(self) -> AsyncIterator[Event]:
        flag = asyncio.Event()
        with self._change:
            self._waker = asyncio.get_running_loop(), flag
        while not self._over:
            if (event := self._take()) is not None:
                yield event
            elif self._advance(self.request):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PATIENCE):
                        await flag.wait()
                flag.clear()
