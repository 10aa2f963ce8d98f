"""Cached prefixes: texts whose keys and values stay cached after their requests, for prompts with the same beginning.

An index holds the texts as sorted byte strings, so that the text with the longest common prefix is a neighbor of a
prompt's place in it: a search makes few comparisons. With recurrent or sliding-window layers, a new text can go on only
at the checkpoints of a cached one; its beginnings up to the checkpoints are then in the index, too.
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
    """A cached text (sequence of tokens), with a KV cache of one row that holds exactly its tokens.

    ids: the token ids; as an argument, further ids that the cache does not hold may follow.
    cache: the KV cache. Raises ValueError if it has more tokens than ``ids``.
    scope: name of the owner whose requests alone may begin with the text; None: the default owner.
    key: the text and its scope as bytes, by which the text is sorted.
    points: the keys of the whole text and of its beginnings up to the cache's checkpoints; another text can go on after
        each of them.
    nbytes: bytes of the keys, values and recurrent states.
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
    """The cached texts (``Prefix``: tokens with their KV cache) of an engine, the least recently used first.

    nbytes: bytes of all cached texts.
    max_bytes: the limit of ``nbytes``. The engine, not this class, keeps to it by calling ``drop``.
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
        """Add the text ``ids``, whose keys and values are in the one row of ``cache``, and return its entry.

        Removes cached texts that are a beginning of the new one. If the store is full (1024 texts), it removes the
        least recently used text. An empty text is returned, but not stored.

        ids: the token ids; further ids that the cache does not hold may follow. cache: belongs to the store from now
            on.
        scope: name of the owner whose requests alone may begin with the text; None: the default owner.
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
        """Find the cached text with the longest reusable beginning of ``ids``, and mark it as recently used.

        Returns a tuple of three: the text (None: there is none); the number of first tokens of ``ids`` whose keys and
        values it can provide; and the length of the longest common prefix with any cached text, which may be larger.

        scope: name of the owner whose texts alone are searched; None: the default owner.
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
        """Remove a cached text and return its KV cache, which the caller may extend.

        prefix: an entry that ``add`` or ``longest`` returned. One that is removed already also gives its cache.
        """
        if self._texts.get(prefix.key) is prefix:
            self._remove(prefix)
        return prefix.cache

    def drop(self) -> bool:
        """Remove the least recently used cached text, with its KV cache; return False if there is none, else True."""
        if not self._texts:
            return False
        self._remove(next(iter(self._texts.values())))
        return True

    def clear(self) -> None:
        """Remove all cached texts, with their KV caches."""
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
        """Yield the ``points`` of cached texts with which ``key`` begins, longest first, ``key`` itself included.

        key: scope and token ids of a text as bytes.
        """
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
