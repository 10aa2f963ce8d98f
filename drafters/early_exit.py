"""Early exit: the model drafts for itself through its first layers (LayerSkip, arXiv 2404.16710).

All states and cache entries of the draft are exact, and scoring resumes at the exit. Models that were not trained to
exit early rarely agree with their first layers read by their own head; a trained module at the exit helps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Unpack

from torch import Tensor

from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.models import drafter_folder
from specdec.runtimes.target import Target
from specdec.speculation.draft import State

from .chain import SHAPE, ShapeOptions
from .exits import ExitDrafter, ExitHeads, PartialPass


class EarlyExitDrafter(ExitDrafter):
    """Drafts a chain through layers [0, E), read out by the model's own norm and head or by a trained module and head.

    exit_layer: E, 1 <= E < N; None: that of ``heads``, else a third of the layers, about where models trained for it
        exit, or a sixth or half of them where the controller finds that better (``State.exit``).
    siblings, nodes: see ``Shape``.
    Raises SpecDecError, when bound, if the exit layer is outside the model.
    """

    name: ClassVar[str] = "early-exit"
    summary: ClassVar[str] = "the model's own first layers and head; training optional"
    training: ClassVar[str] = "specdec train early-exit"

    def __init__(
        self, exit_layer: int | None = None, heads: ExitHeads | None = None, **shape: Unpack[ShapeOptions]
    ) -> None:
        super().__init__(heads, **shape)
        self.given = heads.exits[0] if heads is not None else exit_layer

    @classmethod
    def load(cls, target: Target, source: str | None = None, **given: Any) -> EarlyExitDrafter:
        """With the trained exit of a folder, or of the one shipped for the target, unless ``exit_layer`` says where."""
        options.check(cls.name, given, ("exit_layer", *SHAPE))
        if source is not None and "exit_layer" in given:
            raise SpecDecError(f"'{source}' has its own exit layer; leave exit_layer out, or the folder")
        shipped = None if "exit_layer" in given else drafter_folder.shipped(cls.name, target)
        folder = shipped if source is None else Path(source)
        return cls(**given, heads=None if folder is None else ExitHeads.load(target, folder, cls.name))

    def bind(self, target: Target) -> None:
        count, given = target.num_layers, self.given
        self.exit_layer = options.whole("exit_layer", max(count // 3, 1) if given is None else given, 1, count - 1)
        around = (count // 6, self.exit_layer, count // 2) if given is None else (self.exit_layer,)
        self.layers = sorted({max(layer, 1) for layer in around})
        self.num_exits, self.path = len(self.layers), f"{self.layers} {self.heads is not None}"
        super().bind(target)

    def leave(self, tokens: PartialPass, state: State) -> tuple[Tensor, ...]:
        return self.read(tokens, self.exit_layer if state.exit is None else self.layers[state.exit])
