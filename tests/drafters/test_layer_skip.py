"""Layer skipping: parts of layers, and what is drafted without them."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import FAMILIES, greedy_reference, tiny_model
from transformers import PreTrainedModel
from zoo import PROMPTS

from specdec import SpecDecoder
from specdec.drafters.layer_skip import steps_without
from specdec.runtimes.reference import ReferenceTarget
from specdec.runtimes.target import Pass

PARALLEL = ("phi", "gpt_neox")  # attention and MLP read the same input


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_parts_of_a_layer_make_the_layer(family: str) -> None:
    target = ReferenceTarget(tiny_model(family))
    positions = torch.arange(7)[None]
    x = target.embed(torch.arange(3, 10)[None], positions)

    def run(*parts: str) -> torch.Tensor:
        cache, y = target.new_cache(), x
        mask = cache.register(0, positions)
        for part in parts:
            if part == "layer":
                y = target.layers(y, 1, 2, Pass(positions, mask, cache))
            else:
                y = target.sublayer(y, 1, part, Pass(positions, mask, cache))  # type: ignore[arg-type]
        assert cache.lengths[1] == (7 if parts[0] != "mlp" else 0)
        return y

    whole, attention, mlp = run("layer"), run("attention"), run("mlp")
    assert not any(torch.allclose(a, b) for a, b in ((whole, attention), (whole, mlp), (attention, x), (mlp, x)))
    both = attention + mlp - x if family in PARALLEL else run("attention", "mlp")
    torch.testing.assert_close(both, whole)
    torch.testing.assert_close(run("layer"), whole)  # the model has its parts back


def without(model: PreTrainedModel, attn: tuple[int, ...], mlp: tuple[int, ...]) -> PreTrainedModel:
    """A copy of a llama in which these parts change nothing."""
    model = copy.deepcopy(model)
    for layers, path in ((attn, "self_attn.o_proj"), (mlp, "mlp.down_proj")):
        for layer in layers:
            torch.nn.init.zeros_(model.model.layers[layer].get_submodule(path).weight)
    return model


SETS = [((1,), ()), ((), (0, 3)), ((0, 1, 2, 3), (2,)), ((2,), (0, 1, 2, 3)), ((1, 2), (2, 3))]


@pytest.mark.parametrize("runtime", ["reference", "fused"])
@pytest.mark.parametrize(("attn", "mlp"), SETS)
def test_parts_that_change_nothing_are_not_missed(
    llama: PreTrainedModel, attn: tuple[int, ...], mlp: tuple[int, ...], runtime: str
) -> None:
    model = without(llama, attn, mlp)
    decoder = SpecDecoder(
        model, drafter="layer-skip", drafter_options={"attn": list(attn), "mlp": list(mlp)}, runtime=runtime
    )
    outs = decoder.generate_batch(PROMPTS, max_new_tokens=21, num_speculative_tokens=4, ignore_eos=True)
    for out, prompt in zip(outs, PROMPTS, strict=True):
        assert out.token_ids == greedy_reference(model, prompt, 21) or 2 in out.token_ids
        assert set(out.metrics.per_step_accepted[:-1]) == {4}
    # ... and those that do are missed, but never by the output.
    decoder = SpecDecoder(
        llama, drafter="layer-skip", drafter_options={"attn": list(attn), "mlp": list(mlp)}, runtime=runtime
    )
    out = decoder.generate(PROMPTS[0], max_new_tokens=21, num_speculative_tokens=4)
    assert out.token_ids == greedy_reference(llama, PROMPTS[0], 21)


def test_the_way_without_some_parts() -> None:
    assert steps_without({2}, {2}, 5) == [("layers", 0, 2), ("layers", 3, 5)]
    assert steps_without({1, 2}, {2, 3}, 5) == [("layers", 0, 1), ("mlp", 1, 2), ("attention", 3, 4), ("layers", 4, 5)]
    assert steps_without({0, 1}, {0, 1}, 2) == []
