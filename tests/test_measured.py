"""Ways that compute the same: the fastest is chosen, from timings that are kept, and not on a machine that is busy."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SECONDS

from specdec import measured


@pytest.fixture(autouse=True)
def really(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unmeasured: None) -> None:
    """As users have it, on a machine that nobody else uses, with nothing kept."""
    monkeypatch.setattr(measured, "seconds", SECONDS)
    monkeypatch.setattr(measured._Others, "disturb", lambda self: False)
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))


class Clock:
    """A clock that ways advance."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.runs = 0.0, 0
        monkeypatch.setattr(measured.time, "perf_counter", lambda: self.now)

    def way(self, *takes: float) -> Callable[[], None]:
        """Takes so many seconds, one after the other, from the beginning again."""
        times = itertools.cycle(takes)

        def run() -> None:
            self.now, self.runs = self.now + next(times), self.runs + 1

        return run


def test_the_least_counts_and_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch)
    ways = {"a": clock.way(9.0, 0.30, 0.31, 0.30), "b": clock.way(0.2)}
    found = measured.seconds("two ways", ways)
    assert found is not None and found["a"] == pytest.approx(0.30) and found["b"] == pytest.approx(0.2)
    before = clock.runs
    assert measured.seconds("two ways", ways) == found and clock.runs == before
    assert measured.seconds("two ways", {**ways, "c": clock.way(0.1)}) != found  # a way that was not known then
    (kept,) = (tmp_path / "costs").iterdir()
    kept.write_text(json.dumps({"a": "quick", "b": -1.0}))  # data, whoever wrote it
    again = measured.seconds("two ways", ways)
    assert again is not None and again["b"] == pytest.approx(0.2)


def test_timings_that_do_not_repeat_or_were_disturbed_decide_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = Clock(monkeypatch)
    assert measured.seconds("unsteady", {"a": clock.way(*(0.1 * 1.5**n for n in range(40)))}) is None
    monkeypatch.setattr(measured._Others, "disturb", lambda self: True)
    assert measured.seconds("disturbed", {"a": clock.way(0.1)}) is None
    assert not list(tmp_path.rglob("*.json"))


def test_what_others_use_is_seen_where_it_leaves_too_few_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(measured.os, "cpu_count", lambda: 8)
    for threads, used, disturbed in [(2, 3.0, False), (8, 3.0, True), (8, 0.2, False), (6, 2.2, False), (6, 2.8, True)]:
        times = iter([(10.0, 100.0), (11.0, 100.0 + used)])  # wall, others' core seconds
        monkeypatch.setattr(measured._Others, "_used", staticmethod(lambda times=times: next(times)))
        monkeypatch.setattr(measured.torch, "get_num_threads", lambda threads=threads: threads)
        assert measured._Others().disturb() is disturbed


def test_another_way_must_be_clearly_faster() -> None:
    assert measured.choose(None, "usual") == "usual"
    assert measured.choose({"usual": 1.0, "other": 0.97}, "usual") == "usual"
    assert measured.choose({"usual": 1.0, "other": 0.9}, "usual") == "other"
