"""States of recurrent layers at every position of a batch of windows, for drafts that begin at each position.

The first draft at position t starts from the exact state before t, a later one from the state that the previous step
left at t - 1. So each position's token runs as a row of its own. States are large, so windows must be short.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.base.errors import SpecDecError
from specdec.base.memory import free_memory
from specdec.kvcache.recurrent import Advance, Recurrent, States

HELD = 4  # states per position in memory: exact, before and after a step, and for gradients


class StatesAtPositions(Recurrent):
    """The state of a layer in a cache. Each call of ``run`` is the next draft step at all positions.

    mixed: input of the layer's mixer for every token [B, S, D].
    positions: int64 [B, T], consecutive.
    exact: cache of the states before each position [B, T, ...], by layer.
    """

    def __init__(self, layer: int, mixed: Tensor, positions: Tensor, exact: dict[int, States]) -> None:
        super().__init__(len(mixed))
        self.layer, self.mixed, self.positions, self.exact = layer, mixed, positions, exact

    def run(self, x: Tensor, held: int, tree: Tensor | None, advance: Advance) -> Tensor:
        batch, t, width = x.shape
        if self.layer not in self.exact:
            with torch.no_grad():
                self.exact[self.layer] = self._before(advance)
        before = self.states or self.exact[self.layer]  # [B, T, ...]
        rows = {key: state.flatten(0, 1) for key, state in before.items()}
        out, after = advance(x.reshape(batch * t, 1, width), rows, True)
        ends = {key: state.unflatten(0, (batch, t)) for key, state in after.items()}
        self.states = {key: torch.cat((torch.zeros_like(s[:, :1]), s[:, :-1]), 1) for key, s in ends.items()}
        return out.view(batch, t, -1)

    def _before(self, advance: Advance) -> States:
        """The exact states before each position [B, T, ...]. Raises SpecDecError if they do not fit into memory."""
        rows, (batch, t) = list[States](), self.positions.shape
        for x, start in zip(self.mixed, self.positions[:, 0].tolist(), strict=True):
            rows.append(advance(x[None, :start], {}, False)[1])
        states = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
        need = HELD * t * sum(state.nbytes for state in states.values())
        if (free := free_memory(self.mixed.device)) < need:
            raise SpecDecError(
                f"training through recurrent layer {self.layer} stores its state at {batch} x {t} positions, about "
                f"{need / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free; use a smaller 'rows' or 'window'"
            )
        index = self.positions.clamp_max(self.mixed.shape[1] - 1)  # a window may be shorter than T
        tokens = self.mixed.gather(1, index[..., None].expand(-1, -1, self.mixed.shape[2]))  # (B, T, D)
        found = [states]
        for token in tokens[:, :-1].split(1, 1):
            found.append(advance(token, found[-1], False)[1])
        return {key: torch.stack([each[key] for each in found], 1) for key in states}
