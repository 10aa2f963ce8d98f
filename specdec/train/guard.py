"""What a run goes back to when its updates make the drafter worse than it was at the start."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

MARGIN = 1.05  # of the loss at the start: what a good rate may pass through in its first updates


class Guard:
    """Watches the loss on one held-out batch, and keeps the parameters that had the least.

    start: that loss before the first update. Where a later one is more than ``MARGIN`` times as large, or not a number,
    ``check`` puts the kept parameters back.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], start: float, update: int = 0) -> None:
        self.parameters, self.start = parameters, start
        self._keep(start, update)

    def _keep(self, loss: float, update: int) -> None:
        self.least, self.update = loss, update
        self.kept: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def check(self, loss: float, update: int) -> bool:
        """Whether the run is worse than at its start; if so, the parameters are those of ``self.update`` again."""
        if loss <= MARGIN * self.start:
            if loss < self.least:
                self._keep(loss, update)
            return False
        for name, parameter in self.parameters.items():
            parameter.copy_(self.kept[name])
        return True
