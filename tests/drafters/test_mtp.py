"""The layer for multi-token prediction in a model's checkpoint drafts as the model's authors wrote it down."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from targets import needs_native
from tiny import greedy_reference, sizes_of, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from zoo import PROMPTS, run, watched

from specdec import SpecDecError
from specdec.drafters.mtp import MTPDrafter
from specdec.drafters.none import NoDrafter
from specdec.models.prediction_layer import FORMATS
from specdec.runtimes.native.target import NativeTarget
from specdec.runtimes.transformers import TransformersTarget

QWEN, MIMO, DEEPSEEK = FORMATS
FILE = "model.safetensors"


class Family(NamedTuple):
    """A family, how it calls the tensors, and what makes its config that of the layer alone."""

    layout: Any
    changes: dict[str, Any]


FAMILIES = {
    "qwen3_next": Family(QWEN, {"layer_types": ["full_attention"]}),
    "qwen3_5_text": Family(QWEN, {"layer_types": ["full_attention"]}),
    "qwen2": Family(MIMO, {"layer_types": ["full_attention"]}),
    "deepseek_v3": Family(DEEPSEEK, {"first_k_dense_replace": 0}),
    "glm4_moe": Family(DEEPSEEK, {"first_k_dense_replace": 0}),
}


class Published(NamedTuple):
    """A checkpoint with such a layer: the model, the layer as a model, and what surrounds it."""

    folder: Path
    model: PreTrainedModel
    layer: PreTrainedModel
    around: dict[str, Tensor]


def publish(folder: Path, family: str, sizes: dict[str, Any] | None = None) -> Published:
    (layout, changes), sizes = FAMILIES[family], sizes or {}
    tiny_model(family, **sizes).save_pretrained(folder)
    layer = tiny_model(family, num_hidden_layers=1, **(sizes | changes))
    width = layer.config.hidden_size
    torch.manual_seed(5)
    with torch.no_grad():
        layer.base_model.norm.weight.add_(0.3 * torch.randn(width))
    layer.save_pretrained(folder / "layer")
    own = load_file(folder / "layer" / FILE)
    prefix = layout.prefix.format(n=4)
    around = {part: 1 + 0.3 * torch.randn(width) for part in (layout.token_norm, layout.state_norm)}
    around |= {layout.projection: 0.3 * torch.randn(width, 2 * width), layout.norm: own["model.norm.weight"]}
    tensors = load_file(folder / FILE) | {f"{prefix}{part}.weight": tensor for part, tensor in around.items()}
    for name, tensor in own.items():
        if (part := name.removeprefix("model.layers.0.")) != name:
            tensors[f"{prefix}{layout.layer}{part}"] = tensor
    if layout is DEEPSEEK:
        tensors |= {f"{prefix}embed_tokens.weight": own["model.embed_tokens.weight"].clone()}
        tensors |= {f"{prefix}shared_head.head.weight": own["lm_head.weight"].clone()}
    save_file(tensors, folder / FILE, {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return Published(folder, model, layer, around)


@pytest.fixture(scope="module", params=FAMILIES)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Published]:
    return request.param, publish(tmp_path_factory.mktemp(request.param), request.param)


@torch.inference_mode()
def plainly(family: str, given: Published, ids: list[int], depth: int) -> list[int]:
    """The tokens that the layer predicts after a text, computed with transformers alone, nothing cached."""
    layout, base = FAMILIES[family].layout, given.model.base_model

    def norm(part: str, x: Tensor) -> Tensor:
        own = base.norm.weight.data.clone()
        base.norm.weight.data.copy_(given.around[part])
        out = base.norm(x)
        base.norm.weight.data.copy_(own)
        return out  # type: ignore[no-any-return]

    tokens, drafted, raw = ids[1:], list[int](), list[Tensor]()

    def watch(layer: torch.nn.Module) -> Any:
        return layer.register_forward_hook(
            lambda module, inputs, out: raw.append(out if isinstance(out, Tensor) else out[0])
        )

    hook = watch(base.layers[-1])
    states = base(torch.tensor([ids])).last_hidden_state
    states = (states if layout.reads_norm else raw[-1])[:, :-1]
    hook.remove()
    hook = watch(given.layer.base_model.layers[0])
    for _ in range(depth):
        pair = [norm(layout.token_norm, base.embed_tokens(torch.tensor([tokens]))), norm(layout.state_norm, states)]
        x = torch.cat(pair if layout.token_first else pair[::-1], -1) @ given.around[layout.projection].T
        after = given.layer.base_model(inputs_embeds=x).last_hidden_state
        drafted.append(int(given.model.lm_head(after[:, -1:]).argmax(-1)))
        states = torch.cat((states, (after if layout.feeds_norm else raw[-1])[:, -1:]), 1)
        tokens = [*tokens, drafted[-1]]
    hook.remove()
    return drafted


def test_the_layer_drafts_what_a_plain_implementation_does(published: tuple[str, Published]) -> None:
    family, given = published
    target = TransformersTarget(given.model)
    drafter = MTPDrafter.load(target)
    steps = watched(drafter)
    out, _ = run(target, drafter, PROMPTS, 12, depth=3, eos=None)
    stop = given.model.generation_config
    stop.eos_token_id = None
    assert out == [greedy_reference(given.model, prompt, 12) for prompt in PROMPTS]
    seen = [row for texts, draft in steps for row in zip(texts, draft.lists(), strict=True)]
    assert len(seen) > 12
    for ids, tokens in seen:
        assert tokens == plainly(family, given, ids, len(tokens))


@needs_native
@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen2"])
def test_beside_a_native_model_it_leaves_the_output_unchanged(tmp_path: Path, family: str) -> None:
    given = publish(tmp_path, family, sizes_of(family))
    target = NativeTarget(given.model.bfloat16())
    drafter = MTPDrafter.load(target, str(tmp_path))
    out, ran = run(target, drafter, PROMPTS, 20, eos=None)
    assert out == run(target, NoDrafter(), PROMPTS, 20, eos=None)[0]
    assert all(sum(metrics.per_step_drafted) for metrics in ran.metrics)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    given = publish(tmp_path, "qwen3_5_text")
    target, tensors = TransformersTarget(given.model), load_file(tmp_path / FILE)
    for missing, message in (
        ("mtp.fc.weight", "'mtp.fc' is missing"),
        ("mtp.layers.0.mlp.up_proj.weight", "does not fit"),
        ("mtp.", "has no multi-token prediction layer"),
    ):
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(missing)}
        save_file(kept, tmp_path / FILE, {"format": "pt"})
        with pytest.raises(SpecDecError, match=message):
            MTPDrafter.load(target)
