"""Closed-form maps: ridge regression between states, by streaming normal equations in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from specdec.drafters.m2r2_network import M2R2
from specdec.runtimes.target import Target
from specdec.train.batches import TrainingBatch
from specdec.train.student import projected_from

RIDGE = 1e-3  # of the mean diagonal of the normal matrix


class Ridge:
    """min_W |[X; 1] W - Y|^2 + ridge |W|^2, in one pass over the rows."""

    def __init__(self) -> None:
        self.gram: Tensor | float = 0.0  # [features + 1, features + 1]
        self.cross: Tensor | float = 0.0  # [features + 1, outputs]

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows x [M, features] and y [M, outputs]."""
        x = torch.cat((x, torch.ones_like(x[:, :1])), 1).float()
        self.gram = self.gram + (x.T @ x).double().cpu()
        self.cross = self.cross + (x.T @ y.float()).double().cpu()

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weight [outputs, features] and bias [outputs], float32."""
        assert isinstance(self.gram, Tensor) and isinstance(self.cross, Tensor)
        ridge = RIDGE * self.gram.diagonal().mean() * torch.eye(len(self.gram), dtype=torch.float64)
        w = torch.linalg.solve(self.gram + ridge, self.cross).float()
        return w[:-1].T.contiguous(), w[-1].contiguous()

    def solve_into(self, layer: nn.Module) -> None:
        """Set the parameters of a linear layer."""
        assert isinstance(layer, nn.Linear)
        for parameter, found in zip((layer.weight, layer.bias), self.solve(), strict=True):
            parameter.copy_(found)


def fit_projections(network: M2R2, target: Target, batches: Callable[[], Iterable[TrainingBatch]]) -> None:
    """Fit the projections one after another, each on the path of the earlier ones."""
    for index in range(len(network.projections)):
        fit_projection(network, target, batches(), index)


@torch.no_grad()
def fit_projection(network: M2R2, target: Target, batches: Iterable[TrainingBatch], index: int) -> None:
    """Fit projection ``index`` for draft step 1 with the exact carry."""
    ridge, path = Ridge(), network.path
    goal = path.segments[index][0] if index < len(path.segments) else network.num_layers
    for batch in batches:
        features = network.features(index, *projected_from(network, target, batch, index))
        ridge.add(features[batch.valid], batch.hidden[goal][batch.valid])
    ridge.solve_into(network.projections[index])
