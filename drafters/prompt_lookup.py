"""Prompt lookup: what followed the last occurrence of the current n-gram (Saxena 2023; HF's prompt_lookup_num_tokens).

Needs no training and no model: it looks in the prompt and in what has been generated.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from specdec import options
from specdec.draft import Draft, State
from specdec.errors import SpecDecError
from specdec.target import Target

from .trie import merge


class PromptLookupDrafter:
    """Deterministic drafts by n-gram match, longest n-gram first, latest occurrence first.

    prompt_lookup_max / prompt_lookup_min: longest and shortest n-gram that is looked up (tokens).
    continuations: most continuations of a draft; they begin with different tokens, so that more than one makes a tree.
    """

    name: ClassVar[str] = "prompt-lookup"
    summary: ClassVar[str] = "n-gram lookup in the prompt and the output; no training"
    taps: tuple[int, ...] = ()

    def __init__(self, prompt_lookup_max: int = 3, prompt_lookup_min: int = 1, continuations: int = 1) -> None:
        shortest = options.whole("prompt_lookup_min", prompt_lookup_min, 1)
        longest = options.whole("prompt_lookup_max", prompt_lookup_max, 1)
        if shortest > longest:
            raise SpecDecError(
                f"prompt lookup needs 1 <= prompt_lookup_min <= prompt_lookup_max; got {shortest} and {longest}"
            )
        self.sizes = range(longest, shortest - 1, -1)
        self.continuations = options.whole("continuations", continuations, 1)
        self.start(1)

    @classmethod
    def load(cls, target: Target, source: str | None = None, **given: Any) -> PromptLookupDrafter:
        options.check(cls.name, given, ("prompt_lookup_max", "prompt_lookup_min", "continuations"), source)
        return cls(**given)

    def bind(self, target: Target) -> None:
        pass

    def start(self, batch: int) -> None:
        # Per row: n-gram -> where its continuations start, those with different first tokens, latest first.
        self.indexes: list[dict[tuple[int, ...], tuple[int, ...]]] = [{} for _ in range(batch)]
        self.seen = [0] * batch  # tokens indexed so far

    def propose(self, state: State, limit: int) -> Draft:
        return merge([self._lookup(b, ids, limit) for b, ids in enumerate(state.ids)], state.cache.device)[0]

    def _lookup(self, row: int, ids: list[int], limit: int) -> list[list[int]]:
        index, most = self.indexes[row], self.continuations
        # An n-gram enters the index once its continuation is known, so the current suffix never finds itself.
        for end in range(max(self.seen[row], 1), len(ids)):
            for n in self.sizes:
                if n <= end:
                    key = tuple(ids[end - n : end])
                    others = [start for start in index.get(key, ()) if ids[start] != ids[end]]
                    index[key] = (end, *others[: most - 1])
        self.seen[row] = len(ids)
        found: dict[int, list[int]] = {}  # by first token
        for n in self.sizes:
            for start in index.get(tuple(ids[-n:]), ()) if n <= len(ids) else ():
                found.setdefault(ids[start], ids[start : start + limit])
        return list(found.values())[:most]

    def observe(self, paths: list[list[int]], taps: dict[int, Tensor]) -> None:
        pass

    def select(self, rows: list[int]) -> None:
        self.indexes, self.seen = [self.indexes[i] for i in rows], [self.seen[i] for i in rows]
