"""Cached prefixes: texts whose keys and values stay cached after their requests, for prompts with the same beginning.

An index holds the texts as sorted bytes, so that the text with the longest common prefix is a neighbor of the search
position: a search makes few comparisons. A text with recurrent states or dropped slots can be resumed at its
checkpoints, and the part of the text up to each checkpoint is also in the index.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from specdec.base.sequences import common_prefix
from specdec.kvcache.cache import KVCache

MAX_PREFIXES = 1024  # bounds the memory of the index
SCOPE, TOKEN = 32, array("I").itemsize  # bytes of a key: for its scope, and for each token


class Prefix:
    """A cached text, and a KV cache of one row with exactly its tokens.

    ids: the token ids. scope: name of the tenant whose requests may begin with the text; None: the default tenant.
    key: the text as bytes in the index. points: the keys of all parts that can be resumed, ``key`` included.
    nbytes: size of the buffers of keys and values, and of the recurrent states.
    """

    def __init__(self, ids: Sequence[int], cache: KVCache, scope: str | None) -> None:
        [count] = cache.rows
        if count > len(ids):
            raise ValueError(f"a cache of {count} tokens does not belong to a text of {len(ids)}")
        self.ids = list(ids[:count])
        self.cache = cache
        self.scope = scope
        self.key = _key(self.ids, scope)
        self.nbytes = cache.nbytes + cache.state_bytes * cache.num_states
        self.points = [self.key[: SCOPE + TOKEN * n] for n in {count} | cache.checkpoints(0) if 0 < n <= count]


class PrefixStore:
    """Prefixes by key, the least recently used first.

    nbytes: the sum of those of its prefixes. max_bytes: the limit that an engine keeps to by ``drop``.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self.max_bytes = math.inf
        self._texts = OrderedDict[bytes, Prefix]()
        self._points = list[bytes]()  # sorted
        self._holders = dict[bytes, dict[Prefix, None]]()  # of each point

    @property
    def entries(self) -> list[Prefix]:
        return [*self._texts.values()]

    def add(self, ids: Sequence[int], cache: KVCache, scope: str | None = None) -> Prefix:
        """Add the text ``ids``, which ``cache`` of one row holds, unless it is empty; return its entry.

        Removes texts that are a beginning of the new one and, at ``MAX_PREFIXES``, the least recently used text.
        """
        made = Prefix(ids, cache, scope)
        if made.ids:
            for point in list(self._beginnings(made.key)):
                if point in self._texts:
                    self._remove(self._texts[point])
            while len(self._texts) >= MAX_PREFIXES:
                self.drop()
            self._texts[made.key] = made
            self.nbytes += made.nbytes
            for point in made.points:
                if point not in self._holders:
                    self._points.insert(bisect_left(self._points, point), point)
                self._holders.setdefault(point, {})[made] = None
        return made

    def longest(self, ids: Sequence[int], scope: str | None = None) -> tuple[Prefix | None, int, int]:
        """Find the text with which most of ``ids`` can begin, and mark it as used.

        Returns the text (None: there is none), the number of tokens that can be resumed from it, and the length of the
        longest common prefix with any text.
        """
        key = _key(ids, scope)
        index = bisect_right(self._points, key)
        near = self._points[max(index - 1, 0) : index + 1]
        shared, point = max(
            ((_tokens(common_prefix(each, key)), each) for each in near), default=(0, b""), key=lambda p: p[0]
        )
        if not shared:
            return None, 0, 0
        best = next(reversed(self._holders[point]))
        if (most := best.cache.resumable(0, shared)) < shared:
            point = next(self._beginnings(key), b"")
            if _tokens(len(point)) > most:
                most, best = _tokens(len(point)), next(reversed(self._holders[point]))
            if not most:
                return None, 0, shared
        self._texts.move_to_end(best.key)
        return best, most, shared

    def take(self, prefix: Prefix) -> KVCache:
        """Remove a text and return its cache, which a row of the batch then extends."""
        if self._texts.get(prefix.key) is prefix:
            self._remove(prefix)
        return prefix.cache

    def drop(self) -> bool:
        """Remove the least recently used text; return whether there was one."""
        if not self._texts:
            return False
        self._remove(next(iter(self._texts.values())))
        return True

    def clear(self) -> None:
        """Remove all texts."""
        while self.drop():
            pass

    def _remove(self, prefix: Prefix) -> None:
        del self._texts[prefix.key]
        self.nbytes -= prefix.nbytes
        for point in prefix.points:
            del self._holders[point][prefix]
            if not self._holders[point]:
                del self._holders[point], self._points[bisect_left(self._points, point)]

    def _beginnings(self, key: bytes) -> Iterator[bytes]:
        """Yield the keys of the resumable beginnings (``Prefix.points``) with which ``key`` begins, longest first."""
        index = bisect_right(self._points, key)
        while index:
            index -= 1
            point = self._points[index]
            if (alike := common_prefix(point, key)) == len(point):
                yield point
            else:  # shorter beginnings are sorted before the common prefix
                index = bisect_right(self._points, key[:alike], hi=index)


def _key(ids: Sequence[int], scope: str | None) -> bytes:
    return hashlib.sha256(repr(scope).encode()).digest() + array("I", ids).tobytes()


def _tokens(count: int) -> int:
    return max(count - SCOPE, 0) // TOKEN
