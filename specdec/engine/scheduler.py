"""Which requests run: waiting ones are admitted, their prompts run in parts, and the youngest gives way for memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch

from specdec.engine.batch import Batch
from specdec.engine.request import Request, Status
from specdec.kvcache.cache import KVCache
from specdec.kvcache.prefix import Prefix, PrefixStore, blocks, common
from specdec.runtimes.prefill import run_tokens
from specdec.runtimes.target import Target

DRAFTED = 16  # slots that the nodes of a usual draft take
PAGE = 16  # slots that memory is counted in
AHEAD = 64  # tokens that every row should have room for when one is admitted: else it would soon give way again
ROOM = 1024  # new tokens that a row has room for from the beginning, where its cache is kept for others
SHARED = 32  # a request waits for another's prompt to be run if they have so many more tokens in common
EVERY = (
    512  # tokens of a prompt between two checkpoints of recurrent states, at least; a quarter of it where it is long
)


class Joining:
    """Requests whose prompts are being run, and their cache."""

    def __init__(self) -> None:
        self.rows: list[Request] = []
        self.cache: KVCache | None = None

    def add(self, rows: Sequence[Request], cache: KVCache) -> None:
        if self.cache is None:
            self.cache = cache
        else:
            self.cache.join(cache)
        self.rows += rows

    def remove(self, rows: Sequence[Request]) -> KVCache | None:
        """Take out rows, together with their cache."""
        index = [b for b, row in enumerate(self.rows) if row in rows]
        stay = [b for b in range(len(self.rows)) if b not in index]
        cache, self.rows = self.cache, [self.rows[b] for b in stay]
        if cache is None or not index:
            return None
        if not stay:
            self.cache = None
            return cache
        first, *others = [cache.take(b) for b in index]
        for other in others:
            first.join(other)
        cache.select(stay)
        return first


class Scheduler:
    """Queues and memory of an engine.

    max_rows: most requests that run at once. memory: bytes of keys and values; None: as many as it takes. chunk: most
    tokens of prompts in a step, while rows run. reuse: whether texts are kept for requests that begin alike.
    preemptions; queries, hits: prompt tokens that were looked up, and found. token_bytes: of a token's keys and values,
    where memory is bounded; state_bytes: of a row's recurrent states, and of a checkpoint.

    Texts with recurrent states can be gone on with at checkpoints alone. These are kept in a prompt where another text
    is known to fork off, and every so many tokens.
    """

    def __init__(self, batch: Batch, max_rows: int, memory: int | None, chunk: int, reuse: bool) -> None:
        self.batch, self.max_rows, self.memory, self.chunk, self.reuse = batch, max_rows, memory, chunk, reuse
        self.waiting: deque[Request] = deque()
        self.joining, self.prefixes = Joining(), PrefixStore()
        self.preemptions = self.queries = self.hits = 0
        self.token_bytes, self.state_bytes = (0, 0) if memory is None else _bytes(batch.target)

    @property
    def running(self) -> int:
        return len(self.batch.rows) + len(self.joining.rows)

    # -- memory -------------------------------------------------------------------------------------------------------

    def used(self) -> int:
        """Bytes of keys and values that are held, and of recurrent states. Running rows count in whole blocks of slots,
        kept texts with their buffers."""
        joining = [len(row.ids) for row in self.joining.rows]
        slots = sum(blocks(n, PAGE) for n in (*self.batch.cache.rows, *joining))
        states = self.batch.cache.num_states + self.prefixes.states
        states += 0 if self.joining.cache is None else self.joining.cache.num_states
        kept = 0 if self.memory is None else self.prefixes.nbytes
        return self.token_bytes * slots + kept + self.state_bytes * states

    def _fits(self, more: int, rows: int = 0) -> bool:
        """Whether so many more tokens, and rows, have room; prefixes make room for them."""
        if self.memory is None:
            return True
        while self.used() + more * self.token_bytes + rows * self.state_bytes > self.memory:
            if not self.prefixes.drop():
                return False
        return True

    def make_room(self) -> bool:
        """Before a step: let the youngest rows wait until the others have room to grow; whether any has to."""
        before = self.preemptions
        while not self._fits(DRAFTED * len(self.batch.rows)) and self.running > 1:
            youngest = max([*self.batch.rows, *self.joining.rows], key=lambda row: row.submitted)
            self.leave([youngest], keep=False)
            youngest.enter(Status.WAITING)
            self.waiting.appendleft(youngest)
            self.preemptions += 1
        return self.preemptions > before

    # -- rows ---------------------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Let waiting requests begin, in their order, where there is room."""
        fresh, longest, target = list[Request](), 0, self.batch.target
        while self.waiting and self.running + len(fresh) < self.max_rows:
            row, others = self.waiting[0], self.running + len(fresh)
            # What follows the last token is sought, so it is run; and so are those of whose successors it is asked.
            known = row.ids[: len(row.prompt_scored) if row.unscored else -1]
            source, found, shared = self._longest(known, row.scope)
            more = sum(blocks(len(each.ids), PAGE) for each in (*fresh, row)) + AHEAD * (others + 1)
            if not self._fits(more, len(fresh) + 1) and others:
                break
            if self._waits(row, known, found, fresh):
                break
            if shared > found + SHARED:
                row.forks.add(shared)
            cache = None if source is None else source(found, self._expected(row))
            self._book(row, found)
            self.batch.restart([*self.batch.rows, *self.joining.rows, *fresh])
            self.waiting.popleft()
            if not row.metrics.num_new_tokens:
                row.metrics.queue_seconds = time.perf_counter() - row.submitted
            self.batch.begin(row)
            row.enter(Status.PREFILL)
            expected = self._expected(row)
            if cache is not None:
                cache.expected = expected
                cache.keep_state(0)
                self.joining.add([row], cache)
            else:
                fresh.append(row)
                longest = max(longest, expected)
        if fresh:
            cache = target.new_cache(len(fresh))
            cache.expected = longest
            self.joining.add(fresh, cache)

    def _expected(self, row: Request) -> int:
        """Slots that a row's cache begins with room for."""
        left = min(row.left, ROOM) if self.reuse else row.left
        return min(len(row.ids) + left + DRAFTED, self.batch.target.context)

    def _longest(self, ids: Sequence[int], scope: str | None) -> tuple[Callable[[int, int], KVCache] | None, int, int]:
        """How to get a cache with the most tokens that a text can begin with, how many, and how many are in common with
        what has been run."""
        if not self.reuse:
            return None, 0, 0
        prefix, most, shared = self.prefixes.longest(ids, scope)
        source: Callable[[int, int], KVCache] | None = None
        if prefix is not None:
            whole = most == len(prefix.ids)
            source = partial(self._taken, prefix) if whole else partial(prefix.cache.copy, 0)
        for b, other in enumerate(self.batch.rows):
            if other.scope != scope:
                continue
            alike = min(common(other.ids, ids), self.batch.cache.rows[b])
            shared = max(shared, alike)
            if (count := self.batch.cache.restorable(b, alike)) > most:
                most, source = count, partial(self.batch.cache.copy, b)
        return source, most, shared

    def _waits(self, row: Request, known: Sequence[int], found: int, fresh: list[Request]) -> bool:
        """Whether a text had better wait for a prompt that is being run, and begin with more of it than was found."""
        if not self.reuse:
            return False
        joining, wait = self.joining, False
        for b, other in enumerate((*joining.rows, *fresh)):
            cache = joining.cache if b < len(joining.rows) else None
            shared, run = common(other.ids, known), 0 if cache is None else cache.rows[b]
            if shared <= found + SHARED or other.scope != row.scope:
                continue
            if run < shared:
                other.forks.add(shared)
                wait = True
            elif cache is not None and cache.restorable(b, shared) > found + SHARED:
                wait = True
        return wait

    def _taken(self, prefix: Prefix, count: int, room: int) -> KVCache:
        return self.prefixes.take(prefix)

    def _book(self, row: Request, found: int) -> None:
        if not self.reuse:
            return
        self.queries += len(row.ids)
        self.hits += found
        if not row.metrics.num_new_tokens:
            row.metrics.num_cached_tokens = found

    def prefill(self) -> list[Request]:
        """Run the next part of the prompts that are joining; those that have been run whole join the batch."""
        joining, cache = self.joining, self.joining.cache
        if cache is None:
            return []
        left = [len(row.ids) - n for row, n in zip(joining.rows, cache.rows, strict=True)]
        counts, room = [], self.chunk if self.batch.rows else self.chunk * len(left)
        for row, n, count in zip(joining.rows, cache.rows, left, strict=True):
            count = min(count, self.chunk, room)
            if self.batch.target.recurrent_layers:
                count = min([count, *(fork - n for fork in row.forks if fork > n)])
            counts.append(count)
            room -= count
        whole = self.batch.prefill(joining.rows, cache, counts)
        for b, (row, n) in enumerate(zip(joining.rows, cache.rows, strict=True)):
            if self.reuse and (n in row.forks or n - cache.restorable(b, n - 1) >= max(EVERY, n // 4)):
                cache.keep_state(b)
        if whole and (own := joining.remove(whole)) is not None:
            self.batch.join(whole, own)
            for row in whole:
                if row.status is Status.PREFILL:  # else its first token was its last
                    row.enter(Status.RUNNING)
        return whole

    def leave(self, rows: Sequence[Request], keep: bool = True) -> None:
        """Rows end, or wait again; their texts are kept for others to begin with (``keep``)."""
        batch = self.batch
        if keep and self.reuse:
            for b, row in enumerate(batch.rows):
                if row in rows and row.error is None:
                    self.prefixes.add(row.ids, batch.cache.kept(b), row.scope)
        batch.keep([row for row in batch.rows if row not in rows])
        self.joining.remove(rows)
        self._fits(0)

    def forget(self) -> None:
        """Let all rows and all kept texts go."""
        self.batch.clear()
        self.joining = Joining()
        self.prefixes.clear()


@torch.inference_mode()
def _bytes(target: Target) -> tuple[int, int]:
    """Bytes of a token's keys and values, and of a row's recurrent states."""
    cache = target.new_cache()
    run_tokens(target, cache, [[0]])
    return cache.token_bytes, cache.state_bytes
