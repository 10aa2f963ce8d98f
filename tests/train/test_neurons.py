"""The neurons that a narrow path runs: chosen once, and kept by later runs."""

import json
from pathlib import Path

import pytest
import torch
from training import checkpoint_of, recipe

from specdec import SpecDecError
from specdec.drafters.m2r2 import load_network
from specdec.models import loading
from specdec.train.trainer import train, training_target


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
        assert any(bool(value.any()) for name, value in checkpoint_of(folder).items() if name.endswith("up"))
    with pytest.raises(SpecDecError, match="runs 32 neurons; leave out the setting 'neurons'"):
        train(recipe(answers, tmp_path / "wider", init=str(out), segments=[], neurons=48, steps=2))
    train(recipe(answers, tmp_path / "all", steps=1))
    with pytest.raises(SpecDecError, match="runs all neurons; leave out the setting 'neurons'"):
        train(recipe(answers, tmp_path / "cut", init=str(tmp_path / "all"), segments=[], neurons=32, steps=2))
    with pytest.raises(SpecDecError, match="runs 640 neurons of layer 2's MLP"):
        train(recipe(answers, tmp_path / "wrong", neurons=640))
    assert not [*tmp_path.glob("wrong/**/*.jsonl"), *tmp_path.glob("wrong/**/*.safetensors")]  # nothing was computed
    config = json.loads((out / "config.json").read_text())
    config["path"]["segments"] = [[2, 9]]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecDecError, match="does not fit a model of 4 layers"):  # one trained for a deeper model
        train(recipe(answers, tmp_path / "deep", init=str(out), segments=[], steps=2))
