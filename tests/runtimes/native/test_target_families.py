"""Every family of the native runtime: the same tokens alone, in batches, with drafts, after a prefix, from files.
(Its numbers are those of transformers in every build of the kernels: test_target.)"""

from pathlib import Path

import pytest
import torch
from passes import ALIKE, next_logits
from targets import needs_native
from tiny import HYBRIDS, ROPES, model_of, rough_model, sizes_of, tamed
from tiny_gguf import ARCHITECTURES, TYPES, write_family
from zoo import EVERY, PROMPTS, run

from specdec.models import loading
from specdec.runtimes.native.target import FAMILIES, NativeTarget
from specdec.runtimes.select import make_target

pytestmark = [needs_native, pytest.mark.usefixtures("two_threads")]
COUNT = 20
DRAFTERS = "m2r2: projection", "m2r2: two projections, no early layer", "m2r2 (tree)"


def target_of(family: str) -> NativeTarget:
    return NativeTarget(model_of(family, **({"rope_parameters": ROPES[family]} if family in ROPES else {})))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ALIKE])
def test_drafts_and_batches_change_no_token(family: str) -> None:
    target = target_of(family)
    together = run(target, EVERY["none"](target), PROMPTS, COUNT, eos=None)[0]
    assert [run(target, EVERY["none"](target), [prompt], COUNT, eos=None)[0][0] for prompt in PROMPTS] == together
    for name in DRAFTERS:
        found, ran = run(target, EVERY[name](target), PROMPTS, COUNT, eos=None)
        assert found == together and all(sum(metrics.per_step_drafted) for metrics in ran.metrics), name


@pytest.mark.slow
def test_no_drafter_changes_a_token_of_a_hybrid() -> None:
    """Each may run recurrent layers in a way of its own."""
    target = target_of("qwen3_5_text")
    expected = run(target, EVERY["none"](target), PROMPTS[:2], 8, eos=None)[0]
    for name, make in EVERY.items():
        assert run(target, make(target), PROMPTS[:2], 8, eos=None)[0] == expected, name


@pytest.mark.parametrize("family", ARCHITECTURES)
@torch.inference_mode()
def test_files_run_natively(cache: object, tmp_path: Path, family: str) -> None:
    """Of every type, and of two in each family: passes over 1, 5 and 16 tokens have the same logits to the last bit."""
    sizes = sizes_of(family) | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
    sizes |= {key: 256 for key in ("moe_intermediate_size", "shared_expert_intermediate_size") if key in sizes}
    sizes |= {"layer_types": ["sliding_attention", "full_attention"]} if family in ("gemma3_text", "gpt_oss") else {}
    if family in HYBRIDS:
        sizes |= {"layer_types": ["linear_attention", "full_attention"], "linear_value_head_dim": 64}
    if family == "gemma4_text":
        sizes |= {"num_hidden_layers": 4, "hidden_size_per_layer_input": 256}
        sizes |= {"per_layer_config": {"1": {"head_dim": 128}, "3": {"head_dim": 128}}}
    model = tamed(rough_model(family, **sizes, rope_parameters=ROPES.get(family)))
    ids = torch.randint(3, 97, (1, 22), generator=torch.Generator().manual_seed(7))
    for kind in TYPES if family == "llama" else ("Q4_K", "Q8_0"):
        path = write_family(tmp_path / f"{kind}.gguf", model, kind)
        target, note = make_target(loading.load(path)[0])
        assert target.runtime == "native", note
        whole, parts = target.new_cache(), target.new_cache()
        pieces = [next_logits(target, parts, ids[:, slice(*ends)]) for ends in ((0, 1), (1, 6), (6, 22))]
        assert torch.equal(next_logits(target, whole, ids), torch.cat(pieces, 1))
        assert (target.weight_format == "16 bits") == (kind == "BF16")


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_5_moe_text"])
@torch.inference_mode()
def test_gates_and_ups_of_experts_may_be_one_tensor_of_a_file(cache: object, tmp_path: Path, family: str) -> None:
    model, ids, found = tamed(rough_model(family, **sizes_of(family))), torch.arange(5, 25)[None], list[torch.Tensor]()
    for joined in (False, True):
        path = write_family(tmp_path / f"{joined}.gguf", model, "Q8_0", joined=joined)
        target = make_target(loading.load(path)[0], "native")[0]
        own = target.new_cache()
        modules = loading.load(path, dtype="float32")[0]
        found += [next_logits(target, own, ids), modules(ids).logits]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
