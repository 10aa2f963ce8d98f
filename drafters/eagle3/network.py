"""EAGLE-3's draft head (arXiv 2503.01840): the states of three layers and a token go through one decoder layer.

``transformer_layer_config`` in its ``config.json`` is that of the one layer, a Llama configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from specdec.base.errors import SpecDecError
from specdec.runtimes.target import Target

from ..speculators import DecoderLayer, HeadConfig, PublicHead

KIND = "eagle3"
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries [B, H, T, d], keys and values [B, H', T, d] -> as queries


@dataclass(frozen=True)
class Eagle3Config(HeadConfig):
    """The sizes of an EAGLE-3 head, a decoder layer that drafts from the model's states, in addition to ``HeadConfig``.

    norm_first: whether the residual stream of the layer begins with the normalized input state; False: with the state
        itself.
    """

    norm_first: bool = True

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
        hidden, taps = config.get("target_hidden_size"), config.get("eagle_aux_hidden_state_layer_ids")
        taps = default_taps(target.num_layers) if taps is None else taps
        sizes = cls.read_sizes(config, layer, hidden or layer.get("hidden_size"), taps, target, where)
        return cls(**sizes, norm_first=bool(config.get("norm_before_residual", False)))


def default_taps(layers: int) -> tuple[int, ...]:
    """Return the layers whose inputs a head reads by default: an early, a middle and a late one.

    layers: the model's number of layers.
    """
    return min(2, layers), layers // 2, max(layers - 3, 0)


class Eagle3(PublicHead):
    """An EAGLE-3 head, a decoder layer that runs pairs: a token's embedding, and the features of the token before it.

    The features of a token of the text are made of the model's states (``fc``), those of a drafted token are the
    layer's output. Other modules have their names in the file.

    config: the sizes.
    target: the model for which the head drafts.
    d2t: for each draft token, the difference between its id in the model and its own, int64 [V']; None: no difference.
    has_embedding: whether the head has a token embedding of its own; False: it uses the model's.
    biased: names of the linear layers with a bias, such as "fc" and, in the decoder layer, "mlp.up_proj".
    """

    config: Eagle3Config

    def __init__(
        self,
        config: Eagle3Config,
        target: Target,
        d2t: Tensor | None = None,
        has_embedding: bool = False,
        biased: Sequence[str] = (),
    ) -> None:
        super().__init__(d2t)
        self.config, width = config, config.width

        def linear(name: str, ins: int, outs: int) -> nn.Linear:
            return nn.Linear(ins, outs, bias=name in biased)

        self.fc = linear("fc", len(config.layers) * target.hidden_size, width)
        layer = DecoderLayer(config, 2 * width, linear)
        layer.add_module("hidden_norm", LlamaRMSNorm(width, config.eps))
        self.layers = nn.ModuleList([layer])
        self.norm = LlamaRMSNorm(width, config.eps)
        self.lm_head = linear("lm_head", width, config.vocab)
        self.embed_tokens = nn.Embedding(target.vocab_size, width) if has_embedding else None

    def groups(self, target: Target) -> dict[str, list[nn.Linear]]:
        attention: Any = self.layers[0].self_attn
        return {
            "fc": [self.fc],
            "qkv": [attention[f"{name}_proj"] for name in "qkv"],
            "o": [attention["o_proj"]],
            "head": [self.lm_head],
        }

    def layer(self, embedded: Tensor, features: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run the head's decoder layer on T tokens of each of B rows; return its output, their features, [B, T, D'].

        embedded: embeddings of the tokens, [B, T, D'].
        features: features of the token before each token, [B, T, D'].
        positions: positions of the tokens, int64 [B, T].
        attend: function (queries [B, H, T, d], keys [B, H', T, d], values [B, H', T, d]) that adds keys and values to a
            KV cache, and returns the result of attention [B, H, T, d].
        """
        config, layer = self.config, cast(Any, self.layers[0])
        normed = layer.hidden_norm(features)
        sizes = [count * config.head_dim for count in (config.heads, config.kv_heads, config.kv_heads)]
        parts = self.map("qkv", torch.cat((layer.input_layernorm(embedded), normed), -1)).split(sizes, -1)
        q, k, v = (part.unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for part in parts)
        q, k = apply_rotary_pos_emb(q, k, *self.rotary[0](q, positions))
        x = normed if config.norm_first else features
        return self.feed_forward(0, x + self.map("o", attend(q, k, v).transpose(1, 2).flatten(2)))

    def logits(self, features: Tensor) -> Tensor:
        """Return logits of the next tokens over the draft vocabulary, [B, T, V'], from features [B, T, D'].

        features: as ``layer`` returns them. ``freeze`` must have been called.
        """
        return self.map("head", self.norm(features))
