"""Timings for training and benchmarks: the least counts, drafters take turns, and each exit has its price."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest
from tiny import tiny_model

from specdec.drafters.none import NoDrafter
from specdec.engine import measure
from specdec.engine.measure import SIZES, Timings
from specdec.runtimes.reference import ReferenceTarget


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SECONDS", 0.0)


def flat(seconds: float) -> dict[int, float]:
    return dict.fromkeys(SIZES, seconds)


def test_the_least_of_several_timings_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes take 60 ms while something else runs, and 6 ms otherwise; those over two tokens never had luck."""
    slow = iter((10, 1, 10))
    monkeypatch.setattr(measure, "time_scoring", lambda target, repeats: flat(6.0 * next(slow)) | {2: 60.0})
    monkeypatch.setattr(measure, "time_drafting", lambda *args: 1.2)
    assert measure.measure(None, [NoDrafter()], None) == [Timings(flat(6.0), ((1.2, 1.2),))]  # type: ignore[arg-type]


def test_drafters_are_timed_in_turns_so_that_a_busy_second_hides_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that runs in the first two rounds takes ten times as long."""
    rounds = iter((10, 10, 1))
    busy = [1]

    def scoring(target: Any, repeats: int) -> dict[int, float]:
        busy[0] = next(rounds)
        return flat(6.0 * busy[0])

    monkeypatch.setattr(measure, "time_scoring", scoring)
    monkeypatch.setattr(measure, "time_drafting", lambda target, drafter, *_: busy[0] * drafter.cost)
    both: list[Any] = [Mock(num_exits=1, cost=0.5), Mock(num_exits=1, cost=2.0)]
    short, long = measure.measure(None, both, None)  # type: ignore[arg-type]
    assert short.drafts == ((0.5, 0.5),) and long.drafts == ((2.0, 2.0),) and short.score == long.score


def test_each_exit_and_the_first_token_of_a_draft_have_prices_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token takes 2 (exit 0) or 4 (exit 1); of four, each takes 1.25 or 2.5. A lookup that finds none takes 0."""
    monkeypatch.setattr(measure, "time_scoring", lambda target, repeats: flat(6.0))
    alone = lambda target, drafter, verifier, depth, exit: (2.0 if depth == 1 else 1.25) * (1 + (exit or 0))  # noqa: E731
    monkeypatch.setattr(measure, "time_drafting", alone)
    drafters: list[Any] = [Mock(num_exits=1), Mock(num_exits=2)]
    one, two = measure.measure(None, drafters, None)  # type: ignore[arg-type]
    assert one.drafts == ((2.0, 1.0),) and two.drafts == ((2.0, 1.0), (4.0, 2.0))
    monkeypatch.setattr(measure, "time_drafting", lambda *args: 0.0)
    assert measure.measure(None, drafters[:1], None)[0].drafts == ((0.0, 0.0),)  # type: ignore[arg-type]


def test_no_pass_is_timed_right_after_a_much_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a pass takes longer than it does among steps of a request."""
    sizes, run = list[int](), measure._pass

    def spy(target: Any, cache: Any, start: int, count: int, first: int = 0) -> None:
        sizes.append(count)
        run(target, cache, start, count, first)

    monkeypatch.setattr(measure, "_pass", spy)
    measure.time_scoring(ReferenceTarget(tiny_model()), 1)
    assert sizes[1:].count(1) >= 2 and all(before <= 2 * after for before, after in pairwise(sizes[1:]))


def test_between_timed_sizes_scoring_is_linear_and_beyond_them_goes_on_from_half_the_largest() -> None:
    timings = Timings({1: 10.0, 4: 13.0, 8: 15.0, 16: 31.0}, ((2.0, 1.0),))
    assert [timings.scoring(n) for n in (1, 2, 12, 32)] == [10.0, 11.0, 23.0, 63.0]
    assert [timings.drafting(depth) for depth in (0, 1, 4)] == [0.0, 2.0, 5.0]
