"""The shape of the configs that the hub's small models of 2026 have: all fields, small sizes, random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from targets import needs_native
from tiny import save_tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from specdec.models import loading
from specdec.runtimes.prefill import run_tokens
from specdec.runtimes.select import make_target

COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "initializer_range": 0.1,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "vocab_size": 99,
    "use_cache": True,
}
GRANITE: dict[str, Any] = COMMON | {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "attention_bias": False,
    "attention_multiplier": 0.0078125,
    "bos_token_id": 1,
    "embedding_multiplier": 12,
    "eos_token_id": 2,
    "hidden_size": 64,
    "init_method": "mup",
    "intermediate_size": 96,
    "layer_types": ["mamba", "attention", "mamba", "attention"],
    "logits_scaling": 8,
    "logits_to_keep": None,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 8,
    "mamba_proj_bias": False,
    "max_position_embeddings": 131072,
    "model_type": "granitemoehybrid",
    "normalization_function": "rmsnorm",
    "num_experts_per_tok": 0,
    "num_local_experts": 0,
    "output_router_logits": False,
    "pad_token_id": 0,
    "position_embedding_type": "nope",
    "residual_multiplier": 0.246,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000,
    "router_aux_loss_coef": 0.01,
    "shared_intermediate_size": 96,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen3.5": {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "image_token_id": 90,
        "model_type": "qwen3_5",
        "text_config": COMMON
        | {
            "attention_bias": False,
            "attn_output_gate": True,
            "dtype": "bfloat16",
            "eos_token_id": 2,
            "full_attention_interval": 4,
            "head_dim": 64,
            "hidden_size": 64,
            "intermediate_size": 96,
            "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 16,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_value_head_dim": 16,
            "max_position_embeddings": 262144,
            "mlp_only_layers": [],
            "model_type": "qwen3_5_text",
            "mtp_num_hidden_layers": 1,
            "mtp_use_dedicated_embeddings": False,
            "rms_norm_eps": 1e-06,
            "tie_word_embeddings": True,
            "mamba_ssm_dtype": "float32",
            "rope_parameters": {
                "mrope_interleaved": True,
                "mrope_section": [3, 3, 2],
                "rope_type": "default",
                "rope_theta": 10000000,
                "partial_rotary_factor": 0.25,
            },
        },
        "tie_word_embeddings": True,
        "video_token_id": 91,
        "vision_start_token_id": 92,
        "vision_end_token_id": 93,
        "vision_config": {
            "deepstack_visual_indexes": [],
            "depth": 1,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 32,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 48,
            "model_type": "qwen3_5",
            "num_heads": 2,
            "num_position_embeddings": 16,
            "out_hidden_size": 64,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
    "SmolLM3": COMMON
    | {
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 128,
        "intermediate_size": 96,
        "layer_types": ["full_attention", "full_attention", "full_attention", "full_attention"],
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "pad_token_id": 3,
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.54.0.dev0",
        "use_cache": False,
        "use_sliding_window": False,
    },
    "Ministral 3": {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_token_index": 10,
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "text_config": COMMON
        | {
            "head_dim": 32,
            "hidden_size": 64,
            "intermediate_size": 96,
            "max_position_embeddings": 262144,
            "model_type": "ministral3",
            "rms_norm_eps": 1e-05,
            "rope_parameters": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 16.0,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 16384,
                "rope_theta": 1000000.0,
                "rope_type": "yarn",
                "type": "yarn",
            },
            "sliding_window": None,
            "tie_word_embeddings": True,
        },
        "tie_word_embeddings": True,
        "vision_config": {
            "attention_dropout": 0.0,
            "head_dim": 16,
            "hidden_act": "silu",
            "hidden_size": 32,
            "image_size": 28,
            "initializer_range": 0.02,
            "intermediate_size": 48,
            "model_type": "pixtral",
            "num_attention_heads": 2,
            "num_channels": 3,
            "num_hidden_layers": 1,
            "patch_size": 14,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "vision_feature_layer": -1,
    },
    "LFM2 and LFM2.5": COMMON
    | {
        "architectures": ["Lfm2ForCausalLM"],
        "block_auto_adjust_ff_dim": True,
        "block_dim": 64,
        "block_ff_dim": 96,
        "block_ffn_dim_multiplier": 1.0,
        "block_mlp_init_scale": 1.0,
        "block_multiple_of": 16,
        "block_norm_eps": 1e-05,
        "block_out_init_scale": 1.0,
        "block_use_swiglu": True,
        "block_use_xavier_init": True,
        "bos_token_id": 1,
        "conv_L_cache": 3,
        "conv_bias": False,
        "conv_dim": 64,
        "conv_dim_out": 64,
        "conv_use_xavier_init": True,
        "eos_token_id": 7,
        "full_attn_idxs": [1, 3],
        "hidden_size": 64,
        "max_position_embeddings": 128000,
        "model_type": "lfm2",
        "norm_eps": 1e-05,
        "num_heads": 4,
        "pad_token_id": 0,
        "rope_theta": 1000000.0,
        "theta": 1000000.0,
        "torch_dtype": "bfloat16",
        "use_pos_enc": True,
    },
    "Granite 4": GRANITE
    | {
        "hidden_size": 128,
        "layer_types": ["attention", "attention", "attention", "attention"],
        "mamba_d_head": 32,
        "position_embedding_type": "rope",
    },
    "Granite 4 H": GRANITE,
}
OTHERS = "LFM2 and LFM2.5", "Granite 4 H"  # with layers that have no kernels


@needs_native
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_that_of_a_model_that_runs(tmp_path: Path, monkeypatch: Any, name: str) -> None:
    """Natively, if there are kernels; its logits are those of the model's own code."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    config = AutoConfig.from_pretrained(tmp_path)
    kind: Any = AutoModelForImageTextToText if "text_config" in PUBLISHED[name] else AutoModelForCausalLM
    torch.manual_seed(0)
    whole = kind.from_config(config, dtype=torch.bfloat16).eval()
    whole.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))  # not what transformers made of it
    target, note = make_target(loading.load(tmp_path)[0])
    assert target.runtime == ("transformers" if name in OTHERS else "native"), note
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        run_tokens(target, target.new_cache(), ids.tolist(), every=(every := []))
        expected = whole.float()(input_ids=ids).logits[0]
        found = target.readout(every[0][None])[0].float()
    assert (found - expected).abs().median() < 0.01 * expected.abs().max()
