"""What is known of a family: fields that are not are named, and sizes are bounded before anything is allocated."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from targets import needs_native
from tiny import ROPES, greedy_reference, model_of, rough_model, save_tiny, save_tiny_moe, sizes_of
from transformers import AutoConfig, AutoModelForImageTextToText
from zoo import PROMPTS, run

from specdec.base.errors import SpecDecError
from specdec.drafters.none import NoDrafter
from specdec.models import families, loading, safetensors_file
from specdec.models.config import Config
from specdec.models.native_model import NativeModel
from specdec.models.rotary import Rotary
from specdec.runtimes.select import make_target

UNKNOWN: list[tuple[str, str, Any]] = [
    ("llama", "residual_multiplier", 0.5),
    ("qwen3", "attention_sink", [1]),
    ("olmo2", "clip_qkv", 0.2),
    ("gemma3_text", "attn_logit_softcapping", 50.0),  # which transformers does not read
    ("gemma2", "use_bidirectional_attention", True),
    ("granite", "head_gate", "sigmoid"),
    ("olmoe", "clip_qkv", 0.1),  # which it does
    ("qwen3_5_text", "output_gate_type", "sigmoid"),
]


@needs_native
@pytest.mark.parametrize(("family", "field", "value"), UNKNOWN)
def test_a_field_that_the_family_does_not_know_is_named(family: str, field: str, value: Any) -> None:
    """And such a model runs elsewhere by itself, as its own code does."""
    families.check_fields(model_of(family).config)
    with pytest.raises(SpecDecError, match=f"this '{family}' model has {field} = "):
        make_target(model_of(family, **{field: value}), "native")
    target, note = make_target(model_of(family, **{field: value}))
    assert target.runtime == "transformers"
    for runtime in ("native", "torch"):
        assert f"no {runtime} runtime: the config of this '{family}' model has {field} = " in note
    if family not in ("llama", "gemma2"):
        return
    model = rough_model(family, **(sizes_of(family) | {field: value}))  # in float32
    model.generation_config.eos_token_id = None
    target = make_target(model, target.runtime)[0]
    expected = [greedy_reference(model, prompt, 20) for prompt in PROMPTS]
    assert run(target, NoDrafter(), PROMPTS, 20, eos=None)[0] == expected


PUBLISHED: dict[str, dict[str, Any]] = {  # what configs of published checkpoints have beside others' fields
    "gpt_oss": {"experts_per_token": 4, "initial_context_length": 4096, "output_router_logits": False},
    "gemma2": {"cache_implementation": "hybrid", "sliding_window_size": 4096},
    "gemma3_text": {"_sliding_window_pattern": 6, "use_bidirectional_attention": False},
    "qwen3_next": {"full_attention_interval": 2, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen3_5_text": {
        **{"attn_output_gate": True, "full_attention_interval": 2, "mamba_ssm_dtype": "float32", "mlp_only_layers": []},
        **{"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "output_gate_type": "swish"},
    },
    "phi3": {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}},
    "smollm3": {
        **{"max_window_layers": 28, "no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4, "pretraining_tp": 2},
        **{"rope_scaling": None, "rope_theta": 5e6, "sliding_window": None, "use_sliding_window": False},
    },
    "ministral3": {"rope_parameters": ROPES["ministral3"] | {"beta_fast": 32.0, "beta_slow": 1.0, "type": "yarn"}},
    "granite": {"attention_bias": False, "mlp_bias": False, "normalization_function": "rmsnorm", "init_method": "mup"},
    "olmoe": {"clip_qkv": None},
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_configs_of_published_checkpoints_run_natively(tmp_path: Path, family: str) -> None:
    model_of(family).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | PUBLISHED[family]))
    families.check_fields(AutoConfig.from_pretrained(tmp_path))


EYES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
EYES |= {"num_attention_heads": 2, "head_dim": 16}  # of Gemma 3 and Ministral 3
MULTIMODAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", EYES),
    "gemma4": ("gemma4_text", EYES | {"num_key_value_heads": 2}),
    "mistral3": ("ministral3", EYES | {"model_type": "pixtral"}),
    "qwen3_5": ("qwen3_5_text", {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64}),
}


@needs_native
@pytest.mark.parametrize("kind", MULTIMODAL)
def test_the_text_model_of_a_multimodal_checkpoint_runs_natively(tmp_path, monkeypatch, kind: str) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    text, eyes = MULTIMODAL[kind]
    config = AutoConfig.for_model(kind, text_config=model_of(text).config, vision_config=eyes)
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config).float().eval()
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    whole.save_pretrained(tmp_path)
    model, _ = loading.load(tmp_path)
    assert model.config.model_type == text and not any("vision" in name for name, _ in model.named_parameters())
    ids = torch.arange(5, 25)[None]
    assert torch.allclose(model(ids).logits, whole(input_ids=ids).logits, atol=1e-3)
    native = loading.load(tmp_path, dtype="bfloat16")[0]
    target, note = make_target(native)
    assert isinstance(native, NativeModel) and target.runtime == "native", note


def test_so_is_one_of_the_rotation() -> None:
    config = model_of("llama").config
    config.rope_parameters["llama_4_scaling_beta"] = 0.1
    with pytest.raises(SpecDecError, match=r"has rope_parameters.llama_4_scaling_beta = 0.1"):
        families.check_fields(config)
    config = model_of("gemma3_text").config
    config.rope_parameters["full_attention"]["spiral"] = 2
    with pytest.raises(SpecDecError, match=r"has rope_parameters.spiral = 2"):
        families.check_fields(config)


def test_fields_that_change_no_token_are_none_of_its_business() -> None:
    config = model_of("qwen2").config
    config.unsloth_version, config.attention_dropout, config.something_off = "2026.1", 0.1, False
    config.unk_token_id = 3  # from a GGUF file
    families.check_fields(config)


MORE = r"describes over twice the \d+ weights of its files"


@pytest.mark.parametrize(
    ("kind", "changes", "text"),
    [
        ("mixtral", {"hidden_size": 1 << 30}, "its config says that hidden_size is '1073741824'"),
        ("mixtral", {"num_local_experts": 1 << 20}, "says that num_local_experts is '1048576'"),
        ("mixtral", {"num_experts_per_tok": 7}, "a token takes more experts than the 6 of its config"),
        ("mixtral", {"sliding_window": -1}, "says that sliding_window is '-1'"),
        ("mixtral", {"intermediate_size": 1 << 19}, MORE),
        ("mixtral", {"num_local_experts": 1 << 14}, MORE),
        ("mixtral", {"num_local_experts": 65535, "intermediate_size": 1 << 19}, MORE),  # no memory has that
        ("llama", {"num_hidden_layers": 1 << 13, "layer_types": None}, MORE),
        ("llama", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen3_next", {"shared_expert_intermediate_size": 10**6}, MORE),
        ("qwen3_next", {"linear_value_head_dim": 4000}, MORE),
    ],
)
def test_sizes_are_bounded_before_anything_is_allocated(tmp_path, kind, changes, text) -> None:
    folder = save_tiny(tmp_path) if kind == "llama" else save_tiny_moe(tmp_path, kind)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SpecDecError, match=text):
        loading.load(str(folder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KB


def test_packed_weights_may_hold_more_numbers_than_elements(tmp_path: Path) -> None:
    """Those of quantised checkpoints: a byte has up to eight."""
    save_file({"packed": torch.zeros(3, 5, dtype=torch.uint8), "scale": torch.ones(7)}, tmp_path / "it.safetensors")
    assert safetensors_file.numbers_in([tmp_path / "it.safetensors"]) == {"packed": 8 * 15, "scale": 7}


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("mixtral", {"num_local_experts": 1, "num_experts_per_tok": 2}, "takes more experts than the 1 of its config"),
        ("qwen3_moe", {"num_experts": 2, "num_local_experts": 64, "num_experts_per_tok": 8}, "more experts than the 2"),
    ],
)
def test_impossible_mixtures_are_refused(family: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecDecError, match=message):
        families.check_sizes("x", Config(model_type=family, num_hidden_layers=2, **fields))


def test_fields_that_a_familys_code_ignores_or_obeys_alone_are_not_mixed_up() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(SpecDecError, match=r"has rope_parameters\.partial_rotary_factor = 0\.5"):
        families.check_fields(Config(model_type="llama", rope_parameters=rope, hidden_act="silu"))
    families.check_fields(Config(model_type="phi3", rope_parameters=rope, hidden_act="silu"))
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False}
    assert families.mixture_of(Config(model_type="mixtral", **sizes)).normalize_top_k
    assert not families.mixture_of(Config(model_type="olmoe", num_experts=4, **sizes)).normalize_top_k
    with pytest.raises(SpecDecError, match="rotary embeddings of 64 of the 32 values of a head are impossible"):
        Rotary(Config(head_dim=32, num_key_value_heads=1, rope_parameters=rope | {"partial_rotary_factor": 2.0}))
