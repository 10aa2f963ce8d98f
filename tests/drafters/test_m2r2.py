"""M2R2 with several exits: where tokens leave, what is run when, files, and the training of exits and routers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from tiny import greedy_reference
from transformers import PreTrainedModel
from zoo import PROMPTS, layers_run, m2r2, run

from specdec import SpecDecError, SpecDecoder
from specdec.drafters.m2r2 import M2R2, M2R2Drafter, M2R2Path
from specdec.models import drafter_folder, loading
from specdec.runtimes.transformers import TransformersTarget
from specdec.train.arla import ArlaSettings
from specdec.train.m2r2 import M2R2Settings, path_of
from specdec.train.settings import from_mapping
from specdec.train.trainer import train
from specdec.verifiers.confident import ConfidentVerifier


def scripted(drafter: M2R2Drafter, *sure: float) -> M2R2Drafter:
    """Routers that say, call by call, how sure they are; then that they are."""
    left = iter(sure)
    odds: Callable[..., torch.Tensor] = lambda passed, logits: torch.tensor([[next(left, 0.9)]]).logit()  # noqa: E731
    for router in drafter.network.routers or ():
        router.forward = odds  # type: ignore[method-assign]
    return drafter


def test_a_hard_token_goes_deeper_and_takes_the_earlier_ones_along(llama: PreTrainedModel) -> None:
    target = TransformersTarget(llama)
    early = scripted(m2r2(target, 3, (), False, True, exits=(1, 2), router=4), 0.9, 0.1, 0.9)
    assert layers_run(target, early)[:13] == [
        *((0, 1, 1), (0, 1, 1)),  # h and p of the first token, which leaves at layer 1
        *((0, 1, 1), (0, 1, 1)),
        *((1, 2, 2), (1, 2, 2)),  # the second goes on, h and p, with the first
        *((0, 1, 1), (0, 1, 1)),
        *((0, 1, 1), (0, 1, 1)),
        (1, 2, 2),  # h of the other two follows: scoring resumes at one layer for all
        (0, 2, 1),  # the last drafted token has not been run yet
        (2, 4, 5),
    ]
    projecting = scripted(m2r2(target, 1, ((1, 2), (3, 4)), True, False, exits=(1, 2), router=4), 0.9, 0.1, 0.1, 0.9)
    assert layers_run(target, projecting)[:4] == [(0, 1, 1), (0, 1, 1), (1, 2, 2), (3, 4, 2)]


def test_output_says_how_deep_tokens_went(llama: PreTrainedModel) -> None:
    target = TransformersTarget(llama)
    drafter = scripted(m2r2(target, 3, (), False, True, exits=(1, 2), router=4), 0.9, 0.7, 0.9, 0.1, 0.2, 0.3)
    _, loop = run(target, drafter, PROMPTS[:1], 4, verifier=ConfidentVerifier(0.8))
    # The first token leaves at once, the second at layer 2, the third nowhere: it is the full model's.
    assert loop.metrics[0].exit_layers == [1, 2]
    assert loop.metrics[0].exit_shares == {1: 0.25, 2: 0.25, 4: 0.5}


@pytest.mark.parametrize("exits", [(3,), (2, 1), (0,), (1, 1)])
def test_exits_off_the_path_are_refused(llama: PreTrainedModel, exits: tuple[int, ...]) -> None:
    with refused("exits of an M2R2 path must be rising layers before its end"):
        M2R2(M2R2Path(3, (), exits=exits), TransformersTarget(llama))
    with pytest.raises(SpecDecError, match=r"at the end of a segment; got \[2\] on a path that ends at 4"):
        M2R2(M2R2Path(0, ((1, 3), (3, 4)), exits=(2,)), TransformersTarget(llama))


def test_options_shape_what_is_drafted(llama: PreTrainedModel) -> None:
    target = TransformersTarget(llama)
    for nodes in (1, 6, 9):
        _, loop = run(target, m2r2(target, 0, ((2, 4),), True, False, nodes=nodes), PROMPTS[:1], 20)
        steps = loop.metrics[0]
        assert max(steps.per_step_drafted) <= 4 and steps.num_draft_tokens <= nodes * steps.num_spec_steps
    bad: list[tuple[dict[str, Any], str]] = [
        ({"nodes": 0}, "nodes must be greater than or equal to 1; got 0"),
        ({"width": 0}, "width must be greater than or equal to 1; got 0"),
        ({"exit_confidence": 2}, r"exit_confidence must be less than or equal to 1; got 2"),
    ]
    for options, message in bad:
        with pytest.raises(SpecDecError, match=message):
            M2R2Drafter(M2R2(M2R2Path(2), target), **options)


def common(answers: Path, output: Path) -> dict[str, Any]:
    values: dict[str, Any] = {"prompts": [str(answers)], "output": str(output), "dtype": "float32", "minutes": None}
    return values | {"steps": 60, "rows": 4, "window": 8, "fit_tokens": 200, "eval_fraction": 0.15}


PATHS: list[dict[str, Any]] = [
    {"exit_layer": 3, "exits": [1, 2], "rank": 4, "draft_steps": 1},
    {"segments": [[1, 2], [3, 4]], "exits": [2], "final_projection": True, "rank": 4},
]


@pytest.mark.parametrize("path", PATHS)
def test_exits_and_their_routers_are_trained_and_draft(path: dict[str, Any], answers: Path, tmp_path) -> None:
    model = loading.load("tiny")[0]
    first, second = tmp_path / "drafter", tmp_path / "routed"
    recipe = common(answers, first) | {"method": "m2r2", "draft_vocab": 60, "relative_rate": 0.1} | path
    train(from_mapping(M2R2Settings, recipe, "test"))
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    sooner = path["exits"]
    assert min(losses[1:]) < losses[0]
    assert all(f"agree@{layer}" in lines[-2] for layer in sooner)
    routing = common(answers, second) | {"method": "arla", "drafter": str(first), "width": 4, "draft_vocab": 0}
    train(from_mapping(ArlaSettings, routing, "test"))
    config = drafter_folder.read_config(second)
    assert tuple(config["path"]["exits"]) == tuple(sooner) and config["router"] == 4
    decoder = SpecDecoder(model, None, drafter=str(second), runtime="transformers")
    assert len(decoder.drafter.network.routers) == len(sooner) + 1  # type: ignore[attr-defined]
    assert decoder.generate(PROMPTS[0], max_new_tokens=12).token_ids == greedy_reference(model, PROMPTS[0], 12)


def test_exits_scale_with_the_depth_of_the_model(llama: PreTrainedModel) -> None:
    given = {"method": "m2r2", "exit_layer": 15, "exits": [8], "layers_of": 30}
    assert path_of(from_mapping(M2R2Settings, given, "test"), TransformersTarget(llama)).exits == (1,)
    given = {"method": "m2r2", "segments": [[8, 15], [15, 30]], "exits": [15], "layers_of": 30}
    given["final_projection"] = True
    path = path_of(from_mapping(M2R2Settings, given, "test"), TransformersTarget(llama))
    assert path.segments == ((1, 2), (2, 4)) and path.exits == (2,)
    with pytest.raises(SpecDecError, match="give 'segments' or 'exit_layer'"):
        from_mapping(M2R2Settings, {"method": "m2r2", "exits": [3]}, "test")
