"""All drafters, as chains and trees, greedy and sampled, on tiny model families: plain decoding's very output."""

import pytest
from sampled import AcceptsAll, expected, fit, small
from tiny import ELASTIC, greedy_reference, tiny_model
from zoo import EVERY, PROMPTS, run

from specdec.drafters.layer_skip import LayerSkipDrafter
from specdec.drafters.none import NoDrafter
from specdec.models.families import FAMILIES
from specdec.runtimes.target import Target
from specdec.runtimes.torch.target import TorchTarget
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation import registry

# Families, the runtime, and the drafters: all, or one part of so many. Of the fallback's families, those whose layers,
# states or readouts differ for drafters (targets of all families are tested without them).
CASES: list[tuple[str, type[Target], int]] = [
    ("llama", TransformersTarget, 1),
    ("qwen3", TorchTarget, 1),
    ("gpt2", TransformersTarget, 2),  # absolute positions
    ("qwen3_5_text", TransformersTarget, 3),  # recurrent layers
    ("qwen3_next", TorchTarget, 1),  # and experts
    ("gemma2", TransformersTarget, 4),  # windows, bounded logits
    ("gemma4_text", TransformersTarget, 4),  # heads of two sizes
    ("opt", TransformersTarget, 4),  # an embedding of another size
    ("deepseek_v3", TransformersTarget, 4),  # latent attention
    ("llama4_text", TransformersTarget, 4),  # chunks
    ("nemotron_h", TransformersTarget, 4),  # layers without a cache
    ("mamba2", TransformersTarget, 4),  # no attention
    *((family, TorchTarget, 4) for family in FAMILIES if family not in ("qwen3", "qwen3_next")),
]


def test_the_matrix_has_every_drafter() -> None:
    made = {name.partition(":")[0].removesuffix(" (tree)") for name in EVERY if "+" not in name}
    assert made == set(registry.DRAFTERS)


@pytest.mark.parametrize(("family", "runtime", "parts"), CASES)
def test_greedy_equals_generate_in_a_ragged_batch(family: str, runtime: type[Target], parts: int) -> None:
    """In PyTorch, layers of Gemma 4 read embeddings of their own, and keys of others."""
    model = tiny_model(family, **(ELASTIC if (family, runtime) == ("gemma4_text", TorchTarget) else {}))
    expected = [greedy_reference(model, prompt, 12) for prompt in PROMPTS]
    target = runtime(model)  # type: ignore[call-arg]
    for name in list(EVERY)[CASES.index((family, runtime, parts)) % parts :: parts]:
        assert run(target, EVERY[name](target), PROMPTS, 12)[0] == expected, name


def test_sampling_follows_the_model() -> None:
    """Without drafts: with any, a seed gives the same tokens (test_drafters_pairwise)."""
    model = small("mistral")
    assert sum(p > 1e-3 for p in expected(model, 0.8, 0.9).values()) > 8
    assert fit(TransformersTarget(model), NoDrafter()) > 1e-4


def test_a_rule_that_accepts_everything_fails() -> None:
    assert fit(TransformersTarget(small("llama")), LayerSkipDrafter([1]), verifier=AcceptsAll()) < 1e-4
