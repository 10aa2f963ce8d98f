"""Prompt lookup: what followed the last occurrence of the current n-gram (Saxena 2023; HF's prompt_lookup_num_tokens).

Needs no training and no model: it looks in the prompt and in what has been generated.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from specdec.draft import Draft, State
from specdec.errors import SpecDecError
from specdec.target import Target


class PromptLookupDrafter:
    """Deterministic chain drafts by n-gram match, longest n-gram first, latest occurrence first.

    prompt_lookup_max / prompt_lookup_min: longest and shortest n-gram that is looked up (tokens).
    """

    name: ClassVar[str] = "prompt-lookup"
    summary: ClassVar[str] = "n-gram lookup in the prompt and the output; no training"
    taps: tuple[int, ...] = ()

    def __init__(self, prompt_lookup_max: int = 3, prompt_lookup_min: int = 1) -> None:
        if not 1 <= prompt_lookup_min <= prompt_lookup_max:
            raise SpecDecError(
                f"prompt lookup needs 1 <= prompt_lookup_min <= prompt_lookup_max; "
                f"got {prompt_lookup_min} and {prompt_lookup_max}"
            )
        self.sizes = range(prompt_lookup_max, prompt_lookup_min - 1, -1)
        self.indexes: list[dict[tuple[int, ...], int]] = []  # per row: n-gram -> where its continuation starts
        self.seen: list[int] = []  # per row: tokens indexed so far

    @classmethod
    def load(cls, target: Target, source: str | None = None, **options: Any) -> PromptLookupDrafter:
        return cls(**options)

    def bind(self, target: Target) -> None:
        pass

    def start(self, batch: int) -> None:
        self.indexes, self.seen = [{} for _ in range(batch)], [0] * batch

    def propose(self, state: State, limit: int) -> Draft:
        found = [self._lookup(b, ids, limit) for b, ids in enumerate(state.ids)]
        depth = max(len(tokens) for tokens in found)
        padded = [tokens + [-1] * (depth - len(tokens)) for tokens in found]
        tokens = torch.tensor(padded, dtype=torch.long, device=state.cache.device).view(len(found), depth)
        return Draft(tokens, tuple(range(depth)))

    def _lookup(self, row: int, ids: list[int], limit: int) -> list[int]:
        index = self.indexes[row]
        # An n-gram enters the index once its continuation is known, so the current suffix never finds itself.
        for end in range(max(self.seen[row], 1), len(ids)):
            for n in self.sizes:
                if n <= end:
                    index[tuple(ids[end - n : end])] = end
        self.seen[row] = len(ids)
        for n in self.sizes:
            start = index.get(tuple(ids[-n:])) if n <= len(ids) else None
            if start is not None:
                return ids[start : start + limit]
        return []

    def observe(self, paths: list[list[int]], taps: dict[int, Tensor]) -> None:
        pass

    def select(self, rows: list[int]) -> None:
        self.indexes, self.seen = [self.indexes[i] for i in rows], [self.seen[i] for i in rows]
