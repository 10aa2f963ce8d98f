"""Texts whose keys and values are kept after their requests, for those that begin alike."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.kvcache.cache import KVCache


class Prefix:
    """A text that has been run, with its cache of one row, which has these tokens and no others.

    scope: of the requests that may begin with it.
    """

    def __init__(self, ids: Sequence[int], cache: KVCache, scope: str | None) -> None:
        [count] = cache.rows
        if count > len(ids):
            raise ValueError(f"a cache of {count} tokens does not belong to a text of {len(ids)}")
        self.ids, self.cache, self.scope = list(ids[:count]), cache, scope


class PrefixStore:
    """Prefixes, those used least recently first."""

    def __init__(self) -> None:
        self.kept: list[Prefix] = []

    @property
    def states(self) -> int:
        """Recurrent states that a layer holds."""
        return sum(prefix.cache.num_states for prefix in self.kept)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers of keys and values."""
        return sum(prefix.cache.nbytes for prefix in self.kept)

    def add(self, ids: Sequence[int], cache: KVCache, scope: str | None = None) -> None:
        """Keep a text. Those that it begins with need not be kept beside it."""
        made = Prefix(ids, cache, scope)
        if made.ids:
            self.kept = [p for p in self.kept if p.scope != scope or common(p.ids, made.ids) < len(p.ids)]
            self.kept.append(made)

    def longest(self, ids: Sequence[int], scope: str | None = None) -> tuple[Prefix | None, int, int]:
        """The text with which most of ``ids`` can begin, how many tokens, and how many are in common with any text."""
        best, most, shared = None, 0, 0
        for prefix in self.kept:
            if prefix.scope != scope:
                continue
            alike = common(prefix.ids, ids)
            shared = max(shared, alike)
            if (count := prefix.cache.restorable(0, alike)) > most:
                best, most = prefix, count
        if best is not None:
            self.kept.remove(best)
            self.kept.append(best)
        return best, most, shared

    def take(self, prefix: Prefix) -> KVCache:
        """A text's cache, which goes on as a row's."""
        if prefix in self.kept:
            self.kept.remove(prefix)
        return prefix.cache

    def drop(self) -> bool:
        """Forget the text used least recently; whether there was one."""
        if not self.kept:
            return False
        self.kept.pop(0)
        return True

    def clear(self) -> None:
        self.kept.clear()


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices are compared faster than tokens
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def blocks(tokens: int, block: int) -> int:
    """The slots of whole blocks that hold so many tokens."""
    return -(-tokens // block) * block
