"""Closed-form leaps: ridge regression of the landing state on a leap's features, by streaming normal equations.

Sums are kept in float64. Knows nothing about gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from specdec.drafters.m2r2 import M2R2
from specdec.target import Target
from specdec.train.batches import Batch
from specdec.train.student import landings

RIDGE = 1e-3  # of the mean diagonal of the normal matrix


class NormalEquations:
    """min_W |X W - Y|^2 + ridge |W|^2, with a constant feature, from rows seen once."""

    def __init__(self, features: int, outputs: int) -> None:
        self.gram = torch.zeros(features + 1, features + 1, dtype=torch.float64)
        self.cross = torch.zeros(features + 1, outputs, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows x [M, features] and y [M, outputs]."""
        x = torch.cat((x.float(), x.new_ones(len(x), 1, dtype=torch.float)), 1)
        self.gram += (x.T @ x).double().cpu()
        self.cross += (x.T @ y.float()).double().cpu()

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weight [outputs, features] and bias [outputs], float32."""
        ridge = RIDGE * self.gram.diagonal().mean() * torch.eye(len(self.gram), dtype=torch.float64)
        w = torch.linalg.solve(self.gram + ridge, self.cross).float()
        return w[:-1].T.contiguous(), w[-1].contiguous()


@torch.no_grad()
def fit_leaps(network: M2R2, target: Target, batches: Callable[[], Iterable[Batch]]) -> None:
    """Set the leaps one after another, each on the path that the earlier ones make (step 1, exact carry)."""
    for index, leap in enumerate(network.leaps):
        assert isinstance(leap, nn.Linear)
        equations = NormalEquations(leap.in_features, leap.out_features)
        goal = network.path.segments[index][0] if index < len(network.path.segments) else network.num_layers
        for batch in batches():
            x, carry = landings(network, target, batch, index)
            features = network.features(index, x, carry)
            equations.add(features[batch.valid], batch.hidden[goal][batch.valid])
        weight, bias = equations.solve()
        leap.weight.copy_(weight)
        leap.bias.copy_(bias)
