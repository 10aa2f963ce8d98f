"""What is refused of EAGLE-3 and DSpark heads in the speculators format, whichever it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from heads import TAPS, config_of, save
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from specdec.drafters.dspark import DSparkDrafter
from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.drafters.speculators import PublicHeadDrafter
from specdec.runtimes.transformers import TransformersTarget

DRAFTERS: dict[str, tuple[type[PublicHeadDrafter], Callable[..., PublicHeadDrafter]]] = {
    "eagle3": (Eagle3Drafter, zoo.eagle3),
    "dspark": (DSparkDrafter, zoo.dspark),
}


@pytest.fixture
def target() -> TransformersTarget:
    return TransformersTarget(tiny_model())


@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"speculators_model_type": "dflash"}, "holds the drafter 'dflash', not '"),
        ({"transformer_layer_config": 5}, "head in the speculators format"),
        ({"layer": {"vocab_size": 50}}, "made for a model of vocabulary 50"),
        ({"layer": {"model_type": "mamba"}}, "has the model_type 'mamba'; only "),
        ({"layer": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
        ({"layer": {"hidden_size": 10**9}}, "hidden.size"),
        ({"layer": {"intermediate_size": 10**9}}, "intermediate_size"),
        ({"layer": {"num_key_value_heads": 3}}, "which do not divide them"),
        ({"taps": [1, 2, 9]}, r"reads layers \[1, 2, 9\]; this model has 4"),
        ({"taps": [1, 2]}, "tensor 'fc.weight' is"),
        ({"draft_vocab_size": 30}, "do not fit each other"),
        ({"draft_vocab_size": 98}, "draft_vocab_size"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(target, tmp_path: Path, kind: str, changes, text: str) -> None:
    load, make = DRAFTERS[kind]
    network, given = make(target).network, dict[str, Any](changes)
    if "taps" in given:
        given[TAPS[kind]] = given.pop("taps")
    if "layer" in given:
        layer = config_of(network, target, kind)["transformer_layer_config"]
        given["transformer_layer_config"] = layer | given.pop("layer")
    with refused(text):
        load.load(target, str(save(tmp_path / "head", network, target, kind, **given)))


@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize(
    ("name", "tensor", "text"),
    [
        ("d2t", torch.full((49,), 96), "names tokens that the model does not have"),
        ("norm.weight", torch.full((32,), torch.nan), "holds NaN"),
        ("norm.weight", torch.zeros(1), r"tensor 'norm.weight' is \(1,\)"),
        ("norm.weight", None, "tensor 'norm.weight' is missing"),
        ("d2t", None, "does not say which"),
    ],
)
def test_broken_tensors_are_refused(target, tmp_path: Path, kind: str, name: str, tensor, text: str) -> None:
    load, make = DRAFTERS[kind]
    folder = save(tmp_path / "head", make(target).network, target, kind)
    tensors = load_file(folder / "model.safetensors")
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor[: len(tensors[name])]
    save_file(tensors, folder / "model.safetensors")
    with refused(text):
        load.load(target, str(folder))


def test_a_truncated_file_is_refused(target, tmp_path: Path) -> None:
    folder = save(tmp_path / "head", zoo.dspark(target).network, target, "dspark")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with refused("truncated"):
        DSparkDrafter.load(target, str(folder))
