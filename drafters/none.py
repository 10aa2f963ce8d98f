"""Plain decoding: drafts nothing. The baseline every speedup is measured against."""

from __future__ import annotations

from typing import Any, ClassVar

from specdec import options
from specdec.draft import Draft, Drafter, State
from specdec.target import Target


class NoDrafter(Drafter):
    """Proposes no tokens, so every step is one of plain decoding."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "plain decoding, the baseline"
    drafts: ClassVar[bool] = False
    stateless = True

    @classmethod
    def load(cls, target: Target, source: str | None = None, **given: Any) -> NoDrafter:
        options.check(cls.name, given, source=source)
        return cls()

    def propose(self, state: State, limit: int) -> Draft:
        return Draft.empty(state.cache.batch, state.cache.device)
