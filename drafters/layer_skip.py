"""Layer skipping: the model drafts for itself without some of its layers (Draft & Verify, arXiv 2309.08168).

Needs no training. Its drafts are good as far as the model hardly needs the skipped layers. Those before the first
skipped one are exact: scoring resumes after them. Entries of drafted tokens in the cache of later layers are
provisional.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.runtimes.target import Pass, Target
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Traits
from specdec.speculation.state import State

from .chain import ChainDrafter, Readout


def ranges_without(skipped: Collection[int], num_layers: int) -> list[tuple[int, int]]:
    """Return the ranges [lo, hi) that cover all layers in [0, num_layers) but the ``skipped`` ones, in order."""
    run = set(range(num_layers)).difference(skipped)
    begin, end = ([layer for layer in sorted(run) if layer + side not in run] for side in (-1, 1))
    return [(lo, last + 1) for lo, last in zip(begin, end, strict=True)]


class LayerSkipDrafter(ChainDrafter):
    """Drafts a chain through the layers that are not skipped, with draft logits from the model's own norm and head.

    Raises SpecDecError, when bound, if ``skip`` names all layers, none, or a layer outside the model.

    skip: indices of the layers to skip; None: the fifth of the layers around the middle, which costs least accuracy.
    """

    name: ClassVar[str] = "layer-skip"
    summary: ClassVar[str] = "the model itself without some layers; no training"

    def __init__(self, skip: Sequence[int] | None = None) -> None:
        self.requested = None if skip is None else set(options.check_ints("skip", skip, 0))

    def bind(self, target: Target) -> None:
        n = target.num_layers
        skipped = set(range(2 * n // 5, 3 * n // 5)) if self.requested is None else self.requested
        self.ranges = ranges_without(skipped, n)
        if not skipped or not self.ranges or max(skipped) >= n:
            raise SpecDecError(
                f"layer-skip must leave out some of the model's layers 0 .. {n - 1}, not everything; "
                f"got {sorted(skipped)}"
            )
        self.exit_layer = min(skipped)
        self.traits = Traits((self.name,), cost_key=str(self.ranges))

    def propose(self, state: State, limit: int) -> Draft:
        target, cache = state.target, state.cache
        states, run = list[Tensor](), 0

        def step(token: Tensor, positions: Tensor) -> Readout:
            nonlocal run
            run += 1
            x, mask = target.embed(token, positions), cache.register(self.ranges[0][0], positions)
            for lo, hi in self.ranges:
                x = target.layers(x, lo, hi, Pass(positions, mask, cache, ids=token))
                if hi == self.exit_layer:
                    states.append(x)
            return Readout(target.readout(x)[:, 0])

        draft = self.chain(state, limit, step)
        for lo, hi in self.ranges:
            if lo >= self.exit_layer:
                cache.trim(run, lo, hi)
        if states:
            draft.states, draft.exit_layer = torch.cat(states, 1), self.exit_layer
        return draft
