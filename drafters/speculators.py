"""Public draft heads in the ``speculators`` format: what EAGLE-3, DFlash and DSpark heads have in common.

A folder holds ``config.json``, with ``speculators_model_type`` and ``transformer_layer_config``, and
``model.safetensors``. ``d2t`` there is the difference between a draft token's id in the model and its own; ``t2d``
marks the same tokens among the model's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from specdec.base import options
from specdec.base.devices import is_asynchronous, upload, without_memory
from specdec.base.errors import SpecDecError, one_line
from specdec.models import drafter_folder, hub
from specdec.models.names import display_name
from specdec.runtimes.draft_path import WIDTH, DeviceChoice, DeviceTree, TreeLimits
from specdec.runtimes.target import Target
from specdec.runtimes.torch.draft import Rules, given_of, grow, taken
from specdec.runtimes.torch.linear import Linear, for_drafting
from specdec.speculation.candidates import Candidates
from specdec.speculation.device_draft import DeviceDraft, choice_of
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Given, Trees
from specdec.speculation.state import State
from specdec.speculation.tree_builder import draft_best

from .pairs import PairDrafter

HEADS, LAYERS = 1024, 8  # maximum numbers of attention heads and of tapped layers
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings")  # entries of the rotary embedding


@dataclass(frozen=True)
class HeadConfig:
    """The sizes of a public draft head, a small network that drafts from the model's states. Base class for each kind.

    layers: layers of the model whose input states the head reads; N (the number of layers): the last layer's output.
    width: D', the head's own hidden size (D is the model's).
    heads, kv_heads, head_dim: numbers of attention heads and of key heads, and the size of each head.
    intermediate_size: number of neurons of the MLP in each of the head's decoder layers.
    vocab: V', number of tokens that the head can draft.
    eps: the epsilon of all RMS norms.
    rope: arguments of transformers' ``LlamaConfig`` for the rotary embedding, such as ``rope_theta``; {}: its defaults.
    """

    layers: tuple[int, ...]
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab: int
    eps: float = 1e-6
    rope: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def read_sizes(
        config: Mapping[str, Any], layer: Mapping[str, Any], hidden: Any, taps: Any, target: Target, where: str
    ) -> dict[str, Any]:
        """Check the sizes in an untrusted config.json, and return them by the names of this class's fields.

        Raises SpecDecError if a size is impossible, or of a head for another model than ``target``.
        config: the config.json. layer: its ``transformer_layer_config``.
        hidden: hidden size of the model that the head is for. taps: the value of ``layers``. Both are from the file,
            too, and may be of any type.
        where: name of the head in errors.
        """
        size, inner, vocab = (layer.get(name) for name in ("head_dim", "intermediate_size", "vocab_size"))
        for name, own, model in (("hidden size", hidden, target.hidden_size), ("vocabulary", vocab, target.vocab_size)):
            if own != model:
                raise SpecDecError(f"'{where}' was made for a model of {name} {own}; this model's is {model}")
        n, what = target.num_layers, f"of the {config['speculators_model_type']} head"
        layers = options.check_ints(f"tapped layers {what}", taps, 0)
        if not 1 <= len(layers) <= LAYERS or max(layers) > n:
            raise SpecDecError(f"'{where}' reads layers {list(layers)}; this model has {n}")
        width = drafter_folder.check_inner_size("hidden_size", layer.get("hidden_size"), target.hidden_size)
        heads = options.check_int(f"attention heads {what}", layer.get("num_attention_heads"), 1, HEADS)
        kv_heads = options.check_int(f"key heads {what}", layer.get("num_key_value_heads") or heads, 1, heads)
        if heads % kv_heads:
            raise SpecDecError(
                f"'{where}' has {heads} attention heads on {kv_heads} key heads, which do not divide them"
            )
        return {
            "layers": tuple(layers),
            "width": width,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": drafter_folder.check_inner_size("head_dim", size or width // heads, target.hidden_size),
            "intermediate_size": drafter_folder.check_inner_size("intermediate_size", inner, target.hidden_size),
            "vocab": options.check_int(
                f"draft_vocab_size {what}", config.get("draft_vocab_size"), 2, target.vocab_size
            ),
            "eps": options.check_probability(f"rms_norm_eps {what}", layer.get("rms_norm_eps", 1e-6)),
            "rope": {key: layer[key] for key in ROPE if layer.get(key)},
        }

    def rotary(self) -> LlamaRotaryEmbedding:
        """Return the rotary embedding. Raises SpecDecError if transformers does not accept the entries ``rope``."""
        sizes: dict[str, Any] = {"num_attention_heads": self.heads, "head_dim": self.head_dim, **self.rope}
        try:
            return LlamaRotaryEmbedding(LlamaConfig(hidden_size=self.width, **sizes))
        except Exception as error:  # transformers checks little
            raise SpecDecError(f"the draft head has unusable rotary positions ({one_line(error)})") from None


class DecoderLayer(nn.Module):
    """The parameters of a head's decoder layer under their names in the file. The head computes it; no ``forward``.

    config: the sizes of the head.
    ins: input size of the projections to queries, keys and values.
    linear: function of a name, such as "mlp.up_proj", an input size and an output size that makes this linear layer.
    """

    def __init__(self, config: HeadConfig, ins: int, linear: Callable[[str, int, int], nn.Linear]) -> None:
        super().__init__()
        width, inner, attended = config.width, config.intermediate_size, config.heads * config.head_dim
        for name in ("input_layernorm", "post_attention_layernorm"):
            self.add_module(name, LlamaRMSNorm(width, config.eps))
        sizes = {"q_proj": attended, **dict.fromkeys(("k_proj", "v_proj"), config.kv_heads * config.head_dim)}
        attention = {name: linear(f"self_attn.{name}", ins, size) for name, size in sizes.items()}
        self.self_attn = nn.ModuleDict({**attention, "o_proj": linear("self_attn.o_proj", attended, width)})
        mlp = {name: linear(f"mlp.{name}", width, inner) for name in ("gate_proj", "up_proj")}
        self.mlp = nn.ModuleDict({**mlp, "down_proj": linear("mlp.down_proj", inner, width)})


class PublicHead(nn.Module):
    """Base class of public draft heads, small networks that draft from the model's states (EAGLE-3, DFlash, DSpark).

    A subclass sets ``config`` and ``layers`` (``DecoderLayer`` modules), has the other parameters under their names in
    the file, and implements ``groups``.

    config: the sizes of the head.
    d2t: for each draft token, the difference between its id in the model and its own, int64 [V']; None: no difference.
    deepest: maximum number of tokens that it drafts one after the other; None: any.
    rotary: the rotary embedding, once ``freeze`` has made it.
    """

    config: HeadConfig
    layers: nn.ModuleList
    deepest: int | None = None

    def __init__(self, d2t: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("d2t", d2t)
        self.d2t: Tensor | None
        self.rotary: list[LlamaRotaryEmbedding] = []  # in a list: no submodule, which would be rounded
        self._maps: dict[str, Linear] = {}

    @property
    def tokens(self) -> Tensor | None:
        """The model's ids of the draft tokens, int64 [V']; None: the ids 0 to V' - 1."""
        if self.d2t is None:
            return None
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    @abstractmethod
    def groups(self, target: Target) -> Mapping[str, Sequence[nn.Linear]]:
        """Return the head's linear layers in groups, {name of a group: linear layers with the same input}.

        ``freeze`` packs each group as one linear layer, which ``map`` applies by the group's name.

        target: the model for which the head drafts.
        """

    def freeze(self, target: Target) -> None:
        """Prepare for drafting: move the parameters to the target's dtype and device, and pack the linear layers.

        Sets ``rotary`` and what ``map`` applies. Parameters get no gradients any more. The drafter's ``bind`` calls it.
        """
        self.to(target.device, target.dtype).requires_grad_(False).eval()
        self.rotary = [self.config.rotary().to(target.device)]
        groups = dict(self.groups(target))
        for n, layer in enumerate(self.layers):
            mlp: Any = layer.mlp
            groups |= {f"{n} up": [mlp["gate_proj"], mlp["up_proj"]], f"{n} down": [mlp["down_proj"]]}
        self._maps = {name: _as_one(group) for name, group in groups.items()}

    def map(self, group: str, x: Tensor) -> Tensor:
        """Apply the linear layers of a group to ``x`` [B, T, in]; return their concatenated outputs [B, T, out].

        group: name of the group in ``groups``, such as "qkv". ``freeze`` must have been called.
        """
        return self._maps[group](x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    def feed_forward(self, number: int, x: Tensor) -> Tensor:
        """Return ``x`` [B, T, D'] plus the output of the MLP of layer ``number`` for it, the norm before it included.

        ``freeze`` must have been called.
        """
        layer: Any = self.layers[number]
        gate, up = self.map(f"{number} up", layer.post_attention_layernorm(x)).chunk(2, -1)
        return x + self.map(f"{number} down", F.silu(gate) * up)


H = TypeVar("H", bound=PublicHead)


def _as_one(group: Sequence[nn.Linear]) -> Linear:
    """Return one packed linear layer that computes the concatenated outputs of all layers in ``group``.

    group: linear layers with the same input; each may lack a bias.
    """
    if len(group) == 1:
        return for_drafting(group[0].weight, group[0].bias)
    biases: list[Tensor] = [
        each.weight.new_zeros(each.out_features) if each.bias is None else each.bias for each in group
    ]
    bias = None if all(each.bias is None for each in group) else torch.cat(biases)
    return for_drafting(torch.cat(tuple(each.weight for each in group)), bias)


def read_head(
    folder: Path,
    where: str,
    target: Target,
    vocab: int,
    make: Callable[[Mapping[str, Tensor], Tensor | None], H],
    unread: Sequence[str] = (),
) -> H:
    """Load a public draft head, in the speculators format, from a folder. Raises SpecDecError if a tensor does not fit.

    folder: the folder of the head. where: its name in errors.
    target: the model for which the head drafts. vocab: number of draft tokens.
    make: function that builds the head without memory for its weights, from the tensors in the file (their shapes and
        dtypes) by name, and from ``d2t``: for each draft token, the difference between its id in the model and its own,
        int64 [V'], or None.
    unread: names of tensors in the file that the head does not need.
    """
    with drafter_folder.open_tensors(folder / drafter_folder.WEIGHTS) as stored:
        names = {name.replace("midlayer.", "layers.0."): name for name in stored.header}  # as the first heads say
        header = {name: stored.header[of] for name, of in names.items() if name not in ("t2d", *unread)}
        if "d2t" not in header and vocab < target.vocab_size:
            raise SpecDecError(f"'{where}' drafts from {vocab} tokens and does not say which ('d2t' is missing)")
        with without_memory():
            head = make(header, torch.empty(vocab, dtype=torch.long) if "d2t" in header else None)
        own = head.state_dict()
        drafter_folder.check_fit(folder, own, header)
        head.load_state_dict({name: stored.read(names[name]).to(own[name].dtype) for name in own}, assign=True)
        tokens = head.tokens
        if tokens is not None and bool(((tokens < 0) | (tokens >= target.vocab_size)).any()):
            raise SpecDecError(f"the draft vocabulary in '{where}' names tokens that the model does not have")
        return head


class PublicHeadDrafter(PairDrafter):
    """Base class of drafters with a public head: they grow a tree for greedy rows, and a chain for each row else.

    A public head is a network in the format of the library speculators. A level is all nodes at one depth of a tree.
    A subclass implements ``read``, which loads its kind of head, and what ``PairDrafter`` asks for: ``name``,
    ``summary``, ``shift``, ``run``, ``inputs`` and ``logits``.

    nodes: number of nodes of a tree; None: as many nodes as are worth their cost (``Prices``), or a chain if costs are
        not known.
    width: number of nodes of each level that get children.
    network: the head.
    several: whether several rows draft trees, too.
    """

    needs_training: ClassVar[bool] = True
    network: PublicHead
    several: ClassVar[bool] = False

    def __init__(self, network: PublicHead, width: int = WIDTH, nodes: int | None = None) -> None:
        self.nodes = None if nodes is None else options.check_int("nodes", nodes, 1)
        self.cost_key = str(network.config)
        self.network, self.width = network, options.check_int("width", width, 1)

    @classmethod
    @abstractmethod
    def read(cls, folder: Path, config: Mapping[str, Any], target: Target, where: str) -> PublicHead:
        """Load the head in ``folder``, not frozen yet. Raises SpecDecError if it does not fit the target, or is broken.

        config: the folder's config.json, untrusted. where: the folder's name in errors.
        """

    @classmethod
    def load(cls, target: Target, source: str | None = None, **kwargs: Any) -> Self:
        """Load a head in the speculators format.

        Raises SpecDecError if there is no such head, or it does not fit the target.
        source: a folder, or a Hugging Face repository ORG/NAME[@revision]; None raises, since no head is shipped.
        kwargs: the options ``nodes`` (of a tree; int or None) and ``width`` (nodes of a level that get children), as in
            the constructor.
        """
        options.check_names(cls.name, kwargs, ("nodes", "width"))
        if source is None:
            raise drafter_folder.not_shipped(cls.name, cls.training, target.model.config._name_or_path)
        folder = Path(source) if Path(source).is_dir() else hub.fetch_drafter(source)
        where, config = display_name(folder), drafter_folder.read_config(folder, cls.name)
        if "base" in config:  # ours; others do not say which weights a head is for
            drafter_folder.check_base(config, target, where)
        return cls(cls.read(folder, config, target, where), **kwargs)

    def bind(self, target: Target) -> None:
        head, config = self.network, self.network.config
        head.freeze(target)
        self.layers, self.inner = config.layers, config.width
        self.keys = len(head.layers), config.kv_heads, config.head_dim
        few = config.vocab < target.vocab_size
        first = torch.arange(config.vocab, device=target.device) if few else None
        self.tokens = head.tokens if head.d2t is not None else first
        super().bind(target)

    def candidates(self, state: State, limit: int, given: Given = None, choice: DeviceChoice | None = None) -> Trees:
        if not self._drafts_tree(state):
            return None
        limit = min(limit, self.network.deepest or limit)
        return self._tree(state, limit, self.width, choice, None if choice is None else given)

    def propose(self, state: State, limit: int) -> Draft:
        limit = min(limit, self.network.deepest or limit)
        if not self._drafts_tree(state):
            return super().propose(state, limit)
        if self.traits.has_probabilities and state.prices is not None and not state.prices.levels():
            self.catch_up(state)
            return draft_best([Candidates.none() for _ in state.ids], limit, self.nodes, state)
        width = self.width if self.nodes or state.prices else 1
        choice = choice_of(state, limit, self.nodes, width)
        found = self._tree(state, limit, width, choice)
        if isinstance(found, DeviceTree):
            return DeviceDraft(found, state, limit, chain=width == 1)
        return draft_best(found, limit, self.nodes, state, max(own.levels() for own in found))

    def _drafts_tree(self, state: State) -> bool:
        """Return whether to draft a tree in this step, and not chains.

        Rows must be greedy (one row, or any number if ``several``), and ``nodes`` be set or the host may wait for the
        device.
        """
        sampler, alone = state.sampler, len(state.ids) == 1
        verified = state.threshold is None and (
            sampler.best_allowed if alone else self.several and sampler.plain_greedy
        )
        return verified and (bool(self.nodes) or not is_asynchronous(state.cache.device))

    def _tree(
        self,
        state: State,
        limit: int,
        width: int,
        choice: DeviceChoice | None,
        given: Given = None,
    ) -> list[Candidates] | DeviceTree:
        """Return a tree for each row, with ``width`` children of a node and at most ``limit`` levels.

        choice: the rule by which the device selects nodes; the result is then their tree on the device. None: the
            result is all candidates of each row, from which the caller selects.
        given: for each row, the candidates by n-grams, which the tree extends; None: there are none.
        """
        tree = None if choice is None else self.draft_captured(state, limit, width, choice, given)
        if tree is not None:
            return tree
        prices, device, cache = state.prices, state.cache.device, self.catch_up(state)
        limits = TreeLimits(limit, width) if prices is None else prices.limits(limit, width)
        tables = upload(prices.tables, device, torch.float32) if prices and prices.tables else None
        masks = state.masks(0) if choice is None and len(state.ids) == 1 else None
        rules = Rules(self.tokens, tables, given=given_of(given, device), masks=masks)
        waits = choice is None and not is_asynchronous(device)
        found = taken(grow(self.levels(self.pairs(state), cache), state.roots, limits, rules, waits=waits), choice)
        return found if isinstance(found, DeviceTree) else [Candidates(*nodes) for nodes in found]
