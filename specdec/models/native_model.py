"""Hold a model's config, weights and generation config without transformers' modelling classes.

The modules have the names, parameters and shapes of transformers' modules. Most have no ``forward``: runtimes read the
weights and compute. ``NativeModel.transformers`` makes transformers' model with the same weights. A test compares both.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.base.devices import without_memory
from specdec.base.errors import SpecDecError, one_line
from specdec.models.config import Config, GenerationSettings
from specdec.models.families import (
    FAMILIES,
    Family,
    activation,
    embedded_per_layer,
    head_sizes,
    key_sources,
    mixture_of,
)
from specdec.models.gguf.blocks import BlockExperts, BlockLinear, ScaledEmbedding, to_transformers
from specdec.models.packed import Origin
from specdec.models.rotary import Rotary
from specdec.models.tensor_file import TensorFile

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AnyModel: TypeAlias = "NativeModel | PreTrainedModel"
_making = threading.Lock()


class NativeModel(nn.Module):
    """A decoder-only model: config and weights, for runtimes that compute with them.

    The constructor gives the parameters no values (device "meta"); ``weights.fill`` does. ``forward``, ``generate`` and
    ``save_pretrained`` delegate to a model of transformers that shares the weights.

    config, generation_config: the fields of the model's config files.
    model: the ``Decoder``, with embeddings, layers and final norm.
    lm_head: the output head, a linear layer [V, D].
    file: header of the file that the weights are from; None: they are from no file.
    origin: the file that matrices are mapped from, known in bfloat16 on the CPU; None: none, or not known.
    merged_adapter: the record (``adapter.Merged``) of the LoRA adapter that is merged into the weights; None: none is.
    dtype: dtype of the weights; for weights in GGUF quantization blocks, of the dequantized values.
    """

    def __init__(self, config: Config, dtype: torch.dtype, generation_config: GenerationSettings | None = None) -> None:
        super().__init__()
        self.config, self.generation_config = config, generation_config or GenerationSettings()
        self.file: TensorFile | None = None
        self.origin: Origin | None = None
        self.merged_adapter: Any = None
        self._made: list[PreTrainedModel] = []  # in a list: no part of this module
        with without_memory():
            self.model = Decoder(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            for module in self.modules():
                for name, values in module.named_parameters(recurse=False):
                    made = nn.Parameter(torch.empty(values.shape, dtype=dtype), requires_grad=False)
                    module.register_parameter(name, made)
        if FAMILIES[config.model_type].fields >= {"hidden_activation"}:  # Gemma's
            self.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5)
        if size := embedded_per_layer(config):
            self.model.embed_tokens_per_layer.embed_scale = torch.tensor(size**0.5)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(self.model.embed_tokens, "dtype", None) or self.model.embed_tokens.weight.dtype
        return found

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def base_model(self) -> Decoder:
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, head: nn.Module) -> None:
        self.lm_head = head  # type: ignore[assignment]

    def transformers(self) -> PreTrainedModel:
        """Return transformers' model with the same weights: the same tensors, not copies.

        It is made at the first call; later calls return the same object, and give it the present weights again.
        Weights in GGUF quantization blocks stay in them; its ``state_dict`` and ``save_pretrained`` dequantize them.
        Raises SpecDecError for a config that transformers cannot read, such as one with an unknown ``rope_type``.
        """
        with _making:
            if not self._made:
                try:
                    theirs = transformers_config(self.config.to_dict())
                    theirs._name_or_path, theirs._commit_hash = self.config._name_or_path, self.config._commit_hash
                    model = empty_model(theirs, self.dtype).eval().requires_grad_(False)
                except Exception as error:
                    raise SpecDecError(
                        f"transformers cannot read the config of this {self.config.model_type} model "
                        f"({type(error).__name__}: {one_line(error)}); it may need a newer transformers"
                    ) from error
                model.register_state_dict_post_hook(_add_blocks)
                self._made.append(model)
            made = self._made[0]
            _share(self, made)
        return made

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.transformers()(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.transformers().generate(*args, **kwargs)  # type: ignore[operator]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        self.transformers().save_pretrained(*args, **kwargs)


def as_transformers(model: Any) -> PreTrainedModel:
    """Return ``model``, or, for a ``NativeModel``, a model of transformers that shares its weights."""
    made: PreTrainedModel = model.transformers() if isinstance(model, NativeModel) else model
    return made


# --- modules ---------------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """A decoder-only model without its output head: embeddings, layers, norm and rotary embedding.

    It has no ``forward``: runtimes read the weights. V is the vocabulary size and D the hidden size.

    embed_tokens: the token embedding, [V, D].
    layers: the decoder layers.
    norm: the final norm.
    rotary_emb: cosines and sines by position.
    embed_tokens_per_layer: a second token embedding, of which each layer reads its part; only in Gemma 4 models.
    per_layer_model_projection, per_layer_projection_norm: a linear layer that reads the first layer's input, and the
        norm of its result, which is added to the second embedding; only in Gemma 4 models.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        family = FAMILIES[config.model_type]
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([_layer(config, family, index) for index in range(config.num_hidden_layers)])
        self.norm = Norm(config.hidden_size, config.rms_norm_eps, family)
        if size := embedded_per_layer(config):
            every = config.num_hidden_layers * size
            self.embed_tokens_per_layer = ScaledEmbedding(config.vocab_size_per_layer_input, every)
            self.per_layer_model_projection = nn.Linear(config.hidden_size, every, bias=False)
            self.per_layer_projection_norm = Norm(size, config.rms_norm_eps, family)
        with torch.device("cpu"):
            self.rotary_emb = Rotary(config, family.half_tables, family.wide)


class Norm(nn.Module):
    """An RMS norm over the last dimension, with the rounding and the weight convention of the model's family.

    size: number of features. eps: added to the mean square. family: says when results are rounded to the input's dtype,
        and whether they are multiplied by weight or by 1 + weight.
    """

    def __init__(self, size: int, eps: float, family: Family) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = self.variance_epsilon = eps
        self.round_after_weight, self.around_zero = family.round_after_weight, family.around_zero

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        if self.around_zero:
            return (wide * (1 + self.weight.float())).to(x.dtype)
        return (self.weight * wide).to(x.dtype) if self.round_after_weight else self.weight * wide.to(x.dtype)


class MLP(nn.Module):
    """An MLP ``down(act(gate(x)) * up(x))``, whose input and output have the model's hidden size.

    config: the model's config. inner: number of neurons.
    Gate and up projections are one linear layer ``gate_up_proj`` or two, as in the model's family.
    """

    def __init__(self, config: Config, inner: int) -> None:
        super().__init__()
        family, width = FAMILIES[config.model_type], config.hidden_size
        bias = family.mlp_bias and bool(config.mlp_bias)
        if family.joined:
            self.gate_up_proj = nn.Linear(width, 2 * inner, bias=False)
        else:
            self.gate_proj, self.up_proj = nn.Linear(width, inner, bias), nn.Linear(width, inner, bias)
        self.down_proj = nn.Linear(inner, width, bias)
        self.act = activation(config)

    def forward(self, x: Tensor) -> Tensor:
        joined = hasattr(self, "gate_up_proj")
        gate, up = self.gate_up_proj(x).chunk(2, -1) if joined else (self.gate_proj(x), self.up_proj(x))
        acted = F.silu(gate) if self.act == "silu" else F.gelu(gate, approximate="tanh")
        found: Tensor = self.down_proj(acted * up)
        return found


class Experts(nn.Module):
    """The weights of all experts in one mixture-of-experts layer, without a ``forward``.

    experts: their number E. width: the hidden size. inner: an expert's number of neurons.
    gate_up_proj: [E, 2 inner, width], gate before up. down_proj: [E, width, inner].
    is_transposed: whether the last two dimensions are swapped, gate and up alternate, and experts have biases
        (gpt-oss).
    """

    def __init__(self, experts: int, width: int, inner: int, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        shapes = {"gate_up_proj": (experts, 2 * inner, width), "down_proj": (experts, width, inner)}
        if is_transposed:
            shapes = {name: (count, columns, rows) for name, (count, rows, columns) in shapes.items()}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
            if is_transposed:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(experts, shape[2])))


class Attention(nn.Module):
    """The weights of one attention layer, without a ``forward``, named as in transformers (``q_proj`` and so on).

    config: the model's config. family: its entry in ``FAMILIES``. index: index of the layer.
    head_dim: number of values in a head. scaling: factor of the attention scores.
    A layer that reads the keys and values of another layer has no ``k_proj`` and ``v_proj``. If only ``v_proj`` is
    missing, ``k_proj`` computes keys and values.
    """

    def __init__(self, config: Config, family: Family, index: int) -> None:
        super().__init__()
        width = config.hidden_size
        size, kv_heads = head_sizes(config, index)
        self.head_dim = size
        heads, keys = config.num_attention_heads * size, kv_heads * size
        owns = key_sources(config)[index] == index
        one = getattr(config, "attention_k_eq_v", False) and config.layer_types[index] == "full_attention"
        bias = family.attention_bias and bool(getattr(config, "attention_bias", False))
        if family.joined:
            self.qkv_proj = nn.Linear(width, heads + 2 * keys, bias=False)
        else:
            parts = {"q": heads * (1 + family.gated), "k": keys * owns, "v": keys * (owns and not one)}
            parts = {part: rows for part, rows in parts.items() if rows}
            for part, rows in parts.items():
                setattr(self, f"{part}_proj", nn.Linear(width, rows, bias or family.qkv_bias))
        self.o_proj = nn.Linear(heads, width, bias)
        if family.norm_over_heads or family.norm_by_head:
            sizes = (heads, keys) if family.norm_over_heads else (size, size)
            for part, count in zip("qk" if owns else "q", sizes, strict=False):
                setattr(self, f"{part}_norm", Norm(count, config.rms_norm_eps, family))
        if config.model_type == "gpt_oss":
            self.sinks = nn.Parameter(torch.empty(config.num_attention_heads))
        self.scaling = 1.0 if family.unscaled else size**-0.5
        if "attention_multiplier" in family.fields:
            self.scaling = config.attention_multiplier
        elif "query_pre_attn_scalar" in family.fields:
            self.scaling = config.query_pre_attn_scalar**-0.5


class DeltaRule(nn.Module):
    """The weights of a recurrent layer that computes the gated delta rule, as in Qwen3-Next and Qwen3.5.

    Without a ``forward``; the parameters have the names and shapes of transformers' module ``linear_attn``.
    config: the model's config. family: its entry in ``FAMILIES``.
    num_k_heads, num_v_heads: number of query and key heads, and of value heads. head_k_dim, head_v_dim: their sizes.
    """

    def __init__(self, config: Config, family: Family) -> None:
        super().__init__()
        self.num_k_heads, self.num_v_heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.head_k_dim, self.head_v_dim = config.linear_key_head_dim, config.linear_value_head_dim
        width, values = config.hidden_size, self.num_v_heads * self.head_v_dim
        channels = 2 * self.num_k_heads * self.head_k_dim + values
        self.dt_bias = nn.Parameter(torch.empty(self.num_v_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_v_heads))
        self.conv1d = nn.Conv1d(channels, channels, config.linear_conv_kernel_dim, groups=channels, bias=False)
        if config.model_type == "qwen3_next":
            sizes = {"qkvz": channels + values, "ba": 2 * self.num_v_heads}
        else:
            sizes = {"qkv": channels, "z": values, "b": self.num_v_heads, "a": self.num_v_heads}
        for part, rows in sizes.items():
            setattr(self, f"in_proj_{part}", nn.Linear(width, rows, bias=False))
        self.norm = Norm(self.head_v_dim, config.rms_norm_eps, family)
        self.out_proj = nn.Linear(values, width, bias=False)


def _layer(config: Config, family: Family, index: int) -> nn.Module:
    layer: Any = nn.Module()
    if family.mixer and config.layer_types[index] == "linear_attention":
        layer.linear_attn = DeltaRule(config, family)
    else:
        layer.self_attn = Attention(config, family, index)
    wider = getattr(config, "use_double_wide_mlp", False) and key_sources(config)[index] != index
    inner = config.intermediate_size * (1 + wider)
    layer.mlp = _mixture(config, family) if _routes(config, index) else MLP(config, inner)
    for name in filter(None, family.norms):
        setattr(layer, name, Norm(config.hidden_size, config.rms_norm_eps, family))
    if family.scales_layers:
        layer.layer_scalar = nn.Parameter(torch.empty(1))
    if size := embedded_per_layer(config):
        layer.per_layer_input_gate = nn.Linear(config.hidden_size, size, bias=False)
        layer.per_layer_projection = nn.Linear(size, config.hidden_size, bias=False)
        layer.post_per_layer_input_norm = Norm(config.hidden_size, config.rms_norm_eps, family)
    return layer  # type: ignore[no-any-return]


def _routes(config: Config, index: int) -> bool:
    if not mixture_of(config).experts:
        return False
    step = getattr(config, "decoder_sparse_step", 1)
    return index not in (getattr(config, "mlp_only_layers", None) or ()) and (index + 1) % step == 0


def _mixture(config: Config, family: Family) -> nn.Module:
    mlp, router = nn.Module(), nn.Module()
    count, width, transposed = mixture_of(config).experts, config.hidden_size, config.model_type == "gpt_oss"
    router.weight = nn.Parameter(torch.empty(count, width))
    if transposed:
        router.bias = nn.Parameter(torch.empty(count))
    setattr(mlp, "router" if transposed else "gate", router)
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    mlp.experts = Experts(count, width, inner, transposed)
    if family.shared:
        mlp.shared_expert = MLP(config, config.shared_expert_intermediate_size)
        mlp.shared_expert_gate = nn.Linear(width, 1, bias=False)
    return mlp


# --- transformers ----------------------------------------------------------------------------------------------------


def transformers_config(fields: Mapping[str, Any]) -> Any:
    """Return the transformers config, a ``PretrainedConfig``, with the ``fields`` of a config.json.

    fields: config fields by name, "model_type" included; the config has defaults for those that are missing.
    """
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields))


def empty_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Return transformers' model for ``config``, with its parameters on the device "meta", which take no memory.

    config: a ``Config`` or a config of transformers. dtype: dtype of the parameters.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = transformers_config(config.to_dict()) if isinstance(config, Config) else config
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def _add_blocks(model: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for path, made in to_transformers(model):
        state.update(made.state_dict(prefix=f"{prefix}{path}."))


def _share(own: NativeModel, made: Any) -> None:
    """Give transformers' model ``made`` the weights and settings of the model ``own``, in place, without copies.

    made: transformers' model for the config of ``own``. It gets the same tensors and, for weights in GGUF blocks, the
    same modules.
    """
    from transformers import GenerationConfig

    made.merged_adapter = own.merged_adapter
    made.generation_config = GenerationConfig(**own.generation_config.to_diff_dict())
    if "_attn_implementation" in vars(own.config):
        made.config._attn_implementation = own.config._attn_implementation
    for path, module in own.named_modules(remove_duplicate=False):
        theirs = made.get_submodule(path)
        if isinstance(theirs, BlockExperts) and not isinstance(module, BlockExperts):  # experts have become dense
            theirs = theirs.own[0]
            made.set_submodule(path, theirs)
        if isinstance(module, BlockExperts):
            if theirs is not module:
                module.own[0] = theirs  # has the activation
                made.set_submodule(path, module)
        elif type(module) in (nn.Linear, BlockLinear) or isinstance(module, ScaledEmbedding):
            if theirs is not module:
                made.set_submodule(path, module)
        elif theirs is not module:
            for leaf, values in module.named_parameters(recurse=False):
                if leaf in theirs._buffers:
                    setattr(theirs, leaf, values.detach())
                else:
                    theirs.register_parameter(leaf, values)
    rotary, theirs = own.model.rotary_emb, made.model.rotary_emb
    if "" in rotary.inv_freq:
        theirs.inv_freq = theirs.original_inv_freq = rotary.inv_freq[""].to(own.device)
    if any(buffer.device != own.device for buffer in made.buffers()):
        made.to(own.device)
