"""Prefetching on or off, against scripted machines: the better one is found, and little is lost on the way."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from specdec.runtimes.experts.offload import SHARE, WINDOW, Controller

LAYERS = 4


@pytest.fixture
def decode(monkeypatch):
    """Passes on a machine that is slowed down by ``other(pass)``, and whose layers take 20 % more or less at random.

    cost(pass, on): seconds of a layer but for that. Returns, for each pass, whether prefetching was on.
    """

    def run(
        passes: int,
        cost: Callable[[int, bool], float],
        other=lambda number: 1.0,
        seed=0,
        **options: bool,
    ) -> list[bool]:
        clock, sides, control, noise = 0.0, [], Controller(**options), random.Random(seed)
        monkeypatch.setattr("time.perf_counter", lambda: clock)
        for number in range(passes):
            for row in range(LAYERS):
                control.enter(row, 1)
                stall = 20 if noise.random() < 0.005 else 1
                clock += cost(number, control.on) * other(number) * stall * math.exp(noise.gauss(0, 0.2))
            sides.append(control.on)
        return sides

    return run


def lost(sides: list[bool], cost: Callable[[int, bool], float]) -> float:
    """By how much more time these took than the better side of each pass."""
    best = sum(min(cost(number, True), cost(number, False)) for number in range(len(sides)))
    return sum(cost(number, on) for number, on in enumerate(sides)) / best - 1


def waves(number: int) -> float:
    return 1 + 0.3 * math.sin(number / 37)


@pytest.mark.parametrize("better", [True, False])
@pytest.mark.parametrize(("by", "found"), [(1.08, 0.7), (1.25, 0.85), (2.0, 0.9)])
def test_the_better_side_is_found_on_a_noisy_machine(decode, better, by, found):
    def cost(number: int, on: bool) -> float:
        return 0.001 if on == better else 0.001 * by

    runs = [decode(300, cost, waves, seed) for seed in range(20)]
    right = [sum(on == better for on in sides) / len(sides) for sides in runs]
    assert sum(right) / len(right) > found and min(right) > 0.5
    first = 2 * WINDOW * (by - 1) / 300  # of which nothing is known
    assert max(lost(sides, cost) for sides in runs) < first + 2 * SHARE


def test_sides_that_change_are_followed(decode):
    def cost(number: int, on: bool) -> float:
        return 0.001 * (1.15 if not on else 1.0 if number // 500 % 2 == 0 else 1.3)

    runs = [decode(2000, cost, waves, seed) for seed in range(10)]
    assert max(lost(sides, cost) for sides in runs) < 2 * SHARE
    assert all(sum(sides[800:1000]) < 60 and sum(sides[1300:1500]) > 140 for sides in runs)


def test_a_machine_that_is_slow_whenever_prefetching_is_tried_does_not_turn_it_off(decode):
    def cost(number: int, on: bool) -> float:
        return 0.001 * ((5 if number < 4 * WINDOW else 1) if on else 1.5)

    assert sum(decode(2000, cost)[1000:]) > 900


def test_what_is_given_stays_on(decode):
    assert all(decode(200, lambda _, on: 0.002 if on else 0.001, adaptive=False))


def test_pauses_and_prompts_are_not_compared(monkeypatch):
    clock, control = 0.0, Controller()
    monkeypatch.setattr("time.perf_counter", lambda: clock)
    for number in range(40 * WINDOW):
        tokens = 64 if number % 7 == 0 else 1
        for row in range(LAYERS):
            control.enter(row, tokens)
            clock += 30 if number % 11 == 0 else 0.5 if tokens > 1 else 0.002 if control.on else 0.001
    assert control.ratios and all(1.9 < ratio < 2.1 for ratio in control.ratios)
