"""LoRA adapters with random weights, in PEFT folders."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PARTS = "self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "some/base", "r": 4, "lora_alpha": 8,
    "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"], "bias": "none", "inference_mode": True,
    "fan_in_fan_out": False, "modules_to_save": None, "use_dora": False, "use_rslora": False, "init_lora_weights": True,
    "rank_pattern": {}, "alpha_pattern": {}, "loftq_config": {}, "megatron_core": "megatron.core",
    "qalora_group_size": 16, "layers_to_transform": None, "trainable_token_indices": None,
}  # fmt: skip


def save_lora(folder: Path, model: Any, seed: int = 0, size: float = 0.3, **config: Any) -> dict[str, Tensor]:
    """Write a PEFT folder with random adapters of the linear layers ``PARTS``; return its tensors by name.

    size: scale of the weights. config: entries of adapter_config.json that replace the defaults.
    """
    random, tensors = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    rank = (CONFIG | config)["r"]
    for path, module in model.named_modules():
        if path.endswith(PARTS):
            name = f"base_model.model.{path}.lora_"
            tensors[f"{name}A.weight"] = torch.randn(rank, module.in_features, generator=random) * size
            tensors[f"{name}B.weight"] = torch.randn(module.out_features, rank, generator=random) * size
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return tensors
