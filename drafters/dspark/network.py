"""The draft heads of DFlash and DSpark: decoder layers that read the model's states, and what follows them.

``transformer_layer_config`` in the ``config.json`` is that of the layers, a Qwen3 configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half

from specdec.base import options
from specdec.base.errors import SpecDecError, one_line
from specdec.models.gguf.blocks import weight_rows
from specdec.runtimes.target import GivenLinear, Target

from ..speculators import ROPE, DecoderLayer, HeadConfig, PublicHead

DFLASH, DSPARK = "dflash", "dspark"
ENTRIES = (  # of ``transformer_layer_config`` that are read
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("rms_norm_eps", "attention_bias", "num_hidden_layers", *ROPE),
    *("layer_types", "sliding_window", "use_sliding_window", "max_window_layers"),
)
FULL, SLIDING = "full_attention", "sliding_attention"
DEPTH, BLOCK = 64, 256  # maximum numbers of layers and of tokens of a block
MARKOV = ("vanilla", "gated", "rnn")
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer; queries, keys, values [B, H, T, d] -> as queries


@dataclass(frozen=True)
class BlockConfig(HeadConfig):
    """The sizes of a DFlash or DSpark head, a small network that drafts a block of tokens in one pass.

    The fields are in addition to those of ``HeadConfig``. The Markov head is the part that corrects a token's logits by
    the token before it; the confidence head is the part that predicts whether the likeliest token is accepted. A slot
    is a position in the block, from 0; its output gives the logits of one drafted token.

    depth: number of decoder layers.
    block: S, number of tokens of a block.
    mask_token: id of the token that stands for the tokens to come.
    first: the slot of the block that drafts the first token: 0 (the last token of the text), or 1.
    windows: for each layer, how many tokens before the block it attends to; None: all.
    causal: whether, in layers with a window, a slot of the block only attends to itself and those before.
    biased: whether the projections of the attention have a bias.
    markov: the Markov head, one of ``MARKOV``; "": there is none. rank: its inner size.
    sure: input size of the confidence head, D' or (with the token before) D' + rank; 0: there is none.
    """

    depth: int = 1
    block: int = 8
    mask_token: int = 0
    first: int = 0
    windows: tuple[int | None, ...] = (None,)
    causal: bool = True
    biased: bool = False
    markov: str = ""
    rank: int = 0
    sure: int = 0

    @classmethod
    def read(cls, config: Mapping[str, Any], target: Target, where: str, kind: str) -> BlockConfig:
        """Check an untrusted config.json, and return the sizes in it. where: its name in errors.

        Raises SpecDecError if it describes no head that this code can run, or a head for another model than ``target``.
        kind: ``DFLASH`` or ``DSPARK``, the kind of head that the file must describe.
        """
        layer = config.get("transformer_layer_config")
        if config.get("speculators_model_type") != kind or not isinstance(layer, dict):
            raise SpecDecError(f"'{where}' is not a {kind} head in the speculators format")
        markov = config.get("markov_head_type", MARKOV[0])
        named = {"model_type": "qwen3", "hidden_act": "silu", **layer, "markov_head_type": markov}
        for key, known in (("model_type", ["qwen3"]), ("hidden_act", ["silu"]), ("markov_head_type", [*MARKOV])):
            if named[key] not in known:
                raise SpecDecError(f"'{where}' has the {key} {named[key]!r}; only {' and '.join(known)} can be run")
        what, two = f"of the {kind} head", kind == DSPARK
        own, last = _completed(layer, where, what), target.vocab_size - 1
        taps, width = config.get("aux_hidden_state_layer_ids"), own["hidden_size"]
        first = 0 if config.get("sample_from_anchor", two) else 1
        rank = options.check_int(f"markov_rank {what}", config.get("markov_rank", 256), 0, BLOCK * 16) if two else 0
        sure = two and config.get("enable_confidence_head", True)
        by_token = sure and config.get("confidence_head_with_markov", True)
        if by_token and not rank:
            raise SpecDecError(f"the confidence head of '{where}' reads a Markov head that is not there")
        return cls(
            **cls.read_sizes(config, own, width, taps, target, where),
            depth=own["num_hidden_layers"],
            block=options.check_int(f"block_size {what}", config.get("block_size", 8), 1 + first, BLOCK),
            mask_token=options.check_int(f"mask_token_id {what}", config.get("mask_token_id"), 0, last),
            first=first,
            windows=tuple(own["sliding_window"] if kind == SLIDING else None for kind in own["layer_types"]),
            causal=not config.get("sliding_window_non_causal", False),
            biased=bool(own["attention_bias"]),
            markov=markov if rank else "",
            rank=rank,
            sure=width + rank * bool(by_token) if sure else 0,
        )


def _completed(layer: Mapping[str, Any], where: str, what: str) -> dict[str, Any]:
    """Return the entries of an untrusted ``transformer_layer_config``, completed by transformers' defaults.

    Raises SpecDecError for what transformers does not accept, and for layers that cannot be run.

    layer: the entries. where, what: names of the head and of its kind in errors.
    """
    depth = options.check_int(f"num_hidden_layers {what}", layer.get("num_hidden_layers", 32), 1, DEPTH)
    try:
        made = Qwen3Config(**{key: layer[key] for key in ENTRIES if key in layer})
    except Exception as error:  # it has checks of its own
        raise SpecDecError(f"'{where}' has an unusable transformer_layer_config ({one_line(error)})") from None
    found, kinds = {key: getattr(made, key, None) for key in ENTRIES}, made.layer_types or []
    if len(kinds) != depth or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise SpecDecError(f"'{where}' has {depth} layers of the layer_types {kinds}; {FULL} and {SLIDING} can be run")
    rope = made.rope_parameters or {}  # the same for all layers, or one for each kind
    return found | {"rope_scaling": None, "rope_parameters": rope.get(SLIDING, rope)}


class BlockHead(PublicHead):
    """A DFlash or DSpark head, a small network that drafts a block of tokens in one pass.

    If it drafts all tokens, its output head is the model's. The modules have their names in the file.

    config: the sizes.
    target: the model for which the head drafts.
    d2t: for each draft token, the difference between its id in the model and its own, int64 [V']; None: no difference.
    """

    config: BlockConfig

    def __init__(self, config: BlockConfig, target: Target, d2t: Tensor | None = None) -> None:
        super().__init__(d2t)
        self.config, width, rank = config, config.width, config.rank
        self.deepest = config.block - config.first

        def linear(name: str, ins: int, outs: int) -> nn.Linear:
            return nn.Linear(ins, outs, bias=config.biased and name.startswith("self_attn"))

        self.fc = linear("fc", len(config.layers) * target.hidden_size, width)
        self.layers = nn.ModuleList([DecoderLayer(config, width, linear) for _ in range(config.depth)])
        for layer in self.layers:
            own: Any = layer.self_attn
            own.update({f"{name}_norm": LlamaRMSNorm(config.head_dim, config.eps) for name in "qk"})
        self.hidden_norm, self.norm = LlamaRMSNorm(width, config.eps), LlamaRMSNorm(width, config.eps)
        self.lm_head = None if config.vocab == target.vocab_size else linear("lm_head", width, config.vocab)
        self.markov_head = self.confidence_head = None
        if config.markov:
            parts: dict[str, nn.Module] = {"markov_w1": nn.Embedding(target.vocab_size, rank)}
            parts["markov_w2"] = nn.Linear(rank, config.vocab, bias=False)
            if config.markov == "gated":
                parts["gate_proj"] = nn.Linear(width + rank, rank)
            elif config.markov == "rnn":
                parts["joint_proj"] = nn.Linear(2 * rank + width, 3 * rank)
            self.markov_head = nn.ModuleDict(parts)
        if config.sure:
            self.confidence_head = nn.ModuleDict({"proj": nn.Linear(config.sure, 1)})

    def groups(self, target: Target) -> dict[str, list[nn.Linear]]:
        head = self.lm_head
        if head is None:
            head = GivenLinear(weight_rows(target.own_head, torch.arange(target.vocab_size, device=target.device)))
        groups = {"fc": [self.fc], "head": [head]}
        for n, layer in enumerate(self.layers):
            own: Any = layer.self_attn
            groups |= {f"{n} q": [own["q_proj"]], f"{n} kv": [own["k_proj"], own["v_proj"]], f"{n} o": [own["o_proj"]]}
        if self.markov_head is not None:
            groups |= {name: [part] for name, part in self.markov_head.items() if isinstance(part, nn.Linear)}
        return groups

    def keys_and_values(self, number: int, x: Tensor, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return keys and values of layer ``number`` for ``x`` [B, T, D'], [B, H', T, d] each with H' heads of size d.

        turns: the result of ``rotary`` for the positions of ``x``: cosines and sines, [B, T, d] each.
        """
        own: Any = self.layers[number].self_attn
        k, v = (self._by_head(part) for part in self.map(f"{number} kv", x).chunk(2, -1))
        return _turned(own["k_norm"](k), turns), v

    def forward(self, embedded: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run the layers on the S tokens of each row's block; return their states [B, S, D'] after the head's norm.

        embedded: embeddings of the tokens, [B, S, D']. positions: their positions, int64 [B, S].
        attend: function (layer number, queries [B, H, S, d], keys and values [B, H', S, d]) that adds keys and values
            to a KV cache, and returns the result of attention [B, H, S, d].
        """
        x, turns = embedded, self.rotary[0](embedded, positions)
        for n, layer in enumerate(self.layers):
            own: Any = layer
            y = own.input_layernorm(x)
            q = _turned(own.self_attn["q_norm"](self._by_head(self.map(f"{n} q", y))), turns)
            mixed = attend(n, q, *self.keys_and_values(n, y, turns))
            x = self.feed_forward(n, x + self.map(f"{n} o", mixed.transpose(1, 2).flatten(2)))
        states: Tensor = self.norm(x)
        return states

    def follow(self, tokens: Tensor, states: Tensor, memory: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Run the Markov and the confidence head on one slot of the block, after W different tokens in each row.

        Returns what to add to the slot's logits after each token, [B, W, V'] (None: nothing); the log-odds [B, W, 1]
        that its likeliest token is accepted (None: unknown); and the next slot's ``memory``, [B, W, rank].

        tokens: the tokens before the slot, nodes of the draft tree, int64 [B, W].
        states: the slot's states after the head's norm, [B, 1, D'].
        memory: the Markov head's recurrent state, [B, W, rank]; zeros before the first slot.
        """
        seen, added = states.expand(-1, tokens.shape[1], -1), None
        if self.markov_head is not None:
            own: Any = self.markov_head
            before = kept = own["markov_w1"](tokens)
            seen = torch.cat((seen, before), -1)
            if self.config.markov == "gated":
                kept = self.map("gate_proj", seen).sigmoid() * before
            elif self.config.markov == "rnn":
                inputs = torch.cat((memory, before, seen[..., : self.config.width]), -1)
                gate, new, out = self.map("joint_proj", inputs).chunk(3, -1)
                memory, kept = torch.lerp(new.tanh(), memory, gate.sigmoid()), out.tanh()
            added = self.map("markov_w2", kept)
        sure = self.confidence_head
        return added, None if sure is None else sure["proj"](seen[..., : self.config.sure]), memory

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)


def _turned(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Return ``x`` [B, H, T, d] with rotary positions applied. turns: cosines and sines, [B, T, d] each."""
    cos, sin = (part[:, None] for part in turns)
    return x * cos + rotate_half(x) * sin


def with_confidence(logits: Tensor, odds: Tensor) -> Tensor:
    """Return logits [B, W, V'], float32, whose likeliest token has the log-odds ``odds`` [B, W, 1] in their softmax.

    Only this token's logit changes. If the log-odds are so low that another token would be likeliest, it is set just
    above the second one.
    """
    logits = logits.float()
    best, index = logits.topk(2)
    first = index[..., :1]
    others = logits.scatter(-1, first, -torch.inf).logsumexp(-1, keepdim=True)
    return logits.scatter(-1, first, torch.maximum(others + odds.float(), best[..., 1:] + 1e-3))
