"""Plain decoding: drafts nothing. The baseline of every speedup."""

from __future__ import annotations

from typing import ClassVar

from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Drafter, Traits
from specdec.speculation.state import State


class NoDrafter(Drafter):
    """Proposes no tokens, so every step is one of plain decoding."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "plain decoding, the baseline"
    traits = Traits(("none",), drafts=False)

    def propose(self, state: State, limit: int) -> Draft:
        return Draft.empty(state.cache.batch, state.cache.device)
