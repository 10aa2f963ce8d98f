"""Which requests run: admission, prompts in chunks, and requests that wait again for others."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial

from specdec.base.sequences import common_prefix
from specdec.engine.batch import Batch
from specdec.engine.fairness import Fairness
from specdec.engine.memory import DRAFTED, HEADROOM, Memory, PrefillBatch
from specdec.engine.request import Request, Status
from specdec.kvcache.cache import KVCache
from specdec.kvcache.disk import PrefixDisk
from specdec.kvcache.prefix import PrefixStore

SHARED = 32  # a request waits for another's prompt if they share so many more tokens than any cached prefix
TIMED = 64  # a pass over so many tokens, or more, tells what a prompt's token takes
PATIENCE = 5.0  # seconds after which a request in the background is one like others: under load, too, it is answered
CHECKPOINT = 512  # minimum prompt tokens between two checkpoints of recurrent states; in a long prompt a quarter of it


class Scheduler:
    """Chooses which waiting requests begin and which prompt tokens run in each step.

    batch: the rows that decode, which rows join when their prompts have run.
    max_rows: maximum number of requests that run at once. kv_memory: maximum bytes of keys and values; None: no limit.
    chunk: maximum number of prompt tokens in a step. prefixes, disk: cached prefixes in memory and on disk; None: none.
    waiting: the queue of requests. prefilling: the requests whose prompts are being run.

    A *prefix* is the beginning of a text whose keys and values are cached. A *checkpoint* is what a cache keeps at one
    place of a text so that another text can go on from there.

    A text with recurrent states can be resumed only at checkpoints. A prompt gets one where another text branches off,
    and one every ``CHECKPOINT`` (512) tokens or, in a long prompt, a quarter of the tokens so far. With sliding-window
    layers, whose keys and values before the last window are dropped, a prompt gets one where another text branches off,
    and one at its end.
    """

    def __init__(
        self,
        batch: Batch,
        max_rows: int,
        kv_memory: int | None,
        chunk: int,
        prefixes: PrefixStore | None,
        disk: PrefixDisk | None = None,
    ) -> None:
        self.batch = batch
        self.max_rows = max_rows
        self.chunk = chunk
        self.disk = disk
        self.waiting: deque[Request] = deque()
        self.fairness = Fairness()
        self.prefilling = PrefillBatch()
        self.memory = Memory(kv_memory, batch, self.prefilling, prefixes)
        self.preemptions = 0  # rows that waited again
        self.prefix_queries = 0  # prompt tokens that were looked up among cached prefixes
        self.prefix_hits = 0  # those that were found
        self.timed, self.saved_seconds = (0, 0.0), 0.0  # tokens of prompts that were timed, and their seconds

    @property
    def rows(self) -> list[Request]:
        """The requests that run: those that decode, and those whose prompts are being run."""
        return [*self.batch.rows, *self.prefilling.rows]

    @property
    def running(self) -> int:
        """The number of requests that run."""
        return len(self.batch.rows) + len(self.prefilling.rows)

    # -- rows ---------------------------------------------------------------------------------------------------------

    def preempt(self) -> bool:
        """Move the youngest rows back to the queue until the others have memory for the next step.

        Return whether any moved. Their keys and values are dropped, and computed again later. One row always stays.
        """
        before = self.preemptions
        while not self.memory.make_room(DRAFTED) and self.running > 1:
            youngest = max(self.rows, key=lambda row: row.submit_time)
            youngest.preempted = True
            self._defer(youngest, keep=False)
        return self.preemptions > before

    def admit(self) -> None:
        """Move waiting requests, in the order of ``fairness``, to those whose prompts run (``prefilling``).

        Stops at ``max_rows`` running requests, or at a request for which there is not enough memory.
        """
        self._defer_background()
        self._share_rows()
        fresh, waits = list[Request](), set[Request]()
        while self.running + len(fresh) < self.max_rows and (row := self._next(fresh, waits)) is not None:
            try:
                if not self._admit(row, fresh, waits):
                    break
            except Exception:
                if row.status is Status.WAITING:  # it would fail again, and end others each time
                    self._leave_queue(row)
                raise
        if fresh:
            cache = self.batch.target.new_cache(len(fresh))
            cache.expect([*map(self._expected_slots, fresh)])
            self.prefilling.add(fresh, cache)

    def _admit(self, row: Request, fresh: list[Request], waits: set[Request]) -> bool:
        """Let the request ``row`` begin with the longest cached prefix of its text; return False if memory is missing.

        fresh: the requests that begin in this step without a prefix; ``row`` is added if no prefix of it is cached.
        waits: ``row`` is added if it waits for the prompt of another request, and others may begin before it.
        """
        others, need = self.running + len(fresh), [*map(self._expected_slots, (*fresh, row))]
        if self.memory.room(DRAFTED + HEADROOM, need) < 0 and others:
            return False
        # The last token is run, as its successor is sought; so are those whose successors need log-probabilities.
        ids = row.ids[: len(row.prompt_token_logprobs) if row.needs_prompt_logprobs else -1]
        source, found, shared = self._longest_prefix(ids, row.scope)
        if self._should_wait(row, ids, found, fresh):
            waits.add(row)
            return True
        self.memory.make_room(DRAFTED + HEADROOM, need)
        if shared > found + SHARED:
            self._fork(row, shared)
        if self.disk is not None:
            row.fork_positions.add(len(ids) // self.disk.chunk * self.disk.chunk)
        cache = None if source is None else source(found, self._expected_slots(row))
        found = 0 if cache is None else cache.rows[0]  # fewer if a file is damaged
        self._count_hits(row, found)
        self._leave_queue(row)
        self.fairness.count_turn(row.client)
        if not row.metrics.num_new_tokens:
            row.metrics.queue_seconds = time.perf_counter() - row.submit_time
        self.batch.begin(row)
        if cache is not None and found:
            cache.expect([self._expected_slots(row)])
            cache.checkpoint(0)
            self.prefilling.add([row], cache)
        else:
            fresh.append(row)
        return True

    def _leave_queue(self, row: Request) -> None:
        """Take ``row`` out of the queue, because its prompt runs now."""
        self.waiting.remove(row)
        row.preempted = False
        row.set_status(Status.PREFILL)

    def _share_rows(self) -> None:
        """Let a row of the client with most rows wait for a client with fewer, if all rows are taken.

        The row goes on when it is its client's turn, with its keys and values if they are still cached.
        """
        if self.running < self.max_rows or (new := self._next(())) is None:
            return
        if (row := self.fairness.row_to_defer(new, self.batch.rows, self.rows)) is not None:
            self._defer(row)

    def _defer(self, row: Request, keep: bool = True) -> None:
        """Move a running row back to the front of the queue. keep: whether to cache its keys and values until then."""
        self.remove([row], keep)
        row.set_status(Status.WAITING)
        self.waiting.appendleft(row)
        self.preemptions += 1

    def _defer_background(self) -> None:
        """Move background requests whose prompts run back to the queue while there are others.

        What has run of them is cached. A request is no longer in the background ``PATIENCE`` (5) seconds after it was
        submitted.
        """
        waiting = tuple(self.waiting)  # others add to it
        for row in (*waiting, *self.prefilling.rows):
            row.background = row.background and time.perf_counter() - row.submit_time < PATIENCE
        if all(row.background for row in (*waiting, *self.rows)):
            return
        for row in [row for row in self.prefilling.rows if row.background]:
            self.remove([row])
            row.set_status(Status.WAITING)
            row.deferred = True
            self.waiting.appendleft(row)

    def _next(self, fresh: Sequence[Request], waits: Collection[Request] = ()) -> Request | None:
        """Return the waiting request that begins next, which stays in the queue; None if none may run.

        fresh: requests that have left the queue in this step and are no rows yet; they count as running.
        waits: requests of the queue that cannot begin in this step.
        """
        waiting = tuple(self.waiting)  # other threads add to the queue
        if waits:
            waiting = tuple(row for row in waiting if row not in waits)
        return self.fairness.next(waiting, (*self.rows, *fresh))

    def _expected_slots(self, row: Request) -> int:
        """Return the number of tokens for which to allocate memory when ``row`` begins: its text, new ones, a draft."""
        return self.memory.expected_slots(row, self.max_rows)

    def _longest_prefix(
        self, ids: Sequence[int], scope: str | None
    ) -> tuple[Callable[[int, int], KVCache] | None, int, int]:
        """Find the longest cached prefix of the token ids ``ids``, among texts of ``scope``.

        Return a function that makes a KV cache of it (None: there is none), its number of tokens, and the number of
        first tokens that ``ids`` shares with any cached text, which may be larger. The function takes the number of
        tokens to take over, and the number of tokens to allocate memory for.
        """
        if (prefixes := self.memory.prefixes) is None:
            return None, 0, 0
        prefix, most, shared = prefixes.longest(ids, scope)
        source: Callable[[int, int], KVCache] | None = None
        if prefix is not None:
            whole, cache = most == len(prefix.ids), prefix.cache
            source = (lambda count, capacity: prefixes.take(prefix)) if whole else partial(cache.copy, 0)
        for b, other in enumerate(self.batch.rows):
            if other.scope != scope:
                continue
            alike = min(common_prefix(other.ids, ids), self.batch.cache.rows[b])
            shared = max(shared, alike)
            if (count := self.batch.cache.resumable(b, alike)) > most:
                most, source = count, partial(self.batch.cache.copy, b)
        disk = self.disk
        if disk is not None and len(ids) // disk.chunk * disk.chunk > most and (n := disk.longest(ids, scope)) > most:
            most = n
            source = lambda count, slots: disk.load(self.batch.target.new_cache(), ids, scope, slots)  # noqa: E731
        return source, most, shared

    def _fork(self, row: Request, count: int) -> None:
        """Add ``count`` to ``row.fork_positions``: other texts branch off there, so the prompt gets a checkpoint there.

        With prefixes on disk, which are stored in chunks of tokens, the last end of a chunk before is added, too.
        """
        row.fork_positions |= {count} if self.disk is None else {count, count // self.disk.chunk * self.disk.chunk}

    def _should_wait(self, row: Request, ids: Sequence[int], found: int, fresh: list[Request]) -> bool:
        """Return whether ``row`` waits until the prompt of another request, whose beginning it shares, has run further.

        It does if it shares more first tokens with that prompt than it finds in the cache, by over ``SHARED`` (32). The
        place where the two texts branch off is then recorded (``_fork``).

        ids: the tokens of ``row`` that may be cached. found: number of these that are cached.
        fresh: requests that begin in this step.
        """
        if self.memory.prefixes is None:
            return False
        prefilling, waits = self.prefilling, False
        for b, other in enumerate((*prefilling.rows, *fresh)):
            if other.scope != row.scope or (shared := common_prefix(other.ids, ids)) <= found + SHARED:
                continue
            cache = prefilling.cache if b < len(prefilling.rows) else None
            if cache is None or cache.rows[b] < shared or cache.resumable(b, shared) > found + SHARED:
                self._fork(other, shared)
                waits = True
        return waits

    def _count_hits(self, row: Request, found: int) -> None:
        """Count the prompt tokens of ``row`` as looked up among cached prefixes, and ``found`` of them as found.

        The counts are in ``prefix_queries`` and ``prefix_hits``, and in the request's metrics.
        """
        if self.memory.prefixes is not None and not row.deferred:
            self.prefix_queries += len(row.ids)
            self.prefix_hits += found
            if self.disk is not None:
                self.disk.queries += len(row.ids)
            if not row.metrics.num_new_tokens:
                row.metrics.num_cached_tokens = found

    def prefill(self) -> list[Request]:
        """Run the next tokens of all prompts in ``prefilling``, at most ``chunk`` together while other rows decode.

        Each prompt gets an equal share of these, so that short ones do not wait for long ones; the first get the rest.
        Without decoding rows, it is at most ``chunk`` tokens of each prompt. Rows whose prompts are complete get their
        first token, join the batch, and are returned.
        """
        prefilling, cache = self.prefilling, self.prefilling.cache
        if cache is None:
            return []
        left = [len(row.ids) - n for row, n in zip(prefilling.rows, cache.rows, strict=True)]
        budget = self.chunk if self.batch.rows else self.chunk * len(left)
        counts, shares = [], [min(count, budget // len(left)) for count in left]
        rest = budget - sum(shares)
        for row, n, count, share in zip(prefilling.rows, cache.rows, left, shares, strict=True):
            count = min(count, self.chunk, share + rest)
            if cache.has_checkpoints:
                count = min([count, *(fork - n for fork in row.fork_positions if fork > n)])
            chunk = self.disk.chunk if self.disk is not None and cache.recurrent else 1
            if (end := (n + count) // chunk * chunk) > n:
                count = end - n  # a checkpoint on disk is at the end of a chunk
            counts.append(count)
            rest += share - count
        began = time.perf_counter()
        complete = self.batch.prefill(prefilling.rows, cache, counts)
        self._count_saved(complete, sum(counts), time.perf_counter() - began)
        for b, (row, n) in enumerate(zip(prefilling.rows, cache.rows, strict=True)):
            if self.memory.prefixes is not None and (
                n in row.fork_positions
                or n - cache.resumable(b, n - 1) >= max(CHECKPOINT, n // 4)
                or (cache.window and row in complete)  # the next turn may leave out a part of the answer
            ):
                cache.checkpoint(b)
        if complete and (own := prefilling.remove(complete)) is not None:
            self.batch.join(complete, own)
            for row in complete:
                if row.status is Status.PREFILL:  # else its first token was its last
                    row.set_status(Status.RUNNING)
        return complete

    def _count_saved(self, complete: Sequence[Request], count: int, seconds: float) -> None:
        """Add the estimated time that cached prompt tokens have saved to the metrics of the ``complete`` rows.

        The estimate is the average time of a prompt token in passes over ``TIMED`` (64) tokens or more so far.

        complete: rows whose prompts are complete. count, seconds: number of tokens and time of the last pass.
        """
        if count >= TIMED:
            self.timed = self.timed[0] + count, self.timed[1] + seconds
        for row in complete:
            if row.metrics.num_cached_tokens and not row.metrics.saved_seconds:
                row.metrics.saved_seconds = row.metrics.num_cached_tokens * self.timed[1] / max(self.timed[0], 1)
                self.saved_seconds += row.metrics.saved_seconds

    def remove(self, rows: Sequence[Request], keep: bool = True) -> None:
        """Remove rows that have ended or are preempted from the batch and from ``prefilling``.

        keep: whether to cache their keys and values, for later prompts that begin like their texts.
        """
        batch = self.batch
        if keep and self.memory.prefixes is not None:
            for b, row in enumerate(batch.rows):
                if row in rows and row.error is None:
                    text = self.memory.prefixes.add(row.ids, batch.cache.take_compact(b), row.scope)
                    if self.disk is not None:
                        self.disk.keep(text.ids, text.cache, text.scope)
        batch.keep([row for row in batch.rows if row not in rows])
        for row in [row for row in self.prefilling.rows if row in rows]:
            cache = self.prefilling.remove([row])
            if keep and self.memory.prefixes is not None and row.error is None and cache is not None:
                self.memory.prefixes.add(row.ids, cache, row.scope)
        self.memory.make_room(0)

    def clear(self) -> None:
        """Remove all running rows and their keys and values, without caching these; their statuses do not change."""
        self.batch.keep([])
        self.prefilling.rows, self.prefilling.cache = [], None
