"""Low-rank adapters on the linear maps of a target's layers, which accelerate the residual in M2R2.

Parameters only. Runtimes apply them to some tokens of a pass (``Pass.adapters``).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Adapters(nn.Module):
    """``y += up(down(x))`` beside linear maps: rank-r factors keyed by layer and module path.

    ``up`` starts at zero, so untrained adapters change nothing.

    shapes[layer][path]: (in_features, out_features).
    draft_only: whether passes with them only draft, so that a runtime may quantise weights.
    """

    draft_only = False

    def __init__(self, shapes: Mapping[int, Mapping[str, tuple[int, int]]], rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.paths = {layer: list(paths) for layer, paths in shapes.items()}
        for layer, paths in shapes.items():
            for path, (n_in, n_out) in paths.items():
                key = self._key(layer, path)
                self.register_parameter(key + "/down", nn.Parameter(torch.randn(rank, n_in) * n_in**-0.5))
                self.register_parameter(key + "/up", nn.Parameter(torch.zeros(n_out, rank)))

    @staticmethod
    def _key(layer: int, path: str) -> str:
        return f"{layer}/{path.replace('.', '/')}"

    def factors(self, layer: int) -> dict[str, tuple[Tensor, Tensor]]:
        """``{module path: (down [r, in], up [out, r])}`` of one layer; empty if it has none."""
        return {
            path: (getattr(self, self._key(layer, path) + "/down"), getattr(self, self._key(layer, path) + "/up"))
            for path in self.paths.get(layer, ())
        }
