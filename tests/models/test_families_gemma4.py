"""Gemma 4: layers that differ, in configs and in files; its mixture, which only transformers runs."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from passes import apart
from targets import needs_native
from tiny import WHOLE, greedy_reference, rough_model, save_native, sizes_of, tamed
from tiny_gguf import write_family
from zoo import PROMPTS, run

from specdec.base.errors import SpecDecError
from specdec.drafters.none import NoDrafter
from specdec.models import loading
from specdec.models.gguf.file import read_header
from specdec.models.gguf.model import END_TOKENS, config_of
from specdec.runtimes.select import make_target

MIXTURE: dict[str, Any] = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}


def test_the_large_model_of_a_file_is_the_one_that_it_was_made_of(cache: object, tmp_path: Path) -> None:
    """Its layers with full attention have fewer, larger key heads, and one projection for keys and values."""
    source = rough_model("gemma4_text", **(sizes_of("gemma4_text") | WHOLE))
    model, _ = loading.load(write_family(tmp_path / "it.gguf", source), dtype="float32")
    assert model.config.attention_k_eq_v and not model.config.num_kv_shared_layers
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        assert apart(model(ids).logits, source(ids).logits) < 1e-4
    target = make_target(model)[0]
    expected = [greedy_reference(source, prompt, 12) for prompt in PROMPTS]
    assert target.runtime == "torch" and run(target, NoDrafter(), PROMPTS, 12)[0] == expected


@needs_native
def test_a_file_may_have_keys_that_no_layer_reads(cache: object, tmp_path: Path) -> None:
    """Converters keep those of the layers that read the keys of others."""
    source = tamed(rough_model("gemma4_text", **sizes_of("gemma4_text")))
    more = {f"blk.3.{part}.weight": np.ones((128, 64), np.float32) for part in ("attn_k", "attn_v")}
    model, _ = loading.load(write_family(tmp_path / "it.gguf", source, "Q8_0", tensors=more))
    target, note = make_target(model)
    assert target.runtime == "native" and not note
    assert [*target.new_cache().names] == ["kv", "kv1"]  # type: ignore[attr-defined]


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"num_kv_shared_layers": 4}, "its config says that 4 of 4 layers share the keys of others"),
    ({"num_kv_shared_layers": 3}, "its config says that 3 of 4 layers share"),  # no layer has keys for the second kind
    ({"hidden_size_per_layer_input": 1 << 20}, "embeddings for each layer have 1048576 numbers"),
    ({"vocab_size_per_layer_input": 50}, "its embeddings for each layer lack tokens of its vocabulary"),
    ({"per_layer_config": {"1": {"head_dim": 1 << 20}}}, "its config says .* of layer 1"),
    ({"per_layer_config": {"one": {"head_dim": 64}}}, "cannot load model"),
]


@pytest.mark.parametrize(("changes", "text"), BROKEN)
def test_impossible_layers_are_refused_before_anything_is_allocated(tmp_path: Path, changes: Any, text: str) -> None:
    folder = save_native(tmp_path / "it", "gemma4_text")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(SpecDecError, match=text):
        loading.load(folder)


@needs_native
def test_a_mixture_runs_through_transformers_and_says_why(tmp_path: Path) -> None:
    folder = save_native(tmp_path / "it", "gemma4_text", **(WHOLE | MIXTURE))
    model, _ = loading.load(folder)
    target, note = make_target(model)
    assert target.runtime == "transformers"
    assert "has experts beside an MLP in each layer, which only the transformers runtime has" in note


FALSE: list[tuple[str, Any, str]] = [
    ("expert_count", 4, r"GGUF files of Gemma 4 mixtures \(26B-A4B\) are not supported"),
    ("attention.sliding_window_pattern", [True, False], "does not say what its layers are"),
    ("attention.shared_kv_layers", 9, "does not say what its layers are"),
    ("feed_forward_length", [96, 96, 96, 192], "layers of one kind have different sizes"),
    ("attention.head_count_kv", [2, 1, 2, 2], "layers of one kind have different sizes"),
    ("rope.dimension_count", 32, "only a part of each head rotates"),
]


@pytest.mark.parametrize(("key", "value", "text"), FALSE)
def test_metadata_of_layers_that_do_not_fit_are_refused(tmp_path: Path, key: str, value: Any, text: str) -> None:
    file = read_header(write_family(tmp_path / "it.gguf", rough_model("gemma4_text", **sizes_of("gemma4_text"))))
    file.metadata[f"gemma4.{key}"] = value
    with pytest.raises(SpecDecError, match=text):
        config_of("it", file)


def test_divisors_of_rotary_frequencies_must_be_one_or_huge(tmp_path: Path) -> None:
    source = rough_model("gemma4_text", **sizes_of("gemma4_text"))
    path = write_family(tmp_path / "it.gguf", source)
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if tensor.name == "rope_freqs.weight":
            tensor.data[1] = 2.0
    with pytest.raises(SpecDecError, match="divides rotary frequencies in an unknown way"):
        config_of("it", read_header(path))


def test_turns_end_where_the_model_ends_them() -> None:
    assert {"<turn|>", "<|tool_response>"} <= END_TOKENS
