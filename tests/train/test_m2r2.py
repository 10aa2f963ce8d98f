"""M2R2's method: paths, the layers that residuals run ahead to, rates, alignment."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from training import PATHS, recipe

from specdec.drafters.m2r2 import M2R2Path, load_network
from specdec.models import loading
from specdec.runtimes.reference import ReferenceTarget
from specdec.train import data, states
from specdec.train.batches import assemble, windows
from specdec.train.data import TrainingAnswer
from specdec.train.m2r2 import M2R2Method, path_of
from specdec.train.m2r2_settings import M2R2Settings, path_states
from specdec.train.settings import from_mapping, load_settings
from specdec.train.student import draft_steps
from specdec.train.trainer import train, training_target


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "phi"])
def test_rates_follow_the_size_of_the_weights(kind: str) -> None:
    sizes = []
    for factor in (1.0, 10.0):
        model = tiny_model(kind)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "layers.2." in name or ".h.2." in name:
                    weight.mul_(factor)
        target = training_target(model)
        some = {"segments": [[2, 3]], "final_projection": True, "rank": 4, "prompts": ["-"], "output": "-"}
        method = M2R2Method(from_mapping(M2R2Settings, some, "test"), target)
        masters = method.build(None)
        sizes.append(
            {name: method.parameter_scale(name, p) for name, p in masters.named_parameters() if name.endswith("/up")}
        )
    small, large = sizes
    assert small and all(large[name] == pytest.approx(10 * size) for name, size in small.items())


def test_each_residual_runs_ahead_to_the_layer_that_its_rate_says() -> None:
    early, late = M2R2Path(6, (), False, 4, {0: ["mlp.up_proj"]}), M2R2Path(0, ((20, 24),), True, 4)
    assert early.target_layers(30) == [5, 10, 15, 20, 25, 30]
    behind = dataclasses.replace(early, exits=(2,))  # p begins anew behind an exit
    assert behind.target_layers(30) == [15, 30, 9, 16, 23, 30]
    assert late.target_layers(30) == [20, 21, 22, 23, 24, 30]
    assert M2R2Path(3, ((26, 28),), False, 4).target_layers(30) == [3, 26, 28, 30]
    for path in (*PATHS.values(), early, late):
        assert len(path.target_layers(30)) == path.num_residuals()


def test_alignment_brings_a_layer_before_the_exit_nearer_to_where_it_runs_ahead_to(
    answers: Path, tmp_path: Path
) -> None:
    paper = {"exit_layer": 2, "segments": [], "final_projection": False, "draft_steps": 1, "steps": 60}
    paper |= {"relative_rate": 0.1, "draft_vocab": 0}
    model, _ = loading.load("tiny")
    target, cosines = training_target(model), {}
    some = [a for a in data.read([answers]) if isinstance(a, TrainingAnswer)]
    for align in (0.0, 3.0):
        train(recipe(answers, tmp_path / f"{align}", align=align, **paper))
        folder = tmp_path / f"{align}"
        network = load_network(target, folder)
        aims = network.path.target_layers(4)
        assert aims == [2, 4]
        wanted = dataclasses.replace(path_states(network.path, 4), hidden=(2, 4))
        records = states._records(states._teach(target, some, wanted), wanted)
        batch = assemble(records, windows(records, 8), 8, target.device)
        exits, _ = next(draft_steps(network, target, batch, 1, watched=True))
        pairs = zip(exits[-1][1], aims, strict=True)
        cosines[align] = [
            float(torch.cosine_similarity(p.detach(), batch.hidden[aim], -1)[batch.valid].mean()) for p, aim in pairs
        ]
    assert cosines[3.0][0] > cosines[0.0][0] + 0.1
    assert cosines[3.0][1] > cosines[0.0][1] - 0.01  # the exit, which KL brings there, too


def test_given_paths_scale_with_the_depth_of_the_model() -> None:
    target = ReferenceTarget(tiny_model())  # 4 layers, the paths were chosen on 30
    given = {"segments": [[20, 24]], "layers_of": 30}
    projected, paper = (
        path_of(load_settings(M2R2Settings, "m2r2", name, changes), target)
        for name, changes in (("m2r2", given), ("m2r2-paper", {}))
    )
    assert (projected.exit_layer, projected.segments) == (0, ((3, 4),))
    assert (paper.exit_layer, paper.segments) == (1, ())
    for layers, segment in ((1, (0, 1)), (2, (1, 2)), (12, (8, 10)), (24, (16, 19)), (30, (20, 24)), (60, (40, 48))):
        target.num_layers = layers
        target.linears = lambda layer: {"mlp.up_proj": (8, 8)}  # type: ignore[assignment, method-assign, return-value]
        path = path_of(load_settings(M2R2Settings, "m2r2", None, given), target)
        assert (path.exit_layer, path.segments, path.final_projection) == (0, (segment,), True)
