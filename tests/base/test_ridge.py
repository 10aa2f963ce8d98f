"""Ridge regression by sums: what it finds, and how much a piece of its work does."""

from collections.abc import Generator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from specdec.base import ridge
from specdec.base.ridge import Sums, result


def test_sums_solve_the_ridge_regression_of_all_rows_at_their_weights() -> None:
    torch.manual_seed(0)
    x, y, sums = torch.randn(400, 150), torch.randn(400, 7), Sums(150, 7)
    for at in range(0, 400, 37):
        sums.add(x[at : at + 37], y[at : at + 37])
    found = result(sums.solve(3.0, [(x[:20], y[:20], 4.0)])).T
    weights = torch.ones(400, dtype=torch.double)
    weights[:20] = 5
    rows = torch.cat((x, torch.ones(400, 1)), 1).double()
    size = (rows.T @ rows).diagonal().mean() / 400  # of a row
    system = (rows * weights[:, None]).T @ rows + 3 * size * torch.eye(151, dtype=torch.double)
    exact = torch.linalg.solve(system, (rows * weights[:, None]).T @ y.double())
    assert torch.allclose(found.double(), exact, atol=1e-5) and sums.rows == 400


def test_an_addition_that_is_not_run_to_its_end_can_be_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "PANEL", 8)
    monkeypatch.setattr(ridge, "CHUNK_WORK", 1)
    torch.manual_seed(0)
    x, y, sums, whole = torch.randn(60, 40), torch.randn(60, 3), Sums(40, 3), Sums(40, 3)
    whole.add(x, y)
    sums.add(x[:20], y[:20])
    work = sums.adding(x[20:], y[20:])
    next(work)
    next(work)
    assert not torch.allclose(sums.panels[-1], whole.panels[-1])
    sums.settle()
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(sums.panels, whole.panels, strict=True))
    result(work)  # nothing is added twice
    sums.settle()
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(sums.panels, whole.panels, strict=True))


def counted(work: Generator[None, None, object]) -> list[int]:
    """The multiply-adds of matrix products in each piece."""
    found = list[int]()
    while True:
        with FlopCounterMode(display=False) as counter:
            try:
                next(work)
            except StopIteration:
                return [*found, counter.get_total_flops() // 2]
        found.append(counter.get_total_flops() // 2)


@pytest.mark.parametrize("features", [64, 256])
def test_no_piece_of_work_grows_with_the_size_of_the_system(monkeypatch, features: int) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(ridge, "PANEL", 8)
    monkeypatch.setattr(ridge, "CHUNK_WORK", 100_000)
    x, y = torch.randn(32, features), torch.randn(32, 16)
    sums = Sums(features, 16)
    part = 32 * (features + 17) * 8  # the largest product
    adding, solving = counted(sums.adding(x, y)), counted(sums.solve(1.0, [(x, y, 4.0)]))
    assert max(adding + solving) <= 100_000 + part
    assert len(solving) > sum(solving) / 100_000 / 2
