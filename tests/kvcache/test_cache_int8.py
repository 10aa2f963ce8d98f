"""The 8-bit KV cache: what rounding costs, and that nothing else changes."""

import pytest
import torch
from passes import ALIKE, apart, next_logits, play
from targets import needs_native
from tiny import SIZES, model_of, tiny_model

from specdec.api.decoder import SpecDecoder
from specdec.cli import statistics
from specdec.kvcache.cache import dequantize_rows, quantize_rows
from specdec.models import families
from specdec.runtimes.native.target import FAMILIES, NativeTarget
from specdec.runtimes.target import Pass

pytestmark = [needs_native, pytest.mark.usefixtures("two_threads")]
# Experts change at near ties.
DENSE = [f for f in FAMILIES if f not in ALIKE and not families.FAMILIES[f].fields >= families.EXPERTS]


def steps(x: torch.Tensor) -> torch.Tensor:
    """The difference between neighbouring codes for each number of ``x`` [..., d]."""
    parts = x.unflatten(-1, (-1, 32))
    return (parts.abs().amax(-1, keepdim=True) / 127).expand_as(parts).flatten(-2)


@pytest.mark.parametrize("d", [32, 96])
def test_rounding_is_within_half_a_step(d: int) -> None:
    x = torch.randn(2, 3, 5, d, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.arange(-3, 2)[:, None]
    x[0, 0, 0] = 0
    rows = quantize_rows(x)
    assert (rows.shape, rows.dtype) == ((2, 3, 5, d + d // 16), torch.int8)
    assert bool(((dequantize_rows(rows, torch.float32) - x).abs() <= 0.505 * steps(x)).all())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("family", "d"), [("llama", 32), ("qwen3", 96), ("llama", 128)])
@torch.inference_mode()
def test_kernels_hold_keys_and_values_within_half_a_step(family: str, d: int) -> None:
    model, ids = (
        tiny_model(family, **SIZES | {"head_dim": d}).bfloat16(),
        torch.randint(3, 97, (2, 37), generator=torch.Generator().manual_seed(2)),
    )
    wide, narrow = NativeTarget(model), NativeTarget(model, kv_cache="int8")
    exact, rounded = wide.new_cache(2), narrow.new_cache(2)
    next_logits(wide, exact, ids)
    next_logits(narrow, rounded, ids)
    for b in range(2):
        for whole, rows in zip(exact.data[b], rounded.data[b], strict=True):
            x, held = whole[0, :, :37].float(), dequantize_rows(rows[0, :, :37], torch.float32)
            assert bool(((held - x).abs() <= 0.51 * steps(x) + x.abs() / 256).all())  # x itself is rounded to bf16
            assert int(rows[0, :, :37, d - 32 : d].abs().amax(-1).min()) == 127
            assert not rows[0, :, 37:].any()
    assert rounded.data[0].nbytes / exact.data[0].nbytes == (16 + 1) / 32


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("family", "d"), [*((f, 32) for f in DENSE), ("llama", 96), ("llama", 128)])
@torch.inference_mode()
def test_logits_are_near_those_of_the_16_bit_cache(family: str, d: int) -> None:
    model = model_of(family) if d == 32 else tiny_model(family, **SIZES | {"head_dim": d}).bfloat16()
    wide, narrow = NativeTarget(model), NativeTarget(model, kv_cache="int8")
    ids, pairs = torch.randint(3, 97, (1, 60), generator=torch.Generator().manual_seed(3)), []
    pairs += zip(play(narrow), play(wide), strict=True)
    pairs.append((next_logits(narrow, narrow.new_cache(), ids), next_logits(wide, wide.new_cache(), ids)))
    # Norms of what attention returns make small results large; 1/32 is a step of bf16 in the largest logits.
    most = 0.06 if family in ("olmo2", "gemma4_text") else 1 / 32
    assert all(apart(a.float(), b.float()) <= most for a, b in pairs)
    assert not torch.equal(*pairs[-1])


@pytest.mark.usefixtures("kernels")
@torch.inference_mode()
def test_scores_are_those_of_the_keys_that_are_held() -> None:
    """Where a few channels of keys and queries are large in every token, as in Qwen2.5, and attention is sharp.

    New tokens see committed ones alone, whose keys and values are the same numbers as in a 16-bit cache.
    """
    model, d, count = tiny_model("qwen2", **SIZES | {"head_dim": 64}), 64, 120
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_proj.weight.mul_(8)
        for module, size in (attention.q_proj, 80), (attention.k_proj, 100):
            module.bias.view(-1, d)[:, 24:32] = size * torch.tensor([1, -1] * 4)
    model = model.bfloat16()
    ids = torch.randint(3, 97, (1, count), generator=torch.Generator().manual_seed(3))
    wide, narrow = NativeTarget(model), NativeTarget(model, kv_cache="int8")
    exact, rounded = wide.new_cache(), narrow.new_cache()
    next_logits(wide, exact, ids)
    next_logits(narrow, rounded, ids)
    scales = rounded.data[0][..., :count, d:].view(torch.bfloat16)
    scales.copy_(2 ** scales.float().log2().round())  # keys and values are then exact in 16 bits
    exact.data[0][..., :count, :] = dequantize_rows(rounded.data[0][..., :count, :], torch.bfloat16)
    new, positions = torch.arange(3, 67)[None], torch.full((1, 64), count)
    nothing = torch.zeros(64, 64, dtype=torch.bool)
    logits = []
    for target, cache in (wide, exact), (narrow, rounded):
        given = Pass(positions, cache.register(0, positions, nothing), cache)
        out = target.readout(target.layers(target.embed(new, positions), 0, target.num_layers, given))
        logits.append(out.float().log_softmax(-1))
    assert torch.nn.functional.kl_div(*reversed(logits), reduction="none", log_target=True).sum(-1).mean() < 1e-4


@torch.inference_mode()
def test_what_is_not_finite_stays_so() -> None:
    target = NativeTarget(model_of("llama"), kv_cache="int8")
    x, cache, positions = torch.ones(1, 3, 64).bfloat16(), target.new_cache(), torch.arange(3)[None]
    x[0, 1, 5] = float("inf")
    out = target.layers(x, 0, 4, Pass(positions, cache.register(0, positions), cache))
    assert not out[0, 2].isfinite().any()  # it sees the broken key


def test_an_8_bit_cache_is_named_lossy_and_compared_with_itself() -> None:
    decoder = SpecDecoder(model_of("llama"), drafter="prompt-lookup", kv_cache="int8")
    assert statistics.runtime(decoder)["kv_cache"] == "8 bits (lossy)"
    assert statistics._formats(decoder) == "weights in 16 bits, KV cache in 8 bits (lossy)"
    assert decoder.with_drafter("none").target is decoder.target
    usual = SpecDecoder(decoder.model, drafter="none")
    assert statistics.runtime(usual)["kv_cache"] == "as computed"
    assert statistics._formats(usual) == "weights in 16 bits"
