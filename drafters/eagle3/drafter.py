"""The drafter that grows a chain, or a tree, with the head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.base import options
from specdec.base.devices import is_asynchronous, upload
from specdec.kvcache.cache import KVCache
from specdec.kvcache.mask import Mask
from specdec.models import drafter_folder, hub
from specdec.models.names import display_name
from specdec.runtimes.draft_path import WIDTH, DeviceChoice, DeviceTree, TreeLimits
from specdec.runtimes.target import Target
from specdec.runtimes.torch.draft import Rules, given_of, grow, states_of, taken
from specdec.speculation.candidates import Candidates
from specdec.speculation.device_draft import DeviceDraft, choice_of
from specdec.speculation.draft import Draft
from specdec.speculation.state import State
from specdec.speculation.tree_builder import draft_best

from ..pairs import PairDrafter
from .network import KIND, Eagle3, Eagle3Config, read_network


class Eagle3Drafter(PairDrafter):
    """Drafts with an EAGLE-3 head: a tree grown level by level if one greedy row decodes, else a chain for each row.

    nodes: number of nodes of a tree; None: as many nodes as are worth their cost (``Prices``), or a chain if costs are
        not known.
    width: number of nodes of each level that get children.
    """

    name: ClassVar[str] = KIND
    summary: ClassVar[str] = "public EAGLE-3 head (speculators) on the states of three layers"
    needs_training: ClassVar[bool] = True
    shift = 0

    def __init__(self, network: Eagle3, width: int = WIDTH, nodes: int | None = None) -> None:
        self.nodes = None if nodes is None else options.check_int("nodes", nodes, 1)
        self.cost_key = str(network.config)
        self.network, self.width = network, options.check_int("width", width, 1)

    @classmethod
    def load(cls, target: Target, source: str | None = None, **kwargs: Any) -> Eagle3Drafter:
        """Load a head in the speculators format.

        Raises SpecDecError if there is no such head, or it does not fit the target.
        source: a folder, or a Hugging Face repository ORG/NAME[@revision]; None raises, since no head is shipped.
        kwargs: ``nodes`` and ``width``.
        """
        options.check_names(cls.name, kwargs, ("nodes", "width"))
        if source is None:
            raise drafter_folder.not_shipped(cls.name, cls.training, target.model.config._name_or_path)
        folder = Path(source) if Path(source).is_dir() else hub.fetch_drafter(source)
        where, config = display_name(folder), drafter_folder.read_config(folder, KIND)
        if "base" in config:  # ours; others do not say which weights a head is for
            drafter_folder.check_base(config, target, where)
        return cls(read_network(folder, Eagle3Config.read(config, target, where), target, where), **kwargs)

    def bind(self, target: Target) -> None:
        network, config = self.network, self.network.config
        network.freeze(target)
        self.device, self.layers = target.device, config.layers
        few = config.vocab < target.vocab_size
        first = torch.arange(config.vocab, device=target.device) if few else None
        self.tokens = network.tokens if network.d2t is not None else first
        super().bind(target)

    def new_cache(self) -> KVCache:
        return KVCache(1, 1, self.device)

    def candidates(
        self,
        state: State,
        limit: int,
        given: Sequence[Candidates] | None = None,
        choice: DeviceChoice | None = None,
    ) -> list[Candidates] | DeviceTree | None:
        if not self._drafts_tree(state):
            return None
        return self._tree(state, self.catch_up(state), limit, self.width, choice, None if choice is None else given)

    def propose(self, state: State, limit: int) -> Draft:
        if not self._drafts_tree(state):
            return super().propose(state, limit)
        cache = self.catch_up(state)
        if self.traits.has_probabilities and state.prices is not None and not state.prices.levels():
            return draft_best([Candidates.none()], limit, self.nodes, state)
        width = self.width if self.nodes or state.prices else 1
        choice = choice_of(state, limit, self.nodes, width)
        found = self._tree(state, cache, limit, width, choice)
        if isinstance(found, DeviceTree):
            return DeviceDraft(found, state, limit, chain=width == 1)
        return draft_best(found, limit, self.nodes, state, found[0].levels())

    def _drafts_tree(self, state: State) -> bool:
        """Return whether to draft a tree: one greedy row decodes, and ``nodes`` is set or the host may wait."""
        verified = state.threshold is None and state.sampler.best_allowed and len(state.ids) == 1
        worth = bool(self.nodes) or not is_asynchronous(state.cache.device)
        return verified and worth

    def _tree(
        self,
        state: State,
        cache: KVCache,
        limit: int,
        width: int,
        choice: DeviceChoice | None,
        given: Sequence[Candidates] | None = None,
    ) -> list[Candidates] | DeviceTree:
        [row] = state.row_states
        features, level, position, device = row.last, 0, len(state.ids[0]) - 1, state.cache.device

        def step(tokens: Tensor, parents: Tensor, paths: Tensor | None) -> Tensor:
            nonlocal features, level
            if level:
                positions = torch.full_like(tokens, position + level)
                tree = None if paths is None else paths[..., 1:]
                embedded, mask = self.embed(state.target, tokens, positions), cache.register(0, positions, tree)
                features = self.run(embedded, states_of(features, parents), positions, mask, cache)
            level += 1
            return self.network.logits(features)

        prices = state.prices
        limits = TreeLimits(limit, width) if prices is None else prices.limits(limit, width)
        tables = upload(prices.tables, device, torch.float32) if prices and prices.tables else None
        masks = None if choice is not None else state.masks(0)
        rules = Rules(self.tokens, tables, given=given_of(given, device), masks=masks)
        waits = choice is None and not is_asynchronous(device)
        found = taken(grow(step, state.roots, limits, rules, waits=waits), choice)
        return found if isinstance(found, DeviceTree) else [Candidates(*nodes) for nodes in found]

    def inputs(self, states: Tensor) -> Tensor:
        return self.network.fuse(states)

    def logits(self, outputs: Tensor) -> Tensor:
        return self.network.logits(outputs)

    def embed(self, target: Target, tokens: Tensor, positions: Tensor) -> Tensor:
        own = self.network.embed_tokens
        embedded: Tensor = super().embed(target, tokens, positions) if own is None else own(tokens)
        return embedded

    def run(self, embedded: Tensor, states: Tensor, positions: Tensor, mask: Mask, cache: KVCache) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.append(0, k, v)
            return F.scaled_dot_product_attention(q, keys, values, mask.bool_mask(), enable_gqa=True)

        return self.network.layer(embedded, states, positions, attend)
