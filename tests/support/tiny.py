"""Tiny random models, and folders of them with a character tokenizer and a chat template, as a user would have them."""

import copy
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def save_tiny(folder: Path, context: int = 4096, **sizes: int) -> Path:
    """Write a folder of a float32 Llama whose tokens are characters. It has no end token."""
    return _save(folder, "llama", {"max_position_embeddings": context, **sizes})


def save_model(folder: Path, family: str) -> Path:
    """Write a folder of a small float32 model of ``family``, as ``save_tiny`` does."""
    return _save(folder, family, {})


def save_native(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, **more: object) -> Path:
    """Write a folder as ``save_tiny`` does, of a family and with sizes that the native runtime supports."""
    return _save(folder, kind, sizes_of(kind) | more, dtype)


def save_granite4(folder: Path, **more: object) -> Path:
    """Write a folder of a dense Granite 4 of bfloat16 weights."""
    return _save(folder, "granitemoehybrid", DENSE_GRANITE4 | more, torch.bfloat16)


def save_tiny_moe(folder: Path, kind: str = "mixtral", dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a folder of a mixture of 6 experts, 2 for each token, that the native runtime supports."""
    count = "num_local_experts" if kind == "mixtral" else "num_experts"
    return save_native(folder, kind, dtype, **{count: 6, "num_experts_per_tok": 2})


def _save(folder: Path, kind: str, more: dict[str, object], dtype: torch.dtype = torch.float32) -> Path:
    characters = string.printable.replace("\r", "")
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    size = {"vocab_size": len(characters), **more}
    tiny_model(kind, eos_token_id=None, bos_token_id=None, **size).to(dtype).save_pretrained(folder)
    return folder


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {
        "head_dim": 8,
        "sliding_window": 5,
        "attn_logit_softcapping": 0.25,
        "final_logit_softcapping": 6.0,
    },
    "gemma3_text": {
        "head_dim": 8,
        "final_logit_softcapping": 9.0,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi": {},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "gpt_neox": {},
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 0.8,
        "attention_multiplier": 0.2,
    },
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "ministral3": {"head_dim": 8},
    "gemma4_text": {
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "per_layer_config": {"01": {"head_dim": 16}, "03": {"head_dim": 16}},
        "hidden_size_per_layer_input": 0,
        "tie_word_embeddings": False,
    },
    "llama4_text": {
        "head_dim": 8,
        "attention_chunk_size": 6,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 48,
        "floor_scale": 8,
    },
    "gpt_oss": {
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "swiglu_limit": 0.5,
    },
    "deepseek_v3": {**ROUTED, **LATENT, "n_group": 2, "topk_group": 1},
    "glm4_moe": {**ROUTED, "head_dim": 8},
    "glm4_moe_lite": {**ROUTED, **LATENT, "n_group": 1},
    "minimax_m2": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}
DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
HYBRIDS: dict[str, dict[str, object]] = {  # families with recurrent layers
    "qwen3_next": {"head_dim": 8, **DELTA_NET, **EXPERTS},
    "qwen3_5_text": {"head_dim": 8, **DELTA_NET},
    "qwen3_5_moe_text": {"head_dim": 8, **DELTA_NET, **EXPERTS},
    "olmo_hybrid": DELTA_NET,
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        **MAMBA2,
        "num_local_experts": 4,
        "shared_intermediate_size": 24,
    },
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64, "mamba_d_head": 8, "head_dim": 8},
    "bamba": {**MAMBA2, "attn_layer_indices": [1, 3]},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
        "head_dim": 8,
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"] * 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
    },
}
OTHERS: dict[str, dict[str, object]] = {  # further families that the runtime transformers takes
    "afmoe": {
        "head_dim": 8,
        "sliding_window": 5,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "apertus": {},
    "biogpt": {},
    "codegen": {"n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4},
    "cohere": {},
    "cohere2": {"head_dim": 8, "sliding_window": 5},
    "deepseek_v2": {**ROUTED, **LATENT, "n_group": 1, "topk_group": 1},
    "diffllama": {"head_dim": 8},
    "exaone4": {"head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2},
    "falcon": {"alibi": False, "new_decoder_architecture": False, "multi_query": True},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 4, "n_head": 4},
    "gpt_neo": {
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 5,
    },
    "gptj": {"n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4},
    "helium": {"head_dim": 8},
    "mimo_v2_flash": {"sliding_window": 5},
    "modernbert-decoder": {"local_attention": 6, "global_attn_every_n_layers": 2},
    "nemotron": {"head_dim": 8},
    "olmo3": {"sliding_window": 5},
    "persimmon": {},
    "phimoe": {"sliding_window": 5},
    "stablelm": {},
    "starcoder2": {"sliding_window": 5},
    "vaultgemma": {"head_dim": 8, "sliding_window": 5},
    "xglm": {"d_model": 32, "num_layers": 4, "attention_heads": 4, "ffn_dim": 48},
}
EAGER = (
    "gemma2",
    "gpt_oss",
    "mamba2",
    "gpt_neo",
    "mimo_v2_flash",
    "vaultgemma",
    "xglm",
)  # other attention is not supported


DENSE_GRANITE4: dict[str, object] = {  # as published: the type of the hybrids, no recurrent layer and no experts
    "layer_types": ["attention"] * 4,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 96,
    "intermediate_size": 128,
    "hidden_size": 128,
    "mamba_n_heads": 8,
    "mamba_expand": 2,
    "position_embedding_type": "rope",
    "attention_multiplier": 0.1,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 0.8,
    "init_method": "mup",
    "normalization_function": "rmsnorm",
}


def tiny_model(family: str = "llama", attention: str | None = None, **changes: object) -> PreTrainedModel:
    """Return a random float32 model of 4 layers in evaluation mode; its best logits are clearly the best."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **(FAMILIES | HYBRIDS | OTHERS)[family], **changes})
    attention = attention or ("eager" if family in EAGER else "sdpa")
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.requires_grad_(False)


def greedy_reference(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """Return the new tokens of a greedy ``model.generate``."""
    out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, len(ids) :].tolist()


ROPES = {
    "llama": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "qwen2": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32},
    "phi3": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "ministral3": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8,
                   "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3},
}  # fmt: skip


def rough_model(family: str, **changes: object) -> torch.nn.Module:
    """Return a tiny model with random biases and norm weights."""
    model = tiny_model(family, **changes)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or name.endswith("bias"):
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if parameter.dim() == 1 else 0.1)
        if family == "gemma4_text" and name.endswith("q_norm.weight"):
            parameter.mul_(0.2)  # scores have no other factor
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.mul_(0.8)
    return model


SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
# Gemma 4's small models: layers read embeddings of their own, and the last ones the keys of others; others are larger.
ELASTIC = {
    "per_layer_config": {"1": {"head_dim": 64}, "3": {"head_dim": 64}},
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 128,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
}
GLOBAL = {"head_dim": 64, "num_key_value_heads": 1}
WHOLE = {  # and its large one
    "per_layer_config": {"1": GLOBAL, "3": GLOBAL},
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
}
PHI = {"hidden_size": 128, "intermediate_size": 96}  # its heads share the hidden size


def sizes_of(family: str) -> dict[str, object]:
    """Return config entries with which a tiny model of ``family`` runs in the native runtime."""
    more: dict[str, object] = {"moe_intermediate_size": 32} if family == "qwen3_moe" else {}
    if family == "gemma4_text":
        more = ELASTIC
    if family in HYBRIDS:
        more = {"linear_key_head_dim": 16, "linear_value_head_dim": 32, "linear_num_key_heads": 2}
        more |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 96} if family != "qwen3_5_text" else {}
    return (PHI if family in ("phi3", "olmoe") else SIZES) | more


def tamed(model: torch.nn.Module) -> torch.nn.Module:
    """Scale the matrices of ``model`` to the size of trained ones; rounding to 8 bits then does not grow."""
    for parameter in model.parameters():
        parameter.mul_(0.25 if parameter.dim() > 1 else 1)
    return model


def model_of(family: str, **changes: object) -> torch.nn.Module:
    return rough_model(family, **(sizes_of(family) | changes)).bfloat16()


def without(model: PreTrainedModel, *layers: int) -> PreTrainedModel:
    """Return a copy of a Llama in which ``layers`` do not change the residual."""
    model = copy.deepcopy(model)
    for layer in layers:
        for linear in (model.model.layers[layer].self_attn.o_proj, model.model.layers[layer].mlp.down_proj):
            torch.nn.init.zeros_(linear.weight)
    return model


def change_unseen(model: Any) -> None:
    """Change two rows of a model's embedding where its fingerprint does not see it."""
    from specdec.models import identity  # ``systems`` imports this module before specdec

    table = model.get_input_embeddings().weight.data
    seen = set(identity.sample_positions(table.numel()).tolist())
    width, (first, last) = table.shape[1], (7, 20)
    for row in (first, last):
        column = next(column for column in range(width) if row * width + column not in seen)
        table[row, column] += 1
