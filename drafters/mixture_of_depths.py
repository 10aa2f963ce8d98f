"""Mixture of depths: a router at each layer lets a token run it or pass it by (Raposo et al. 2024, arXiv 2404.02258).

The routers are trained, by distillation, on a frozen base, to a capacity: the share of the routed layers that a token
runs. The first layers are run always; they are exact, and scoring resumes behind them. A token that passes a layer by
leaves keys and values there as soon as a later token of the draft runs it. The paper picks the top tokens of a
sequence for each layer; that looks ahead, so here a token runs a layer where its router's score is positive.
"""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specdec.base import options
from specdec.models import drafter_folder
from specdec.runtimes.layer_pass import Pass
from specdec.runtimes.linear_maps import rms_unit
from specdec.runtimes.target import Target
from specdec.speculation.draft import Draft, State

from . import trained
from .chain import SHAPE, ChainDrafter, Readout, ShapeOptions
from .vocabulary import DraftVocabulary


class Routers(nn.Module):
    """One linear score of the residual for each layer from ``first`` on; a token runs the layer where it is positive.

    first: layers below are always run, 1 <= first < N. draft_vocab: int32 [V'], or None for the full vocabulary.
    """

    def __init__(self, first: int, target: Target, draft_vocab: Tensor | None = None) -> None:
        super().__init__()
        self.first = options.whole("first", first, 1, target.num_layers - 1)
        count = target.num_layers - first
        self.weight = nn.Parameter(torch.zeros(count, target.hidden_size))
        self.bias = nn.Parameter(torch.ones(count))  # untrained, every layer is run
        self.register_buffer("draft_vocab", draft_vocab)
        self.draft_vocab: Tensor | None

    def score(self, layer: int, x: Tensor) -> Tensor:
        """Of the residual x [B, T, D] before ``layer`` -> [B, T, 1]."""
        return F.linear(rms_unit(x), self.weight[layer - self.first, None], self.bias[layer - self.first, None])


class MixtureOfDepthsDrafter(ChainDrafter):
    """Drafts a chain through the layers that trained routers choose for each token; a batch runs what any row needs.

    siblings, nodes: see ``Shape``.
    """

    name: ClassVar[str] = "mixture-of-depths"
    summary: ClassVar[str] = "the layers that a trained router chooses for each token"
    training: ClassVar[str] = "specdec train mixture-of-depths"
    needs_training: ClassVar[bool] = True
    leaves_early = True

    vocabulary: DraftVocabulary

    def __init__(self, routers: Routers, **shape: Unpack[ShapeOptions]) -> None:
        super().__init__(**shape)
        self.routers = routers

    @classmethod
    def load(cls, target: Target, source: str | None = None, **given: Any) -> MixtureOfDepthsDrafter:
        """From a drafter folder, or the one shipped for the target. Raises SpecDecError if there is none."""
        options.check(cls.name, given, SHAPE)
        folder = trained.find(cls, target, source)
        first = trained.read_config(folder, cls.name, target).get("first", 0)
        routers = drafter_folder.load(folder, target.vocab_size, lambda vocab: Routers(first, target, vocab))
        return cls(routers, **given)

    def bind(self, target: Target) -> None:
        self.routers.to(target.device, target.dtype).requires_grad_(False).eval()
        self.path = f"{self.routers.first} {float(self.routers.weight.sum())}"
        self.vocabulary = DraftVocabulary(target, self.routers.draft_vocab)

    def propose(self, state: State, limit: int) -> Draft:
        target, cache, routers, first = state.target, state.cache, self.routers, self.routers.first
        states: list[Tensor] = []
        routed = range(first, target.num_layers)
        waiting: dict[int, list[Tensor]] = {layer: [] for layer in routed}  # inputs of tokens that passed it by

        def step(token: Tensor, positions: Tensor) -> Readout:
            given = Pass(positions, cache.mask(0, positions), cache)
            x = target.layers(target.embed(token, positions), 0, first, given)
            states.append(x)
            run = first
            for layer in routed:
                waiting[layer].append(x)
                if bool((routers.score(layer, x) > 0).any()):
                    block = torch.cat(waiting[layer], 1)  # (B, n, D)
                    own = positions + torch.arange(1 - block.shape[1], 1, device=positions.device)
                    x = target.layers(block, layer, layer + 1, Pass(own, cache.mask(layer, own), cache))[:, -1:]
                    waiting[layer].clear()
                    run += 1
            return Readout(self.vocabulary.logits(x)[:, 0], layers=torch.full_like(token, run))

        draft = self.chain(state, limit, step)
        for layer in routed:
            cache.trim(len(states) - len(waiting[layer]), layer, layer + 1)  # provisional
        draft.states, draft.exit_layer = torch.cat(states, 1), first
        return draft
