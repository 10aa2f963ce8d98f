"""Multi-token prediction: a layer of the model's own checkpoint drafts (arXiv 2412.19437).

The layer runs pairs: the model's final state of a token, or for a drafted token the layer's own output, and the next
token. It has its own keys and values of each pair. ``models.prediction_layer`` reads it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.kvcache.cache import KVCache
from specdec.kvcache.mask import Mask
from specdec.models import prediction_layer
from specdec.runtimes.target import Pass, Target
from specdec.runtimes.torch.linear import for_drafting
from specdec.runtimes.torch.static_cache import Lanes

from .pairs import PairDrafter

_heads: WeakKeyDictionary[Target, MTPHead] = WeakKeyDictionary()  # drafters of a target share its layer


@dataclass
class MTPHead:
    """A prediction layer: norms of a token and of the state before it, a projection of both, a decoder layer, a norm.

    A *pair* is a token and the state of the token before it (``drafters.pairs``).

    draft_target: the layer as a model of one layer, with its own norm and the model's output head.
    projection: linear layer from the embedding and the state, concatenated [.., 2 D], to the layer's input [.., D].
    token_norm, state_norm: norms of the embedding and of the state before the projection.
    final_norm: module that is applied to the model's states before the layer reads them.
    norm: module that is applied to the layer's output before a drafted token's next pass reads it.
    token_first: whether the embedding comes first in the projection's input.
    feeds_norm: whether drafted tokens read the layer's output after ``norm``; False: as it is.
    """

    draft_target: Target
    projection: Callable[[Tensor], Tensor]
    token_norm: nn.Module
    state_norm: nn.Module
    final_norm: nn.Module
    norm: nn.Module
    token_first: bool = True
    feeds_norm: bool = True

    def inputs(self, embedded: Tensor, states: Tensor) -> Tensor:
        """Return the layer's input [B, T, D] for T pairs of each row.

        embedded: the embeddings of the pairs' tokens. states: the states of the tokens before them. Both are [B, T, D].
        """
        pair = self.token_norm(embedded), self.state_norm(states)
        x: Tensor = self.projection(torch.cat(pair if self.token_first else pair[::-1], -1))
        return x


class MTPDrafter(PairDrafter):
    """Drafts a chain with the multi-token prediction layer of the model's own checkpoint.

    That is a decoder layer, trained with the model, which predicts the token after the next one from the model's final
    state and the next token's embedding. head: that layer.
    """

    name: ClassVar[str] = "mtp"
    summary: ClassVar[str] = f"prediction layer inside the checkpoint of {prediction_layer.FAMILIES}; no training"
    shift = 1

    def __init__(self, head: MTPHead) -> None:
        self.head, self.cost_key = head, head.draft_target.fingerprint

    @classmethod
    def load(cls, target: Target, source: str | None = None, **kwargs: Any) -> MTPDrafter:
        """Load the layer from the checkpoint ``source``. Raises SpecDecError if there is none, or it does not fit.

        source: a model name, a folder or a companion file; None: the model's own files. kwargs: the drafter has no
            options, so any raises SpecDecError.
        """
        options.check_names(cls.name, kwargs)
        return cls(read_head(target, source))

    def bind(self, target: Target) -> None:
        own = self.head.draft_target
        if (own.hidden_size, own.vocab_size) != (target.hidden_size, target.vocab_size):
            raise SpecDecError("the multi-token prediction layer is of another model; its sizes differ")
        self.layers, self.inner = (target.num_layers,), target.hidden_size
        self.keys = None if own.keys is None else (1, *own.keys)
        super().bind(target)

    def new_cache(self) -> KVCache:
        return self.head.draft_target.new_cache() if self.static is None else super().new_cache()

    def inputs(self, states: Tensor) -> Tensor:
        made: Tensor = self.head.final_norm(states)
        return made

    def fed(self, outputs: Tensor) -> Tensor:
        return self.head.norm(outputs) if self.head.feeds_norm else outputs

    def logits(self, outputs: Tensor) -> Tensor:
        return self.head.draft_target.readout(outputs)

    def run(self, tokens: Tensor, states: Tensor, positions: Tensor, mask: Mask, cache: KVCache | Lanes) -> Tensor:
        x = self.head.inputs(self.target.embed(tokens, positions), states)
        return self.head.draft_target.layers(x, 0, 1, Pass(positions, mask, cache))  # type: ignore[arg-type]


def read_head(target: Target, source: str | None = None) -> MTPHead:
    """Load a multi-token prediction layer, and return it as a head.

    target: the model to draft for.
    source: the checkpoint that has the layer, a model's name or a file; None: the model's own, which is read once.
    Raises SpecDecError if the checkpoint has no such layer, or it does not fit the model.
    """
    if source is None and target in _heads:
        return _heads[target]
    model: Any = target.model
    if (found := prediction_layer.find(model, source)) is None:
        name = source or model.config._name_or_path
        raise SpecDecError(
            f"the checkpoint '{name}' has no multi-token prediction layer; those of {prediction_layer.FAMILIES} may "
            "have one"
        )
    final_norm = getattr(model.base_model, "norm", None)
    if final_norm is None:
        raise SpecDecError(
            f"drafter 'mtp' does not serve '{model.config.model_type}' models: their final norm is unknown"
        )
    layer = prediction_layer.read(model, found)

    def norm(weight: Tensor) -> nn.Module:
        made = copy.deepcopy(final_norm)
        made.weight = nn.Parameter(weight.to(final_norm.weight), requires_grad=False)
        return made

    own, names = target.beside(layer.model), layer.names
    after: Any = own.model.base_model
    reads = final_norm if names.reads_norm else nn.Identity()
    norms = norm(layer.token_norm), norm(layer.state_norm), reads, after.norm
    head = MTPHead(own, for_drafting(layer.projection), *norms, names.token_first, names.feeds_norm)
    _check_finite(head, target, found.name)
    if source is None:
        _heads[target] = head
    return head


@torch.inference_mode()
def _check_finite(head: MTPHead, target: Target, name: str) -> None:
    """Raise SpecDecError if the layer ``head`` gives infinite values or NaN for two tokens.

    name: the name of its checkpoint, for the error.
    """
    places = torch.arange(2, device=target.device)[None]
    embedded, cache = target.embed(places + target.vocab_size // 2, places), head.draft_target.new_cache()
    x = head.inputs(embedded, head.final_norm(embedded))
    made = head.norm(head.draft_target.layers(x, 0, 1, Pass(places, cache.register(0, places), cache)))
    if not bool(made.isfinite().all()):
        raise SpecDecError(
            f"the multi-token prediction layer of '{name}' is broken: its results are infinite or NaN; get it again"
        )
