"""Layer skipping: the model drafts for itself without some of its layers (Draft & Verify, arXiv 2309.08168; SWIFT).

Needs no training, and agrees with the full model as far as the model is indifferent to those layers. The layers before
the first skipped one are exact: their states are handed over and scoring resumes there. What drafted tokens leave in
the cache of later layers is provisional. Skips whole layers, not the attention or the MLP of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from specdec import options
from specdec.draft import Draft, State
from specdec.errors import SpecDecError
from specdec.target import Target

from .chain import draft_chain


class LayerSkipDrafter:
    """Drafts a chain through the layers that are not in ``skip``, read out by the model's own norm and head.

    skip: layers to leave out; None: the fifth of them around the middle, which models miss least.
    siblings: number of further candidates at each depth of the chain, which cost no drafting.
    Raises SpecDecError, when bound, if ``skip`` removes every layer, none, or one outside the model.
    """

    name: ClassVar[str] = "layer-skip"
    summary: ClassVar[str] = "the model itself without some of its layers; no training"
    taps: tuple[int, ...] = ()

    def __init__(self, skip: Sequence[int] | None = None, siblings: Sequence[int] = ()) -> None:
        self.skip = None if skip is None else options.wholes("skip", skip, 0)
        self.siblings = options.wholes("siblings", siblings, 0)
        self.ranges: list[tuple[int, int]] = []  # layers [lo, hi) that drafting runs
        self.exit_layer = 0  # layers below are run as in the full model

    @classmethod
    def load(cls, target: Target, source: str | None = None, **given: Any) -> LayerSkipDrafter:
        options.check(cls.name, given, ("skip", "siblings"), source)
        return cls(**given)

    def bind(self, target: Target) -> None:
        count = target.num_layers
        skipped = self.skipped(count)
        kept = [layer for layer in range(count) if layer not in skipped]
        if not skipped or not kept or max(skipped) >= count:
            raise SpecDecError(
                f"skip must name some of the model's layers 0 .. {count - 1}, not all of them; got {sorted(skipped)}"
            )
        self.exit_layer = min(skipped)
        starts = [layer for layer in kept if layer - 1 not in kept]
        ends = [layer + 1 for layer in kept if layer + 1 not in kept]
        self.ranges = list(zip(starts, ends, strict=True))

    def skipped(self, num_layers: int) -> set[int]:
        """The layers that a model of ``num_layers`` drafts without."""
        return set(range(2 * num_layers // 5, 3 * num_layers // 5) if self.skip is None else self.skip)

    @property
    def path(self) -> str:
        """What the cost of drafting depends on."""
        return str(self.ranges)

    def start(self, batch: int) -> None:
        pass

    def propose(self, state: State, limit: int) -> Draft:
        target, cache = state.target, state.cache
        states: list[Tensor] = []

        def step(token: Tensor, positions: Tensor) -> Tensor:
            x, mask = target.embed(token, positions), cache.mask(self.ranges[0][0], positions)
            for lo, hi in self.ranges:
                x = target.layers(x, lo, hi, positions, mask, cache)
                if hi == self.exit_layer:
                    states.append(x)
            return target.readout(x)[:, 0]

        draft = draft_chain(state, limit, step, self.siblings)
        for lo, hi in self.ranges:
            if lo > self.exit_layer:
                cache.trim(max(draft.depths()), lo, hi)
        if states:
            draft.states, draft.exit_layer = torch.cat(states, 1), self.exit_layer
        return draft

    def observe(self, paths: list[list[int]], taps: dict[int, Tensor]) -> None:
        pass

    def select(self, rows: list[int]) -> None:
        pass
