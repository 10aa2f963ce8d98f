"""Multi-token prediction: a layer of the model's own checkpoint drafts (arXiv 2412.19437).

The layer runs pairs: the model's final state of a token, or for a drafted token the layer's own output, and the next
token. It has its own keys and values of each pair. transformers does not load these tensors, so they are read from the
checkpoint's files here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from specdec.base import options
from specdec.base.errors import SpecDecError, one_line
from specdec.kvcache.cache import KVCache
from specdec.kvcache.mask import Mask
from specdec.models import drafter_folder
from specdec.models.native_model import as_transformers
from specdec.models.source import weight_files
from specdec.runtimes.target import GivenLinear, Pass, Target
from specdec.runtimes.transformers import TransformersTarget

from .pairs import PairDrafter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TensorNames(NamedTuple):
    """The names of the tensors of a model family's prediction layer, and how the family runs this layer.

    prefix: prefix of all tensor names; ``{n}`` stands for the number of the model's layers.
    layer: further prefix of the tensors of the decoder layer.
    token_norm, state_norm, projection, norm: names of the norms of embedding and state, of the projection of both, and
        of the norm after the layer.
    token_first: whether the embedding is the first part of the projection's input.
    reads_norm: whether the layer reads the model's final states after the final norm.
    feeds_norm: whether drafted tokens read the layer's output after its norm.
    """

    prefix: str
    layer: str
    token_norm: str
    state_norm: str
    projection: str
    norm: str
    token_first: bool
    reads_norm: bool
    feeds_norm: bool


FORMATS = (  # as vLLM runs them
    # Qwen3-Next, Qwen3.5
    TensorNames("mtp.", "layers.0.", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm", True, True, True),
    # MiMo
    TensorNames(
        *("model.mtp_layers.0.", "", "token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
        *(False, False, True),
    ),
    # DeepSeek V3, GLM 4.5
    TensorNames("model.layers.{n}.", "", "enorm", "hnorm", "eh_proj", "shared_head.norm", True, True, False),
)
SHARED = ("shared_head.head.", "embed_tokens.")  # copies of the model's own embedding and output head
ONE_LAYER = {  # config entries, where they exist: the layer has full attention, and experts if the model has them
    "layer_types": ["full_attention"],
    "mlp_layer_types": ["sparse"],
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "first_k_dense_replace": 0,
}
FAMILIES = "Qwen3-Next, Qwen3.5, DeepSeek V3, GLM 4.5 and MiMo"


@dataclass
class MTPHead:
    """A prediction layer: norms of a token and of the state before it, a projection of both, a decoder layer, a norm.
    draft_target: the layer as a model of one layer, with its own norm and the model's output head.
    final_norm: module that is applied to the model's states before the layer reads them.
    norm: module that is applied to the layer's output before a drafted token's next pass reads it.
    """

    draft_target: Target
    projection: nn.Module
    token_norm: nn.Module  # of the token's embedding
    state_norm: nn.Module  # of the model's state
    final_norm: nn.Module
    norm: nn.Module
    token_first: bool = True  # whether the embedding comes first in the projection's input
    feeds_norm: bool = True  # whether drafted tokens read the layer's output after its norm

    def inputs(self, embedded: Tensor, states: Tensor) -> Tensor:
        """Return the layer's input [B, T, D] for pairs of embeddings and states, [B, T, D] each."""
        pair = self.token_norm(embedded), self.state_norm(states)
        x: Tensor = self.projection(torch.cat(pair if self.token_first else pair[::-1], -1))
        return x


class MTPDrafter(PairDrafter):
    """Drafts a chain with the multi-token prediction layer of the model's own checkpoint. head: that layer."""

    name: ClassVar[str] = "mtp"
    summary: ClassVar[str] = f"prediction layer inside the checkpoint of {FAMILIES}; no training"
    shift = 1

    def __init__(self, head: MTPHead) -> None:
        self.head, self.cost_key = head, head.draft_target.fingerprint

    @classmethod
    def load(cls, target: Target, source: str | None = None, **kwargs: Any) -> MTPDrafter:
        """Load the layer from the checkpoint ``source``. Raises SpecDecError if there is none, or it does not fit.

        source: a model name or a folder; None: the model's own checkpoint.
        """
        options.check_names(cls.name, kwargs)
        return cls(read_head(target, source))

    def bind(self, target: Target) -> None:
        own = self.head.draft_target
        if (own.hidden_size, own.vocab_size) != (target.hidden_size, target.vocab_size):
            raise SpecDecError("the multi-token prediction layer is of another model; its sizes differ")
        self.layers = (target.num_layers,)
        super().bind(target)

    def new_cache(self) -> KVCache:
        return self.head.draft_target.new_cache()

    def inputs(self, states: Tensor) -> Tensor:
        made: Tensor = self.head.final_norm(states)
        return made

    def fed(self, outputs: Tensor) -> Tensor:
        return self.head.norm(outputs) if self.head.feeds_norm else outputs

    def logits(self, outputs: Tensor) -> Tensor:
        return self.head.draft_target.readout(outputs)

    def run(self, tokens: Tensor, states: Tensor, positions: Tensor, mask: Mask, cache: KVCache) -> Tensor:
        x = self.head.inputs(self.target.embed(tokens, positions), states)
        return self.head.draft_target.layers(x, 0, 1, Pass(positions, mask, cache))


def read_head(target: Target, source: str | None = None) -> MTPHead:
    """Load the prediction layer from the checkpoint of the target's model, or from ``source``, a name or a folder.

    Raises SpecDecError if the checkpoint has no such layer, or it does not fit the model's family.
    """
    whole = target.model.config
    config = whole.get_text_config()
    name = source or config._name_or_path or whole._name_or_path
    files = weight_files(name, None if source else getattr(whole, "_commit_hash", None))
    for names in FORMATS:
        prefix = names.prefix.format(n=target.num_layers)
        if tensors := _read(files, prefix):
            break
    else:
        raise SpecDecError(
            f"the checkpoint '{name}' has no multi-token prediction layer; those of {FAMILIES} may have one"
        )
    model = as_transformers(target.model)
    d, around = target.hidden_size, dict[str, Tensor]()
    for part in (names.token_norm, names.state_norm, names.projection, names.norm):
        tensor, shape = tensors.pop(f"{part}.weight", None), (d, 2 * d) if part == names.projection else (d,)
        if tensor is None or tensor.shape != shape:
            found = "missing" if tensor is None else f"{tuple(tensor.shape)}, not {shape}"
            raise SpecDecError(
                f"the multi-token prediction layer of '{name}' does not fit: '{prefix}{part}' is {found}"
            )
        around[part] = tensor
    final_norm = getattr(model.base_model, "norm", None)
    if final_norm is None:
        raise SpecDecError(
            f"drafter 'mtp' does not serve '{model.config.model_type}' models: their final norm is unknown"
        )
    inside = f"{model.base_model_prefix}.layers.0."
    state = {inside + part.removeprefix(names.layer): tensor for part, tensor in tensors.items()}
    state |= {f"{model.base_model_prefix}.norm.weight": around[names.norm]}
    own: Any = _one_layer(model, state, name)

    def norm(part: str) -> nn.Module:
        made = copy.deepcopy(final_norm)
        made.weight = nn.Parameter(around[part].to(final_norm.weight), requires_grad=False)
        return made

    projection = GivenLinear(around[names.projection].to(target.device, target.dtype))
    token_norm, state_norm = norm(names.token_norm), norm(names.state_norm)
    reads = final_norm if names.reads_norm else nn.Identity()
    norms = token_norm, state_norm, reads, own.base_model.norm
    return MTPHead(TransformersTarget(own), projection, *norms, names.token_first, names.feeds_norm)


def _read(files: list[Path], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix``, by the rest of the name.

    Embeddings and output heads, which copy the model's, are left out.
    """
    found = {}
    for path in files:
        with drafter_folder.open_tensors(path) as stored:
            for name in stored.header:
                part = name.removeprefix(prefix)
                if part != name and not part.startswith(SHARED):
                    found[part] = stored.read(name)
    return found


def _one_layer(model: PreTrainedModel, state: dict[str, Tensor], name: str) -> PreTrainedModel:
    """Return a model of one layer, with the embedding and the output head of ``model``.

    state: the layer's tensors by name.
    name: the checkpoint's name, for errors.
    """
    config = model.config.get_text_config()
    changes: dict[str, Any] = {"num_hidden_layers": 1}
    changes |= {key: value for key, value in ONE_LAYER.items() if getattr(config, key, None) is not None}
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    make: Any = type(model).from_pretrained
    state |= {f"{model.base_model_prefix}.embed_tokens.weight": embedding.weight, "lm_head.weight": head.weight}
    try:
        own, info = make(
            None,
            config=type(config).from_dict(config.to_dict() | changes),
            state_dict=state,
            dtype=model.dtype,
            attn_implementation=config._attn_implementation,
            output_loading_info=True,
        )
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise SpecDecError(f"cannot load the multi-token prediction layer of '{name}' ({one_line(error)})") from error
    for what in ("missing_keys", "unexpected_keys"):
        if keys := sorted(info[what]):
            raise SpecDecError(f"the multi-token prediction layer of '{name}' does not fit ({what}: {keys[0]})")
    own = own.to(model.device).eval().requires_grad_(False)
    own.set_input_embeddings(embedding)
    own.set_output_embeddings(head)
    return own  # type: ignore[no-any-return]
