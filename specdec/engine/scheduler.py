"""Which requests run: admission, prompts in chunks, preemption of the youngest request when memory is full."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial

import torch

from specdec.base.sequences import common_prefix
from specdec.engine.batch import Batch
from specdec.engine.request import Request, Status
from specdec.kvcache.cache import KVCache
from specdec.kvcache.disk import PrefixDisk
from specdec.kvcache.prefix import PrefixStore, blocks
from specdec.runtimes.target import Target, run_tokens

DRAFTED = 16  # slots that the nodes of a usual draft take
HEADROOM = 48  # further free slots for each row at an admission: with fewer, a row would soon be preempted again
NEW_SLOTS = 1024  # maximum new tokens that a row's cache is allocated for at first, if later requests may reuse it
SHARED = 32  # a request waits for another's prompt if they share so many more tokens than any cached prefix
TIMED = 64  # a pass over so many tokens, or more, tells what a prompt's token takes
PARTIES = 1024  # of so many the turn is known
CHECKPOINT = 512  # minimum prompt tokens between two checkpoints of recurrent states; in a long prompt a quarter of it
Party = tuple[str | None, str | None]  # ``Request.party``


class PrefillBatch:
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
        """Remove rows; return their cache."""
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

    max_rows, kv_memory, chunk (``prefill_chunk``), reuse, disk: as in ``Engine``.
    token_bytes: size of a token's keys and values; state_bytes: of a row's recurrent states, or a checkpoint. 0 without
        a limit of memory.

    A text with recurrent states can be resumed only at checkpoints. A prompt gets one where another text branches off,
    and one every ``CHECKPOINT`` tokens.
    """

    def __init__(
        self,
        batch: Batch,
        max_rows: int,
        kv_memory: int | None,
        chunk: int,
        reuse: bool,
        disk: PrefixDisk | None = None,
    ) -> None:
        self.batch, self.max_rows, self.kv_memory, self.chunk = batch, max_rows, kv_memory, chunk
        self.reuse, self.disk = reuse, disk
        self.waiting: deque[Request] = deque()
        self.turns = dict[Party, int]()  # the number of the last admission from a party, the earliest first
        self.prefilling, self.prefixes = PrefillBatch(), PrefixStore()
        self.awaited: tuple[Request, Request, int, int] | None = None  # as ``_should_wait`` found
        self.preemptions = self.prefix_queries = self.prefix_hits = 0
        self.timed, self.saved_seconds = (0, 0.0), 0.0  # tokens of prompts that were timed, and their seconds
        self.token_bytes, self.state_bytes = (0, 0) if kv_memory is None else _sizes(batch.target)

    @property
    def running(self) -> int:
        return len(self.batch.rows) + len(self.prefilling.rows)

    # -- memory -------------------------------------------------------------------------------------------------------

    def used(self) -> int:
        """Bytes of the buffers of keys and values, of running rows and cached prefixes, and of recurrent states."""
        return self._running_bytes() + self._prefix_bytes()

    def _running_bytes(self) -> int:
        caches = [cache for cache in (self.batch.cache, self.prefilling.cache) if cache is not None]
        rows = sum(cache.nbytes + self.state_bytes * cache.num_states for cache in caches)
        return rows + self.batch.target.spare_bytes

    def _prefix_bytes(self) -> int:
        return self.prefixes.nbytes + self.state_bytes * self.prefixes.states

    def _room(self, tokens: int, new: Sequence[int] = ()) -> float:
        """Bytes left for cached prefixes beside so many more tokens of each row, and new rows with so many slots.

        Below 0, there is no memory for these.
        """
        if self.kv_memory is None:
            return math.inf
        return self.kv_memory - self._running_bytes() - self._growth(tokens, new)

    def _fits(self, tokens: int, new: Sequence[int] = ()) -> bool:
        """Drop cached prefixes until they have ``_room``; return whether there is any."""
        room = self._room(tokens, new)
        while self._prefix_bytes() > room and self.prefixes.drop():
            pass
        return room >= 0

    def _growth(self, tokens: int, new: Sequence[int]) -> int:
        """Bytes that buffers and states grow by for these."""
        batch, prefilling, now = self.batch.cache, self.prefilling, 0
        then = [blocks(slots, batch.block) for slots in new]
        for cache, ends in ((batch, batch.rows), (prefilling.cache, [len(row.ids) for row in prefilling.rows])):
            if cache is not None:
                now += sum(cache.capacities([0] * cache.batch))
                then += cache.capacities([end + tokens for end in ends])
        # Where a pass pads its rows, each may grow as much as the longest.
        slots = sum(then) if self.batch.target.ragged else len(then) * max(then, default=0)
        return max(slots - now, 0) * self.token_bytes + len(new) * self.state_bytes

    def preempt(self) -> bool:
        """Before a step: let the youngest rows wait until the others have memory to grow; return whether any does."""
        before = self.preemptions
        while not self._fits(DRAFTED) and self.running > 1:
            youngest = max([*self.batch.rows, *self.prefilling.rows], key=lambda row: row.submit_time)
            self.remove([youngest], keep=False)
            youngest.set_status(Status.WAITING)
            youngest.preempted = True
            self.waiting.appendleft(youngest)
            self.preemptions += 1
        return self.preemptions > before

    # -- rows ---------------------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Let waiting requests begin, in turn, while there is memory."""
        self._put_off()
        self._share_rows()
        fresh = list[Request]()
        while self.running + len(fresh) < self.max_rows and (row := self._next(fresh)) is not None:
            others, need = self.running + len(fresh), [*map(self._expected_slots, (*fresh, row))]
            if (self._room(DRAFTED + HEADROOM, need) < 0 and others) or self._still_waits(row):
                break
            # The last token is run, as its successor is sought; so are those whose successors need log-probabilities.
            ids = row.ids[: len(row.prompt_token_logprobs) if row.needs_prompt_logprobs else -1]
            source, found, shared = self._longest_prefix(ids, row.scope)
            if self._should_wait(row, ids, found, fresh):
                break
            self._fits(DRAFTED + HEADROOM, need)
            if shared > found + SHARED:
                self._fork(row, shared)
            if self.disk is not None:
                row.fork_positions.add(len(ids) // self.disk.chunk * self.disk.chunk)
            cache = None if source is None else source(found, self._expected_slots(row))
            found = 0 if cache is None else cache.rows[0]  # fewer if a file is damaged
            self._count_hits(row, found)
            self.waiting.remove(row)
            self._count_turn(row.party)
            if not row.metrics.num_new_tokens:
                row.metrics.queue_seconds = time.perf_counter() - row.submit_time
            self.batch.begin(row)
            row.set_status(Status.PREFILL)
            if cache is not None and found:
                cache.expect([self._expected_slots(row)])
                cache.checkpoint(0)
                self.prefilling.add([row], cache)
            else:
                fresh.append(row)
        if fresh:
            cache = self.batch.target.new_cache(len(fresh))
            cache.expect([*map(self._expected_slots, fresh)])
            self.prefilling.add(fresh, cache)

    def _share_rows(self) -> None:
        """With all rows taken, let the youngest row of the party with most wait for a party with two fewer, or less.

        It goes on when it is its party's turn, with the keys and values that it has, if they are still cached.
        """
        rows = (*self.batch.rows, *self.prefilling.rows)
        if len(rows) < self.max_rows or (new := self._next(())) is None or new.preempted:
            return
        running = Counter(row.party for row in rows)
        most = max(running, key=running.__getitem__)
        own = [row for row in self.batch.rows if row.party == most and row.priority <= new.priority]
        if own and running[most] > running[new.party] + 1:
            youngest = max(own, key=lambda row: row.submit_time)
            self.remove([youngest])
            youngest.set_status(Status.WAITING)
            self.waiting.appendleft(youngest)
            self.preemptions += 1

    def _count_turn(self, party: Party) -> None:
        number = next(reversed(self.turns.values()), 0) + 1
        self.turns.pop(party, None)
        self.turns[party] = number
        if len(self.turns) > PARTIES:
            del self.turns[next(iter(self.turns))]

    def _put_off(self) -> None:
        """Let requests in the background wait while there are others, which can begin with what these have run."""
        waiting = tuple(self.waiting)  # others add to it
        if all(row.background for row in (*waiting, *self.batch.rows, *self.prefilling.rows)):
            return
        for row in [row for row in self.prefilling.rows if row.background]:
            if (cache := self.prefilling.remove([row])) is not None and self.reuse:
                self.prefixes.add(row.ids, cache, row.scope)
            row.set_status(Status.WAITING)
            row.put_off = True
            self.waiting.appendleft(row)

    def _next(self, fresh: Sequence[Request]) -> Request | None:
        """The waiting request whose turn it is; None if there is none that may run now.

        Preempted ones come first. Of the highest priority, the party with the fewest rows is next, and of those with
        equally many the one that has waited longest for a turn; within a party, the first that came.
        """
        rows, waiting = (*self.batch.rows, *self.prefilling.rows, *fresh), tuple(self.waiting)  # others add to it
        running, scopes = (Counter(getattr(row, name) for row in rows) for name in ("party", "scope"))
        idle = all(row.background for row in (*rows, *waiting))
        best: tuple[tuple[int, ...], Request] | None = None
        for row in waiting:
            if row.background and not idle:
                continue
            if row.preempted:
                return row
            if row.scope_rows is None or scopes[row.scope] < row.scope_rows:
                rank = -row.priority, running[row.party], self.turns.get(row.party, 0)
                if best is None or rank < best[0]:
                    best = rank, row
        return None if best is None else best[1]

    def _expected_slots(self, row: Request) -> int:
        """Slots that a row's cache is allocated for at first: of limited memory, no more than its share."""
        new = min(row.remaining, NEW_SLOTS) if self.reuse else row.remaining
        if self.kv_memory is not None:
            share = self.kv_memory // max(self.token_bytes * self.max_rows, 1)
            new = min(new, max(share - len(row.ids) - DRAFTED, HEADROOM))
        return min(len(row.ids) + new + DRAFTED, self.batch.target.context)

    def _longest_prefix(
        self, ids: Sequence[int], scope: str | None
    ) -> tuple[Callable[[int, int], KVCache] | None, int, int]:
        """The longest prefix of ``ids`` that is cached.

        Returns a function that makes a cache of it, its length, and the number of tokens shared with any text.
        """
        if not self.reuse:
            return None, 0, 0
        prefix, most, shared = self.prefixes.longest(ids, scope)
        source: Callable[[int, int], KVCache] | None = None
        if prefix is not None:
            whole, cache = most == len(prefix.ids), prefix.cache
            source = (lambda count, capacity: self.prefixes.take(prefix)) if whole else partial(cache.copy, 0)
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
        """Note that texts branch off after ``count`` tokens of a row; on disk, they do at the end of a chunk."""
        row.fork_positions |= {count} if self.disk is None else {count, count // self.disk.chunk * self.disk.chunk}

    def _should_wait(self, row: Request, ids: Sequence[int], found: int, fresh: list[Request]) -> bool:
        """Whether a request had better wait for a prompt that is being run, to begin with more of it than is cached."""
        self.awaited = None
        if not self.reuse:
            return False
        prefilling = self.prefilling
        for b, other in enumerate((*prefilling.rows, *fresh)):
            if other.scope != row.scope or (shared := common_prefix(other.ids, ids)) <= found + SHARED:
                continue
            cache = prefilling.cache if b < len(prefilling.rows) else None
            if self._worth(cache, b, shared, found):
                self._fork(other, shared)
                self.awaited = row, other, shared, found
        return self.awaited is not None

    def _still_waits(self, row: Request) -> bool:
        """Whether a request waits for the same prompt as before, so that nothing else need be looked up."""
        prefilling = self.prefilling
        if self.awaited is None or self.awaited[0] is not row or self.awaited[1] not in prefilling.rows:
            return False
        _, other, shared, found = self.awaited
        return self._worth(prefilling.cache, prefilling.rows.index(other), shared, found)

    def _worth(self, cache: KVCache | None, b: int, shared: int, found: int) -> bool:
        """Whether row ``b`` of prompts that are run will have more than ``found`` of ``shared`` tokens for others."""
        return cache is None or cache.rows[b] < shared or cache.resumable(b, shared) > found + SHARED

    def _count_hits(self, row: Request, found: int) -> None:
        if self.reuse and not row.put_off:
            self.prefix_queries += len(row.ids)
            self.prefix_hits += found
            if self.disk is not None:
                self.disk.queries += len(row.ids)
            if not row.metrics.num_new_tokens:
                row.metrics.num_cached_tokens = found

    def prefill(self) -> list[Request]:
        """Run the next chunk of the prompts; rows whose prompts are complete join the batch and are returned."""
        prefilling, cache = self.prefilling, self.prefilling.cache
        if cache is None:
            return []
        left = [len(row.ids) - n for row, n in zip(prefilling.rows, cache.rows, strict=True)]
        counts, budget = [], self.chunk if self.batch.rows else self.chunk * len(left)
        for row, n, count in zip(prefilling.rows, cache.rows, left, strict=True):
            count = min(count, self.chunk, budget)
            if self.batch.target.recurrent_layers:
                count = min([count, *(fork - n for fork in row.fork_positions if fork > n)])
                if self.disk is not None and (end := (n + count) // self.disk.chunk * self.disk.chunk) > n:
                    count = end - n  # a checkpoint on disk is at the end of a chunk
            counts.append(count)
            budget -= count
        began = time.perf_counter()
        complete = self.batch.prefill(prefilling.rows, cache, counts)
        self._count_saved(complete, sum(counts), time.perf_counter() - began)
        for b, (row, n) in enumerate(zip(prefilling.rows, cache.rows, strict=True)):
            if self.reuse and (n in row.fork_positions or n - cache.resumable(b, n - 1) >= max(CHECKPOINT, n // 4)):
                cache.checkpoint(b)
        if complete and (own := prefilling.remove(complete)) is not None:
            self.batch.join(complete, own)
            for row in complete:
                if row.status is Status.PREFILL:  # else its first token was its last
                    row.set_status(Status.RUNNING)
        return complete

    def _count_saved(self, complete: Sequence[Request], count: int, seconds: float) -> None:
        """Note what cached tokens of ``complete`` rows would have taken. count, seconds: of the last pass."""
        if count >= TIMED:
            self.timed = self.timed[0] + count, self.timed[1] + seconds
        for row in complete:
            if row.metrics.num_cached_tokens and not row.metrics.saved_seconds:
                row.metrics.saved_seconds = row.metrics.num_cached_tokens * self.timed[1] / max(self.timed[0], 1)
                self.saved_seconds += row.metrics.saved_seconds

    def remove(self, rows: Sequence[Request], keep: bool = True) -> None:
        """Remove rows that have ended or are preempted. keep: cache their texts for others to begin with."""
        batch = self.batch
        if keep and self.reuse:
            for b, row in enumerate(batch.rows):
                if row in rows and row.error is None:
                    text = self.prefixes.add(row.ids, batch.cache.take_compact(b), row.scope)
                    if self.disk is not None:
                        self.disk.keep(text.ids, text.cache, text.scope)
        batch.keep([row for row in batch.rows if row not in rows])
        self.prefilling.remove(rows)
        self._fits(0)

    def clear(self) -> None:
        """Drop all rows and all cached prefixes."""
        self.batch.keep([])
        self.prefilling, self.prefixes, self.awaited = PrefillBatch(), PrefixStore(), None


@torch.inference_mode()
def _sizes(target: Target) -> tuple[int, int]:
    """Bytes of a token's keys and values, and of a row's recurrent states."""
    cache = target.new_cache()
    run_tokens(target, cache, [[0]])
    return cache.token_bytes, cache.state_bytes
