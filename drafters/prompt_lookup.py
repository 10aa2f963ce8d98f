"""Prompt lookup: what followed the last occurrence of the current n-gram (Saxena 2023; HF's prompt_lookup_num_tokens).

Needs no training and no model. Searches the text so far; ``ngram`` also searches the texts of earlier requests.
"""

from __future__ import annotations

from array import array
from typing import ClassVar

from specdec.base.errors import SpecDecError
from specdec.base.options import Count
from specdec.base.settings import checked
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Drafter
from specdec.speculation.state import State
from specdec.speculation.tree_builder import merge

WIDTH = array("i").itemsize  # bytes of a token id


class _Index:
    """Index of the n-grams in a row's text, and of the tokens that followed them.

    sizes: the lengths of n-grams.
    most: maximum number of continuations of an n-gram, which begin with different tokens.
    text: the token ids that are in the index, 4 bytes each.
    found: by n-gram (its bytes in ``text``), where the text goes on: indices in it, the latest first.
    """

    def __init__(self, sizes: range, most: int) -> None:
        self.sizes, self.most = sizes, most
        self.text = b""
        self.found = dict[bytes, tuple[int, ...]]()

    def add(self, ids: list[int]) -> None:
        """Add the n-grams of a row's text ``ids`` that have a token after them and are not in the index yet."""
        seen = len(self.text) // WIDTH
        self.text += array("i", ids[seen:]).tobytes()
        text, found, more = self.text, self.found, self.most - 1
        for end in range(max(seen, 1), len(ids)):
            last, only = end * WIDTH, (end,)  # one object for all lengths
            for n in self.sizes:
                if n <= end:
                    gram = text[last - n * WIDTH : last]
                    others = [at for at in found.get(gram, ()) if ids[at] != ids[end]][:more] if more else ()
                    found[gram] = (end, *others) if others else only

    def after(self, count: int) -> tuple[int, ...]:
        """Return where the text goes on after its last ``count`` tokens, as ``found`` has it; (): nowhere."""
        return self.found.get(self.text[-count * WIDTH :], ())


class PromptLookupDrafter(Drafter):
    """Drafts the tokens that followed an earlier occurrence of the text's last n-gram, as long an n-gram as occurs.

    prompt_lookup_max, prompt_lookup_min: lengths of the longest and shortest n-gram that is looked up, in tokens.
    continuations: maximum number of continuations in a draft, latest first; they begin with different tokens, so that
        they form a tree.
    """

    name: ClassVar[str] = "prompt-lookup"
    summary: ClassVar[str] = "n-gram lookup in the prompt and the output; no training"

    @checked
    def __init__(
        self,
        prompt_lookup_max: Count = 8,
        prompt_lookup_min: Count = 1,
        continuations: Count = 1,
    ) -> None:
        if prompt_lookup_min > prompt_lookup_max:
            raise SpecDecError(
                "prompt lookup needs 1 <= prompt_lookup_min <= prompt_lookup_max; "
                f"got {prompt_lookup_min} and {prompt_lookup_max}"
            )
        self.sizes, self.continuations = range(prompt_lookup_max, prompt_lookup_min - 1, -1), continuations

    def begin(self) -> _Index:
        return _Index(self.sizes, self.continuations)

    def propose(self, state: State, limit: int) -> Draft:
        return merge([self._lookup(state, row, limit) for row in range(len(state.ids))], state.cache.device)[0]

    def _lookup(self, state: State, row: int, limit: int) -> list[list[int]]:
        """Return the continuations (token ids) to draft for the row of index ``row``, of at most ``limit`` tokens each.

        Those of the longest n-grams come first. Adds the row's new tokens to its index.
        """
        index, ids = state.row_states[row], state.ids[row]
        index.add(ids)  # an n-gram enters it once its continuation is known, so the current suffix never finds itself
        found: dict[int, list[int]] = {}  # by first token
        # Of the longest n-gram at the end of the text, then of shorter ones
        for start in (at for n in self.sizes if n <= len(ids) for at in index.after(n)):
            if ids[start] not in found and (tokens := state.allowed(row, ids[start : start + limit])):
                found[ids[start]] = tokens
            if len(found) == self.continuations:
                break
        return list(found.values())
