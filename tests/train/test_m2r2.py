"""M2R2's method: paths, the layers that residuals run ahead to, rates, alignment."""

import pytest
import torch
from tiny import tiny_model

from specdec.runtimes.transformers import TransformersTarget
from specdec.train.m2r2 import M2R2Method, M2R2Settings, path_of
from specdec.train.settings import from_mapping, load_settings
from specdec.train.trainer import training_target


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
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


def test_given_paths_scale_with_the_depth_of_the_model() -> None:
    target = TransformersTarget(tiny_model())  # 4 layers, the paths were chosen on 30
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


LFM2 = [2, 5, 8, 10, 12, 14]  # of 16 layers those with attention


@pytest.mark.parametrize(
    ("layers", "attention", "segments"),
    [
        (24, range(3, 24, 4), ((19, 20),)),  # Qwen3.5 0.8B and 2B
        (32, range(3, 32, 4), ((23, 24), (27, 28))),  # 4B
        (16, LFM2, ((12, 13),)),
        (40, [5, 15, 25, 35], ((35, 36),)),  # Granite 4: none in the range
        (52, [35, 38, 39, 41, 43], ((38, 40),)),  # Nemotron-H: attention with the MLP behind it, not an MLP alone
    ],
)
def test_given_paths_leave_out_recurrent_layers(layers: int, attention: list[int], segments: tuple[object]) -> None:
    target = TransformersTarget(tiny_model("lfm2"))
    target.num_layers, target.recurrent_layers = layers, frozenset(range(layers)) - {*attention}
    target.linears = lambda layer: {"mlp.up_proj": (8, 8)}  # type: ignore[assignment, method-assign, return-value]
    path = path_of(load_settings(M2R2Settings, "m2r2", "m2r2", {}), target)
    assert path.segments == segments
    assert sorted(path.adapters) == [layer for lo, hi in segments for layer in range(lo, hi)]  # type: ignore[misc]
