"""The draft heads of DFlash and DSpark: decoder layers that read the model's states, and what follows them.

``transformer_layer_config`` in the ``config.json`` is that of the layers, a Qwen3 or Llama configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half

from specdec.base import options
from specdec.base.errors import SpecDecError, one_line
from specdec.models.gguf.blocks import weight_rows
from specdec.runtimes.target import GivenLinear, Target

from ..speculators import ROPE, DecoderLayer, HeadConfig, PublicHead, read_head

DFLASH, DSPARK = "dflash", "dspark"
CONFIGS: dict[Any, Any] = {"qwen3": Qwen3Config, "llama": LlamaConfig}
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
ENTRIES = (  # of ``transformer_layer_config`` that are read
    *(*SIZES, *ROPE, "rms_norm_eps", "attention_bias", "num_hidden_layers", "max_position_embeddings"),
    *("layer_types", "sliding_window", "use_sliding_window", "max_window_layers"),
)
KINDS = ("full_attention", "sliding_attention")
DEPTH, BLOCK = 64, 256  # maximum numbers of layers and of tokens of a block
MARKOV = ("vanilla", "gated", "rnn")
THEIRS = ("embed_tokens.weight", "verifier_norm.weight", "verifier_lm_head.weight")  # copies of the model's weights
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer; queries, keys, values [B, H, T, d] -> as queries


@dataclass(frozen=True)
class BlockConfig(HeadConfig):
    """The sizes of a head.

    depth: number of decoder layers.
    block: S, number of tokens of a block.
    mask_token: id of the token that stands for the tokens to come.
    first: the slot of the block that drafts the first token: 0 (the last token of the text), or 1.
    windows: for each layer, how far before the block it attends to the text; None: no limit.
    causal: whether, in layers with a window, a slot of the block only attends to itself and those before.
    biased: whether the projections of the attention have a bias.
    markov: the Markov head, one of ``MARKOV``; "": there is none. rank: its inner size.
    sure: whether there is a confidence head. sure_by_token: whether it reads the token before, too.
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
    sure: bool = False
    sure_by_token: bool = False

    @classmethod
    def read(cls, config: Mapping[str, Any], target: Target, where: str, kind: str) -> BlockConfig:
        """Check an untrusted config.json, and return the sizes in it. where: its name in errors.

        Raises SpecDecError if it describes no head that this code can run, or a head for another model than ``target``.

        kind: ``DFLASH`` or ``DSPARK``.
        """
        layer = config.get("transformer_layer_config")
        if config.get("speculators_model_type") != kind or not isinstance(layer, dict):
            raise SpecDecError(f"'{where}' is not a {kind} head in the speculators format")
        family, what = layer.get("model_type", "qwen3"), f"of the {kind} head"
        for key, value, known in (
            ("model_type", family, [*CONFIGS]),
            ("hidden_act", layer.get("hidden_act", "silu"), ["silu"]),
            ("markov_head_type", config.get("markov_head_type", "vanilla"), [*MARKOV]),
        ):
            if value not in known:
                raise SpecDecError(f"'{where}' has the {key} {value!r}; it must be {' or '.join(known)}")
        made = _whole(family, layer, where, what)
        sizes = cls.read_sizes(
            *(config, made, made["hidden_size"], config.get("aux_hidden_state_layer_ids")), target, where
        )
        first = 0 if config.get("sample_from_anchor", kind == DSPARK) else 1
        rank = options.check_int(f"markov_rank {what}", config.get("markov_rank", 256), 0, 16 * target.hidden_size)
        rank = rank if kind == DSPARK else 0
        sure = kind == DSPARK and bool(config.get("enable_confidence_head", True))
        by_token = sure and bool(config.get("confidence_head_with_markov", True))
        if by_token and not rank:
            raise SpecDecError(f"the confidence head of '{where}' reads a Markov head that it does not have")
        window = made["sliding_window"]
        return cls(
            **sizes,
            depth=made["num_hidden_layers"],
            block=options.check_int(f"block_size {what}", config.get("block_size", 8), 1 + first, BLOCK),
            mask_token=options.check_int(
                f"mask_token_id {what}", config.get("mask_token_id"), 0, target.vocab_size - 1
            ),
            first=first,
            windows=tuple(window if each == KINDS[1] else None for each in made["layer_types"]),
            causal=not config.get("sliding_window_non_causal", False),
            biased=bool(made["attention_bias"]),
            markov=config.get("markov_head_type", "vanilla") if rank else "",
            rank=rank,
            sure=sure,
            sure_by_token=by_token,
        )


def _whole(family: str, layer: Mapping[str, Any], where: str, what: str) -> dict[str, Any]:
    """Return the entries of an untrusted ``transformer_layer_config``, completed by transformers' defaults.

    Raises SpecDecError for what transformers does not accept, and for layers that cannot be run.
    """
    depth = options.check_int(f"num_hidden_layers {what}", layer.get("num_hidden_layers", 32), 1, DEPTH)
    try:
        made = CONFIGS[family](**{key: layer[key] for key in ENTRIES if key in layer})
    except Exception as error:  # each class has checks of its own
        raise SpecDecError(f"'{where}' has an unusable transformer_layer_config ({one_line(error)})") from None
    found = {key: getattr(made, key, None) for key in ENTRIES}
    kinds = found["layer_types"] = found["layer_types"] or [KINDS[0]] * depth
    if len(kinds) != depth or any(kind not in KINDS for kind in kinds):
        raise SpecDecError(
            f"'{where}' has the layer_types {kinds}; it must be one of {', '.join(KINDS)} for each layer"
        )
    if found["sliding_window"] is not None:
        options.check_int(f"sliding_window {what}", found["sliding_window"], 1)
    rope = found["rope_parameters"]
    if isinstance(rope, dict) and KINDS[1] in rope:  # one entry for each kind of layers
        found["rope_parameters"] = rope[KINDS[1]]
    return found


class BlockHead(PublicHead):
    """A DFlash or DSpark head. d2t: as in ``PublicHead``.

    Its output head is the model's if it drafts all tokens.
    """

    config: BlockConfig

    def __init__(self, config: BlockConfig, target: Target, d2t: Tensor | None = None) -> None:
        super().__init__(d2t)
        self.config, width, rank = config, config.width, config.rank

        def linear(name: str, ins: int, outs: int) -> nn.Linear:
            return nn.Linear(ins, outs, bias=config.biased and "self_attn" in name)

        self.fc = linear("fc", len(config.layers) * target.hidden_size, width)
        self.layers = nn.ModuleList([DecoderLayer(config, width, "", linear) for _ in range(config.depth)])
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
            self.confidence_head = nn.ModuleDict({"proj": nn.Linear(width + rank * config.sure_by_token, 1)})

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

    def features(self, states: Tensor) -> Tensor:
        """Return features [B, T, D'] from the input states of the n ``layers``, concatenated to [B, T, n D]."""
        made: Tensor = self.hidden_norm(self.map("fc", states))
        return made

    def remember(self, features: Tensor, positions: Tensor, append: Callable[[int, Tensor, Tensor], Any]) -> None:
        """Make the keys and values of a text from its features [B, T, D'].

        positions: int64 [B, T]. append: takes the number of a layer, and its keys and values [B, H', T, d].
        """
        turns = self.turns(features, positions)
        for n in range(self.config.depth):
            append(n, *self._keys_and_values(n, features, turns))

    def run_block(self, embedded: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run the layers on the S embedded tokens of each row's block; return states [B, S, D'] after the norm.

        positions: int64 [B, S]. attend: computes attention, as ``Attend`` says.
        """
        x, turns = embedded, self.turns(embedded, positions)
        for n, layer in enumerate(self.layers):
            own: Any = layer
            y = own.input_layernorm(x)
            q = _turned(own.self_attn["q_norm"](self._by_head(self.map(f"{n} q", y))), turns)
            mixed = attend(n, q, *self._keys_and_values(n, y, turns))
            x = self.feed_forward(n, x + self.map(f"{n} o", mixed.transpose(1, 2).flatten(2)))
        states: Tensor = self.norm(x)
        return states

    def logits(self, states: Tensor) -> Tensor:
        """Return draft logits [B, S, V'] of each slot of the block, before the Markov head."""
        return self.map("head", states)

    def follow(self, tokens: Tensor, states: Tensor, memory: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Return what a slot of the block knows by the tokens drafted before it, of W nodes of each row.

        The result is what to add to the slot's logits, [B, W, V'] (None: nothing), the log-odds [B, W, 1] that its
        likeliest token is accepted (None: unknown), and the next slot's ``memory``.

        tokens: the tokens before, int64 [B, W]. states: of the slot, [B, 1, D'].
        memory: of the Markov head, [B, W, rank], zeros at first.
        """
        states, added, odds = states.expand(-1, tokens.shape[1], -1), None, None
        seen = [states]
        if self.markov_head is not None:
            own: Any = self.markov_head
            before = kept = own["markov_w1"](tokens)
            if self.config.sure_by_token:
                seen.append(before)
            if self.config.markov == "gated":
                kept = self.map("gate_proj", torch.cat((states, before), -1)).sigmoid() * before
            elif self.config.markov == "rnn":
                gate, new, out = self.map("joint_proj", torch.cat((memory, before, states), -1)).chunk(3, -1)
                memory, kept = torch.lerp(new.tanh(), memory, gate.sigmoid()), out.tanh()
            added = self.map("markov_w2", kept)
        if self.confidence_head is not None:
            odds = self.confidence_head["proj"](torch.cat(seen, -1))
        return added, odds, memory

    def _keys_and_values(self, number: int, x: Tensor, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, H', T, d] of layer ``number`` for ``x`` [B, T, D']."""
        own: Any = self.layers[number].self_attn
        k, v = (self._by_head(part) for part in self.map(f"{number} kv", x).chunk(2, -1))
        return _turned(own["k_norm"](k), turns), v

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)


def _turned(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary positions to ``x`` [B, H, T, d]. turns: cosines and sines, [B, T, d] each."""
    cos, sin = (part[:, None] for part in turns)
    return x * cos + rotate_half(x) * sin


def with_confidence(logits: Tensor, odds: Tensor) -> Tensor:
    """Let the likeliest token of logits [B, W, V'] have the log-odds ``odds`` [B, W, 1], if it stays the likeliest."""
    if logits.shape[-1] < 2:
        return logits
    logits = logits.float()
    best, index = logits.topk(2)
    first = index[..., :1]
    others = logits.scatter(-1, first, -torch.inf).logsumexp(-1, keepdim=True)
    return logits.scatter(-1, first, torch.maximum(others + odds.float(), best[..., 1:] + 1e-3))


def read_network(folder: Path, config: BlockConfig, target: Target, where: str) -> BlockHead:
    """Load the head in ``folder``. Raises SpecDecError if a tensor does not fit. where: the folder's name in errors."""
    if config.width != target.hidden_size:
        raise SpecDecError(
            f"'{where}' has states of its own size ({config.width}); the model's have {target.hidden_size}"
        )
    own = ("lm_head.weight", "d2t") if config.vocab == target.vocab_size else ()  # the model's, and no difference
    make = lambda header, d2t: BlockHead(config, target, d2t)  # noqa: E731
    return read_head(folder, where, target, config.vocab, make, unread=(*THEIRS, *own))
