"""Passes with some neurons of the MLPs: as if the other neurons gave nothing, in every runtime."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import adapted_pass
from targets import needs_native
from tiny import model_of, rough_model, tiny_model

from specdec import SpecDecError
from specdec.drafters.m2r2.network import M2R2, load_network
from specdec.drafters.m2r2.path import M2R2Path
from specdec.models import drafter_folder
from specdec.runtimes.decoder_layer import Adapters
from specdec.runtimes.narrow import gated_mlp, strengths
from specdec.runtimes.native.target import NativeTarget
from specdec.runtimes.target import Target
from specdec.runtimes.torch.target import TorchTarget
from specdec.runtimes.transformers import TransformersTarget

FAMILIES = "llama", "qwen2", "phi3", "olmo2"
LAYERS, COUNT = (0, 1, 2), 32


def narrow_adapters(target: Target, low_rank: bool = False) -> Adapters:
    """The first layers with ``COUNT`` neurons, and low-rank terms beside what is left of their MLPs."""
    torch.manual_seed(3)
    mlps = {n: gated_mlp(target.block(n)) for n in LAYERS}
    shapes = {n: mlp.shapes(COUNT) for n, mlp in mlps.items()} if low_rank else {}
    adapters = Adapters(shapes, 4, dict.fromkeys(LAYERS, COUNT))
    for layer in LAYERS:
        adapters.get_buffer(f"{layer}/neurons").copy_(torch.randperm(mlps[layer].size)[:COUNT].sort().values)
        for _, up in adapters.factors(layer).values():
            torch.nn.init.normal_(up, std=0.05)
    return adapters.requires_grad_(False)


def without_the_others(model: Any, adapters: Adapters) -> Any:
    """A copy of the model in which the neurons that are not kept give nothing, with the low-rank terms merged."""
    model = copy.deepcopy(model)
    for layer in LAYERS:
        block, kept = model.model.layers[layer], adapters.kept(layer)
        mlp, factors = gated_mlp(block), adapters.factors(layer)
        gone = torch.ones(mlp.size, dtype=torch.bool)
        gone[kept] = False
        mlp.down.weight[:, gone] = 0
        for path, (down, up) in factors.items():
            weight = block.get_submodule(path).weight
            if path == mlp.out:
                weight[:, kept] += up @ down
            else:
                weight[mlp.rows(kept)] += up @ down
    return model


@pytest.mark.parametrize(("family", "low_rank"), [("llama", False), *((family, True) for family in FAMILIES)])
@pytest.mark.parametrize("runtime", [TransformersTarget, TorchTarget])
@torch.inference_mode()
def test_other_neurons_give_nothing(runtime: type[Target], family: str, low_rank: bool) -> None:
    model = rough_model(family)
    target = runtime(model)
    adapters = narrow_adapters(target, low_rank)
    expected = adapted_pass(TransformersTarget(without_the_others(model, adapters)), None, 6)
    whole = adapted_pass(target, None, 6)
    assert torch.allclose(adapted_pass(target, adapters, 6), expected, atol=5e-5)
    assert not torch.allclose(expected, whole, atol=1e-2)
    assert torch.equal(adapted_pass(target, None, 6), whole)  # the model is as it was


@needs_native
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_other_neurons_give_nothing_natively(family: str) -> None:
    model = model_of(family)
    target = NativeTarget(model)
    adapters = narrow_adapters(target, True)
    expected = adapted_pass(TransformersTarget(without_the_others(model, adapters)), None, 6).float()
    whole, got = (adapted_pass(target, each, 6).float() for each in (None, adapters))
    assert (got - expected).norm() < 0.04 * expected.norm() < 0.4 * (whole - expected).norm()


def test_gradients_reach_the_low_rank_terms() -> None:
    target = TorchTarget(rough_model("llama"), packs=False)
    adapters = narrow_adapters(target, True).requires_grad_(True)
    adapted_pass(target, adapters, 6).square().sum().backward()
    assert all(each.grad is not None and bool(each.grad.any()) for each in adapters.parameters())


@torch.inference_mode()
def test_the_strongest_neurons_are_those_that_add_most() -> None:
    target, x = TransformersTarget(rough_model("llama")), torch.randn(50, 32)
    block = target.block(1)
    mlp, found = gated_mlp(block), strengths(block, "llama", x)
    y = block.post_attention_layernorm(x)
    a = torch.nn.functional.silu(y @ mlp.ins["mlp.gate_proj"].weight.T) * (y @ mlp.ins["mlp.up_proj"].weight.T)
    each = a[:, None] * mlp.down.weight  # (50, D, I): what each neuron adds
    assert torch.allclose(found, each.square().sum((0, 1)), rtol=1e-3)


def test_neurons_that_a_model_does_not_have_are_refused(tmp_path: Path) -> None:
    target = TransformersTarget(tiny_model("llama"))
    network = M2R2(M2R2Path(0, ((1, 3),), True, 4, neurons=32), target)
    config = {"drafter": "m2r2", "base": {"fingerprint": target.fingerprint}, "path": network.path.to_json()}
    tensors = dict(network.state_dict())
    drafter_folder.write(tmp_path, config, tensors)
    assert torch.equal(load_network(target, tmp_path).adapters.kept(1), torch.arange(32))
    for wrong in (torch.arange(32) + 1000, torch.arange(32) - 1, torch.zeros(32)):
        drafter_folder.write(tmp_path, config, tensors | {"adapters.1/neurons": wrong.int()})
        with pytest.raises(SpecDecError, match=r"neurons of layer 1 .* are not rising numbers"):
            load_network(target, tmp_path)
    for count in (33, 1 << 20):
        with pytest.raises(SpecDecError, match=f"runs {count} neurons of layer 1's MLP"):
            M2R2(M2R2Path(0, ((1, 3),), True, 4, neurons=count), target)
    gpt = TransformersTarget(tiny_model("gpt2"))
    with pytest.raises(SpecDecError, match="has none to choose from"):
        M2R2(M2R2Path(0, ((1, 3),), True, 4, neurons=32), gpt)


WITHOUT_MEMORY = """
import sys
from specdec.base.devices import without_memory
from specdec.runtimes.decoder_layer import Adapters
with without_memory():
    Adapters({1: {"mlp.down_proj": (32, 16)}}, 4, {1: 32})
print("sympy" in sys.modules)
"""


def test_a_drafter_with_fewer_neurons_is_loaded_without_sympy() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY], capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr
