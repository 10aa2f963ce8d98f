"""A request, and the handle that its sender gets: events, metrics, cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Protocol

from pydantic import Field, SkipValidation

from specdec.base.errors import SpecDecError
from specdec.base.options import SamplingParams
from specdec.base.settings import Whole, checked_class
from specdec.engine.logprobs import TokenLogprob
from specdec.engine.metrics import RequestMetrics
from specdec.runtimes.target import Target
from specdec.speculation.sampling import RowSampler

Ids = Sequence[Whole]


class Status(StrEnum):
    """The status of a request: waiting in the queue, running its prompt, decoding in the batch, or finished."""

    WAITING = "waiting"
    PREFILL = "prefill"
    RUNNING = "running"
    FINISHED = "finished"


ALLOWED_CHANGES = {  # a preempted request waits again
    Status.WAITING: {Status.PREFILL, Status.FINISHED},
    Status.PREFILL: {Status.RUNNING, Status.WAITING, Status.FINISHED},
    Status.RUNNING: {Status.WAITING, Status.FINISHED},
    Status.FINISHED: {Status.FINISHED},  # the step that ended it may fail
}


class TextSink(Protocol):
    """Interface of an object that receives a request's new tokens, and may end the request, as at a stop string."""

    def push(self, token: int) -> str | None:
        """Receive the next token id; return a finish reason, such as "stop", if the text ends with it, else None.

        Called once for each new token, an end token included, in the thread that runs the engine's steps. An exception
        ends the request with the reason "error".
        """


@checked_class
@dataclass(eq=False)
class Request:
    """A request, which becomes one row of the engine's batch. Raises SpecDecError for a value of the wrong type.

    prompt: the token ids, from first to last.
    max_new_tokens: maximum number of new tokens; 0: only the prompt runs.
    sampler: chooses tokens from logits; by default greedily.
    eos: ids of the model's end tokens, which end the request.
    stop_token_ids: ids of other tokens that end it, with the finish reason "stop".
    text: receives each new token in order, and may end the request; None: nothing does.
    num_speculative_tokens: maximum draft depth in tokens; 0: no drafts; None: as deep as pays. If all rows have a
        number, each drafts just as deep.
    logprobs: number of top tokens to report with the log-probability of each new token; None: no log-probabilities.
    prompt_logprobs: whether the prompt's tokens, from the second on, get log-probabilities, too.
    scope: name of the tenant; cached prefixes are shared only within a scope. None: the default tenant.
    sender: name of the client within the scope; rows and the queue are shared fairly between clients. None: unnamed.
    priority: waiting requests with a higher number begin first.
    scope_rows: maximum number of requests of the scope that run at once.
    background: whether the prompt runs only while there are no other requests, for the first seconds of its wait.
    learn: whether drafters may learn from its text.
    """

    prompt: Ids
    max_new_tokens: Annotated[Whole, Field(ge=0)]
    sampler: RowSampler = field(default_factory=lambda: RowSampler(SamplingParams()))
    eos: frozenset[Whole] = frozenset()
    stop_token_ids: frozenset[Whole] = frozenset()
    text: SkipValidation[TextSink | None] = None
    num_speculative_tokens: Annotated[Whole, Field(ge=0)] | None = None
    logprobs: Annotated[Whole, Field(ge=0)] | None = None
    prompt_logprobs: bool = False
    scope: str | None = None
    sender: str | None = None
    priority: int = 0
    scope_rows: int | None = None
    background: bool = False
    learn: bool = True

    # State that the engine keeps
    ids: list[int] = field(init=False)  # prompt and output; the last one, the root, is not yet cached
    metrics: RequestMetrics = field(init=False)  # figures so far
    drafter_state: Any = field(init=False, default=None)  # ``Drafter.begin``
    depth_history: Any = field(init=False, default=None)  # ``DepthPolicy.begin``
    status: Status = field(init=False, default=Status.WAITING)  # changed only by ``set_status``
    finish_reason: str | None = field(init=False, default=None)  # as in ``finish``; None: it has not ended
    error: SpecDecError | None = field(init=False, default=None)  # the error that ended it
    cancelled: bool = field(init=False, default=False)  # its sender wants it to end
    preempted: bool = field(init=False, default=False)  # it waits again, as memory was short
    deferred: bool = field(init=False, default=False)  # while its prompt ran, because others came
    submit_time: float = field(init=False, default=0.0)  # ``time.perf_counter`` at submission; 0.0: before it
    phases_at_start: dict[str, float] | None = field(init=False, default=None)  # the engine's, at admission
    new_tokens: list[int] = field(init=False, default_factory=list)  # of the last step
    new_depths: list[int] = field(init=False, default_factory=list)  # their depths in the draft; 0: the model's own
    fork_positions: set[int] = field(init=False, default_factory=set)  # lengths at which other texts branch off
    handle: Handle | None = field(init=False, default=None)  # for its reader, once it is submitted
    token_logprobs: list[TokenLogprob] = field(init=False, default_factory=list)  # of the new tokens
    prompt_token_logprobs: list[TokenLogprob] = field(init=False, default_factory=list)  # from the second token on

    def __post_init__(self) -> None:
        self.prompt = list(self.prompt)
        self.ids = list(self.prompt)
        self.metrics = RequestMetrics(len(self.prompt))

    @property
    def client(self) -> tuple[str | None, str | None]:
        """The client (scope, sender), between which rows and the queue are shared fairly."""
        return self.scope, self.sender

    @property
    def remaining(self) -> int:
        """Maximum number of tokens that may still be generated."""
        return self.max_new_tokens - self.metrics.num_new_tokens

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether it wants log-probabilities of its prompt, and some are missing."""
        return self.prompt_logprobs and len(self.prompt_token_logprobs) < len(self.prompt) - 1

    def set_status(self, status: Status) -> None:
        """Change the status; no other code does.

        Raises ValueError for a change that ``ALLOWED_CHANGES`` lacks, such as from finished to waiting.
        """
        if status not in ALLOWED_CHANGES[self.status]:
            raise ValueError(f"a request that is {self.status} cannot become {status}")
        self.status = status

    def finish(self, reason: str, error: SpecDecError | None = None) -> None:
        """Record that the request has ended: set its status, ``finish_reason`` and ``error``.

        The engine then removes it from the batch or the queue, and sends its last event. Of several calls the last
        counts.

        reason: "eos" (an end token came), "stop" (a stop token), "length" (``max_new_tokens``), "cancelled", "error",
            or what the request's ``text`` has returned for a token.
        error: the error that ended the request; None: it ended without one.
        """
        self.set_status(Status.FINISHED)
        self.finish_reason, self.error = reason, error

    def append(self, tokens: Sequence[int], depths: Sequence[int]) -> None:
        """Append ``tokens`` up to where plain decoding would end, and end the request there.

        The appended ones are then in ``new_tokens``; the rest must not enter the text or the cache.

        tokens: new token ids; -1: the model's logits were not finite, which ends the request with "error".
        depths: for each token, its depth in the draft; 0: the model chose it itself.
        """
        self.new_tokens = []
        if not self.remaining:  # only the prompt is of interest
            self.finish("length")
            tokens = ()
        for token in tokens:
            if token < 0:  # the model's logits are not finite
                self.finish("error")
                break
            self.new_tokens.append(token)
            self.metrics.num_new_tokens += 1
            try:
                reason, error = self._finish_reason(token), None
            except Exception as raised:  # of its text: it must not end other requests
                reason, error = "error", failure(raised)
            if reason is not None:
                self.finish(reason, error)
                break
        self.ids += self.new_tokens
        self.new_depths = list(depths[: len(self.new_tokens)])
        self.sampler.noise.forget(len(self.ids))

    def close_phases(self, seconds_by_phase: dict[str, float]) -> None:
        """Set ``metrics.phases`` to the increase of the engine's seconds since the request began; called at its end.

        All are 0 if it never began. seconds_by_phase: the engine's seconds so far, by the name of the phase.
        """
        start = seconds_by_phase if self.phases_at_start is None else self.phases_at_start
        self.metrics.phases = {phase: seconds - start.get(phase, 0.0) for phase, seconds in seconds_by_phase.items()}

    def _finish_reason(self, token: int) -> str | None:
        """Pass the new token id ``token`` to ``text``; return the reason why the request ends with it, or None."""
        reason = None if self.text is None else self.text.push(token)
        if token in self.eos:
            return "eos"
        if token in self.stop_token_ids:
            return "stop"
        return reason or (None if self.remaining > 0 else "length")


def check_prompt(prompt: Sequence[int], target: Target) -> None:
    """Raise SpecDecError if the token ids ``prompt`` cannot run on ``target``.

    They must not be empty, leave space for a new token in the model's context, and be in its vocabulary.
    """
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
    """Return the SpecDecError with which a request ends: ``error`` itself, or one with its class name and message."""
    if isinstance(error, SpecDecError):
        return error
    found = SpecDecError(f"decoding failed ({type(error).__name__}: {error})")
    found.__cause__ = error
    return found


@dataclass
class Event:
    """The new token ids of a request since its last event, and its end. The reader owns the object.

    tokens: the ids, in order; empty if only the end is reported.
    finish_reason: "eos", "stop" (or the reason that ``Request.text`` returns), "length", "cancelled" or "error"; None:
        the request goes on.
    error: the error that ended the request; None: there is none.
    depths: for each token, its depth in the draft that it was accepted from; 0: the model chose it itself.
    """

    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: SpecDecError | None = None
    depths: list[int] = field(default_factory=list)

    @property
    def accepted(self) -> int:
        """Number of leading tokens that were drafted."""
        return next((n for n, depth in enumerate(self.depths) if not depth), len(self.depths))


POLL = 1.0  # seconds after which a reader checks that the engine is still there


class Handle:
    """Iterates over the events of a request, for one reader, with ``for`` in a thread or ``async for``.

    It waits for each event, and stops after the one with a finish reason. An error of the request is in that event, and
    is not raised. At most one event waits for a slow reader; new tokens are added to it.

    check: function that ends the request if its engine has ended; called about every second while the reader waits.
    """

    def __init__(self, request: Request, check: Callable[[Request], None]) -> None:
        self.request, self._check = request, check
        self._pending: Event | None = None
        self._change = threading.Condition()
        self._waker: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._ended = False

    @property
    def metrics(self) -> RequestMetrics:
        """The figures of the request so far."""
        return self.request.metrics

    def cancel(self) -> None:
        """Let the request end before the next step, with the reason "cancelled"; no effect if it has ended.

        Returns at once. Any thread may call it.
        """
        self.request.cancelled = True

    def put(self, tokens: list[int], depths: list[int]) -> None:
        """Add a step's new tokens to the pending event, with the request's finish reason and error if it has ended.

        The reader is not woken; ``notify`` does that.

        tokens: the new token ids.
        depths: for each of them, its depth in the draft; 0: the model chose it itself.
        """
        with self._change:
            event = self._pending = self._pending or Event()
            event.tokens += tokens
            event.depths += depths
            event.finish_reason, event.error = self.request.finish_reason, self.request.error

    def notify(self) -> None:
        """Wake the reader of this handle, who then gets the pending event. The engine calls it after ``put``."""
        with self._change:
            self._change.notify_all()
            waker = self._waker
        if waker is not None:  # without the lock: the reader takes it at once
            loop, flag = waker
            with contextlib.suppress(RuntimeError):  # its loop is closed: nobody reads
                loop.call_soon_threadsafe(flag.set)

    def _take(self) -> Event | None:
        """Return the pending event and remove it; None: there is none."""
        with self._change:
            event, self._pending = self._pending, None
            self._ended = self._ended or (event is not None and event.finish_reason is not None)
            return event

    def __iter__(self) -> Iterator[Event]:
        while not self._ended:
            if (event := self._take()) is not None:
                yield event
            else:
                self._check(self.request)
                with self._change:
                    self._change.wait_for(lambda: self._pending is not None, POLL)

    async def __aiter__(self) -> AsyncIterator[Event]:
        flag = asyncio.Event()
        with self._change:
            self._waker = asyncio.get_running_loop(), flag
        while not self._ended:
            if (event := self._take()) is not None:
                yield event
            else:
                self._check(self.request)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL):
                        await flag.wait()
                flag.clear()
