"""Cached prefixes: texts whose keys and values stay cached after their requests, for prompts that begin alike."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.kvcache.cache import KVCache

MAX_PREFIXES = 1024  # each is compared with every new text


class Prefix:
    """A text, and a cache of one row with exactly its tokens. scope: of the requests that may begin with it."""

    def __init__(self, ids: Sequence[int], cache: KVCache, scope: str | None) -> None:
        [count] = cache.rows
        if count > len(ids):
            raise ValueError(f"a cache of {count} tokens does not belong to a text of {len(ids)}")
        self.ids, self.cache, self.scope = list(ids[:count]), cache, scope


class PrefixStore:
    """Prefixes, the least recently used first."""

    def __init__(self) -> None:
        self.entries: list[Prefix] = []

    @property
    def states(self) -> int:
        """Number of recurrent states of a layer."""
        return sum(prefix.cache.num_states for prefix in self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers of keys and values."""
        return sum(prefix.cache.nbytes for prefix in self.entries)

    def add(self, ids: Sequence[int], cache: KVCache, scope: str | None = None) -> None:
        """Add a text. Texts that it begins with are removed."""
        made = Prefix(ids, cache, scope)
        if made.ids:
            self.entries = [p for p in self.entries if p.scope != scope or common(p.ids, made.ids) < len(p.ids)]
            self.entries = [*self.entries[1 - MAX_PREFIXES :], made]

    def longest(self, ids: Sequence[int], scope: str | None = None) -> tuple[Prefix | None, int, int]:
        """The text from which most of ``ids`` can be resumed, their number, and the most shared with any text."""
        best, most, shared = None, 0, 0
        for prefix in self.entries:
            if prefix.scope != scope:
                continue
            alike = common(prefix.ids, ids)
            shared = max(shared, alike)
            if (count := prefix.cache.resumable(0, alike)) > most:
                best, most = prefix, count
        if best is not None:
            self.entries.remove(best)
            self.entries.append(best)
        return best, most, shared

    def take(self, prefix: Prefix) -> KVCache:
        """Remove a text and return its cache, for a row to go on with."""
        if prefix in self.entries:
            self.entries.remove(prefix)
        return prefix.cache

    def drop(self) -> bool:
        """Remove the least recently used text; return whether there was one."""
        if not self.entries:
            return False
        self.entries.pop(0)
        return True


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix of two texts."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices are compared faster than tokens
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def blocks(tokens: int, block: int) -> int:
    """The number of slots of the blocks that hold so many tokens."""
    return -(-tokens // block) * block
