"""DEED: several exits, and every token leaves at the first that is sure of it (Tang et al. 2023, arXiv 2311.08623).

Each exit has a trained adaptation module; all share one head. A token that goes deeper finds the deeper features of the
draft's earlier tokens computed just in time. The paper trains a model together with its exits; here the base stays
frozen, drafts are verified (or stand, under a confident verifier), and their states are reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from specdec import artifacts, options
from specdec.draft import State
from specdec.errors import SpecDecError
from specdec.target import Target

from .exits import Climb, ExitDrafter, ExitHeads


class DeedDrafter(ExitDrafter):
    """Drafts a chain whose tokens leave at the first exit that is sure of its best token, or at the last.

    exit_confidence: how sure, in [0, 1]; where drafts stand unjudged, the verifier's threshold takes its place.
    siblings: number of further candidates at each depth of the chain, which cost no drafting.
    """

    name: ClassVar[str] = "deed"
    summary: ClassVar[str] = "several trained exits, each token leaves at the first that is sure of it"
    training: ClassVar[str] = "specdec train deed"

    def __init__(self, heads: ExitHeads, exit_confidence: float = 0.5, siblings: Sequence[int] = ()) -> None:
        super().__init__(heads, siblings)
        if not isinstance(exit_confidence, int | float) or not 0 <= exit_confidence <= 1:
            raise SpecDecError(f"exit_confidence must be a probability in [0, 1]; got {exit_confidence!r}")
        self.exits, self.bar = heads.exits, float(exit_confidence)

    @classmethod
    def load(cls, target: Target, source: str | None = None, **given: Any) -> DeedDrafter:
        """From a drafter folder, or the one shipped for the target. Raises SpecDecError if there is none."""
        options.check(cls.name, given, ("exit_confidence", "siblings"))
        folder = Path(source) if source is not None else artifacts.shipped(cls.name, target.fingerprint)
        if folder is None:
            name = target.model.config._name_or_path or "MODEL"
            raise SpecDecError(
                f"drafter 'deed' needs trained exits and none are shipped for this model; train them: {cls.training} "
                f"--model {name} --prompts FILE --output DIR, then pass --drafter DIR"
            )
        return cls(ExitHeads.load(target, folder, cls.name), **given)

    @property
    def path(self) -> str:
        return f"{self.exits} {self.bar}"

    def leave(self, climb: Climb, state: State, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        bar = self.bar if state.threshold is None else state.threshold
        logits, sure = self.read(climb.to(self.exits[0]))
        layers = torch.full_like(sure, self.exits[0], dtype=torch.long)
        for index, layer in enumerate(self.exits[1:], start=1):
            on = sure < bar  # (B, 1): rows that go on
            if not bool(on.any()):
                break
            deeper, surer = self.read(climb.to(layer), index)
            logits, sure = torch.where(on, deeper, logits), torch.where(on, surer, sure)
            layers = layers.masked_fill(on, layer)
        return logits, sure, layers
