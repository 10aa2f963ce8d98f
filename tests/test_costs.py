"""Measured costs are kept, reused, and measured again when the file is unusable or the machine is another."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from conftest import tiny_model

from specdec import costs
from specdec.drafters.none import NoDrafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.target import ReferenceTarget
from specdec.verifiers.exact import ExactVerifier


def test_costs_are_measured_once_and_again_when_something_changes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    target, verifier = ReferenceTarget(tiny_model()), ExactVerifier()
    first = costs.costs(target, PromptLookupDrafter(), verifier)
    assert set(first.score) == set(costs.ROWS) and min(first.score.values()) > 0 and first.draft >= 0
    assert costs.costs(target, PromptLookupDrafter(), verifier) == first  # times never repeat by chance
    (kept,) = (tmp_path / "costs").iterdir()
    kept.write_text("{}")
    assert costs.costs(target, PromptLookupDrafter(), verifier) != first
    costs.costs(target, NoDrafter(), verifier)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    costs.costs(target, NoDrafter(), verifier)
    assert len(list((tmp_path / "costs").iterdir())) == 3


def test_an_unwritable_cache_only_costs_time(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "file"))
    assert costs.costs(ReferenceTarget(tiny_model()), NoDrafter(), ExactVerifier()).draft == 0


def test_a_planted_file_is_read_as_data(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    target = ReferenceTarget(tiny_model())
    costs.costs(target, NoDrafter(), ExactVerifier())
    (kept,) = (tmp_path / "costs").iterdir()
    data = json.loads(kept.read_text())
    data["score"] = {str(n): 5.0 for n in costs.ROWS}
    kept.write_text(json.dumps(data))
    assert costs.costs(target, NoDrafter(), ExactVerifier()).score[1] == 5.0
    data["score"]["1"] = -1.0
    kept.write_text(json.dumps(data))
    assert costs.costs(target, NoDrafter(), ExactVerifier()).score[1] not in (5.0, -1.0)
