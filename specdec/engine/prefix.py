"""Texts whose keys and values are kept after their requests, for those that begin alike."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.runtimes.cache import KVCache


class Prefix:
    """A text that has been run, with its cache of one row."""

    def __init__(self, ids: Sequence[int], cache: KVCache) -> None:
        self.ids, self.cache = ids, cache


class PrefixStore:
    """Prefixes, those used least recently first."""

    def __init__(self) -> None:
        self.kept: list[Prefix] = []

    @property
    def states(self) -> int:
        """Recurrent states that a layer holds."""
        return sum(prefix.cache.num_states for prefix in self.kept)

    @property
    def tokens(self) -> int:
        """Slots that are held."""
        return sum(prefix.cache.rows[0] for prefix in self.kept)

    def add(self, ids: Sequence[int], cache: KVCache) -> None:
        """Keep a text. Those that it begins with need not be kept beside it."""
        count = cache.rows[0]
        if not count:
            return
        text = list(ids[:count])
        self.kept = [prefix for prefix in self.kept if common(prefix.ids, text) < len(prefix.ids)]
        self.kept.append(Prefix(text, cache))

    def longest(self, ids: Sequence[int]) -> tuple[Prefix | None, int, int]:
        """The text with which most of ``ids`` can begin, how many tokens, and how many are in common with any text."""
        best, most, shared = None, 0, 0
        for prefix in self.kept:
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
