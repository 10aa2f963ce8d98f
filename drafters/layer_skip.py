"""Layer skipping: the model drafts for itself without some of its parts (Draft & Verify, arXiv 2309.08168; SWIFT).

Needs no training. Its drafts are good as far as the model hardly needs the skipped parts: the attention or the MLP of a
layer, or both (SWIFT, arXiv 2410.06916). The layers before the first skipped part are exact: scoring resumes behind
them. Entries of drafted tokens in the cache of later layers are provisional.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar, Literal, Unpack

import torch
from torch import Tensor

from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.kvcache.cache import KVCache
from specdec.kvcache.mask import Mask
from specdec.runtimes.target import Pass, Target
from specdec.speculation.draft import Draft, State

from .chain import ChainDrafter, Readout, ShapeOptions

Step = tuple[Literal["layers", "attention", "mlp"], int, int]  # the part that runs, of layers [lo, hi)


def steps_without(attn: Collection[int], mlp: Collection[int], num_layers: int) -> list[Step]:
    """The steps through the model without the attention of layers ``attn`` and the MLP of layers ``mlp``."""
    steps: list[Step] = []
    for layer in range(num_layers):
        if layer in attn and layer in mlp:
            continue
        if layer in attn or layer in mlp:
            steps.append(("mlp" if layer in attn else "attention", layer, layer + 1))
        elif steps and steps[-1][0] == "layers" and steps[-1][2] == layer:
            steps[-1] = "layers", steps[-1][1], layer + 1
        else:
            steps.append(("layers", layer, layer + 1))
    return steps


def run_step(target: Target, step: Step, x: Tensor, positions: Tensor, mask: Mask, cache: KVCache) -> Tensor:
    """Run a step: [B, T, D] -> [B, T, D]; arguments as in ``Target.layers``."""
    part, lo, hi = step
    if part == "layers":
        return target.layers(x, lo, hi, Pass(positions, mask, cache))
    return target.sublayer(x, lo, part, Pass(positions, mask, cache))


class LayerSkipDrafter(ChainDrafter):
    """Drafts a chain through the parts that are not skipped, read out by the model's own norm and head.

    By default, the fifth of the layers around the middle is skipped, which costs least. Raises SpecDecError, when
    bound, if everything, nothing, or a layer outside the model is skipped.

    skip: layers to skip.
    attn, mlp: layers whose attention or MLP is skipped.
    siblings, nodes: see ``ChainShape``.
    """

    name: ClassVar[str] = "layer-skip"
    summary: ClassVar[str] = "the model itself without some layers or parts of them; no training"

    def __init__(
        self,
        skip: Sequence[int] | None = None,
        attn: Sequence[int] = (),
        mlp: Sequence[int] = (),
        **shape: Unpack[ShapeOptions],
    ) -> None:
        super().__init__(**shape)
        self.default = skip is None and not attn and not mlp
        whole = options.check_ints("skip", () if skip is None else skip, 0)
        self.attn = {*whole, *options.check_ints("attn", attn, 0)}
        self.mlp = {*whole, *options.check_ints("mlp", mlp, 0)}

    def bind(self, target: Target) -> None:
        n = target.num_layers
        if self.default:
            self.attn = self.mlp = set(range(2 * n // 5, 3 * n // 5))
        skipped, self.steps = self.attn | self.mlp, steps_without(self.attn, self.mlp, n)
        if not skipped or not self.steps or max(skipped) >= n:
            raise SpecDecError(
                f"layer-skip must leave out some of the model's layers 0 .. {n - 1} or parts of them, not everything; "
                f"got attn {sorted(self.attn)}, mlp {sorted(self.mlp)}"
            )
        self.exit_layer, self.path = min(skipped), str(self.steps)

    def propose(self, state: State, limit: int) -> Draft:
        target, cache = state.target, state.cache
        states, run = list[Tensor](), 0
        attending = [(lo, hi) for part, lo, hi in self.steps if part != "mlp"]
        first = attending[0][0] if attending else 0

        def step(token: Tensor, positions: Tensor) -> Readout:
            nonlocal run
            run += 1
            x, mask = target.embed(token, positions), cache.register(first, positions)
            for part in self.steps:
                x = run_step(target, part, x, positions, mask, cache)
                if part[2] == self.exit_layer:
                    states.append(x)
            return Readout(target.readout(x)[:, 0])

        draft = self.chain(state, limit, step)
        for lo, hi in attending:
            if lo >= self.exit_layer:
                cache.trim(run, lo, hi)
        if states:
            draft.states, draft.exit_layer = torch.cat(states, 1), self.exit_layer
        return draft
