"""The PyTorch runtime computes what models of transformers compute, on every family it knows."""

from types import MethodType
from typing import Any

import pytest
import torch
from passes import adapted_pass, next_logits, play, random_adapters
from tiny import ROPES, rough_model, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from specdec.base.errors import SpecDecError
from specdec.models.families import FAMILIES
from specdec.runtimes.select import make_target
from specdec.runtimes.target import Pass, Target
from specdec.runtimes.torch import linear
from specdec.runtimes.torch.target import TorchTarget
from specdec.runtimes.transformers import TransformersTarget

VARIANTS = [(family, {}) for family in FAMILIES]
VARIANTS += [(f, {"rope_parameters": rope}) for f, rope in ROPES.items() if f in FAMILIES]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
@torch.inference_mode()
def test_equal_to_the_model(family: str, changes: dict[str, object]) -> None:
    model = rough_model(family, **changes)
    expected = play(TransformersTarget(model))
    got = play(TorchTarget(model))
    assert len(got) == len(expected)
    assert max((a - b).abs().max().item() for a, b in zip(got, expected, strict=True)) < 5e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_sixteen_bits_and_packed_weights(dtype: torch.dtype) -> None:
    model = rough_model("qwen3").to(dtype)
    target = TorchTarget(model)
    for got, expected in zip(play(target), play(TransformersTarget(model)), strict=True):
        assert (got - expected).abs().max() / expected.abs().max() < 5e-2
    weight, bias, x = torch.randn(48, 32, dtype=dtype), torch.randn(48, dtype=dtype), torch.randn(3, 32, dtype=dtype)
    plain = linear.dense(weight, bias)(x)
    if target.make is linear.packed:
        assert torch.allclose(linear.packed(weight, bias)(x), plain, atol=0.1, rtol=0.02)


def test_a_packed_map_has_the_bias_whose_numbers_lie_apart() -> None:
    weight, column, x = torch.randn(48, 32), torch.randn(48, 3)[:, 1], torch.randn(3, 32)
    assert torch.allclose(linear.packed(weight, column)(x), linear.dense(weight, column)(x), atol=1e-4)


def test_the_model_keeps_its_values_and_nothing_is_held_twice() -> None:
    model = rough_model("qwen2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    TorchTarget(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    for modules in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        assert len({m.weight.untyped_storage().data_ptr() for m in modules}) == 1
    pointer = attention.q_proj.weight.data_ptr()
    TorchTarget(model)  # a second runtime shares the fused weights of the first
    assert attention.q_proj.weight.data_ptr() == pointer


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@torch.no_grad()  # inference mode would hide the steps of attention
def test_a_long_causal_prompt_has_no_mask_of_its_own_size() -> None:
    t, model = 2000, rough_model("qwen2", max_position_embeddings=4096)
    target, ids, positions = TransformersTarget(model), torch.randint(3, 97, (1, t)), torch.arange(t)[None]
    cache, x = target.new_cache(), target.embed(ids, positions)
    with Largest() as largest:
        target.layers(x, 0, 4, Pass(positions, cache.register(0, positions), cache))
    assert 0 < largest.elements < t * t / 4


@pytest.mark.parametrize(("family", "changes"), [*VARIANTS[:1], ("mistral", {"sliding_window": 71}), *VARIANTS[-1:]])
@torch.no_grad()
def test_long_causal_passes_equal_the_model(family: str, changes: dict[str, object]) -> None:
    """From an empty cache and behind cached tokens."""
    lengths = (181, 64, 65, 128)
    model = rough_model(family, **changes, max_position_embeddings=1024)
    ids = torch.randint(3, 97, (2, sum(lengths)))
    target = TorchTarget(model)
    cache = target.new_cache(2)
    found = torch.cat([next_logits(target, cache, part) for part in ids.split(lengths, 1)], 1)
    assert torch.allclose(found, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_gradients_pass_through_a_long_causal_pass() -> None:
    target = TorchTarget(rough_model("llama", max_position_embeddings=1024), packs=False)
    t = 131
    positions, x = torch.arange(t)[None], torch.randn(1, t, 32)

    def gradient(target: Target) -> torch.Tensor:
        cache, given = target.new_cache(), x.clone().requires_grad_()
        target.layers(given, 0, 4, Pass(positions, cache.register(0, positions), cache))[0, -1].sum().backward()
        assert given.grad is not None
        return given.grad

    assert torch.allclose(gradient(target), gradient(TransformersTarget(target.model)), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_adapters_agree_with_those_of_the_fallback(family: str) -> None:
    model = rough_model(family)
    reference, fused = TransformersTarget(model), TorchTarget(model)
    assert fused.linears(1) == reference.linears(1)
    with torch.inference_mode(False):
        adapters = random_adapters(reference, leave_out="self_attn.k_proj")
    expected = adapted_pass(reference, adapters, 3)
    assert (expected - adapted_pass(reference, None, 3)).abs().max() > 0.1
    for _ in range(2):  # made on the first call, reused on the second
        assert torch.allclose(adapted_pass(fused, adapters, 3), expected, atol=5e-5, rtol=1e-5)


ONLY_NATIVE: list[tuple[dict[str, Any], str]] = [
    ({"weights": "int4"}, "weights in fewer bits"),
    ({"kv_cache": "int8"}, "8-bit KV cache"),
    ({"expert_cache": 0.5}, "expert cache"),
]


@pytest.mark.parametrize(("given", "what"), ONLY_NATIVE)
def test_other_runtimes_refuse_what_only_the_native_one_has(given: dict[str, Any], what: str) -> None:
    for runtime in ("torch", "transformers"):
        with pytest.raises(SpecDecError, match=f"the {runtime} runtime has no {what}, the native one has"):
            make_target(tiny_model("llama").bfloat16(), runtime, **given)
    [(name, value)] = given.items()
    with pytest.raises(SpecDecError, match=rf"{name} '{value}' is not possible here \(no native runtime: .*bfloat16"):
        make_target(tiny_model("llama", intermediate_size=64), **given)


@pytest.mark.parametrize("name", ["weights", "kv_cache"])
def test_unknown_names_get_a_suggestion(name: str) -> None:
    with pytest.raises(SpecDecError, match=rf"unknown {name} 'int7' \(did you mean 'int8'\?\)"):
        make_target(tiny_model("llama"), **{name: "int7"})  # type: ignore[arg-type]


def test_a_fallback_says_why() -> None:
    target, note = make_target(tiny_model("phi"))
    assert target.runtime == "transformers" and "'phi' is unknown to the torch runtime" in note
    model = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    target, note = make_target(model)
    assert target.runtime == "transformers" and "'dynamic'" in note
    target, note = make_target(tiny_model("llama"))
    assert (target.runtime, note) == ("torch", "")
    assert make_target(tiny_model("llama"), "transformers")[0].runtime == "transformers"
    with pytest.raises(SpecDecError, match="unknown to the torch runtime"):
        make_target(tiny_model("phi"), "torch")


@pytest.mark.parametrize(
    ("name", "meant"), [("torhc", "torch"), ("fused", "torch"), ("graphs", "torch"), ("reference", "transformers")]
)
def test_an_unknown_runtime_gets_a_suggestion(name: str, meant: str) -> None:
    with pytest.raises(SpecDecError, match=rf"unknown runtime '{name}' \(did you mean '{meant}'\?\)"):
        make_target(tiny_model("llama"), name)


def test_a_model_that_computes_something_else_is_noticed() -> None:
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = MethodType(lambda self, x: -type(self).forward(self, x), mlp)
    target, note = make_target(model)
    assert target.runtime == "transformers" and "gives other logits" in note
