"""Plain decoding: drafts nothing. The baseline every speedup is measured against."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from specdec import options
from specdec.draft import Draft, State
from specdec.target import Target


class NoDrafter:
    """Proposes no tokens, so every round is one plain decoding step."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "plain decoding, the baseline"
    taps: tuple[int, ...] = ()
    stateless: ClassVar[bool] = True  # rows may join a generation under way

    @classmethod
    def load(cls, target: Target, source: str | None = None, **given: Any) -> NoDrafter:
        options.check(cls.name, given, source=source)
        return cls()

    def bind(self, target: Target) -> None:
        pass

    def start(self, batch: int) -> None:
        pass

    def propose(self, state: State, limit: int) -> Draft:
        return Draft.empty(state.cache.batch, state.cache.device)

    def observe(self, paths: list[list[int]], taps: dict[int, Tensor]) -> None:
        pass

    def select(self, rows: list[int]) -> None:
        pass
