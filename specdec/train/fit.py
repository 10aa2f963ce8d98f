"""Closed-form maps: ridge regression of one state on others, by streaming normal equations in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from specdec.drafters.m2r2_network import M2R2
from specdec.runtimes.target import Target
from specdec.train.batches import Batch
from specdec.train.student import projected_from

RIDGE = 1e-3  # of the mean diagonal of the normal matrix


class Ridge:
    """min_W |[X; 1] W - Y|^2 + ridge |W|^2, from rows seen once."""

    def __init__(self) -> None:
        self.gram: Tensor | float = 0.0  # [features + 1, features + 1]
        self.cross: Tensor | float = 0.0  # [features + 1, outputs]

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows x [M, features] and y [M, outputs]."""
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


@torch.no_grad()
def fit_projections(network: M2R2, target: Target, batches: Callable[[], Iterable[Batch]], begin: int = 0) -> None:
    """Set the projections from ``begin`` on, each on the path that the earlier ones make (step 1, exact carry)."""
    goals = [*(lo for lo, _ in network.path.segments), *(network.num_layers for _ in network.path.reach)]
    for index, projection in list(enumerate(network.projections))[begin:]:
        ridge = Ridge()
        for batch in batches():
            features = network.features(index, *projected_from(network, target, batch, index))
            ridge.add(features[batch.valid], batch.hidden[goals[index]][batch.valid])
        ridge.solve_into(projection)
