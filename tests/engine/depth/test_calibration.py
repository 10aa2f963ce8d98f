"""Calibration: what sources say is held against what was accepted, in the row first, over all rows second."""

import math
import random
from collections.abc import Callable

import pytest
import torch

from specdec.engine.depth.calibration import (
    COUNT_AFTER_CHANGE,
    FIRST,
    MEMORY,
    RAW_PROBABILITIES,
    DecayedCounts,
    History,
    Outcome,
    rates,
    table,
)
from specdec.runtimes.draft_path import KNOTS, calibrated
from specdec.speculation.candidates import Candidates


def tree(*nodes: tuple[int, int, float]) -> Candidates:
    """The token, the parent and the probability of each node, of one source."""
    tokens, parents, said = (list(part) for part in zip(*nodes, strict=True))
    return Candidates([math.log(p) for p in said], tokens, parents, [said])


def histories() -> tuple[History, History]:
    """Of a row, and of all rows."""
    return History(2, 1, 4), History(2, 1, 4, MEMORY)


def teach(right: Callable[[float], float], count: int, *into: History, source: int = 0, seed: int = 0) -> None:
    """Candidates of which those said to be right with p are right with ``right(p)``."""
    rng = random.Random(seed)
    for _ in range(count):
        p = 1 / (1 + math.exp(-rng.uniform(-4, 5)))
        hit = rng.random() < right(p)
        found = Candidates([0.0], [7], [0], [[p if n == source else 0.0] for n in range(2)])
        for history in into:
            history.add(Outcome.of(int(hit), 0, 0, found, [7 if hit else 8]), 0, 1, 0.0)


def read(p: float, row: History, common: History, source: int = 0) -> float:
    return float(calibrated(torch.tensor([p]), torch.tensor([table(row, common, source)])))


@pytest.mark.parametrize("p", [0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_what_an_unknown_source_says_counts(p: float) -> None:
    assert read(p, *histories()) == pytest.approx(p, abs=0.012)
    raw = RAW_PROBABILITIES[:-1]
    assert [read(said, *histories()) for said in raw] == pytest.approx(raw, abs=1e-3)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.5])
def test_tables_find_out_how_likely_a_source_is_right(power: float) -> None:
    row, common = histories()
    teach(lambda p: p**power, 6000, common)
    for p in (0.05, 0.2, 0.5, 0.8, 0.95):
        assert read(p, row, common) == pytest.approx(p**power, abs=0.09)
    assert read(0.5, row, common, source=1) == pytest.approx(0.5, abs=0.01)  # each source has a table of its own


def test_a_row_is_measured_by_all_rows_first_and_by_itself_later() -> None:
    row, common = histories()
    teach(lambda p: 0.9, 4000, common)
    assert read(0.5, row, common) > 0.85
    teach(lambda p: 0.1, 20, row, common)
    assert 0.5 < read(0.5, row, common) < 0.88
    teach(lambda p: 0.1, 1500, row)
    assert read(0.5, row, common) < 0.4 and read(0.5, History(2, 1, 4), common) > 0.8


def test_what_was_seen_long_ago_counts_little_and_so_does_what_is_forgotten() -> None:
    old = DecayedCounts(1, 50.0)
    for hit in [1.0] * 500 + [0.0] * 50:
        old.add(0, hit)
    assert old.trials[0] == pytest.approx(50) and 0.25 < old.mean(0, 0.5, 0.0) < 0.45
    other = DecayedCounts(2, 1000.0)
    for _ in range(800):
        other.add(0, 1.0)
    other.add(1, 1.0)
    other.forget()
    assert other.trials == other.hits == pytest.approx([COUNT_AFTER_CHANGE, 1.0])
    for _ in range(40):
        other.add(0, 0.0)
    assert other.mean(0, 0.5, 4.0) < 0.4


def test_candidates_behind_wrong_ones_say_nothing_and_siblings_do() -> None:
    found = tree((7, 0, 0.5), (8, 0, 0.3), (9, 1, 0.6), (10, 2, 0.7), (11, 4, 0.9))
    seen = Outcome.of(2, 0, 0, found, [8, 10, 5])
    near = {0.5: 4, 0.3: 3, 0.7: 4, 0.9: 6}  # the lower of the two knots
    assert {(knot, hit) for _, knot, weight, hit in seen.candidates if weight > 0.5} <= {
        *((near[p], 0.0) for p in (0.5, 0.9)),
        *((near[p] + up, 1.0) for p in (0.3, 0.7) for up in (0, 1)),
        (7, 0.0),
    }
    assert sum(weight for _, _, weight, _ in seen.candidates) == pytest.approx(4)  # not 9, behind 7
    assert sum(weight * hit for _, _, weight, hit in seen.candidates) == pytest.approx(2)


def test_a_level_counts_where_the_free_draft_has_nothing_right() -> None:
    assert Outcome.of(2, 3).levels == [(0, 1.0), (1, 1.0), (2, 0.0)] and Outcome.of(0, 0).levels == []
    assert Outcome.of(2, 3, 1).levels == [(0, 1.0), (1, 0.0)]
    assert Outcome.of(2, 2, 1).levels == [(0, 1.0)] and Outcome.of(2, 3, 3).levels == []


def test_a_level_whose_token_was_right_but_not_scored_added_nothing() -> None:
    found = tree((7, 0, 0.5), (8, 0, 0.3))
    assert Outcome.of(0, 1, 0, found, [8]).levels == [(0, 0.0)]


def test_positions_never_reached_are_taken_to_be_like_the_one_before() -> None:
    row, common = histories()
    assert rates(row, common, 0) == [FIRST] * 4
    for _ in range(400):
        common.add(Outcome.of(1, 2), 0, 1, 0.0)
    first, second, *rest = rates(row, common, 0)
    assert first > 0.95 and second < 0.15 and rest == [pytest.approx(second)] * 2
    assert len(KNOTS) == len(RAW_PROBABILITIES)
