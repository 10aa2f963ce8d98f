"""DEED: several exits, and every token leaves at the first that is sure of it (Tang et al. 2023, arXiv 2311.08623).

Each exit has a trained adaptation module; all share one head. A token that goes deeper finds the deeper features of the
draft's earlier tokens computed just in time. The paper trains a model together with its exits; here the base stays
frozen, drafts are verified (or accepted unscored, under a confident verifier), and their states are reused.
"""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from torch import Tensor

from specdec.base import options
from specdec.runtimes.target import Target
from specdec.speculation.draft import State

from . import trained
from .chain import SHAPE, ShapeOptions, first_sure
from .exits import ExitDrafter, ExitHeads, PartialPass


class DeedDrafter(ExitDrafter):
    """Drafts a chain whose tokens leave at the first exit that is sure of its best token, or at the last.

    exit_confidence: how sure, in [0, 1]; where drafts are not verified, the verifier's threshold takes its place. Which
        exit is the last, is for the controller to choose (``State.exit``).
    siblings, nodes: see ``Shape``.
    """

    name: ClassVar[str] = "deed"
    summary: ClassVar[str] = "several trained exits, each token leaves at the first that is sure of it"
    training: ClassVar[str] = "specdec train deed"
    needs_training: ClassVar[bool] = True

    def __init__(self, heads: ExitHeads, exit_confidence: float = 0.5, **shape: Unpack[ShapeOptions]) -> None:
        super().__init__(heads, **shape)
        self.exits, self.bar = heads.exits, options.probability("exit_confidence", exit_confidence)
        self.num_exits, self.path = len(self.exits), f"{self.exits} {self.bar}"

    @classmethod
    def load(cls, target: Target, source: str | None = None, **given: Any) -> DeedDrafter:
        """From a drafter folder, or the one shipped for the target. Raises SpecDecError if there is none."""
        options.check(cls.name, given, ("exit_confidence", *SHAPE))
        return cls(ExitHeads.load(target, trained.find(cls, target, source), cls.name), **given)

    def leave(self, tokens: PartialPass, state: State) -> tuple[Tensor, ...]:
        bar = self.bar if state.threshold is None else state.threshold
        last = self.num_exits if state.exit is None else state.exit + 1
        return first_sure(lambda index: self.read(tokens, self.exits[index], index), last, bar)
