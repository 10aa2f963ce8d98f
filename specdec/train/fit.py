"""Closed-form projections: ridge regression of a state on a projection's features, by streaming normal equations.

Sums are kept in float64. Knows nothing about gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from specdec.drafters.m2r2_network import M2R2
from specdec.runtimes.target import Target
from specdec.train.batches import Batch
from specdec.train.student import projected_from

ONE = "1"  # the part of constant features
RIDGE = 1e-3  # of the mean diagonal of the normal matrix


class Moments:
    """min_W |X W - Y|^2 + ridge |W|^2 for several (X, Y) at once, from rows seen once.

    problems: (names of the parts that make X, name of Y) of each; a constant feature comes with all. Products of parts
    that problems share are accumulated one time.
    """

    def __init__(self, problems: Iterable[tuple[Sequence[str], str]]) -> None:
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.pairs: set[tuple[str, str]] = set()
        for features, goal in problems:
            full = (*features, ONE)
            self.pairs |= {(a, b) for i, a in enumerate(full) for b in full[i:]} | {(a, goal) for a in full}

    def add(self, parts: dict[str, Tensor]) -> None:
        """Rows of each part, [M, width]."""
        rows = {name: part.float() for name, part in parts.items()}
        rows[ONE] = torch.ones_like(next(iter(rows.values()))[:, :1])
        for a, b in self.pairs:
            product = (rows[a].T @ rows[b]).double().cpu()
            self.sums[a, b] = self.sums[a, b] + product if (a, b) in self.sums else product

    def solve(self, features: Sequence[str], goal: str) -> tuple[Tensor, Tensor]:
        """Weight [outputs, features] and bias [outputs], float32, of one of the problems."""
        full = (*features, ONE)
        blocks = [[self.sums[a, b] if (a, b) in self.sums else self.sums[b, a].T for b in full] for a in full]
        gram = torch.cat([torch.cat(row, 1) for row in blocks])
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        w = torch.linalg.solve(gram + ridge, torch.cat([self.sums[a, goal] for a in full])).float()
        return w[:-1].T.contiguous(), w[-1].contiguous()

    def solve_into(self, layer: nn.Module, features: Sequence[str], goal: str) -> None:
        """Set the parameters of a linear layer."""
        assert isinstance(layer, nn.Linear)
        for parameter, found in zip((layer.weight, layer.bias), self.solve(features, goal), strict=True):
            parameter.copy_(found)


@torch.no_grad()
def fit_projections(network: M2R2, target: Target, batches: Callable[[], Iterable[Batch]], begin: int = 0) -> None:
    """Set the projections from ``begin`` on, each on the path that the earlier ones make (step 1, exact carry)."""
    for index, projection in list(enumerate(network.projections))[begin:]:
        goal = network.path.segments[index][0] if index < len(network.path.segments) else network.num_layers
        moments = Moments([(["features"], "goal")])
        for batch in batches():
            x, carry = projected_from(network, target, batch, index)
            parts = {"features": network.features(index, x, carry), "goal": batch.hidden[goal]}
            moments.add({name: part[batch.valid] for name, part in parts.items()})
        moments.solve_into(projection, ["features"], "goal")
