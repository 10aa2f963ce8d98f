"""Closed-form maps: ridge regression of one state on others, by streaming normal equations in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from specdec.drafters.m2r2_network import M2R2
from specdec.runtimes.target import Target
from specdec.train.batches import Batch
from specdec.train.student import draft_steps, projected_from

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


def fit_projections(network: M2R2, target: Target, batches: Callable[[], Iterable[Batch]], steps: int = 1) -> None:
    """Set the projections one after another, each on the path that the earlier ones make.

    Then all of them once more, on the drafter's own states of steps 1 .. ``steps``.
    """
    for index in range(len(network.projections)):
        fit_projection(network, target, batches(), index)
    for index in range(len(network.projections) if steps > 1 else 0):
        fit_projection(network, target, batches(), index, steps)


@torch.no_grad()
def fit_projection(network: M2R2, target: Target, batches: Iterable[Batch], index: int, steps: int = 1) -> None:
    """Set projection ``index``: for step 1, which has the exact carry, or for steps 1 .. ``steps``."""
    ridge, path = Ridge(), network.path
    goal = path.segments[index][0] if index < len(path.segments) else network.num_layers
    for batch in batches:
        if steps == 1:
            pairs = [(projected_from(network, target, batch, index), batch.valid)]
        else:
            pairs = [(step.mapped[index], step.valid) for step in draft_steps(network, target, batch, steps)]
        for mapped, valid in pairs:
            ridge.add(network.features(index, *mapped)[valid], batch.hidden[goal][valid])
    ridge.solve_into(network.projections[index])
