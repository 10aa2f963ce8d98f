"""Public heads as others write them, and the parts of their decoder layers by the formula."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import zoo
from safetensors.torch import save_file
from torch import Tensor

from specdec.drafters.speculators import PublicHead
from specdec.runtimes.target import Target
from specdec.speculation.drafter import Drafter

TEXT = [5, 6, 7, 8, 5, 6, 9, 3, 12]
TAPS = {"eagle3": "eagle_aux_hidden_state_layer_ids", "dspark": "aux_hidden_state_layer_ids"}


def save(folder: Path, network: PublicHead, target: Target, kind: str, **changes: Any) -> Path:
    """Write a head as others do, with ``changes`` of its config.json."""
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    if network.tokens is not None:
        tensors["t2d"] = torch.zeros(target.vocab_size, dtype=torch.bool).index_fill(0, network.tokens, True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(network, target, kind) | changes))
    return folder


def config_of(network: PublicHead, target: Target, kind: str) -> dict[str, Any]:
    """config.json in the speculators format. kind: "eagle3", "dspark" or "dflash"."""
    head: Any = network.config
    config = {"speculators_model_type": kind, "draft_vocab_size": head.vocab}
    layer = {
        "hidden_act": "silu",
        "hidden_size": head.width,
        "intermediate_size": head.intermediate_size,
        "num_attention_heads": head.heads,
        "num_key_value_heads": head.kv_heads,
        "head_dim": head.head_dim,
        "rms_norm_eps": head.eps,
        "vocab_size": target.vocab_size,
    }
    if kind == "eagle3":
        layer |= {"model_type": "llama", "num_hidden_layers": 1, "max_position_embeddings": target.context, **head.rope}
        verifier = {"name_or_path": "org/base", "architectures": list(target.model.config.architectures or [])}
        return config | {
            "architectures": ["Eagle3Speculator"],
            "speculators_version": "0.3.0",
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
                "verifier": verifier,
            },
            "target_hidden_size": target.hidden_size,
            "norm_before_residual": head.norm_first,
            TAPS[kind]: list(head.layers),
            "tie_word_embeddings": False,
            "transformer_layer_config": layer,
        }
    layer |= {
        "model_type": "qwen3",
        "num_hidden_layers": head.depth,
        "attention_bias": head.biased,
        "use_sliding_window": any(head.windows),
        "sliding_window": max(window or 0 for window in head.windows),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in head.windows],
    }
    return config | {
        "architectures": ["DSparkSpeculator"],
        "speculators_version": "0.9.0",
        "block_size": head.block,
        TAPS["dspark"]: list(head.layers),
        "mask_token_id": head.mask_token,
        "sample_from_anchor": not head.first,
        "sliding_window_non_causal": not head.causal,
        "markov_rank": head.rank,
        "markov_head_type": head.markov or "vanilla",
        "enable_confidence_head": head.sure > 0,
        "confidence_head_with_markov": head.sure > head.width,
        "transformer_layer_config": layer,
    }


def proposed(target: Target, drafter: Drafter, prompts: list[list[int]], count: int = 9) -> list[Any]:
    """The texts of all rows and the draft, of each step of a generation."""
    seen = zoo.watched(drafter)
    zoo.run(target, drafter, prompts, count, eos=None)
    return seen


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions: x [H, T, d]."""
    half = x.shape[-1] // 2
    angles = positions[:, None] / 10000.0 ** (torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


def attended(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Attention of queries [H, T, 8] to the keys and values [h, S, 8] that are ``visible`` [T, S]; returns [T, 8 H]."""
    k, v = (part.repeat_interleave(len(q) // len(part), 0) for part in (k, v))
    scores = (q @ k.transpose(1, 2) / 8**0.5).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def fed_forward(w: dict[str, Tensor], layer: str, x: Tensor) -> Tensor:
    """``x`` plus the MLP of a layer whose tensors begin with ``layer``."""
    y = norm(x, w[layer + "post_attention_layernorm.weight"])
    gate, up = (y @ w[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w[layer + "mlp.down_proj.weight"].T
