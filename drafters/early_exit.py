"""Early exit: the model drafts for itself through its first layers, with its own head (LayerSkip, arXiv 2404.16710).

That is layer skipping with the whole tail skipped: all states and cache entries of the draft are exact, and scoring
resumes at the exit. Models that were not trained to exit early rarely agree with their first layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from specdec import options
from specdec.target import Target

from .layer_skip import LayerSkipDrafter


class EarlyExitDrafter(LayerSkipDrafter):
    """Drafts a chain through layers [0, exit_layer), read out by the model's own norm and head.

    exit_layer: E, 1 <= E < N; None: a third of the layers, about where models trained for it exit.
    siblings: number of further candidates at each depth of the chain, which cost no drafting.
    Raises SpecDecError, when bound, if the exit layer is outside the model.
    """

    name: ClassVar[str] = "early-exit"
    summary: ClassVar[str] = "the model's own first layers and head; no training"

    def __init__(self, exit_layer: int | None = None, siblings: Sequence[int] = ()) -> None:
        super().__init__(siblings=siblings)
        self.wanted = exit_layer

    @classmethod
    def load(cls, target: Target, source: str | None = None, **given: Any) -> EarlyExitDrafter:
        options.check(cls.name, given, ("exit_layer", "siblings"), source)
        return cls(**given)

    def skipped(self, num_layers: int) -> set[int]:
        wanted = max(num_layers // 3, 1) if self.wanted is None else self.wanted
        return set(range(options.whole("exit_layer", wanted, 1, num_layers - 1), num_layers))
