"""Complete the config of common model types from the metadata of a GGUF file, without importing transformers.

A GGUF file lacks fields whose defaults depend on the model type. transformers completes the configs of the types that
this module does not know. A test compares both ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from specdec.models.config import Config

NEEDED = {
    *("hidden_size", "intermediate_size", "max_position_embeddings", "model_type", "num_attention_heads"),
    *("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "vocab_size"),
}
OPTIONAL = {"head_dim", "rope_theta", "tie_word_embeddings"}
OPTIONAL |= {f"{part}_token_id" for part in ("bos", "eos", "pad", "unk")}
EVERY: dict[str, Any] = {
    **dict.fromkeys(("architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "problem_type")),
    **dict.fromkeys(("is_encoder_decoder", "output_attentions", "output_hidden_states", "tie_word_embeddings"), False),
    **dict.fromkeys(("return_dict", "use_cache"), True),
    **{"attention_dropout": 0.0, "chunk_size_feed_forward": 0, "hidden_act": "silu", "initializer_range": 0.02},
    **{"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}},
}
SLIDING = {"max_window_layers": 28, "sliding_window": None, "use_sliding_window": False}
OWN: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "bos_token_id": 1, "eos_token_id": 2, "mlp_bias": False, "pretraining_tp": 1},
    "qwen2": SLIDING,
    "qwen3": {"attention_bias": False, "head_dim": 128, **SLIDING},
}


def complete(values: Mapping[str, Any]) -> Config | None:
    """Return the config of a model with the fields ``values``, completed by the defaults of its model type.

    values: config fields from a GGUF file, by transformers' names, "model_type" included.
    Returns None if the model type or a field is not known here, so that only transformers can complete the config.
    """
    kind, given = values["model_type"], {key: value for key, value in values.items() if key != "rope_theta"}
    known = kind in OWN and NEEDED <= values.keys() <= NEEDED | OPTIONAL
    if not known or values["hidden_size"] % values["num_attention_heads"]:
        return None
    found = EVERY | OWN[kind] | given
    if kind == "llama":
        found.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    if "max_window_layers" in found:
        found["layer_types"] = ["full_attention"] * values["num_hidden_layers"]
    found["rope_parameters"] = {"rope_theta": values.get("rope_theta", 10000.0), "rope_type": "default"}
    return Config(**found, transformers_version=metadata.version("transformers"))
