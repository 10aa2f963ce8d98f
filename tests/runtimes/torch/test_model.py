"""The pass that kernels are checked against: transformers' logits in every family, and faults that it finds."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from targets import needs_native
from tiny import ROPES, WHOLE, rough_model, sizes_of, tamed
from tiny_gguf import write_family
from torch import Tensor

from specdec.base.errors import SpecDecError
from specdec.models import families, loading
from specdec.models.config import Config
from specdec.models.gguf.blocks import Blocks
from specdec.models.native_model import NativeModel
from specdec.runtimes import decoder_layer
from specdec.runtimes.native import linear
from specdec.runtimes.native.packing import PackedModel
from specdec.runtimes.native.target import NativeTarget
from specdec.runtimes.target import _windows
from specdec.runtimes.torch.model import logits_of

IDS = torch.arange(1, 21) * 7919 % 97
BIASES, TIED = {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "llama": [{"attention_bias": True}, BIASES | TIED, {"head_dim": None}],
    "qwen2": [TIED],
    **{kind: [{"attention_bias": True}] for kind in ("qwen3", "olmo2", "gemma3_text")},
    **{kind: [BIASES] for kind in ("granite", "smollm3")},
    "olmoe": [{"attention_bias": True}, {"norm_topk_prob": True}],
    "gemma2": [{"sliding_window": 3}],
    "gemma4_text": [WHOLE, {"num_kv_shared_layers": 0}, {"use_bidirectional_attention": "vision"}],
    "gpt_oss": [{"attention_bias": False}],
    "qwen3_moe": [{"attention_bias": True}, {"mlp_only_layers": [1], "decoder_sparse_step": 2}],
    "qwen3_5_text": [{"attention_bias": True, "linear_num_value_heads": 8}],
    "qwen3_next": [{"linear_num_value_heads": 8}, {"mlp_only_layers": [2]}],
}
CASES = [(kind, change) for kind in families.FAMILIES for change in ({}, *VARIANTS.get(kind, ()))]


def shapes(model: Any) -> dict[str, Any]:
    return {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}


def native_model(model: Any) -> NativeModel:
    """A native model with the weights of one of transformers, which has the same modules."""
    own = NativeModel(Config(**model.config.to_dict()), model.dtype)
    assert shapes(own) == shapes(model) and own.dtype == model.dtype
    assert (own.lm_head.weight is own.model.embed_tokens.weight) == bool(model.config.tie_word_embeddings)
    for name, value in model.state_dict(keep_vars=True).items():
        path, _, leaf = name.rpartition(".")
        setattr(own.get_submodule(path), leaf, torch.nn.Parameter(value, requires_grad=False))
    if model.config.tie_word_embeddings:
        own.lm_head.weight = own.model.embed_tokens.weight
    return own


@pytest.mark.parametrize(("kind", "changes"), CASES, ids=[f"{kind} {change}" for kind, change in CASES])
def test_modules_and_logits_are_those_of_transformers(kind: str, changes: dict[str, Any]) -> None:
    rope = {"rope_parameters": ROPES[kind]} if kind in ROPES else {}
    model = rough_model(kind, **(sizes_of(kind) | rope | changes))
    expected = model(IDS[None]).logits[0]
    found = logits_of(native_model(model), IDS, _windows(model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss"])
def test_tokens_take_the_experts_that_are_given(kind: str) -> None:
    model, seen = native_model(rough_model(kind, **sizes_of(kind))), dict[int, Tensor]()

    def choose(layer: int, logits: Tensor) -> Tensor:
        seen[layer] = logits
        return logits.topk(2).indices if least is None else logits.topk(2, largest=False).indices

    windows, least = _windows(model), None
    assert torch.equal(logits_of(model, IDS, windows, choose), logits_of(model, IDS, windows))
    assert sorted(seen) == [0, 1, 2, 3] and seen[0].shape == (20, 4)
    least = True
    assert not torch.allclose(logits_of(model, IDS, windows, choose), logits_of(model, IDS, windows))


def swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates are taken for ups."""
    own = decoder_layer.modules

    def modules(layer: Any) -> dict[str, Any]:
        found = own(layer)
        return found | {"gate_up": found["gate_up"][::-1]}

    monkeypatch.setattr(decoder_layer, "modules", modules)


def unordered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of queries and keys stay in the order of the file."""
    own = linear._block_tiles
    monkeypatch.setattr(linear, "_block_tiles", lambda blocks, memory: own(replace(blocks, rows=None), memory))


def misread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks in the middle of a matrix have other numbers."""
    own = linear._block_tiles

    def tiles(blocks: Blocks, memory: Any) -> Any:
        data = blocks.data.clone()
        data[1:-1, ::34] += 8
        return own(replace(blocks, data=data), memory)

    monkeypatch.setattr(linear, "_block_tiles", tiles)


def unrotated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each position is that behind it."""
    own = NativeTarget._rotary_tables

    def tables(self: NativeTarget, count: int) -> Any:
        found = own(self, count)
        if not hasattr(self, "moved"):
            self.moved = [table.copy_(table.roll(1, 0) * 0.5) for table in found[0]]  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(NativeTarget, "_rotary_tables", tables)


def unscaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms have no weights."""
    monkeypatch.setattr(PackedModel, "_norm", lambda self, module: torch.ones(module.weight.shape))


FAULTS: list[Callable[[pytest.MonkeyPatch], None]] = [swapped, unordered, misread, unrotated, unscaled]


@needs_native
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_kernels_is_found(cache, tmp_path, monkeypatch, fault) -> None:
    source: Any = tamed(rough_model("llama", **sizes_of("llama")))
    for layer in source.model.layers:  # scores differ, and what layers add is as large as what they are added to
        own, mlp = layer.self_attn, layer.mlp
        for module, factor in (
            (own.q_proj, 4),
            (own.k_proj, 4),
            (own.o_proj, 8),
            (mlp.gate_proj, 2),
            (mlp.down_proj, 8),
        ):
            module.weight.mul_(factor)
    model = loading.load(write_family(tmp_path / "it.gguf", source, "Q8_0"))[0]
    assert isinstance(model, NativeModel) and NativeTarget(model).logit_difference < 0.02
    fault(monkeypatch)
    with pytest.raises(SpecDecError, match="the native runtime gives other logits than this 'llama' model"):
        NativeTarget(model)
