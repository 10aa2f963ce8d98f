"""Measured costs are kept, reused, and measured again when the file is unusable or the machine is another."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tiny import tiny_model

from specdec import SpecDecoder
from specdec.drafters.none import NoDrafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.engine.depth import AutoDepth, StepReport
from specdec.engine.depth import measure as costs
from specdec.runtimes.reference import ReferenceTarget
from specdec.speculation.draft import Draft
from specdec.verifiers.exact import ExactVerifier


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(costs, "SECONDS", 0.0)


@pytest.fixture
def once(monkeypatch) -> None:
    """Everything is timed once, which is enough where no figure counts."""
    monkeypatch.setattr(costs, "REPEATS", 1)


@pytest.mark.usefixtures("once")
def test_costs_are_measured_once_and_again_when_something_changes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    target, verifier = ReferenceTarget(tiny_model()), ExactVerifier()
    first = costs.costs(target, PromptLookupDrafter(), verifier)
    assert set(first.score) == set(costs.SIZES) and min(first.score.values()) > 0 and min(first.drafts[0]) >= 0
    assert costs.costs(target, PromptLookupDrafter(), verifier) == first  # times never repeat by chance
    (kept,) = (tmp_path / "costs").iterdir()
    kept.write_text("{}")
    assert costs.costs(target, PromptLookupDrafter(), verifier) != first
    costs.costs(target, NoDrafter(), verifier)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    costs.costs(target, NoDrafter(), verifier)
    assert len(list((tmp_path / "costs").iterdir())) == 3


@pytest.mark.usefixtures("once")
def test_what_the_first_draft_makes_is_made_before_a_request_also_where_costs_are_stored(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    target, limits = ReferenceTarget(tiny_model()), list[int]()
    costs.costs(target, PromptLookupDrafter(), ExactVerifier())
    drafter = PromptLookupDrafter()
    monkeypatch.setattr(drafter, "propose", lambda state, limit: limits.append(limit) or Draft.empty(1))
    costs.costs(target, drafter, ExactVerifier())
    assert limits


@pytest.mark.usefixtures("once")
def test_an_unwritable_cache_only_costs_time(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "file"))
    assert costs.costs(ReferenceTarget(tiny_model()), NoDrafter(), ExactVerifier()).drafts == ((0.0, 0.0),)


@pytest.mark.usefixtures("once")
def test_a_planted_file_is_read_as_data(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    target = ReferenceTarget(tiny_model())
    costs.costs(target, NoDrafter(), ExactVerifier())
    (kept,) = (tmp_path / "costs").iterdir()
    data = json.loads(kept.read_text())
    data["score"] = {str(n): 5.0 for n in costs.SIZES}
    kept.write_text(json.dumps(data))
    assert costs.costs(target, NoDrafter(), ExactVerifier()).score[1] == 5.0
    data["score"]["1"] = -1.0
    kept.write_text(json.dumps(data))
    assert costs.costs(target, NoDrafter(), ExactVerifier()).score[1] not in (5.0, -1.0)


def test_figures_that_requests_contradict_are_corrected_for_good(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    target, drafter, verifier = ReferenceTarget(tiny_model()), PromptLookupDrafter(), ExactVerifier()
    costs.costs(target, drafter, verifier)
    (file,) = (tmp_path / "costs").iterdir()
    data = json.loads(file.read_text()) | {"score": {str(n): 75.0 + n for n in costs.SIZES}, "drafts": [[47.0, 47.0]]}
    file.write_text(json.dumps(data))  # as a busy machine would have it
    policy = AutoDepth(costs.costs(target, drafter, verifier))
    row = policy.begin()
    for _ in range(30):
        policy.observe(StepReport([row], [2], [1], 3, 2 * 1.3, 6.3))
    found = policy.costs()
    assert 5 < found.score[1] < 7 and 1 < found.drafts[0][0] < 1.6 and found.yields[0][0][0] == 1.0
    costs.store(target, drafter, found)
    assert costs.costs(target, drafter, verifier) == found


def test_the_least_of_several_timings_counts(monkeypatch) -> None:
    """Passes take 60 ms while something else runs, and 6 ms otherwise; those over two tokens never had luck."""
    slow = iter((10, 1, 10))
    scoring = lambda target, repeats: dict.fromkeys(costs.SIZES, 6.0 * next(slow)) | {2: 60.0}  # noqa: E731
    monkeypatch.setattr(costs, "time_scoring", scoring)
    monkeypatch.setattr(costs, "time_drafting", lambda *args: 1.2)
    assert costs.measure(None, [NoDrafter()], None) == [costs.Costs(dict.fromkeys(costs.SIZES, 6.0), ((1.2, 1.2),))]


def test_drafters_are_timed_in_turns_so_that_a_busy_second_hides_neither(monkeypatch) -> None:
    """All that runs in the first two rounds takes ten times as long."""
    rounds = iter((10, 10, 1))
    busy = [1]

    def scoring(target: Any, repeats: int) -> dict[int, float]:
        busy[0] = next(rounds)
        return dict.fromkeys(costs.SIZES, 6.0 * busy[0])

    monkeypatch.setattr(costs, "time_scoring", scoring)
    monkeypatch.setattr(costs, "SECONDS", 0.0)
    monkeypatch.setattr(costs, "time_drafting", lambda target, drafter, *_: busy[0] * drafter.cost)
    short, long = costs.measure(None, [Mock(num_exits=1, cost=0.5), Mock(num_exits=1, cost=2.0)], None)
    assert short.drafts == ((0.5, 0.5),) and long.drafts == ((2.0, 2.0),) and short.score == long.score


def test_each_exit_and_the_first_token_of_a_draft_have_prices_of_their_own(monkeypatch) -> None:
    """One token takes 2 (exit 0) or 4 (exit 1); of four, each takes 1.25 or 2.5. A lookup that finds none takes 0."""
    monkeypatch.setattr(costs, "time_scoring", lambda target, repeats: dict.fromkeys(costs.SIZES, 6.0))
    alone = lambda target, drafter, verifier, depth, exit: (2.0 if depth == 1 else 1.25) * (1 + (exit or 0))  # noqa: E731
    monkeypatch.setattr(costs, "time_drafting", alone)
    one, two = costs.measure(None, [Mock(num_exits=1), Mock(num_exits=2)], None)
    assert one.drafts == ((2.0, 1.0),) and two.drafts == ((2.0, 1.0), (4.0, 2.0))
    monkeypatch.setattr(costs, "time_drafting", lambda *args: 0.0)
    assert costs.measure(None, [Mock(num_exits=1)], None)[0].drafts == ((0.0, 0.0),)


def test_what_requests_find_out_is_kept_at_most_once_a_minute(monkeypatch) -> None:
    kept: list[costs.Costs] = []
    monkeypatch.setattr("specdec.api.decoder.store", lambda target, drafter, found: kept.append(found))
    decoder = SpecDecoder(tiny_model(), None, drafter="prompt-lookup")
    for _ in range(3):
        decoder.generate([5, 6, 5, 6, 5], max_new_tokens=8)
    assert len(kept) == 1 and kept[0].score.keys() == {1, 2, 4, 8, 16}
    monkeypatch.setattr("specdec.api.decoder.KEEP_EVERY", 0.0)
    decoder.generate([5, 6, 5, 6, 5], max_new_tokens=8)
    assert len(kept) == 2


def test_no_pass_is_timed_right_after_a_much_larger_one(monkeypatch) -> None:
    """Such a pass takes longer than it does among steps of a request."""
    sizes, run = list[int](), costs._pass

    def spy(target: Any, cache: Any, start: int, count: int, first: int = 0) -> None:
        sizes.append(count)
        run(target, cache, start, count, first)

    monkeypatch.setattr(costs, "_pass", spy)
    costs.time_scoring(ReferenceTarget(tiny_model()), 1)
    assert sizes[1:].count(1) >= 2 and all(before <= 2 * after for before, after in pairwise(sizes[1:]))
