"""Prompt lookup: what followed the last occurrence of the current n-gram (Saxena 2023; HF's prompt_lookup_num_tokens).

Needs no training and no model. Searches the text so far and, optionally, the texts of earlier requests (as suffix
decoding does, arXiv 2411.04975). They change what is drafted, never the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.base.options import Count
from specdec.base.settings import checked
from specdec.speculation.draft import Draft, Drafter, State
from specdec.speculation.ngram import Scoped
from specdec.speculation.tree_builder import merge

STORE = 100_000  # tokens of earlier requests that ``store: true`` stores: some 100 MB

Place = tuple[list[int], int]  # a text, and the index in it at which a continuation starts


class _Index:
    """n-gram -> the places of its continuations, with different first tokens, latest first.

    most: maximum number of places of an n-gram.
    seen: number of tokens of a row's text that are in the index.
    store: the texts of earlier requests of the row's scope, once it has drafted.
    """

    def __init__(self, sizes: range, most: int) -> None:
        self.sizes, self.most, self.places = sizes, most, dict[tuple[int, ...], tuple[Place, ...]]()
        self.seen = 0
        self.store: _Store | None = None

    def add(self, ids: list[int], begin: int) -> None:
        """Enter the n-grams of ``ids`` whose continuation starts at ``begin`` or later."""
        for end in range(max(begin, 1), len(ids)):
            for n in self.sizes:
                if n <= end:
                    key = tuple(ids[end - n : end])
                    others = [place for place in self.places.get(key, ()) if place[0][place[1]] != ids[end]]
                    self.places[key] = ((ids, end), *others[: self.most - 1])


class _Store:
    """Texts of earlier requests, at most ``size`` tokens. The older half is dropped as a whole."""

    def __init__(self, sizes: range, most: int, size: int) -> None:
        self.make = lambda: _Index(sizes, most)
        self.newer, self.older, self.size, self.tokens = self.make(), self.make(), size, 0

    def add(self, ids: list[int]) -> None:
        if self.tokens + len(ids) > self.size // 2:
            self.newer, self.older, self.tokens = self.make(), self.newer, 0
        text = ids[-(self.size // 2) :]
        self.newer.add(text, 0)
        self.tokens += len(text)


class PromptLookupDrafter(Drafter):
    """Deterministic drafts by n-gram match, longest n-gram first, latest occurrence first.

    prompt_lookup_max, prompt_lookup_min: longest and shortest n-gram that is looked up, in tokens.
    continuations: maximum number of continuations of a draft; they begin with different tokens and make a tree.
    store: number of tokens of earlier requests, prompts and outputs, that are searched after the text itself; 0 or
        false: none; true: 100,000.
    """

    name: ClassVar[str] = "prompt-lookup"
    summary: ClassVar[str] = "n-gram lookup in the prompt, the output and earlier requests; no training"
    before_others: ClassVar[dict[str, Any]] = {"prompt_lookup_min": 2}  # options where another drafter comes after it

    @checked
    def __init__(
        self,
        prompt_lookup_max: Count = 8,
        prompt_lookup_min: Count = 1,
        continuations: Count = 1,
        store: Any = False,
    ) -> None:
        if prompt_lookup_min > prompt_lookup_max:
            raise SpecDecError(
                "prompt lookup needs 1 <= prompt_lookup_min <= prompt_lookup_max; "
                f"got {prompt_lookup_min} and {prompt_lookup_max}"
            )
        self.sizes, self.continuations = range(prompt_lookup_max, prompt_lookup_min - 1, -1), continuations
        size = STORE * store if isinstance(store, bool) else options.check_int("store", store, 0)
        self.stores = Scoped(lambda: _Store(self.sizes, self.continuations, size)) if size else None

    def begin(self) -> _Index:
        return _Index(self.sizes, self.continuations)

    def end(self, row_state: _Index, ids: list[int], start: int, learn: bool = True) -> None:
        if row_state.store is not None and learn:
            row_state.store.add(ids)

    def propose(self, state: State, limit: int) -> Draft:
        return merge([self._lookup(state, row, limit) for row in range(len(state.ids))], state.cache.device)[0]

    def _lookup(self, state: State, row: int, limit: int) -> list[list[int]]:
        index, ids = state.row_states[row], state.ids[row]
        if self.stores is not None:
            index.store = self.stores.of(state.scopes[row] if state.scopes else None)
        # An n-gram enters the index once its continuation is known, so the current suffix never finds itself.
        index.add(ids, index.seen)
        index.seen = len(ids)
        found: dict[int, list[int]] = {}  # by first token
        for text, start in self._places(index, ids):
            if text[start] not in found and (tokens := state.allowed(row, text[start : start + limit])):
                found[text[start]] = tokens
            if len(found) == self.continuations:
                break
        return list(found.values())

    def _places(self, own: _Index, ids: list[int]) -> Iterator[Place]:
        """Where the end of the text occurred before: long matches first, the text itself before the store."""
        indexes = [own]
        if own.store is not None:
            indexes += [own.store.newer, own.store.older]
        for n in self.sizes:
            if n <= len(ids):
                key = tuple(ids[-n:])
                for index in indexes:
                    yield from index.places.get(key, ())
