"""The engine: requests come in at any time, and steps serve all that run.

A step admits waiting requests, runs a part of their prompts, drafts for all rows, scores all drafts in one pass,
accepts row by row, delivers, and lets go of what has ended. Steps run in a thread of the engine's own (``start``), or
in the caller's.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from specdec.base.errors import QueueFullError, SpecDecError
from specdec.engine.batch import Batch, not_finite
from specdec.engine.depth import DepthPolicy
from specdec.engine.request import Handle, Request, Status, check_prompt, failure
from specdec.engine.scheduler import Scheduler
from specdec.runtimes.prefill import CHUNK
from specdec.runtimes.target import Target
from specdec.speculation.draft import Drafter, Verifier

__all__ = ["Engine", "EngineStats", "QueueFullError"]

IDLE = 0.1  # seconds after which a thread without work looks whether its engine is still there
Events = list[tuple[Request, list[int]]]


@dataclass(frozen=True)
class EngineStats:
    """running, waiting: requests. kv_bytes: of keys and values held; kv_budget: how many may be (None: no bound).

    prefix_queries, prefix_hits: prompt tokens that were looked up, and found. preemptions: requests that gave way and
    are computed again. steps, drafted, accepted, accepted_per_position: of all requests so far. drafter: "on",
    "off" (it has failed: requests are decoded plainly) or "none". drafter_failures: how often it has failed.
    """

    running: int
    waiting: int
    kv_bytes: int
    kv_budget: int | None
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    steps: int
    drafted: int
    accepted: int
    accepted_per_position: list[int] = field(default_factory=list)
    drafter: str = "none"
    drafter_failures: int = 0

    @property
    def kv_usage(self) -> float:
        """The share of the budget that is held."""
        return self.kv_bytes / self.kv_budget if self.kv_budget else 0.0


class Engine:
    """Decodes requests with one target and one drafter, at most ``max_rows`` at once.

    max_waiting: further requests that may wait. kv_memory: bytes of keys and values; None: as many as it takes. When
    they are used up, the youngest request waits and is computed again. What a drafter holds is not among them: a draft
    model's own cache has the tokens of the running rows. prefill_chunk: most tokens of prompts that run
    between two steps of the running rows. reuse: whether what a prompt has in common with earlier texts is not computed
    again. ended: called when the engine is closed.
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
        prefill_chunk: int = CHUNK,
        reuse: bool = False,
        ended: Callable[[], object] = lambda: None,
    ) -> None:
        self.target, self.max_waiting, self.ended = target, max_waiting, ended
        self.batch = Batch(target, drafter, verifier, policy)
        self.scheduler = Scheduler(self.batch, max_rows, kv_memory, prefill_chunk, reuse)
        self.ledger = self.batch.ledger
        self.steps_done = self.drafted = self.accepted = 0
        self.positions: Counter[int] = Counter()
        self._asleep: list[Handle] = []  # handles of what was put since readers were woken
        self._gate = threading.Condition()  # of the waiting queue and of what closing changes
        self._turn = threading.RLock()  # of steps
        self._thread: threading.Thread | None = None
        self._closing = self._draining = self._closed = False

    # -- requests -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Handle:
        """Let a request wait for its turn. Raises QueueFullError if too many do, and SpecDecError if it cannot run."""
        request.handle = Handle(request, self._advance)
        self.enqueue(request)
        return request.handle

    def enqueue(self, request: Request) -> None:
        """The same without a handle: for callers that run the steps themselves."""
        check_prompt(request.prompt, self.target)
        if request.sampling.transforms.highest >= self.target.vocab_size:
            raise SpecDecError(f"logit_bias has token ids outside the model's vocabulary of {self.target.vocab_size}")
        if request.submitted:
            raise SpecDecError("a request is run once; make another of the same prompt")
        request.limit = min(request.limit, self.target.context - len(request.prompt))
        with self._gate:
            if self.closed:
                raise SpecDecError("the engine is closed; it takes no more requests")
            waiting = self.scheduler.waiting
            if len(waiting) - (self.scheduler.max_rows - self.scheduler.running) >= self.max_waiting:
                raise QueueFullError(f"{len(waiting)} requests are waiting already; try again later")
            request.submitted = time.perf_counter()
            waiting.append(request)
            self._gate.notify_all()

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests: ``close`` was called, or its thread has failed."""
        return self._closing or (self._thread is not None and not self._thread.is_alive())

    @property
    def drafting(self) -> str:
        """As ``drafter`` of ``stats``."""
        return self.batch.drafting

    @property
    def busy(self) -> bool:
        """Whether any request runs or waits."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def _advance(self, request: Request) -> bool:
        """Run a step, unless a thread does: then return True. Where that has died, the request ends."""
        thread = self._thread
        if thread is not None and thread.is_alive():
            return True
        with self._turn:
            if thread is None and self.busy:
                self.step()
            elif request.status is not Status.FINISHED:
                request.finish("error", SpecDecError("the engine has ended; start another"))
                self._put(request, [], [])
        return False

    def steps(self) -> Iterator[Events]:
        """Run steps until every request has ended; yield what each brings."""
        while self.busy:
            yield self.step()

    # -- steps --------------------------------------------------------------------------------------------------------

    def step(self) -> Events:
        """Admit, draft, score, accept, deliver; return the new tokens of each row that went on."""
        with self._turn:
            self.ledger.restart()
            self._drop_cancelled()
            scheduler, batch = self.scheduler, self.batch
            decoding = bool(batch.rows)
            crowded = decoding and scheduler.make_room()
            if scheduler.waiting and not crowded:
                scheduler.admit()
                self._book(scheduler.joining.rows)
            events: Events = []
            if scheduler.joining.rows:
                events += self._deliver(scheduler.prefill())
            if decoding and batch.rows:
                batch.step(self._wake)
                for row in batch.rows:
                    self._count(row.metrics.per_step_drafted[-1], row.metrics.per_step_accepted[-1])
                events += self._deliver(batch.rows)
            if not (decoding and batch.rows):
                self._wake()
            return events

    def _book(self, rows: Sequence[Request]) -> None:
        """Rows that begin: their ledger is the engine's from now on."""
        for row in rows:
            if row.begun is None:
                row.begun = dict(self.ledger.seconds)
                row.metrics.ledger = self.ledger.seconds  # shared until the row ends

    def _deliver(self, rows: Sequence[Request]) -> Events:
        """Give each row's reader its new tokens, and let go of the rows that ended."""
        rows, now = list(rows), time.perf_counter()
        for number, row in enumerate(rows):
            if row.finished == "error" and row.error is None:
                constraint = row.sampling.constraint
                row.error = None if constraint is None else constraint.error(row.ids)
                row.error = row.error or not_finite(self.target, row, number if len(rows) > 1 else None)
            if not row.metrics.first_token_seconds:
                row.metrics.first_token_seconds = now - row.submitted
        if ended := [row for row in rows if row.finished is not None]:
            self._end(ended)
        self.ledger.mark("overhead")
        for row in rows:
            if row.finished is not None:
                row.settle(self.ledger.seconds)
            self._put(row, row.new, row.depths)
        return [(row, row.new) for row in rows]

    def _put(self, row: Request, tokens: list[int], depths: list[int]) -> None:
        """Leave tokens where the reader of a request finds them once it is woken."""
        if row.handle is not None:
            row.handle.put(tokens, depths)
            self._asleep.append(row.handle)

    def _wake(self) -> None:
        """Let readers have what was put: while the model scores, when their work does not hold up the next draft."""
        asleep, self._asleep = self._asleep, []
        for handle in asleep:
            handle.wake()

    def _count(self, drafted: int, accepted: int) -> None:
        self.steps_done += 1
        self.drafted += drafted
        self.accepted += accepted
        self.positions.update(range(accepted))

    def _end(self, rows: Sequence[Request]) -> None:
        """Let go of rows that have ended."""
        self.scheduler.leave(rows)
        for row in rows:
            if row.begun is not None:
                self.batch.end(row)

    def _drop_cancelled(self) -> None:
        """Let go of requests that nobody wants any more."""
        waiting = self._here() if self.scheduler.waiting else [*self.batch.rows, *self.scheduler.joining.rows]
        for row in waiting:
            if row.cancelled:
                self._cancel(row)

    def _here(self) -> list[Request]:
        """All requests that run or wait."""
        with self._gate:
            return [*self.batch.rows, *self.scheduler.joining.rows, *self.scheduler.waiting]

    def _cancel(self, row: Request) -> None:
        with self._gate:
            if row.status is Status.WAITING:
                self.scheduler.waiting.remove(row)
            row.finish("cancelled")
        self._end([row])
        row.settle(self.ledger.seconds)
        self._put(row, [], [])
        self._wake()

    def _fail(self, error: BaseException) -> None:
        """A step has failed: what ran cannot go on. What waits can."""
        rows, why = [*self.batch.rows, *self.scheduler.joining.rows], failure(error)
        self.scheduler.forget()
        for row in rows:
            row.finish("error", why)
            row.settle(self.ledger.seconds)
            self._put(row, [], [])
        self._wake()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def start(self) -> Engine:
        """Run steps in a thread whenever there is something to do, until ``close``."""
        thread = threading.Thread(target=_run, args=(weakref.ref(self),), name="specdec engine", daemon=True)
        thread.start()
        self._thread = thread
        return self

    def _round(self) -> bool:
        """One step, or a wait for work; False at the end."""
        with self._gate:
            if not self.busy and not self._closing:
                self._gate.wait(IDLE)
                return True
            if self._closing and not (self._draining and self.busy):
                return False
        try:
            self.step()
        except Exception as error:
            self._fail(error)
        return True

    def close(self, drain: bool = False) -> None:
        """Take no more requests, and end: at once, or when those that were taken have ended (``drain``)."""
        with self._gate:
            self._closing, self._draining = True, drain
            self._gate.notify_all()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        elif drain:
            for _ in self.steps():
                pass
        with self._turn:
            self._thread = None
            for row in self._here():
                self._cancel(row)
            self.scheduler.forget()
            if not self._closed:
                self._closed = True
                self.ended()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- figures ------------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """How things stand."""
        scheduler = self.scheduler
        most = max(self.positions, default=-1) + 1
        return EngineStats(
            running=scheduler.running,
            waiting=len(scheduler.waiting),
            kv_bytes=scheduler.used(),
            kv_budget=scheduler.memory,
            prefix_queries=scheduler.queries,
            prefix_hits=scheduler.hits,
            preemptions=scheduler.preemptions,
            steps=self.steps_done,
            drafted=self.drafted,
            accepted=self.accepted,
            accepted_per_position=[self.positions[n] for n in range(most)],
            drafter=self.drafting,
            drafter_failures=self.batch.failures,
        )


def _run(engine: weakref.ref[Engine]) -> None:
    """The thread: it ends with its engine, which it does not keep alive while there is nothing to do."""
    while (alive := engine()) is not None and alive._round():
        del alive
