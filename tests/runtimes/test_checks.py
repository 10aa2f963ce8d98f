"""The check of a runtime at load: rounding passes, with near ties between experts, too; other arithmetic does not."""

from types import MethodType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from targets import needs_native
from tiny import rough_model, sizes_of, tamed, tiny_model
from torch import Tensor

from specdec.base.errors import MemoryFullError, SpecDecError
from specdec.models.families import EXPERTS, FAMILIES
from specdec.runtimes.decoder_layer import router
from specdec.runtimes.native.target import NativeTarget
from specdec.runtimes.select import make_target
from specdec.runtimes.torch.model import Network
from specdec.runtimes.torch.target import TorchTarget
from specdec.runtimes.transformers import TransformersTarget

MIXTURES = [name for name, family in FAMILIES.items() if family.fields >= EXPERTS]


def mixture(family: str, seed: int = 0, apart: float = 1.0) -> Any:
    """A model in bfloat16 with 2 of 8 experts. apart: how far the rows of its routers are from one another."""
    count = {key: 8 for key in ("num_experts", "num_local_experts")} | {"num_experts_per_tok": 2}
    model: Any = tamed(rough_model(family, **sizes_of(family), **count))
    random = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        rows = router(layer.mlp).weight  # (E, D)
        every, own = (torch.randn(size, generator=random) for size in (rows.shape[1], rows.shape))
        rows.copy_((every + apart * own) * rows.shape[1] ** -0.5)
        layer.mlp.experts.down_proj.mul_(8)  # what they return is as large as what they are added to
    return model.bfloat16()


@needs_native
@pytest.mark.parametrize("family", MIXTURES)
def test_near_ties_between_experts_are_no_fault(family: str) -> None:
    for seed in range(2):
        assert NativeTarget(mixture(family, seed, 0.02), "int8").logit_difference < 0.05


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text"])
def test_near_ties_are_no_fault_where_modules_run(family: str) -> None:
    for seed in range(2):
        assert TransformersTarget(mixture(family, seed, 0.02)).logit_difference < 0.05


def louder(layer: Any) -> None:
    replace(layer.post_attention_layernorm, lambda own, x: 1.3 * own(x))


def scaled(layer: Any) -> None:
    replace(router(layer.mlp), lambda own, x: own(1.3 * x))


def unnormalised(layer: Any) -> None:
    def route(own: Any, x: Tensor) -> tuple[Tensor, ...]:
        logits, shares, experts = own(x)
        return logits, shares * logits.float().softmax(-1).gather(1, experts).sum(-1, keepdim=True), experts

    replace(router(layer.mlp), route)


def reordered(layer: Any) -> None:
    replace(layer.mlp.experts, lambda own, x, experts, shares: own(x, (experts + 1) % 8, shares))


def chosen_otherwise(layer: Any) -> None:
    def route(own: Any, x: Tensor) -> tuple[Tensor, ...]:
        logits, shares, _ = own(x)
        return logits, shares, logits.topk(2, largest=False).indices

    replace(router(layer.mlp), route)


def replace(module: Any, function: Any) -> None:
    """The module computes ``function`` of its own computation and the inputs."""
    own = module.forward
    module.forward = MethodType(lambda _, *given: function(own, *given), module)


@needs_native
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("other", [louder, scaled, unnormalised, reordered, chosen_otherwise])
def test_another_mixture_is_refused(family: str, other: Any) -> None:
    """Modules that compute something else than their weights say: as if the kernels did."""
    model = mixture(family)
    for layer in model.model.layers:
        other(layer)
    with pytest.raises(SpecDecError, match="the native runtime gives other logits than this"):
        NativeTarget(model)


def test_numbers_that_are_not_finite_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TransformersTarget.readout

    def wrong(self: Any, *given: Any) -> Tensor:
        logits = right(self, *given)
        return logits if logits.shape[1] == 8 else logits * float("nan")

    monkeypatch.setattr(TransformersTarget, "readout", wrong)
    with pytest.raises(SpecDecError, match="gives other logits"):
        TransformersTarget(tiny_model("llama"))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
@pytest.mark.parametrize("part", [(TorchTarget, "layers"), (Network, "run")])
def test_full_memory_is_no_fault_of_the_model(
    part: tuple[type, str], error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence says so, and no slower runtime is taken."""
    monkeypatch.setattr(*part, Mock(side_effect=error))
    with pytest.raises(MemoryFullError, match=r"^cpu: the memory .*; .* \(.*memory\)$") as found:
        make_target(tiny_model("llama"))
    assert found.value.__cause__ is error and "\n" not in str(found.value)
