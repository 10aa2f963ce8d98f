"""What is trained is what drafts, with the reference's values and gradients."""

import pytest
import torch
from tiny import tiny_model
from training import PATHS, same_drafts, shaken

from specdec.drafters.m2r2 import M2R2Path
from specdec.runtimes.target import Pass
from specdec.runtimes.torch.target import TorchTarget
from specdec.runtimes.transformers import TransformersTarget
from specdec.train.student import Teacher
from specdec.train.trainer import training_target


@pytest.mark.parametrize("name", PATHS)
def test_the_student_drafts_exactly_as_the_drafter(name: str) -> None:
    same_drafts(training_target(tiny_model("llama")), PATHS[name])


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3", "gemma", "gemma2", "qwen3_moe"]
)
def test_training_has_the_reference_values_and_gradients(family: str) -> None:
    model = tiny_model(family)
    names = ["self_attn.qkv_proj" if family == "phi3" else "self_attn.k_proj", "mlp.down_proj"]
    names += ["linear_attn.in_proj_qkv", "linear_attn.in_proj_b", "linear_attn.out_proj"]
    results, every = [], TransformersTarget(model)
    path = M2R2Path(0, ((1, 4),), True, 3, {n: [x for x in names if x in every.linears(n)] for n in (1, 2, 3)})
    for target in (TransformersTarget(model), training_target(model)):
        network = shaken(path, target).requires_grad_(True)
        x, positions = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(3)), torch.arange(11)[None]
        positions = positions.expand(2, -1)
        cache = target.new_cache(2)
        y = target.layers(x, 1, 4, Pass(positions, cache.register(1, positions), cache, adapters=network.adapters))
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in network.adapters.parameters())])
    assert isinstance(training_target(model), TorchTarget)
    for reference, direct in zip(*results, strict=True):
        torch.testing.assert_close(direct, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_loss_is_the_total_variation(share: float) -> None:
    teacher = Teacher(TransformersTarget(tiny_model("llama")), None, variation=share)
    p, logits = torch.randn(2, 3, 97).softmax(-1), torch.randn(2, 3, 97)
    teacher.p, teacher.entropy = p, -(p * p.log()).sum(-1)
    q = logits.softmax(-1)
    divergence, variation = (p * (p / q).log()).sum(-1), (p - q).abs().sum(-1) / 2
    torch.testing.assert_close(teacher.loss(logits), (1 - share) * divergence + share * variation)
