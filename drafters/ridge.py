"""Ridge regression by sums of products: any number of rows in constant memory, solved in short pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

RIDGE = 50.0  # rows of average size that the ridge counts as: fits of few rows need it
PANEL = 128  # columns that are eliminated at once


class Sums:
    """What min_W |[X; 1] W - Y|^2 + ridge |W|^2 needs to know of its rows.

    gram: [F + 1, F + 1], float32.
    cross: [F + 1, D], float32.
    """

    def __init__(self, features: int, outputs: int) -> None:
        self.gram, self.cross = torch.zeros(features + 1, features + 1), torch.zeros(features + 1, outputs)

    @property
    def rows(self) -> float:
        """Their number: the last feature is 1."""
        return float(self.gram[-1, -1])

    def add(self, x: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """Add rows x [n, F] and y [n, D], each counted ``weight`` times."""
        x = torch.cat((x, torch.ones_like(x[:, :1])), 1).float().cpu()
        self.gram.addmm_(x.T, x, alpha=weight)
        self.cross.addmm_(x.T, y.float().cpu(), alpha=weight)

    def scale(self, factor: float) -> None:
        """Count each row ``factor`` times."""
        self.gram *= factor
        self.cross *= factor

    def solve(self, ridge: float, more: Iterable[tuple[Tensor, Tensor, float]] = ()) -> Iterator[Tensor | None]:
        """Yield None after each piece of work, and at the end W [F + 1, D], float32.

        ridge: a number of rows of average size. more: further rows and their weights, as for ``add``.
        """
        system = torch.cat((self.gram, self.cross.T)).double()  # (F + 1 + D, F + 1)
        size = len(self.gram)
        system.diagonal()[:size] += ridge * float(self.gram.diagonal().mean()) / max(self.rows, 1.0)
        yield None
        for x, y, weight in more:
            x = torch.cat((x, torch.ones_like(x[:, :1])), 1).float()
            system += weight * (torch.cat((x, y.float()), 1).T @ x)
            yield None
        for lo in range(0, size, PANEL):  # a Cholesky factorisation, which also solves L Z = cross
            hi = min(lo + PANEL, size)
            corner = torch.linalg.cholesky(system[lo:hi, lo:hi])
            system[lo:hi, lo:hi] = corner
            below = system[hi:]
            panel = torch.linalg.solve_triangular(corner, below[:, lo:hi].T, upper=False).T  # (rest, PANEL)
            below[:, lo:hi] = panel
            for start in range(hi, size, 8 * PANEL):
                stop = min(start + 8 * PANEL, size)
                system[start:, start:stop] -= panel[start - hi :] @ panel[start - hi : stop - hi].T
            yield None
        factor, found = system[:size], system[size:]  # (F + 1, F + 1), (D, F + 1)
        for hi in range(size, 0, -PANEL):
            lo = max(hi - PANEL, 0)
            right = found[:, lo:hi] - found[:, hi:] @ factor[hi:, lo:hi]
            found[:, lo:hi] = torch.linalg.solve_triangular(factor[lo:hi, lo:hi], right, upper=False, left=False)
            yield None
        yield found.T.float()

    def fit(self, layer: nn.Linear) -> None:
        """Set the parameters of a linear map X -> Y."""
        *_, found = self.solve(RIDGE)
        assert found is not None
        with torch.no_grad():
            layer.weight.copy_(found[:-1].T)
            layer.bias.copy_(found[-1])
