"""Timings for benchmarks."""

from itertools import pairwise
from typing import Any

import pytest
from tiny import tiny_model

from specdec.bench import pass_times
from specdec.runtimes.transformers import TransformersTarget


def test_no_pass_is_timed_right_after_a_much_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a pass takes longer than it does among steps of a request."""
    sizes, run = list[int](), pass_times._pass

    def spy(target: Any, cache: Any, start: int, count: int, first: int = 0) -> None:
        sizes.append(count)
        run(target, cache, start, count, first)

    monkeypatch.setattr(pass_times, "_pass", spy)
    pass_times.time_scoring(TransformersTarget(tiny_model()), 1)
    assert sizes[1:].count(1) >= 2 and all(before <= 2 * after for before, after in pairwise(sizes[1:]))
