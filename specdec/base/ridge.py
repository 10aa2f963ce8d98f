"""Ridge regression by sums of products: any number of rows in constant memory, added and solved in short pieces."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from specdec.base.memory import trim_heap

RIDGE = 50.0  # rows of average size that the ridge counts as: fits of few rows need it
PANEL = 128  # features of a panel
WORK = 5e8  # multiply-adds in single precision of a piece of work: some 20 ms on one core
DOUBLE = 2  # multiply-adds that one in double precision counts as
TOUCHED, ALLOCATED = 16, 100  # those that a number counts as that is moved, or moved to new memory

Weighted = tuple[Tensor, Tensor, float]  # x [n, F], y [n, D], how many times each row counts
T = TypeVar("T")


class Sums:
    """What min_W |[X; 1] W - Y|^2 + ridge |W|^2 needs to know of its rows.

    size: F + 1, with the feature that is always 1. outputs: D.
    panels: the columns [lo, lo + w) of [[X; 1] Y].T [X; 1], from the diagonal down: [F + 1 - lo + D, w], float32.
    """

    def __init__(self, features: int, outputs: int) -> None:
        self.size, self.outputs = features + 1, outputs
        starts = range(0, self.size, PANEL)
        self.panels = [torch.zeros(self.size - lo + outputs, min(PANEL, self.size - lo)) for lo in starts]

    @property
    def rows(self) -> float:
        """Their number: the last feature is 1."""
        last = self.panels[-1]
        return float(last[last.shape[1] - 1, -1])

    def add(self, x: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """Add rows x [n, F] and y [n, D], each counted ``weight`` times."""
        result(self.adding(x, y, weight))

    def adding(self, x: Tensor, y: Tensor, weight: float = 1.0) -> Generator[None]:
        """``add`` in pieces."""
        return in_pieces(_added(self.panels, (x, y, weight)))

    def scaled(self, factor: float) -> Generator[None, None, Sums]:
        """Return sums that count each row ``factor`` times, after pieces of work."""
        made = Sums(self.size - 1, self.outputs)
        pairs = zip(made.panels, self.panels, strict=True)
        yield from in_pieces(ALLOCATED * own.add_(panel, alpha=factor).numel() for own, panel in pairs)
        return made

    def solve(self, ridge: float, more: Iterable[Weighted] = ()) -> Generator[None, None, Tensor]:
        """Return W.T [D, F + 1], float32, after pieces of work.

        ridge: a number of rows of average size. more: further rows.
        """
        found = torch.empty(self.outputs, self.size)
        yield from in_pieces(self._solved(found, ridge, more))
        trim_heap()  # the system is larger than all that is kept
        return found

    def _solved(self, solution: Tensor, ridge: float, more: Iterable[Weighted]) -> Iterator[float]:
        """Solve the system in double precision."""
        size = sum(float(panel.diagonal().sum()) for panel in self.panels) / self.size / max(self.rows, 1.0)  # of a row
        panels = list[Tensor]()
        for panel in self.panels:
            panels.append(panel.double())
            panels[-1].diagonal().add_(ridge * size)
            yield ALLOCATED * panel.numel()
        for rows in more:
            yield from _added(panels, rows)
        # A Cholesky factorisation L L.T, which also solves Z L.T = cross.T.
        for number, panel in enumerate(panels):
            width, start = panel.shape[1], 0
            panel[:width] = corner = torch.linalg.cholesky(panel[:width])
            panel[width:] = below = torch.linalg.solve_triangular(corner.T, panel[width:], upper=True, left=False)
            yield DOUBLE * panel.numel() * width
            for later in panels[number + 1 :]:
                later.addmm_(below[start:], below[start : start + later.shape[1]].T, alpha=-1)
                start += later.shape[1]
                yield DOUBLE * later.numel() * width
        # W.T L = Z, from the last panel back.
        for number in reversed(range(len(panels))):
            panel = panels[number]
            found, start, lo = panel[-self.outputs :], panel.shape[1], number * PANEL
            for later in panels[number + 1 :]:
                found.addmm_(later[-self.outputs :], panel[start : start + later.shape[1]], alpha=-1)
                start += later.shape[1]
                yield DOUBLE * found.numel() * later.shape[1]
            corner = panel[: panel.shape[1]]
            found.copy_(torch.linalg.solve_triangular(corner, found, upper=False, left=False))
            solution[:, lo : lo + panel.shape[1]] = found
            yield ALLOCATED * found.numel()

    def fit(self, layer: nn.Linear) -> None:
        """Set the parameters of a linear map X -> Y."""
        found = result(self.solve(RIDGE))
        with torch.no_grad():
            layer.weight.copy_(found[:, :-1])
            layer.bias.copy_(found[:, -1])


def _added(panels: list[Tensor], rows: Weighted) -> Iterator[float]:
    x, y, weight = rows
    x, y = x.float(), y.float()
    both, lo = torch.cat((x, torch.ones_like(x[:, :1]), y), 1).cpu(), 0  # (n, F + 1 + D)
    for panel in panels:
        hi = lo + panel.shape[1]
        panel.add_(both[:, lo:].T @ both[:, lo:hi], alpha=weight)
        yield (len(x) + TOUCHED) * panel.numel()
        lo = hi


def in_pieces(parts: Iterable[float]) -> Generator[None]:
    """Do work whose parts tell their multiply-adds, and yield whenever ``WORK`` are done."""
    done = 0.0
    for part in parts:
        done += part
        if done >= WORK:
            yield
            done = 0.0


def result(work: Generator[None, None, T]) -> T:
    """What the work returns, done at once."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
