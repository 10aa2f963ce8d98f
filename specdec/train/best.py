"""The parameters that a run goes back to when its updates make the drafter worse than it was at the start."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Best:
    """A copy of the parameters that had the least loss on held-out windows so far.

    start: that loss before the first update. least, update: the least one, and when it was.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], start: float, update: int = 0) -> None:
        self.parameters, self.start = parameters, start
        self.keep(start, update)

    def keep(self, loss: float, update: int) -> None:
        """The parameters as they are now are the best."""
        self.least, self.update = loss, update
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def put_back(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self.values[name])
