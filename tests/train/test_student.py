"""What is trained is what drafts, with the reference's values and gradients."""

import math

import pytest
import torch
from passes import apart
from targets import needs_native
from tiny import model_of, tiny_model
from training import PATHS, same_drafts, shaken

from specdec.drafters.m2r2 import M2R2Path
from specdec.drafters.m2r2.network import Carry
from specdec.runtimes.native import linear
from specdec.runtimes.native.target import NativeTarget
from specdec.runtimes.target import Pass
from specdec.runtimes.torch.target import TorchTarget
from specdec.runtimes.transformers import TransformersTarget
from specdec.train import states, student
from specdec.train.batches import assemble, windows
from specdec.train.data import TrainingAnswer
from specdec.train.evaluate import evaluate
from specdec.train.student import Teacher, agree
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


@pytest.mark.parametrize(("share", "sharpen"), [(0.0, 0.0), (0.5, 0.3), (1.0, 0.0)])
def test_losses_and_gradients_are_those_of_the_formula(share: float, sharpen: float, monkeypatch) -> None:
    """A share of the loss is the total variation, the rest KL, at valid positions of answers of two lengths."""
    monkeypatch.setattr(student, "BLOCK", 4)
    monkeypatch.setattr(student, "FLOATS", 120)  # three positions of 40 tokens
    target, wanted = training_target(tiny_model("llama")), states.StateSelection((), (4,))
    answers = [TrainingAnswer((5, 6, 7), tuple(range(8, 8 + count))) for count in (9, 6)]
    records = states._records(states._make_shard(target, answers, wanted), wanted)
    batch = assemble(records, windows(records, 64), target.device)
    teacher = Teacher(target, torch.arange(2, 38), sharpen, share, extra=4)
    teacher.begin(batch)
    valid, weight = batch.valid & (batch.positions > 3), torch.rand(batch.valid.shape)
    final = batch.before[4].clone().requires_grad_(True)
    loss, agreement, right = teacher.compare(final, valid, weight)
    loss.backward()
    own = batch.before[4].clone().requires_grad_(True)
    base, draft = (target.readout(x, teacher.head) for x in (batch.hidden[4], own))
    p, q = base.softmax(-1), draft.softmax(-1)
    chosen = torch.nn.functional.one_hot(teacher.best.clamp_min(0), 40) * (teacher.best >= 0)[..., None]
    known = sharpen * (teacher.best >= 0)[..., None]
    p = p * (1 - known) + known * chosen
    away = (torch.special.xlogy(p, p) - p * q.log()).sum(-1)
    away = (1 - share) * away + share * (p - q).abs().sum(-1) / 2
    expected = (away * weight)[valid].sum() / batch.valid.sum()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(final.grad, own.grad, rtol=1e-4, atol=1e-7)
    best = draft.argmax(-1)
    assert torch.equal(right, (best == teacher.next) & valid)
    assert agreement == pytest.approx(float((best == teacher.best)[valid].float().mean()))
    mass = torch.exp(base.logsumexp(-1) - batch.log_z)
    torch.testing.assert_close(teacher.mass, mass[batch.valid])
    found = evaluate(teacher, [batch], lambda _: [(own.detach(), valid)], 1)
    overlap = torch.minimum(q, p * mass[..., None]).detach().sum(-1)[valid].mean()
    assert found["overlap"] == [pytest.approx(float(overlap), abs=1e-4)]
    assert found["top1"] == [
        pytest.approx(float(((best == teacher.best) & teacher.known(batch))[valid].float().mean()), abs=1e-4)
    ]
    assert found["positions"] == int(valid.sum())
    loss, agreement, right = teacher.compare(final, valid & False)
    assert loss == 0 and math.isnan(agreement) and not right.any()


def test_of_equally_likely_tokens_the_first_one_is_the_draft() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert [bool(agree(logits, torch.tensor([index]))) for index in (1, 2, 3, -1)] == [True, False, False, False]


@needs_native
def test_projections_and_heads_are_rounded_as_in_drafts(monkeypatch) -> None:
    monkeypatch.setattr(linear, "LARGE", 0)  # 4 bits, as large weights
    model = model_of("llama")
    target, vocab = training_target(model), torch.arange(2, 66)
    network = shaken(M2R2Path(0, ((2, 4),), True, 4), target, vocab.int()).bfloat16().requires_grad_(True)
    x, carry = torch.randn(1, 9, target.hidden_size).bfloat16(), torch.randn(2, 1, 9, target.hidden_size).bfloat16()
    given = 0, x, Carry(carry[0], [carry[1]])
    exact = network.project(*given)
    network.round(target)
    rounded = network.project(*given)
    rounded.float().square().sum().backward()
    assert bool(network.projections[0].weight.grad.any())
    network.freeze(target)
    drafted = network.project(*given)
    assert apart(rounded.float(), drafted.float()) < 0.3 * apart(exact.float(), drafted.float())

    head = NativeTarget(model).readout(x, target.reduced_head(vocab)).float()
    teachers = [Teacher(target, vocab, extra=0, rounds=rounds) for rounds in (False, True)]
    wanted = states.StateSelection((), (target.num_layers,))
    records = states._records(states._make_shard(target, [TrainingAnswer((5, 6), (7, 8, 9))], wanted), wanted)
    for teacher in teachers:
        teacher.begin(assemble(records, windows(records, 64), target.device, target.dtype))
    plain, drafts = (apart(teacher.logits(x).float(), head) for teacher in teachers)
    assert drafts < 0.3 * plain and torch.equal(teachers[0].p, teachers[1].p)
