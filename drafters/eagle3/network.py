"""EAGLE-3's draft head (arXiv 2503.01840): the states of three layers and a token go through one decoder layer.

A folder in the ``speculators`` format holds ``config.json``, with ``speculators_model_type: eagle3`` and the layer's
Llama configuration, and ``model.safetensors``. ``d2t`` there is the difference between a draft token's id in the model
and its own; ``t2d`` marks the same tokens among the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from specdec.base import options
from specdec.base.devices import without_memory
from specdec.base.errors import SpecDecError, one_line
from specdec.models import drafter_folder
from specdec.runtimes.target import Target
from specdec.runtimes.torch.linear import Linear, for_drafting

KIND = "eagle3"
HEADS, LAYERS = 1024, 8  # maximum numbers of attention heads and of tapped layers
MODEL = "the EAGLE-3 head"
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries [B, H, T, d], keys and values [B, H', T, d] -> as queries


@dataclass(frozen=True)
class Eagle3Config:
    """The sizes of an EAGLE-3 head.

    layers: indices of the model's layers whose input states the head reads.
    width: D', the head's own hidden size (D is the model's).
    heads, kv_heads, head_dim: numbers of attention heads and of key heads, and the size of each head.
    intermediate_size: number of neurons of the MLP.
    vocab: V', number of draft tokens.
    eps: epsilon of the RMS norms.
    norm_first: whether the residual connection starts from the normalized state instead of the state itself.
    rope: entries of a ``LlamaConfig`` for its rotary embedding, such as ``rope_theta``.
    """

    layers: tuple[int, ...]
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab: int
    eps: float = 1e-6
    norm_first: bool = True
    rope: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, config: Mapping[str, Any], target: Target, where: str) -> Eagle3Config:
        """Check an untrusted config.json, and return the sizes in it. where: its name in errors.

        Raises SpecDecError if it describes no head that this code can run, or a head for another model than ``target``.
        """
        layer = config.get("transformer_layer_config")
        if config.get("speculators_model_type") != KIND or not isinstance(layer, dict):
            raise SpecDecError(f"'{where}' is not an EAGLE-3 head in the speculators format")
        for key, known in (("model_type", "llama"), ("hidden_act", "silu"), ("num_hidden_layers", 1)):
            if layer.get(key, known) != known:
                raise SpecDecError(f"the decoder of '{where}' has the {key} {layer[key]!r}; only {known!r} can be run")
        expected = {
            "hidden size": (config.get("target_hidden_size") or layer.get("hidden_size"), target.hidden_size),
            "vocabulary": (layer.get("vocab_size"), target.vocab_size),
        }
        for name, (own, model) in expected.items():
            if own != model:
                raise SpecDecError(f"'{where}' was made for a model of {name} {own}; this model's is {model}")
        n, what = target.num_layers, f"of {MODEL}"
        eps = options.check_probability(f"rms_norm_eps {what}", layer.get("rms_norm_eps", 1e-6))
        ids = config.get("eagle_aux_hidden_state_layer_ids")
        layers = default_taps(n) if ids is None else options.check_ints(f"tapped layers {what}", ids, 0)
        if not 1 <= len(layers) <= LAYERS or max(layers) > n:
            raise SpecDecError(f"'{where}' reads layers {list(layers)}; this model has {n}")
        width = drafter_folder.check_inner_size("hidden_size", layer.get("hidden_size"), target.hidden_size)
        heads = options.check_int(f"attention heads {what}", layer.get("num_attention_heads"), 1, HEADS)
        kv_heads = options.check_int(f"key heads {what}", layer.get("num_key_value_heads") or heads, 1, heads)
        if heads % kv_heads:
            raise SpecDecError(
                f"'{where}' has {heads} attention heads on {kv_heads} key heads, which do not divide them"
            )
        return cls(
            tuple(layers),
            width,
            heads,
            kv_heads,
            drafter_folder.check_inner_size("head_dim", layer.get("head_dim") or width // heads, target.hidden_size),
            drafter_folder.check_inner_size("intermediate_size", layer.get("intermediate_size"), target.hidden_size),
            options.check_int(f"draft_vocab_size {what}", config.get("draft_vocab_size"), 1, target.vocab_size),
            eps,
            bool(config.get("norm_before_residual", False)),
            {key: layer[key] for key in ("rope_theta", "rope_scaling", "rope_parameters") if layer.get(key)},
        )

    def rotary(self) -> LlamaRotaryEmbedding:
        """Return the rotary embedding. Raises SpecDecError if transformers does not accept the entries ``rope``."""
        sizes: dict[str, Any] = {
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "head_dim": self.head_dim,
        }
        try:
            return LlamaRotaryEmbedding(LlamaConfig(**sizes, num_key_value_heads=self.kv_heads, **dict(self.rope)))
        except Exception as error:  # transformers checks little
            raise SpecDecError(f"{MODEL} has unusable rotary positions ({one_line(error)})") from None


def default_taps(layers: int) -> tuple[int, ...]:
    """Return the layers that a head reads by default, of ``layers`` layers: an early, a middle and a late one."""
    return min(2, layers), layers // 2, max(layers - 3, 0)


class DecoderLayer(nn.Module):
    """Holds the decoder layer's parameters under their names in the file.

    linear: makes the linear layer of a name, input size and output size.
    """

    def __init__(self, config: Eagle3Config, linear: Callable[[str, int, int], nn.Linear]) -> None:
        super().__init__()
        width, inner, attended = config.width, config.intermediate_size, config.heads * config.head_dim
        for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
            self.add_module(name, LlamaRMSNorm(width, config.eps))
        sizes = {"q_proj": attended, **dict.fromkeys(("k_proj", "v_proj"), config.kv_heads * config.head_dim)}
        attention = {name: linear(f"layers.0.self_attn.{name}", 2 * width, size) for name, size in sizes.items()}
        attention["o_proj"] = linear("layers.0.self_attn.o_proj", attended, width)
        self.self_attn = nn.ModuleDict(attention)
        mlp = {name: linear(f"layers.0.mlp.{name}", width, inner) for name in ("gate_proj", "up_proj")}
        self.mlp = nn.ModuleDict({**mlp, "down_proj": linear("layers.0.mlp.down_proj", inner, width)})


class Eagle3(nn.Module):
    """An EAGLE-3 head. It runs pairs: a token's embedding, and the features of the token before it.

    d2t: for each draft token, the difference between its id in the model and its own, int64 [V']; None: no difference.
    has_embedding: whether the head has an embedding of its own.
    biased: names of the linear layers with a bias.
    maps: the linear layers in their fastest format, made by ``freeze``; layers that read the same input are merged.
    """

    def __init__(
        self,
        config: Eagle3Config,
        target: Target,
        d2t: Tensor | None = None,
        has_embedding: bool = False,
        biased: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.config, width = config, config.width

        def linear(name: str, ins: int, outs: int) -> nn.Linear:
            return nn.Linear(ins, outs, bias=name in biased)

        self.fc = linear("fc", len(config.layers) * target.hidden_size, width)
        self.layers = nn.ModuleList([DecoderLayer(config, linear)])
        self.norm = LlamaRMSNorm(width, config.eps)
        self.lm_head = linear("lm_head", width, config.vocab)
        self.embed_tokens = nn.Embedding(target.vocab_size, width) if has_embedding else None
        self.register_buffer("d2t", d2t)
        self.d2t: Tensor | None
        self._rotary: list[LlamaRotaryEmbedding] = []  # in a list: no submodule, which would be rounded
        self.maps: dict[str, Linear] = {}

    @property
    def tokens(self) -> Tensor | None:
        """The model's ids of the draft tokens, int64 [V']; None: the ids 0 to V' - 1."""
        if self.d2t is None:
            return None
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def freeze(self, target: Target) -> None:
        """Prepare for drafting: move the parameters to the target's dtype and device, and pack the linear layers."""
        self.to(target.device, target.dtype).requires_grad_(False).eval()
        self._rotary = [self.config.rotary().to(target.device)]
        layer: Any = self.layers[0]
        attention, mlp = layer.self_attn, layer.mlp
        groups: dict[str, list[nn.Linear]] = {
            "fc": [self.fc],
            "qkv": [attention[f"{name}_proj"] for name in "qkv"],
            "o": [attention["o_proj"]],
            "up": [mlp["gate_proj"], mlp["up_proj"]],
            "down": [mlp["down_proj"]],
            "head": [self.lm_head],
        }
        self.maps = {name: _as_one(group) for name, group in groups.items()}

    def fuse(self, states: Tensor) -> Tensor:
        """Return features [B, T, D'], from the input states of the n ``layers``, concatenated to [B, T, n D]."""
        return self._map("fc", states)

    def layer(self, embedded: Tensor, features: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run the decoder layer on T pairs of each row, and return the tokens' features, [B, T, D'].

        embedded, features: the tokens' embeddings, and the features of the tokens before, [B, T, D'] each.
        positions: the tokens' positions, int64 [B, T]. attend: computes attention, as ``Attend`` says.
        """
        config, layer = self.config, cast(Any, self.layers[0])
        normed = layer.hidden_norm(features)
        sizes = [count * config.head_dim for count in (config.heads, config.kv_heads, config.kv_heads)]
        parts = self._map("qkv", torch.cat((layer.input_layernorm(embedded), normed), -1)).split(sizes, -1)
        q, k, v = (part.unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for part in parts)
        q, k = apply_rotary_pos_emb(q, k, *self._rotary[0](q, positions))
        x = normed if config.norm_first else features
        x = x + self._map("o", attend(q, k, v).transpose(1, 2).flatten(2))
        gate, up = self._map("up", layer.post_attention_layernorm(x)).chunk(2, -1)
        return x + self._map("down", F.silu(gate) * up)

    def logits(self, features: Tensor) -> Tensor:
        """Return logits of the next tokens over the draft vocabulary, [B, T, V'], from features [B, T, D']."""
        return self._map("head", self.norm(features))

    def _map(self, group: str, x: Tensor) -> Tensor:
        return self.maps[group](x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def _as_one(group: Sequence[nn.Linear]) -> Linear:
    """Return one packed linear layer that computes the concatenated outputs of all layers in ``group``."""
    if len(group) == 1:
        return for_drafting(group[0].weight, group[0].bias)
    biases: list[Tensor] = [
        each.weight.new_zeros(each.out_features) if each.bias is None else each.bias for each in group
    ]
    bias = None if all(each.bias is None for each in group) else torch.cat(biases)
    return for_drafting(torch.cat(tuple(each.weight for each in group)), bias)


def read_network(folder: Path, config: Eagle3Config, target: Target, where: str) -> Eagle3:
    """Load the head in ``folder``. Raises SpecDecError if a tensor does not fit. where: the folder's name in errors."""
    with drafter_folder.open_tensors(folder / drafter_folder.WEIGHTS) as stored:
        names = {name.replace("midlayer.", "layers.0."): name for name in stored.header}
        header = {name: stored.header[of] for name, of in names.items() if name != "t2d"}
        vocab = target.vocab_size
        if "d2t" not in header and config.vocab < vocab:
            raise SpecDecError(f"'{where}' drafts from {config.vocab} tokens and does not say which ('d2t' is missing)")
        d2t = torch.empty(config.vocab, dtype=torch.long, device="meta") if "d2t" in header else None
        biased = [name.removesuffix(".bias") for name in header if name.endswith(".bias")]
        with without_memory():
            network = Eagle3(config, target, d2t, "embed_tokens.weight" in header, biased)
        own = network.state_dict()
        if config.width != target.hidden_size and "embed_tokens.weight" not in header:
            raise SpecDecError(f"'{where}' has states of its own size ({config.width}) and no embedding for them")
        drafter_folder.check_fit(folder, own, header)
        network.load_state_dict({name: stored.read(names[name]).to(own[name].dtype) for name in own}, assign=True)
        tokens = network.tokens
        if tokens is not None and bool(((tokens < 0) | (tokens >= vocab)).any()):
            raise SpecDecError(f"the draft vocabulary in '{where}' names tokens that the model does not have")
        return network
