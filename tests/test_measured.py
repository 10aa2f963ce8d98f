"""Ways that compute the same: the fastest is chosen, from timings that are kept, and not on a machine that is busy."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SECONDS, tiny_model

from specdec import kernels, measured
from specdec.fused import FusedTarget
from specdec.target import ReferenceTarget


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


def timings(packed: list[float], dense: list[float]) -> dict[str, float]:
    names = (("packed", packed), ("dense", dense))
    return {f"{name} {n}": s for name, given in names for n, s in zip(kernels.SIZES, given, strict=True)}


def test_a_plan_takes_the_fastest_storage_and_fills_up_rows_where_more_are_faster() -> None:
    #          1    2    3    4    5    6    8    12   16   64
    found = timings(
        [7.0, 7.5, 6.3, 4.8, 4.9, 5.5, 6.3, 8.0, 8.7, 30.0], [4.0, 8.0, 9.0, 9.0, 9.0, 9.0, 9.0, 7.0, 8.6, 20.0]
    )
    plan = kernels.Plan(["packed", "dense"], found)
    assert [plan(n) for n in (1, 2, 3, 4, 5)] == [
        ("dense", 1),
        ("packed", 4),
        ("packed", 4),
        ("packed", 4),
        ("packed", 5),
    ]
    assert plan(7) == ("packed", 7) and plan(10) == ("dense", 10)  # as 8 and as 12 rows; 16: not clearly faster
    assert plan(16) == ("packed", 16) and plan(17) == ("dense", 17) and plan(4000) == ("dense", 4000)
    assert plan.used == {"packed", "dense"}
    assert str(plan) == "1 dense, 2-3 as 4 packed, 4-8 packed, 9-12 dense, 13-16 packed, more dense"
    usual = kernels.Plan(["int4", "dense"], None)
    assert usual(1) == ("int4", 1) and usual(13) == ("dense", 13)


@torch.inference_mode()
def test_rows_that_are_filled_up_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings that have every pass padded: logits stay those of the reference runtime, taps and all."""
    costs = [9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 1.0, 5.0]
    monkeypatch.setattr(measured, "seconds", lambda what, ways: {way: costs[n % 10] for n, way in enumerate(ways)})
    model = tiny_model("llama")
    target, reference = FusedTarget(model), ReferenceTarget(model)
    assert target.plan(3)[1] == 16 and target.head_plan(3)[1] == 16
    ids = torch.arange(6).view(2, 3)
    positions, out, seen = torch.arange(3).repeat(2, 1), [], []
    for runtime in (target, reference):
        cache, taps = runtime.new_cache(2), {1: torch.empty(0), runtime.num_layers: torch.empty(0)}
        x = runtime.embed(ids, positions)
        x = runtime.layers(x, 0, runtime.num_layers, positions, cache.mask(0, positions), cache, taps)
        out.append(runtime.readout(x))
        seen.append(taps)
    assert torch.allclose(out[0], out[1], atol=1e-5) and out[0].shape == (2, 3, runtime.vocab_size)
    assert all(torch.allclose(seen[0][layer], seen[1][layer], atol=1e-5) for layer in seen[1])
