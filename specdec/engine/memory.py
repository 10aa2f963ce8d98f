"""The memory of keys and values, and of recurrent states: what rows and cached prefixes take, and what is left."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from specdec.engine.batch import Batch
from specdec.engine.request import Request
from specdec.kvcache.cache import KVCache
from specdec.kvcache.prefix import PrefixStore
from specdec.runtimes.prefill import run_tokens
from specdec.runtimes.target import Target

DRAFTED = 16  # slots that the nodes of a usual draft take
HEADROOM = 48  # further free slots for each row at an admission: with fewer, a row would soon be preempted again
NEW_SLOTS = 1024  # maximum new tokens that a row's cache is allocated for at first, if later requests may reuse it


class PrefillBatch:
    """The requests whose prompts are being run, and one KV cache with a row for each.

    rows: the requests, in the order of the cache's rows. cache: None while there is no request.
    """

    def __init__(self) -> None:
        self.rows: list[Request] = []
        self.cache: KVCache | None = None

    def add(self, rows: Sequence[Request], cache: KVCache) -> None:
        """Add requests. cache: the keys and values of ``rows``, in this order, which join those that are there."""
        if self.cache is None:
            self.cache = cache
        else:
            self.cache.join(cache)
        self.rows += rows

    def remove(self, rows: Sequence[Request]) -> KVCache | None:
        """Remove those of ``rows`` that are here; return a KV cache of them.

        Its rows have the order that the requests had here. None: none of them is here.
        """
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


class Memory:
    """Keeps the KV caches of an engine within a limit of bytes. A *slot* is the place of one token in a row's cache.

    limit: maximum number of bytes, cached prefixes included; None: no limit.
    batch, prefilling: the rows that decode, and the rows whose prompts are being run.
    prefixes: keys and values that are cached for prompts that begin alike, and dropped where rows need the memory;
        None: none are kept.
    token_bytes: bytes of a token's keys and values; 0 without a limit.
    state_bytes: bytes of a row's recurrent states, or of a checkpoint of them; 0 without a limit.
    """

    def __init__(self, limit: int | None, batch: Batch, prefilling: PrefillBatch, prefixes: PrefixStore | None) -> None:
        self.limit = limit
        self.batch = batch
        self.prefilling = prefilling
        self.prefixes = prefixes
        self.token_bytes, self.state_bytes = (0, 0) if limit is None else cache_sizes(batch.target)

    def used(self) -> int:
        """Return the bytes of keys, values and recurrent states of running rows and of cached prefixes."""
        return self._running_bytes() + self.prefix_bytes()

    def prefix_bytes(self) -> int:
        """Return the bytes of keys, values and recurrent states that are cached for prompts that begin alike.

        Those on disk are not counted. 0: no such cache is kept, or it is empty.
        """
        return 0 if self.prefixes is None else self.prefixes.nbytes

    def room(self, tokens: int, new: Sequence[int] = ()) -> float:
        """Return the bytes left for cached prefixes if each row grows by ``tokens`` and new rows begin.

        A negative result means that there is not enough memory; infinity, that there is no limit.

        tokens: number of tokens by which each running row grows. new: for each row that begins, the number of tokens
            that its KV cache has space for.
        """
        return math.inf if self.limit is None else self.limit - self._running_bytes() - self._growth(tokens, new)

    def make_room(self, tokens: int, new: Sequence[int] = ()) -> bool:
        """Drop cached prefixes, the least recently used first, until running rows have memory to grow and to begin.

        Return whether they have enough memory within the limit. False: even without prefixes there is too little.

        tokens: number of tokens by which each running row grows. new: for each row that begins, the number of tokens
            that its KV cache has space for.
        """
        room = self.room(tokens, new)
        if (prefixes := self.prefixes) is not None:
            while prefixes.nbytes > min(room, prefixes.max_bytes) and prefixes.drop():
                pass
        return room >= 0

    def expected_slots(self, row: Request, max_rows: int) -> int:
        """Return for how many tokens to allocate the KV cache of a new row: for its text, new tokens and a draft.

        With a limit of memory, it is at most the share of one of ``max_rows`` rows, if that is enough for the text and
        a few steps. It is never more than the model's context.

        row: the request that begins. max_rows: maximum number of rows that run together.
        """
        new = min(row.remaining, NEW_SLOTS) if self.prefixes is not None else row.remaining
        if self.limit is not None:
            share = self.limit // max(self.token_bytes * max_rows, 1)
            new = min(new, max(share - len(row.ids) - DRAFTED, HEADROOM))
        return min(len(row.ids) + new + DRAFTED, self.batch.target.context)

    def _running_bytes(self) -> int:
        """Return the bytes of the keys, values and recurrent states of all running rows, prefixes not included.

        Memory that the target has allocated for further rows (``Target.spare_bytes``) is added.
        """
        caches = [cache for cache in (self.batch.cache, self.prefilling.cache) if cache is not None]
        rows = sum(cache.nbytes + self.state_bytes * cache.num_states for cache in caches)
        return rows + self.batch.target.spare_bytes

    def _growth(self, tokens: int, new: Sequence[int]) -> int:
        """Return the bytes by which buffers and states of all rows would grow beyond what they hold now, at least 0.

        tokens: number of tokens by which each running row grows. new: for each row that begins, the number of tokens
            that its KV cache has space for.
        """
        batch, prefilling, now = self.batch.cache, self.prefilling, 0.0
        then = [batch.new_capacity(slots) for slots in new]
        for cache, ends in ((batch, batch.rows), (prefilling.cache, [len(row.ids) for row in prefilling.rows])):
            if cache is not None:
                now += sum(cache.capacities([0] * cache.batch))
                then += cache.capacities([end + tokens for end in ends])
        # Where a pass pads its rows, each may grow as much as the longest.
        slots = sum(then) if self.batch.target.ragged else len(then) * max(then, default=0)
        return int(max(slots - now, 0) * self.token_bytes) + len(new) * self.state_bytes


@torch.inference_mode()
def cache_sizes(target: Target) -> tuple[int, int]:
    """Return the bytes of one token's keys and values, and of one row's recurrent states (0: none), in all layers.

    Runs one token through ``target`` to measure them.
    """
    cache = target.new_cache()
    run_tokens(target, cache, [[0]])
    return cache.token_bytes, cache.state_bytes
