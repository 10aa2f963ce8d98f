"""Ridge regression from sums of products: any number of rows in constant memory, added and solved in short chunks.

Functions that work in chunks are generators: each yields after about ``CHUNK_WORK`` multiply-adds, so that a thread can
pause between chunks, and returns its result.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from specdec.base.memory import trim_heap

RIDGE = 50.0  # the ridge counts as this number of rows of average size, which regressions of few rows need
PANEL = 128  # columns of a panel
CHUNK_WORK = 5e8  # multiply-adds in single precision of a chunk of work: some 20 ms on one core
DOUBLE = 2  # a multiply-add in double precision counts as this number of single-precision ones
TOUCHED = 16  # moving a number counts as this number of multiply-adds
ALLOCATED = 100  # moving a number to new memory counts as this number of multiply-adds

Weighted = tuple[Tensor, Tensor, float]  # inputs x [n, F], outputs y [n, D], weight of each row
T = TypeVar("T")


class Sums:
    """The sums of products from which a ridge regression is solved, so that the examples themselves are not kept.

    The regression predicts D outputs from F inputs: min_W |[X 1] W - Y|^2 + ridge |W|^2. A row is one example: its F
    inputs are a row of X, its D outputs a row of Y, and it counts with a weight. [X 1] is X with a column of ones. So
    W is [F + 1, D], and its last row is the bias, which the ridge shrinks, too.

    features: F. outputs: D.
    size: F + 1.
    panels: the sums [X 1].T [X 1] (symmetric; its lower triangle is kept) with Y.T [X 1] below, as column blocks of up
        to 128 columns. The block that begins at column lo has the rows from lo on: float32 [F + 1 - lo + D, columns].
    """

    def __init__(self, features: int, outputs: int) -> None:
        self.size, self.outputs = features + 1, outputs
        starts = range(0, self.size, PANEL)
        self.panels = [torch.zeros(self.size - lo + outputs, min(PANEL, self.size - lo)) for lo in starts]
        self._begun: Iterator[float] = iter(())

    @property
    def rows(self) -> float:
        """Return the sum of the weights of the rows added so far."""
        last = self.panels[-1]  # the last feature is always 1
        return float(last[last.shape[1] - 1, -1])

    def add(self, x: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """Add n rows at once: inputs x [n, F] and outputs y [n, D].

        weight: number of times that each row counts; negative: the rows are removed.
        """
        result(self.adding(x, y, weight))

    def adding(self, x: Tensor, y: Tensor, weight: float = 1.0) -> Generator[None]:
        """Add n rows, inputs x [n, F] and outputs y [n, D], in chunks.

        The result is a generator that yields None after each chunk of work (some 20 ms). Until it has run to its end,
        or ``settle`` was called, the rows are added in part, and the sums must not be used.

        weight: number of times that each row counts; negative: the rows are removed.
        """
        self._begun = _added(self.panels, (x, y, weight))
        return in_chunks(self._begun)

    def settle(self) -> None:
        """Do what is left of the latest ``adding``, at once; its generator then ends."""
        for _ in self._begun:
            pass

    def scaled(self, factor: float) -> Generator[None, None, Sums]:
        """Make a copy of the sums in which the weight of each row is multiplied by ``factor``; this object stays.

        The result is a generator that yields None after each chunk of work (some 20 ms) and returns the copy;
        ``result(sums.scaled(factor))`` runs it at once. factor: 0: the copy has no rows.
        """
        scaled = Sums(self.size - 1, self.outputs)
        pairs = zip(scaled.panels, self.panels, strict=True)
        yield from in_chunks(ALLOCATED * own.add_(panel, alpha=factor).numel() for own, panel in pairs)
        return scaled

    def solve(self, ridge: float, more: Iterable[Weighted] = ()) -> Generator[None, None, Tensor]:
        """Solve the regression in chunks; the solution is W.T [D, F + 1], float32, whose last column is the bias.

        The result is a generator that yields None after each chunk of work (some 20 ms) and returns W.T;
        ``result(sums.solve(ridge))`` runs it at once. The sums stay as they are, and must not change until it ends.
        ridge: the weight of |W|^2, as a number of rows of average size. more: further rows (x [n, F], y [n, D],
        weight), which are counted in this solution alone.
        Raises torch.linalg.LinAlgError if there are no rows.
        """
        solution = torch.empty(self.outputs, self.size)
        yield from in_chunks(self._solved(solution, ridge, more))
        trim_heap()  # the system of equations is larger than the solution
        return solution

    def _solved(self, solution: Tensor, ridge: float, more: Iterable[Weighted]) -> Iterator[float]:
        """Solve the regression in double precision, and write W.T into ``solution`` [D, F + 1], which the caller made.

        The result is an iterator for ``in_chunks``: each step does a part of the work and yields its cost as a number
        of multiply-adds. ``solution`` is complete when it ends. ridge, more: as in ``solve``.
        """
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
        """Solve the regression at once, and copy the solution into weight and bias of ``layer``, in place.

        layer: a linear layer with F inputs, D outputs and a bias. The ridge is that of 50 average rows (``RIDGE``).
        """
        solution = result(self.solve(RIDGE))
        with torch.no_grad():
            layer.weight.copy_(solution[:, :-1])
            layer.bias.copy_(solution[:, -1])


def _added(panels: list[Tensor], rows: Weighted) -> Iterator[float]:
    """Add the products of ``rows`` (x [n, F], y [n, D], weight) to the column blocks ``Sums.panels``, in place.

    The result is an iterator for ``in_chunks``: each step adds to one block and yields its cost as a number of
    multiply-adds. The rows are added completely when it ends.
    """
    x, y, weight = rows
    x, y = x.float(), y.float()
    both, lo = torch.cat((x, torch.ones_like(x[:, :1]), y), 1).cpu(), 0  # (n, F + 1 + D)
    for panel in panels:
        hi = lo + panel.shape[1]
        panel.add_(both[:, lo:].T @ both[:, lo:hi], alpha=weight)
        yield (len(x) + TOUCHED) * panel.numel()
        lo = hi


def in_chunks(parts: Iterable[float]) -> Generator[None]:
    """Run work that is an iterator of small parts; yield None each time about 20 ms of work (``CHUNK_WORK``) are done.

    parts: does a part of the work at each step, and yields its cost as a number of multiply-adds.
    """
    done = 0.0
    for part in parts:
        done += part
        if done >= CHUNK_WORK:
            yield
            done = 0.0


def result(work: Generator[None, None, T]) -> T:
    """Run a generator to its end, without pauses between its chunks of work, and return its return value."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
