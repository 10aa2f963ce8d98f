"""The engine: requests come in at any time, and steps serve all that run.

A step admits waiting requests, runs a part of their prompts, drafts for all rows, scores all drafts in one pass,
accepts row by row, delivers tokens, and removes rows that have ended. Steps run in the engine's own thread (``start``)
or in the caller's.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from specdec.base.background import Stop, Work
from specdec.base.errors import QueueFullError, SpecDecError
from specdec.engine.batch import Batch, not_finite
from specdec.engine.depth import DepthPolicy
from specdec.engine.fairness import admits
from specdec.engine.guard import Outage
from specdec.engine.request import Handle, Request, Status, check_prompt, failure
from specdec.engine.scheduler import Scheduler
from specdec.kvcache.disk import PrefixDisk
from specdec.kvcache.prefix import PrefixStore
from specdec.runtimes.prefill import PASS_TOKENS
from specdec.runtimes.target import Target
from specdec.speculation.drafter import Drafter
from specdec.speculation.verifier import Verifier

IDLE = 0.1  # seconds after which a thread without work checks that its engine is still there
LEARNING = 0.01  # share of the time of steps that the drafter's own work may take while requests run
Events = list[tuple[Request, list[int]]]


@dataclass(frozen=True)
class EngineStats:
    """Figures of an engine at one moment; totals are over all requests so far.

    A *prefix* is the beginning of a text whose keys and values are cached for prompts that begin alike.

    kv_bytes: bytes of the keys, values and recurrent states in memory, those of cached prefixes included.
    kv_budget: maximum of ``kv_bytes``; None: no limit.
    prefix_queries, prefix_hits: numbers of prompt tokens looked up among cached prefixes, and found there.
    disk_queries, disk_hits, disk_bytes: the same for prefixes on disk, and bytes of these.
    prefix_bytes: bytes of cached prefixes in memory.
    saved_seconds: estimated time that the found tokens would have taken.
    preemptions: number of times that a running request moved back to the queue, to go on later.
    steps: number of steps after the prefill, counted once for each request that took part.
    drafted, accepted: sums over these: of the depths of drafts, and of the numbers of accepted drafted tokens.
    drafter: "on", "off" (it has failed: nothing is drafted for a while) or "none" (it never drafts).
    outage: why the drafter is off; None: it is not.
    """

    running: int  # requests that run
    waiting: int  # requests in the queue
    kv_bytes: int
    kv_budget: int | None
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    steps: int
    drafted: int
    accepted: int
    drafter: str = "none"
    drafter_failures: int = 0  # number of times that the drafter failed
    outage: Outage | None = None
    disk_queries: int = 0
    disk_hits: int = 0
    disk_bytes: int = 0
    prefix_bytes: int = 0
    saved_seconds: float = 0.0

    @property
    def kv_usage(self) -> float:
        """``kv_bytes`` as a share of ``kv_budget``; 0 without a limit."""
        return self.kv_bytes / self.kv_budget if self.kv_budget else 0.0


class Engine:
    """Decodes requests with one target and one drafter, at most ``max_rows`` at once.

    ``submit`` adds requests at any time. Steps run in the engine's own thread after ``start``, or in the caller's by
    ``steps``. ``close`` ends it, also at the end of a ``with`` block.

    target: the model. drafter: proposes tokens; already bound to the target (``Drafter.bind``).
    verifier: decides which proposed tokens are accepted.
    policy: chooses how deep each step drafts.
    max_waiting: maximum number of requests in the queue; inf: no limit. Where it is full, a client that has less than
        an equal share of it may still add some, up to twice that number in all.
    kv_memory: maximum bytes of keys and values; None: no limit. At the limit, the youngest request is preempted. The
        cache of a draft model is not counted.
    prefill_chunk: maximum number of prompt tokens that run between two steps of the running rows.
    prefixes: the keys and values of earlier texts, with which prompts that begin alike start. Texts of this engine are
        added, and the caller may pass the store to a later engine of the target. None: none are kept.
    disk: stores prefixes for later processes, too; it is closed with the engine. None: nothing is stored.
    learn: whether the engine's thread lets the drafter learn (``Learner.work``) when there is nothing else to do, and
        for 1 % of the time while requests run.
    on_close: called once, when the engine has ended.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        verifier: Verifier,
        policy: DepthPolicy,
        *,
        max_rows: int = 16,
        max_waiting: float = math.inf,
        kv_memory: int | None = None,
        prefill_chunk: int = PASS_TOKENS,
        prefixes: PrefixStore | None = None,
        disk: PrefixDisk | None = None,
        learn: bool = False,
        on_close: Callable[[], object] = lambda: None,
    ) -> None:
        self.target = target
        self.max_waiting = max_waiting
        self.on_close = on_close
        self.learns = learn and drafter.learner is not None
        self._saved = 0.0  # seconds that the drafter's work may take
        self.batch = Batch(target, drafter, verifier, policy)
        self.scheduler = Scheduler(self.batch, max_rows, kv_memory, prefill_chunk, prefixes, disk)
        self.timer = self.batch.timer
        self.steps_done = self.drafted = self.accepted = 0
        self.requests = dict[Request, None]()  # accepted, and not ended for their readers: wherever they are in a step
        self._unread: list[Handle] = []  # handles with tokens whose readers have not been notified
        self._queue = threading.Condition()  # guards the requests, the waiting queue and the flags below
        self._stepping = threading.RLock()  # held during a step
        self._work: Work[None] | None = None  # of its thread
        self._closing = False  # whether ``close`` was called
        self._draining = False  # whether accepted requests are still served then
        self._closed = False  # whether everything is released
        if disk is not None:
            weakref.finalize(self, disk.close)  # also of an engine that nobody closes

    # -- requests -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Handle:
        """Queue a request, and return at once a handle: an iterable of its events, with its new tokens and its end.

        Raises QueueFullError if too many requests wait, and SpecDecError if it cannot run or was submitted before.

        request: its ``max_new_tokens`` is lowered to what the model's context has space for.
        """
        check_prompt(request.prompt, self.target)
        if max(request.sampler.params.logit_bias or (), default=-1) >= self.target.vocab_size:
            raise SpecDecError(f"logit_bias has token ids outside the model's vocabulary of {self.target.vocab_size}")
        if request.submit_time:
            raise SpecDecError("a request is run once; make another of the same prompt")
        request.max_new_tokens = min(request.max_new_tokens, self.target.context - len(request.prompt))
        with self._queue:
            if self.closed:
                raise SpecDecError("the engine is closed; it takes no more requests")
            waiting = self.scheduler.waiting
            free = self.scheduler.max_rows - self.scheduler.running
            if not admits(request.client, tuple(waiting), self.max_waiting + free, self.max_waiting):
                raise QueueFullError(f"{len(waiting)} requests are waiting already; try again later")
            request.submit_time = time.perf_counter()
            request.handle = Handle(request, self._check)
            self.requests[request] = None
            waiting.append(request)
            self._queue.notify_all()
        return request.handle

    @property
    def closed(self) -> bool:
        """Whether the engine accepts no more requests: ``close`` was called, or its thread has failed."""
        return self._closing or (self._work is not None and not self._work.running)

    @property
    def drafting(self) -> str:
        """The drafter's status: "on", "off" (it has failed) or "none" (it never drafts)."""
        return self.batch.drafting

    @property
    def outage(self) -> Outage | None:
        """Why the drafter is off; None: it is not."""
        return self.batch.guard.outage

    @property
    def busy(self) -> bool:
        """Whether any request runs or waits."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def _check(self, request: Request) -> None:
        """End the request with an error if the engine has ended; no effect while its thread runs.

        A reader's ``Handle`` calls it while it waits. Raises SpecDecError if the engine never had a thread.
        """
        work = self._work
        if work is not None and work.running:
            return
        with self._stepping:
            if request.status is Status.FINISHED:
                return
            if work is None and not self._closing:
                raise SpecDecError("this engine has no thread, so nothing comes; call start, or run its steps")
            self._finish([request], "error", SpecDecError("the engine has ended; start another"))

    # -- steps --------------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[Events]:
        """Run steps in the caller's thread until every request has ended.

        Yield, for each step, a list of pairs (request, its new token ids), which may be empty. ``close`` ends the
        steps, too, if another thread calls it.

        A step admits, prefills, decodes and delivers. A step that fails ends all requests but those that wait, and its
        error is raised.
        """
        while self.busy and (self._draining or not self._closing):
            events, error = self._try_step()
            if error is not None:
                raise error
            yield events

    def _try_step(self) -> tuple[Events, Exception | None]:
        """Run a step; return what ``_step`` returns, and the error by which it has failed (None: it has not).

        After an error, all requests but those that wait have ended with it, and the list is empty.
        """
        with self._stepping:
            try:
                return self._step(), None
            except BaseException as error:
                self._fail(error)
                if not isinstance(error, Exception):  # Ctrl-C: no prefix is kept of what it cut off
                    raise
                return [], error

    def _step(self) -> Events:
        """Run one step: admit, prefill, decode, deliver. Return (request, its new token ids) for each that got tokens.

        A request that ends without a further token has [].
        """
        self.timer.restart()
        for row in self._all_requests():
            if row.cancelled:
                self._cancel(row)
        self._recover()
        scheduler, batch = self.scheduler, self.batch
        preempted, decoding = scheduler.preempt(), bool(batch.rows)
        if scheduler.waiting and not preempted:
            scheduler.admit()
            for row in scheduler.prefilling.rows:  # new ones share the engine's phases until they end
                if row.phases_at_start is None:
                    row.phases_at_start = dict(self.timer.seconds)
                    row.metrics.phases = self.timer.seconds
        events: Events = []
        if scheduler.prefilling.rows:
            events += self._deliver(scheduler.prefill())
        if decoding and batch.rows:
            batch.step(self._notify)
            self.steps_done += len(batch.rows)
            self.drafted += sum(row.metrics.per_step_drafted[-1] for row in batch.rows)
            self.accepted += sum(row.metrics.per_step_accepted[-1] for row in batch.rows)
            events += self._deliver(batch.rows)
        if not (decoding and batch.rows):
            self._notify()
        new: dict[Request, list[int]] = {}
        for row, tokens in events:  # a row that ends its prefill beside others decodes in the same step
            new[row] = new.get(row, []) + tokens
        return list(new.items())

    def _recover(self) -> None:
        """Restart a drafter that has failed if its pause is over; no effect otherwise."""
        if self.outage is not None:  # ``Drafter.end`` may be called for a preempted request
            self.batch.recover([row for row in self._all_requests() if row.phases_at_start is not None])

    def _deliver(self, rows: Sequence[Request]) -> Events:
        """Put each row's new tokens into its reader's pending event, and remove the rows that have ended.

        ``_notify`` wakes the readers later. Return (row, its new token ids) for each of ``rows``, those that have just
        been prefilled or decoded.
        """
        rows, now = list(rows), time.perf_counter()
        for number, row in enumerate(rows):
            if row.finish_reason == "error" and row.error is None:
                constraint = row.sampler.constraint
                row.error = None if constraint is None else constraint.error(row.ids)
                if (why := row.sampler.failure) is not None:
                    row.error = failure(why)
                row.error = row.error or not_finite(self.target, row, number if len(rows) > 1 else None)
            row.metrics.last_token_seconds = now - row.submit_time
            row.metrics.first_token_seconds = row.metrics.first_token_seconds or now - row.submit_time
        ended = [row for row in rows if row.finish_reason is not None]
        if ended:
            self._end(ended)
        self.timer.mark("overhead")
        for row in rows:
            if row.finish_reason is not None:
                row.close_phases(self.timer.seconds)
            self._put_event(row, row.new_tokens, row.new_depths)
        self._forget(ended)
        return [(row, row.new_tokens) for row in rows]

    def _put_event(self, row: Request, tokens: list[int], depths: list[int]) -> None:
        """Add new tokens and their depths in the draft (0: the model's own) to the pending event of request ``row``.

        ``_notify`` wakes its reader later.
        """
        if row.handle is not None:
            row.handle.put(tokens, depths)
            self._unread.append(row.handle)

    def _notify(self) -> None:
        """Wake the readers that have new events.

        Called while a device scores, if possible, so that the readers' work does not delay the next draft.
        """
        handles, self._unread = self._unread, []
        for handle in handles:
            handle.notify()

    def _end(self, rows: Sequence[Request]) -> None:
        """Remove rows that have ended from batch and memory, and tell the drafter of them.

        Their keys and values may stay, as cached prefixes for prompts that begin alike.
        """
        self.scheduler.remove(rows)
        self._end_drafts(rows)

    def _end_drafts(self, rows: Sequence[Request]) -> None:
        """Tell the drafter that ``rows`` have ended, those that had begun."""
        for row in rows:
            if row.phases_at_start is not None:
                self.batch.end(row)

    def _all_requests(self) -> list[Request]:
        """Return all requests that run or wait, and those whose last event is not sent yet, in a new list."""
        with self._queue:
            return list(self.requests)

    def _forget(self, rows: Sequence[Request]) -> None:
        """Drop the engine's references to ``rows``, which have got their last event, and their ``drafter_state``."""
        with self._queue:
            for row in rows:
                self.requests.pop(row, None)
                row.drafter_state = None  # a reader may keep the request, but not the drafter's keys and values

    def _finish(self, rows: Sequence[Request], reason: str, error: SpecDecError | None = None) -> None:
        """End requests, and send their last events; the caller removes them from the queue or the batch.

        reason: their ``Event.finish_reason``, such as "error". error: their ``Event.error``; None: none.
        """
        for row in rows:
            row.finish(reason, error)
            row.close_phases(self.timer.seconds)
            self._put_event(row, [], [])
        self._forget(rows)
        self._notify()

    def _cancel(self, row: Request) -> None:
        """End the request ``row``, which waits or runs, with the reason "cancelled", and send its last event."""
        with self._queue:
            if row.status is Status.WAITING:
                self.scheduler.waiting.remove(row)
            row.finish("cancelled")
        self._end([row])
        self._finish([row], "cancelled")

    def _fail(self, error: BaseException) -> None:
        """End all requests but those that wait, after a step that failed with ``error``, and drop cached prefixes."""
        failed = [row for row in self._all_requests() if row.status is not Status.WAITING]
        self._end_drafts(failed)
        self._finish(failed, "error", failure(error))
        self.scheduler.clear()
        if self.scheduler.memory.prefixes is not None:
            self.scheduler.memory.prefixes.clear()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def start(self) -> Engine:
        """Start a thread that runs steps whenever there is something to do, until ``close``; return this engine."""
        self._work = Work(partial(_run, weakref.ref(self)), "specdec engine")
        return self

    def _step_or_wait(self) -> bool:
        """Run a step, or learn if there is no request, or wait up to ``IDLE`` (0.1) seconds for one.

        The engine's thread calls it again and again, until it returns False: the engine has ended.
        """
        if not self.busy and not self._closing and (self._learn() or self.target.settle()):
            return True
        with self._queue:
            if not self.busy and not self._closing:
                self._queue.wait(IDLE)
                return True
            if self._closing and not (self._draining and self.busy):
                return False
        began = time.perf_counter()
        self._try_step()  # requests have its error
        self._saved += LEARNING * (time.perf_counter() - began)
        if self._saved > 0 and self.busy:
            began = time.perf_counter()
            self._learn()
            self._saved -= time.perf_counter() - began
        return True

    def _learn(self) -> bool:
        """Let the drafter train itself for about 50 ms; return False if it has no data or does not learn."""
        with self._stepping:
            self._recover()
            return self.learns and self.batch.learn()

    def close(self, drain: bool = False) -> None:
        """End the engine, and wait until its present step and its thread have ended; no effect if it was closed.

        drain: whether to serve all accepted requests first; if not, they end with the reason "cancelled".
        """
        with self._queue:
            self._closing, self._draining = True, drain
            self._queue.notify_all()
        if self._work is not None:
            self._work.join()
        elif drain:
            for _ in self.steps():
                pass
        with self._stepping:
            self._work = None
            for row in self._all_requests():
                self._cancel(row)
            self.scheduler.clear()
            if not self._closed:
                self._closed = True
                self.scheduler.memory.prefixes = None
                if self.scheduler.disk is not None:
                    self.scheduler.disk.close()
                self.on_close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- figures ------------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Return the engine's current figures. It does not wait for a running step."""
        scheduler = self.scheduler
        return EngineStats(
            running=scheduler.running,
            waiting=len(scheduler.waiting),
            kv_bytes=scheduler.memory.used(),
            kv_budget=scheduler.memory.limit,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            prefix_bytes=scheduler.memory.prefix_bytes(),
            saved_seconds=scheduler.saved_seconds,
            preemptions=scheduler.preemptions,
            steps=self.steps_done,
            drafted=self.drafted,
            accepted=self.accepted,
            drafter=self.drafting,
            drafter_failures=self.batch.guard.failures,
            outage=self.outage,
            **({} if (disk := scheduler.disk) is None else disk.figures()),
        )


def _run(engine: weakref.ref[Engine], stop: Stop) -> None:
    """Run steps until the engine is closed or deleted: the function of its thread, which does not keep it alive.

    stop: set when the thread is to end.
    """
    while not stop.is_set() and (alive := engine()) is not None and alive._step_or_wait():
        del alive
