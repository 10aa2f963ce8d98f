"""SkipDecode: the later a token of an answer, the fewer layers it gets (Del Corro et al. 2023, arXiv 2307.02628).

The exit falls linearly with position, so that no token needs keys and values above an earlier one's exit. The model's
own head reads the exit; nothing is trained. The paper accepts every token (here: a confident verifier with threshold
0) and never runs the layers it skipped; here the next deep pass fills them in.
"""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from torch import Tensor

from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.runtimes.target import Target
from specdec.speculation.draft import State

from .chain import SHAPE, ChainRow, ShapeOptions
from .exits import ExitDrafter, PartialPass


class SkipDecodeRow(ChainRow):
    """prompt: its tokens, once they are known."""

    prompt = 0


class SkipDecodeDrafter(ExitDrafter):
    """Drafts a chain through a number of layers that falls from ``deepest`` to ``shallowest`` over ``horizon`` tokens.

    deepest, shallowest: exit of the first and of the last tokens, 1 <= shallowest <= deepest < N; None: four and two
        fifths of the layers. horizon: new tokens until the shallowest exit is reached.
    siblings, nodes: see ``Shape``.
    Raises SpecDecError, when bound, if the exits are outside the model or in the wrong order.
    """

    name: ClassVar[str] = "skip-decode"
    summary: ClassVar[str] = "the model's own first layers, fewer the later the token; no training"

    def __init__(
        self,
        deepest: int | None = None,
        shallowest: int | None = None,
        horizon: int = 128,
        **shape: Unpack[ShapeOptions],
    ) -> None:
        super().__init__(**shape)
        self.bounds, self.horizon = (shallowest, deepest), options.whole("horizon", horizon, 1)

    @classmethod
    def load(cls, target: Target, source: str | None = None, **given: Any) -> SkipDecodeDrafter:
        options.check(cls.name, given, ("deepest", "shallowest", "horizon", *SHAPE), source)
        return cls(**given)

    def bind(self, target: Target) -> None:
        count = target.num_layers
        own = (max(2 * count // 5, 1), max(4 * count // 5, 1))
        low, high = (usual if given is None else given for given, usual in zip(self.bounds, own, strict=True))
        self.low = options.whole("shallowest", low, 1, count - 1)
        self.high = options.whole("deepest", high, 1, count - 1)
        if self.low > self.high:
            raise SpecDecError(f"the exit falls from deepest to shallowest; got {self.high} and {self.low}")
        self.path = f"{self.low} {self.high} {self.horizon}"
        super().bind(target)

    def begin(self) -> SkipDecodeRow:
        return SkipDecodeRow()

    def leave(self, tokens: PartialPass, state: State) -> tuple[Tensor, ...]:
        for row, ids in zip(state.memory, state.ids, strict=True):
            row.prompt = row.prompt or len(ids) - 1  # the first new token is known by now
        done = min(len(ids) - row.prompt for row, ids in zip(state.memory, state.ids, strict=True)) + tokens.count - 1
        # Rows share their layers: those of the row that is least far.
        layer = self.high - round((self.high - self.low) * min(done / self.horizon, 1.0))
        return self.read(tokens, layer)
