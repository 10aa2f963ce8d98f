"""Describe the supported model families: what their layers compute, their config fields, and their GGUF metadata.

A family that needs no new arithmetic is one entry of ``FAMILIES``. The PyTorch runtime reads a family directly. The
native runtime translates it into the C structures that its kernels read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.base.errors import SpecDecError

BEFORE = "input_layernorm", "", "post_attention_layernorm", ""
AFTER = "", "post_attention_layernorm", "", "post_feedforward_layernorm"
AROUND = "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
# Config fields that change no token, or that every family may have and the model's modules follow.
IGNORED = {
    *("_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder"),
    *("label2id", "model_type", "output_attentions", "output_hidden_states", "problem_type", "return_dict"),
    "transformers_version",
    *("attention_dropout", "attn_implementation", "auto_map", "cache_implementation", "embd_pdrop"),
    *("initializer_range", "is_llama_config", "output_router_logits", "pretraining_tp", "quantization_config"),
    *("resid_pdrop", "router_aux_loss_coef", "router_jitter_noise", "torch_dtype", "transformers.js_config"),
    *("init_method", "unsloth_fixed", "unsloth_fixed_mtp", "unsloth_version", "use_cache"),
}
COMMON = {
    *("attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "layer_types"),
    *("max_position_embeddings", "max_window_layers", "mlp_bias", "num_attention_heads", "num_hidden_layers"),
    *("num_key_value_heads", "original_max_position_embeddings", "rms_norm_eps", "rope_parameters", "sliding_window"),
    *("tie_word_embeddings", "use_sliding_window", "vocab_size"),
}
# Of ``rope_parameters``: what transformers makes tables from.
ROPE = {
    *("attention_factor", "beta_fast", "beta_slow", "factor", "finetuned", "high_freq_factor", "long_factor"),
    *("low_freq_factor", "max_position_embeddings", "mscale", "mscale_all_dim", "original_max_position_embeddings"),
    *("partial_rotary_factor", "rope_theta", "rope_type", "short_factor", "truncate", "type"),
}
NORMALIZED = "olmoe", "qwen3_moe", "qwen3_next"  # obey ``norm_topk_prob``; other mixtures always normalize
# All layers obey ``sliding_window``; of other families whose configs name no layer types, none does.
WINDOWS = "mistral", "ministral3", "mixtral", "phi3", "qwen3_moe"
ACTIVATIONS = "silu", "gelu_pytorch_tanh", "clamped"  # as in native.h
# Sizes in a config, and what they are below: nothing is allocated for a larger one.
WIDEST, LONGEST = 1 << 20, 1 << 30
SIZES = dict.fromkeys(("num_hidden_layers", "head_dim", "num_experts_per_tok", "rotated"), 1 << 14)
SIZES |= dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 1 << 16)
SIZES |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 1 << 16)
SIZES |= dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), WIDEST)
SIZES |= {"shared_expert_intermediate_size": WIDEST}
SIZES |= dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"), 1 << 12)
SIZES |= {"linear_value_head_dim": 1 << 12, "linear_conv_kernel_dim": 1 << 8, "linear_values": WIDEST}
SIZES |= {"global_head_dim": 1 << 14, "vocab_size_per_layer_input": 1 << 28}
SIZES |= {"vocab_size": 1 << 28, "max_position_embeddings": LONGEST, "sliding_window": LONGEST}


@dataclass(frozen=True)
class Family:
    """The description of one of transformers' model types: what its layers compute, and what config and GGUF files say.

    The key in ``FAMILIES`` is the model type.

    norms: module names of four norms of a layer: before attention, after attention, before the MLP, after the MLP; "":
        the layer lacks this norm.
    round_after_weight: whether a norm rounds to the model's dtype only after the product with its weight.
    around_zero: whether a norm multiplies by 1 + weight instead of weight.
    norm_over_heads: whether queries and keys have an RMS norm over all heads together.
    norm_by_head: whether queries and keys have an RMS norm over each head.
    norm_values: whether values have a norm over each head, without a weight.
    unscaled: whether attention scores have no scale factor.
    scales_layers: whether each layer's output, residual included, is multiplied by a scalar weight of the layer.
    qkv_bias: whether the query, key and value projections always have biases.
    attention_bias: whether the config field ``attention_bias`` gives biases to attention's linear layers.
    mlp_bias: whether the config field ``mlp_bias`` gives biases to the MLP's linear layers.
    joined: whether one linear layer computes queries, keys and values, and one the gate and up projections.
    mixer: name of the recurrence that replaces attention in recurrent layers, "gated delta rule"; "": the family has no
        recurrent layers.
    gated: whether attention's result is multiplied by gates, which the query projection also computes.
    shared: whether each mixture-of-experts layer has one more expert, with a gate, that all tokens use.
    half_tables: whether transformers' rotary tables have each cosine and sine once instead of twice.
    wide: whether rotary tables stay in float32 instead of the model's dtype.
    partial: whether ``partial_rotary_factor`` may exclude a part of each head from rotation.
    fields: config fields that this family supports besides those of all families; "rope_parameters.NAME" is a nested
        field.
    only: config field -> the only value of it that is supported.
    gguf: name of the architecture in GGUF files; "": GGUF files are not supported.
    interleaved: whether GGUF files store the rows of queries and keys in interleaved rotary order (rows that rotate
        together are neighbours).
    tiled_heads: whether GGUF files of recurrent layers store the first value head of every key head, then the second
        one, and so on.
    keys: GGUF metadata key, without "ARCHITECTURE." -> config field, besides those of all families (``KEYS``).
    """

    norms: tuple[str, str, str, str] = BEFORE
    round_after_weight: bool = False
    around_zero: bool = False
    norm_over_heads: bool = False
    norm_by_head: bool = False
    norm_values: bool = False
    unscaled: bool = False
    scales_layers: bool = False
    qkv_bias: bool = False
    attention_bias: bool = True
    mlp_bias: bool = False
    joined: bool = False
    mixer: str = ""
    gated: bool = False
    shared: bool = False
    half_tables: bool = False
    wide: bool = False
    partial: bool = False
    fields: frozenset[str] = frozenset()
    only: dict[str, Any] = field(default_factory=dict)
    gguf: str = ""
    interleaved: bool = False
    tiled_heads: bool = False
    keys: dict[str, str] = field(default_factory=dict)


KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "rope.dimension_count": "rotated",  # this is no field of a config
    "rope.freq_base": "rope_theta",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
HEAD = {"attention.key_length": "head_dim"}
GEMMA = frozenset({"hidden_activation"})
CAPPED = GEMMA | {"final_logit_softcapping", "query_pre_attn_scalar"}
TWICE_CAPPED = CAPPED | {"attn_logit_softcapping", "sliding_window_size"}
WINDOW = {"attention.sliding_window": "sliding_window"}
SOFTCAPS = "final_logit_softcapping", "attn_logit_softcapping"
WINDOWED = HEAD | WINDOW | dict(zip(SOFTCAPS, SOFTCAPS, strict=True))
# Of layers that differ: sizes of heads, keys of other layers, wider MLPs, and embeddings that each layer reads.
PER_LAYER = frozenset({"attention_k_eq_v", "hidden_size_per_layer_input", "num_kv_shared_layers", "per_layer_config"})
PER_LAYER |= {"per_layer_config.head_dim", "per_layer_config.num_key_value_heads"}
PER_LAYER |= {"use_double_wide_mlp", "vocab_size_per_layer_input"}
BY_KIND = {
    "attention.key_length": "global_head_dim",
    "attention.key_length_swa": "head_dim",
    "attention.shared_kv_layers": "num_kv_shared_layers",
    "attention.sliding_window_pattern": "sliding",  # this is no field of a config
    "embedding_length_per_layer_input": "hidden_size_per_layer_input",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "rope.dimension_count_swa": "rotated_sliding",  # nor is this
    "rope.freq_base_swa": "rope_local_base_freq",
}
MISSING = {"enable_moe_block": "experts beside an MLP in each layer, which only the transformers runtime has"}
SCALED = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
EXPERTS = frozenset({"norm_topk_prob", "num_experts", "num_experts_per_tok", "num_local_experts"})
ROUTED = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
CLAMPED = frozenset({"swiglu_alpha", "swiglu_limit"})
LINEAR = {f"linear_{name}" for name in ("key_head_dim", "num_key_heads", "num_value_heads", "value_head_dim")}
GRIDS = "rope_parameters.mrope_interleaved", "rope_parameters.mrope_section"  # of images: text has one position
PREDICTS = "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"  # of a layer that is no part of the model
DELTA_RULE = Family(
    round_after_weight=True,
    around_zero=True,
    norm_by_head=True,
    mixer="gated delta rule",
    gated=True,
    partial=True,
    fields=frozenset({*LINEAR, *GRIDS, *PREDICTS, "full_attention_interval", "linear_conv_kernel_dim"}),
    only={"attn_output_gate": True, "mamba_ssm_dtype": "float32", "output_gate_type": "swish"},
    gguf="qwen35",
    tiled_heads=True,
    keys=HEAD
    | {
        "ssm.conv_kernel": "linear_conv_kernel_dim",
        "ssm.state_size": "linear_key_head_dim",
        "ssm.group_count": "linear_num_key_heads",
        "ssm.time_step_rank": "linear_num_value_heads",
        "ssm.inner_size": "linear_values",  # these are no fields of a config
        "full_attention_interval": "full_attention_interval",
        "nextn_predict_layers": "nextn_layers",
    },
)
SHARED = replace(
    DELTA_RULE,
    shared=True,
    gguf="qwen35moe",
    keys=DELTA_RULE.keys
    | {
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    },
    fields=DELTA_RULE.fields
    | EXPERTS
    | {"decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "shared_expert_intermediate_size"},
)
FAMILIES = {
    "llama": Family(mlp_bias=True, gguf="llama", interleaved=True, keys=HEAD),
    "mistral": Family(attention_bias=False),
    "qwen2": Family(qkv_bias=True, attention_bias=False, gguf="qwen2"),
    "qwen3": Family(norm_by_head=True, gguf="qwen3", keys=HEAD),
    "phi3": Family(
        attention_bias=False,
        joined=True,
        partial=True,
        fields=frozenset({"partial_rotary_factor"}),
        gguf="phi3",
        keys=WINDOW,
    ),
    "granite": Family(
        mlp_bias=True,
        fields=frozenset(SCALED.values()),
        only={"normalization_function": "rmsnorm"},
        gguf="granite",
        interleaved=True,
        keys=SCALED | {"expert_shared_feed_forward_length": "intermediate_size"},  # of a dense Granite 4
    ),
    "olmo2": Family(AFTER, round_after_weight=True, norm_over_heads=True, wide=True, gguf="olmo2"),
    "smollm3": Family(
        mlp_bias=True, fields=frozenset({"no_rope_layers", "no_rope_layer_interval"}), gguf="smollm3", interleaved=True
    ),
    "ministral3": Family(
        attention_bias=False,
        fields=frozenset({"rope_parameters.llama_4_scaling_beta"}),
        gguf="mistral3",
        interleaved=True,
        keys=HEAD | {"attention.temperature_scale": "llama_4_scaling_beta"},
    ),
    "mixtral": Family(attention_bias=False, fields=EXPERTS, interleaved=True, keys=HEAD | ROUTED),
    "olmoe": Family(norm_over_heads=True, fields=EXPERTS, gguf="olmoe", keys=ROUTED),
    "qwen3_moe": Family(
        norm_by_head=True,
        fields=EXPERTS | {"decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size"},
        gguf="qwen3moe",
        keys=HEAD | ROUTED | {"expert_feed_forward_length": "moe_intermediate_size"},
    ),
    "gpt_oss": Family(
        round_after_weight=True,
        half_tables=True,
        fields=EXPERTS | CLAMPED | {"experts_per_token", "initial_context_length"},  # two that others repeat
        gguf="gpt-oss",
        keys=HEAD | ROUTED | WINDOW | {"expert_feed_forward_length": "intermediate_size"},
    ),
    "gemma": Family(round_after_weight=True, around_zero=True, fields=GEMMA, gguf="gemma", keys=HEAD),
    "gemma2": Family(AROUND, True, True, fields=TWICE_CAPPED, gguf="gemma2", keys=WINDOWED),
    "gemma3_text": Family(
        AROUND,
        True,
        True,
        norm_by_head=True,
        fields=CAPPED,
        gguf="gemma3",
        keys=WINDOWED | {"rope.freq_base_swa": "rope_local_base_freq"},
    ),
    "gemma4_text": Family(
        AROUND,
        True,
        norm_by_head=True,
        norm_values=True,
        unscaled=True,
        scales_layers=True,
        attention_bias=False,
        fields=GEMMA | PER_LAYER | {"final_logit_softcapping"},
        only={"attention_bias": False, "use_bidirectional_attention": "vision"},  # between the tokens of an image
        gguf="gemma4",
        keys=WINDOW | {SOFTCAPS[0]: SOFTCAPS[0]} | BY_KIND,
    ),
    "qwen3_5_text": DELTA_RULE,
    "qwen3_next": replace(SHARED, gguf="qwen3next", tiled_heads=False),
    "qwen3_5_moe_text": SHARED,
}


class Numbers(NamedTuple):
    """The constants in a model's arithmetic.

    embeddings: factor of the token embeddings.
    results: factor of what attention and MLP add to the residual.
    logits: factor of the logits.
    scores_cap: attention scores x become cap * tanh(x / cap); 0: no cap.
    logits_cap: logits x become cap * tanh(x / cap); 0: no cap.
    limit: bound at which the MLP activation "clamped" of gpt-oss cuts its inputs; 0 in other models.
    alpha: factor in the sigmoid of the MLP activation "clamped"; 1 in other models.
    """

    embeddings: float = 1.0
    results: float = 1.0
    logits: float = 1.0
    scores_cap: float = 0.0
    logits_cap: float = 0.0
    limit: float = 0.0
    alpha: float = 1.0


def numbers_of(config: Any) -> Numbers:
    """Return the factors and caps in the arithmetic of a model. config: the text model's config.

    The factor of Gemma's embeddings, the square root of the hidden size, is rounded to bfloat16.
    """
    family = FAMILIES[config.model_type]
    known = {name: getattr(config, name) for name in family.fields if hasattr(config, name)}
    width = float(torch.tensor(config.hidden_size**0.5).bfloat16()) if family.fields >= GEMMA else 1.0
    return Numbers(
        float(known.get("embedding_multiplier", width)),
        float(known.get("residual_multiplier", 1)),
        1 / float(known.get("logits_scaling", 1)),
        float(known.get("attn_logit_softcapping") or 0),
        float(known.get("final_logit_softcapping") or 0),
        float(known.get("swiglu_limit", 0)),
        float(known.get("swiglu_alpha", 1)),
    )


def head_sizes(config: Any, layer: int) -> tuple[int, int]:
    """Return (number of values in a head, number of key-value heads) of the attention layer with the index ``layer``.

    config: the text model's config, in which single layers may have sizes of their own. layer: counts from 0.
    """
    own = {int(number): fields for number, fields in (getattr(config, "per_layer_config", None) or {}).items()}
    fields = own.get(layer, {})
    size = (
        fields.get("head_dim") or getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return int(size), int(fields.get("num_key_value_heads") or config.num_key_value_heads)


def key_sources(config: Any) -> list[int]:
    """Return for each layer the index of the layer whose keys and values its attention reads, mostly its own.

    config: the text model's config. The last ``num_kv_shared_layers`` layers compute no keys and values; each of them
    reads those of the last earlier layer of its type (sliding-window or full attention) that computes some.
    """
    count = int(config.num_hidden_layers)
    kinds: Any = getattr(config, "layer_types", None)
    first = count - (getattr(config, "num_kv_shared_layers", None) or 0)
    return [n if n < first else max(m for m in range(first) if kinds[m] == kinds[n]) for n in range(count)]


def embedded_per_layer(config: Any) -> int:
    """Return the width of the extra token embedding that each layer of a Gemma 4 model reads; 0: the model has none.

    config: the text model's config.
    """
    return int(getattr(config, "hidden_size_per_layer_input", None) or 0)


class Mixture(NamedTuple):
    """The sizes of a model's mixture-of-experts layers.

    experts: number of experts in a layer; 0: the model has no experts.
    top_k: number of experts that each token uses.
    normalize_top_k: whether the router weights of a token's experts are scaled to sum to 1.
    """

    experts: int = 0
    top_k: int = 0
    normalize_top_k: bool = False


def mixture_of(config: Any) -> Mixture:
    """Return the sizes of a model's mixture-of-experts layers; for a model without experts, all sizes are 0.

    config: the text model's config.
    """
    if not FAMILIES[config.model_type].fields >= EXPERTS:
        return Mixture()
    count = getattr(config, "num_experts", None) or config.num_local_experts
    normalizes = config.model_type not in NORMALIZED or bool(getattr(config, "norm_topk_prob", True))
    return Mixture(count, config.num_experts_per_tok, normalizes)


class Mixer(NamedTuple):
    """The sizes of a model's recurrent layers: a short causal convolution over tokens, then the gated delta rule.

    layers: number of recurrent layers in the model; 0: it has none.
    key_heads: number of query and key heads.
    value_heads: number of value heads.
    key_dim: size of a query or key head.
    value_dim: size of a value head.
    taps: width of the convolution in tokens, the newest token included.
    """

    layers: int = 0
    key_heads: int = 0
    value_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    taps: int = 0

    @property
    def channels(self) -> int:
        """Return the number of channels of the convolution: the queries, keys and values of a token in all heads."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


def mixer_of(config: Any) -> Mixer:
    """Return the sizes of a model's recurrent layers; for a model without such layers, all sizes are 0.

    config: the text model's config.
    """
    if not FAMILIES[config.model_type].mixer:
        return Mixer()
    heads = config.linear_num_key_heads, config.linear_num_value_heads
    sizes = config.linear_key_head_dim, config.linear_value_head_dim, config.linear_conv_kernel_dim
    return Mixer(config.layer_types.count("linear_attention"), *heads, *sizes)


class Rotation(NamedTuple):
    """The description of a rotary table (cosines and sines by position), by which queries or keys are rotated.

    layer_type: the config's layer type, such as "full_attention", whose rotary parameters the table has; "": all layers
        have the same parameters.
    beta, span: the table is multiplied by 1 + beta * ln(1 + position // span), which scales queries in long texts.
    half_tables: whether transformers' rotary module returns each cosine and sine once instead of twice.
    """

    layer_type: str = ""
    beta: float = 0.0
    span: int = 1
    half_tables: bool = False

    def tables(self, rotary: Any, count: int, dtype: torch.dtype) -> Tensor:
        """Return cosines [:, 0] and sines [:, 1], float32 [count, 2, rotated / 2], for the positions 0 ... count - 1.

        "rotated" is the number of values of a head that rotate.
        rotary: the model's rotary module, transformers' or a ``Rotary``. dtype: the dtype to which the module rounds
        the table before it is converted to float32.
        """
        positions = torch.arange(count)
        with torch.no_grad():
            made = rotary(torch.empty(0, dtype=dtype), positions[None], *filter(None, [self.layer_type]))
        found = torch.stack([table[0].chunk(1 if self.half_tables else 2, -1)[0].float() for table in made], 1)
        factor = 1 + self.beta * torch.log(1 + torch.floor(positions / self.span))
        return found * factor.to(dtype)[:, None, None].float() if self.beta else found


def rotations(config: Any) -> list[tuple[Rotation, Rotation] | None]:
    """Return for each layer (rotary table of its queries, rotary table of its keys); None: the layer rotates neither.

    config: the text model's config. Equal descriptions stand for equal tables, which layers may share.
    """
    count, rope = int(config.num_hidden_layers), config.rope_parameters
    nested = all(isinstance(value, dict) for value in rope.values())
    found = list[tuple[Rotation, Rotation] | None]()
    for layer in range(count):
        plain = Rotation(
            config.layer_types[layer] if nested else "", half_tables=FAMILIES[config.model_type].half_tables
        )
        beta = rope.get("llama_4_scaling_beta") or 0.0
        queries = plain._replace(beta=beta, span=rope["original_max_position_embeddings"]) if beta else plain
        rotates = (getattr(config, "no_rope_layers", None) or [1] * count)[layer]
        found.append((queries, plain) if rotates else None)
    return found


def activation(config: Any) -> str:
    """Return the name of the MLP's activation, such as "silu"; "clamped" stands for that of gpt-oss.

    config: the text model's config.
    """
    if FAMILIES[config.model_type].fields >= CLAMPED:
        return "clamped"
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def check_fields(config: Any) -> None:
    """Raise SpecDecError for a config field that may change the model's output and that its family does not support.

    config: the text model's config, of a model type in ``FAMILIES``. An unknown MLP activation is refused, too.
    """
    family = FAMILIES[config.model_type]
    for name, value in _fields(config):
        if value and name in MISSING:
            raise SpecDecError(f"this '{config.model_type}' model has {MISSING[name]}")
        known = family.only[name] == value if name in family.only else name in COMMON | IGNORED | family.fields
        if not known and value not in (None, False, [], {}):
            raise SpecDecError(
                f"the config of this '{config.model_type}' model has {name} = {str(value)[:40]}, and it is unknown "
                "what that changes"
            )
    if (act := activation(config)) not in ACTIVATIONS:
        raise SpecDecError(f"the activation '{act}' is unknown; known: {', '.join(ACTIVATIONS)}")


def _fields(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of each field of the text model's ``config`` that may change the output.

    Private fields and token ids are left out. Fields nested in ``rope_parameters`` and ``per_layer_config`` follow as
    "PARENT.NAME", except those from which transformers computes rotary tables (``ROPE``).
    """
    for name, value in config.to_dict().items():
        if not name.startswith("_") and not name.endswith("_token_id"):
            yield name, value
        parameters = value if name in ("per_layer_config", "rope_parameters") and isinstance(value, dict) else {}
        each = list(parameters.values()) if all(isinstance(v, dict) for v in parameters.values()) else [parameters]
        partial = FAMILIES[config.model_type].partial or any(part.get("rope_type") == "proportional" for part in each)
        read = ROPE if partial else ROPE - {"partial_rotary_factor"}
        for key, found in ((key, found) for part in each for key, found in part.items() if key not in read):
            if (key, found) != ("partial_rotary_factor", 1):
                yield f"{name}.{key}", found


def check_sizes(name: str, config: Any) -> None:
    """Raise SpecDecError if a size in the ``config`` of the model called ``name`` is impossible or too large.

    Configs are untrusted, so this is called before anything of such a size is allocated. ``config`` may be of any model
    type, and of a multimodal model, of which the text model is checked; sizes that it lacks are not checked.
    """
    text = config.get_text_config()
    fields = text.to_dict()  # of a size that differs by layer, transformers has no attribute
    values = {key: fields[key] if key in fields else getattr(text, key, None) for key in SIZES}
    if "sliding_attention" not in (getattr(text, "layer_types", None) or ["sliding_attention"]):
        values["sliding_window"] = None  # of no layer
    if getattr(text, "model_type", "") == "granitemoehybrid" and values["num_local_experts"] == 0:  # as most of them
        values |= {"num_local_experts": None, "num_experts_per_tok": None}
    for key, value in values.items():
        if value is not None and not (type(value) is int and 0 < value < SIZES[key]):
            raise SpecDecError(f"cannot load model '{name}': its config says that {key} is {str(value)[:60]!r}")
    layers, experts = values["num_hidden_layers"], values["num_experts"] or values["num_local_experts"] or 1
    family = FAMILIES.get(getattr(text, "model_type", ""))
    least = 1 if family is not None and family.fields >= EXPERTS else 2  # dense models of other types may say 1
    if values["num_experts_per_tok"] and least <= experts < values["num_experts_per_tok"]:
        raise SpecDecError(f"cannot load model '{name}': a token takes more experts than the {experts} of its config")
    for key in ("layer_types", "no_rope_layers"):
        each = getattr(text, key, None)
        if each is not None and layers is not None and len(each) < layers:
            raise SpecDecError(f"cannot load model '{name}': its config has {len(each)} {key} for {layers} layers")
    if family is not None and family.fields >= PER_LAYER:
        _check_layers(name, text, layers or 0)


def _check_layers(name: str, config: Any, layers: int) -> None:
    """Raise SpecDecError for impossible sizes of single layers in the config of a Gemma 4 model.

    name: the model's name in messages. config: the text model's config. layers: number of layers.
    """
    found = config.to_dict()
    shared, size = (found.get(key) or 0 for key in ("num_kv_shared_layers", "hidden_size_per_layer_input"))
    kinds, own = found.get("layer_types") or [], found.get("per_layer_config") or {}
    whole = type(shared) is int and 0 <= shared < max(layers, 1) and type(size) is int and 0 <= size < 1 << 14
    if not whole or not {*kinds[:layers]} <= {*kinds[: layers - shared]}:
        raise SpecDecError(
            f"cannot load model '{name}': its config says that {str(shared)[:60]} of {layers} layers share the keys of "
            f"others, and that embeddings for each layer have {str(size)[:60]} numbers"
        )
    if size and (found.get("vocab_size_per_layer_input") or 0) < found.get("vocab_size", 0):
        raise SpecDecError(f"cannot load model '{name}': its embeddings for each layer lack tokens of its vocabulary")
    for number, fields in own.items():
        good = str(number).isdecimal() and isinstance(fields, dict)
        if not good or any(
            type(fields[key]) is not int or not 0 < fields[key] < SIZES[key] for key in SIZES.keys() & fields
        ):
            raise SpecDecError(
                f"cannot load model '{name}': its config says {str(fields)[:60]} of layer {str(number)[:60]}"
            )
    heads = {int(number): fields.get("head_dim") for number, fields in own.items()}
    sizes = [heads.get(layer) or found.get("head_dim") for layer in range(layers)]
    for layer, source in enumerate(key_sources(config)):
        if sizes[layer] != sizes[source]:
            raise SpecDecError(
                f"cannot load model '{name}': layer {layer} has heads of {sizes[layer]} values, and reads keys of "
                f"{sizes[source]}"
            )
