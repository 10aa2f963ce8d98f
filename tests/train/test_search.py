"""The search for a path: what is predicted, measured, chosen and trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from training import evaluations, recipe, searched

from specdec import SpecDecError, SpecDecoder
from specdec.drafters.m2r2 import M2R2, M2R2Drafter, M2R2Path, load_network
from specdec.engine.measure import Timings
from specdec.models import drafter_folder, loading
from specdec.runtimes.target import Target
from specdec.train import data, search, states
from specdec.train.batches import assemble, windows
from specdec.train.data import TrainingAnswer
from specdec.train.evaluate import evaluate, predict_speedup
from specdec.train.m2r2 import M2R2Method
from specdec.train.student import fit_projections
from specdec.train.trainer import train, training_target


def test_the_predicted_speedup_weighs_acceptance_against_measured_costs() -> None:
    costs = Timings({1: 10.0, 2: 11.0, 3: 12.0, 5: 14.0}, drafts=((1.0, 1.0),))
    # One draft: 1.5 tokens in 1 + 11 of 10 units; a second adds 0.4 tokens for 2 more; a third too little.
    assert predict_speedup([0.5, 0.4, 0.05], costs) == (pytest.approx(1.9 * 10 / 14), 2)
    assert predict_speedup([0.5], costs, nodes=[4]) == (1.0, 0)  # its tree costs 14 to score


@pytest.fixture
def priced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs of layers without timing."""
    score = {n: 1 + 0.02 * n for n in (1, 2, 4, 8)}
    costs = [Timings(score, ((0.1 * n, 0.1 * n),)) for n in (1, 2)]
    monkeypatch.setattr(search, "draft_costs", lambda *args: costs)


def test_the_search_chooses_the_path_of_largest_predicted_speedup_and_trains_it(
    answers: Path, tmp_path: Path, priced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    train(searched(answers, out))
    kept = json.loads((out / "search.json").read_text())
    assert {tuple(row["segment"]) for row in kept["table"]} == {(2, 3), (2, 4)}
    best = max(kept["table"], key=lambda row: row["speedup"])
    assert best["tokens"] == pytest.approx(evaluations(out)[0]["score"], abs=0.15)  # as the first evaluation finds it
    path = drafter_folder.read_config(out)["path"]
    assert path["segments"] == [kept["chosen"]] == [best["segment"]] and path["final_projection"]
    assert not (out / "states" / "search").exists()
    monkeypatch.setattr(search, "acceptance_chains", None)  # nothing is searched again
    train(searched(answers, out), resume=True)


def test_drafts_of_the_search_are_those_of_a_network_that_training_fits(answers: Path, tmp_path: Path) -> None:
    target = training_target(tiny_model("llama", eos_token_id=None))
    some = [a for a in data.read([answers]) if isinstance(a, TrainingAnswer)]
    records = states.compute_states(tmp_path / "states", target, some, states.StateSelection((2, 3), (2, 3, 4)))
    found = search.acceptance_chains(target, None, 2, records, records, searched(answers, tmp_path / "out"))
    assert found.keys() == {(2, 3), (2, 4)}
    network = M2R2(M2R2Path(0, ((2, 4),), True), target)
    rows = windows(records, 8)
    batches = [assemble(records, rows[i : i + 4], 8, target.device) for i in range(0, len(rows), 4)]
    fit_projections(network, target, lambda: batches)
    with torch.no_grad():
        fitted = evaluate(network, target, batches)
    assert found[2, 4] == pytest.approx(fitted["chain"], abs=0.02)


def test_a_path_whose_later_drafts_fail_is_worth_what_is_accepted_of_it() -> None:
    """Cheap layers that agree in the first draft alone, against dear ones that go on: no training is assumed."""
    score = {n: 10.0 for n in (1, 2, 4, 8)}
    costs = [Timings(score, ((cost, cost),)) for cost in (0.1, 1.0)]
    chains = {(2, 3): [0.5, 0.1, 0.0, 0.0], (2, 4): [0.5, 0.4, 0.3, 0.2]}
    best, other = search.rank(chains, costs)
    assert best == search.SegmentCandidate((2, 4), 0.1, 2.4, pytest.approx(24 / 14, abs=1e-3), 4)
    assert other == search.SegmentCandidate((2, 3), 0.01, 1.6, pytest.approx(16 / 10.2, abs=1e-3), 2)


def test_the_search_measures_segments_of_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(target: Target, drafters: list[M2R2Drafter], verifier: Any) -> list[Timings]:
        assert all(drafter.nodes is None for drafter in drafters)  # as users run them
        lengths = [hi - lo for drafter in drafters for lo, hi in drafter.network.path.segments]
        return [Timings({1: 10.0}, ((length + 1.0,) * 2,)) for length in lengths]

    monkeypatch.setattr(search, "measure", measured)
    costs = search.draft_costs(SpecDecoder(tiny_model("llama", num_hidden_layers=8), None, drafter="none"), None)
    assert [c.drafts[-1][1] for c in costs] == [2.0, 3.0, 4.0, 5.0]


def test_a_part_of_the_neurons_is_chosen_once_trained_and_begun_from(answers: Path, tmp_path: Path) -> None:
    out, more = tmp_path / "out", tmp_path / "more"
    settings = recipe(answers, out, neurons=32, steps=4)
    train(settings)
    kept = {int(layer): torch.tensor(some) for layer, some in json.loads((out / "neurons.json").read_text()).items()}
    assert kept.keys() == {2, 3} and not (out / "states" / "neurons").exists()
    train(settings.model_copy(update={"steps": 6}), resume=True)
    train(recipe(answers, more, init=str(out), segments=[], final_projection=False, steps=2))
    target = training_target(loading.load("tiny")[0])
    for folder in (out, more):
        network = load_network(target, folder)
        assert network.path.neurons == 32
        for layer, some in kept.items():
            assert torch.equal(network.adapters.kept(layer), some)  # type: ignore[arg-type]
            assert not torch.equal(some, torch.arange(32))
        assert any(bool(up.any()) for _, up in network.adapters.factors(2).values())
    with pytest.raises(SpecDecError, match="runs 32 neurons; leave out the setting 'neurons'"):
        train(recipe(answers, tmp_path / "wider", init=str(out), segments=[], neurons=48, steps=2))
    with pytest.raises(SpecDecError, match="runs 640 neurons of layer 2's MLP"):
        train(recipe(answers, tmp_path / "wrong", neurons=640))


def test_a_drafter_of_all_neurons_is_cut_to_a_part(answers: Path, tmp_path: Path) -> None:
    out, cut = tmp_path / "out", tmp_path / "cut"
    train(recipe(answers, out, steps=4))
    settings = recipe(answers, cut, init=str(out), segments=[], final_projection=False, neurons=32, steps=1)
    train(settings)
    kept = {int(layer): torch.tensor(some) for layer, some in json.loads((cut / "neurons.json").read_text()).items()}
    target = training_target(loading.load("tiny")[0])
    method = M2R2Method(settings, target)
    method.neurons = kept
    whole, part = (load_network(target, out).state_dict(), method.read_parameters(out))
    for layer, some in kept.items():
        name = f"adapters.{layer}/mlp"
        assert torch.equal(part[f"{name}/gate_proj/up"], whole[f"{name}/gate_proj/up"][some])
        assert torch.equal(part[f"{name}/up_proj/up"], whole[f"{name}/up_proj/up"][some])
        assert torch.equal(part[f"{name}/down_proj/down"], whole[f"{name}/down_proj/down"][:, some])
        assert torch.equal(load_network(target, cut).adapters.kept(layer), some)  # type: ignore[arg-type]
