"""EAGLE-3 (arXiv 2503.01840): one decoder layer over the states of three layers drafts a chain, or a tree of tokens.

The head runs pairs: a token's embedding, and the features of the token before it, which are made of the tapped layers'
states, or for a drafted token the head's own output. It has its own keys and values of each pair. Heads in the
``speculators`` format are read as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.base import options
from specdec.base.devices import is_asynchronous, upload
from specdec.base.errors import SpecDecError
from specdec.models import drafter_folder, hub
from specdec.runtimes.target import Target
from specdec.runtimes.tree_drafting import WIDTH, Candidates, TreeLimits, by_levels
from specdec.speculation.draft import Draft, State
from specdec.speculation.tree_builder import draft_best

from .chain import SHAPE, ChainDrafter, ChainRow, Readout, ShapeOptions, pair_chunks
from .eagle3_network import KIND, Eagle3, Eagle3Config, read_network

BLOCK = 256  # slots that a row's keys grow by


class Eagle3Row(ChainRow):
    """The state of a row.

    states: tapped states of the tokens whose pairs have not been run, parts [n, 3 D].
    count: number of pairs that have been run.
    keys, values: keys and values of these pairs, [1, H', slots, d].
    last: the head's output at the root's pair, [1, 1, D'].
    """

    def __init__(self) -> None:
        super().__init__()
        self.states: list[Tensor] = []
        self.count = 0
        self.keys = self.values = self.last = torch.empty(0)

    def put(self, at: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values [1, H', T, d] from slot ``at`` on; return all up to their end."""
        end = at + k.shape[2]
        if self.keys.dim() < 4 or end > self.keys.shape[2]:
            slots = max(-(-end // BLOCK) * BLOCK, 2 * self.keys.shape[2] if self.keys.dim() == 4 else 0)
            keys, values = (part.new_empty(1, part.shape[1], slots, part.shape[3]) for part in (k, v))
            if at:
                keys[:, :, :at], values[:, :, :at] = self.keys[:, :, :at], self.values[:, :, :at]
            self.keys, self.values = keys, values
        self.keys[:, :, at:end], self.values[:, :, at:end] = k, v
        return self.keys[:, :, :end], self.values[:, :, :end]


class Eagle3Drafter(ChainDrafter):
    """Drafts with an EAGLE-3 head: a chain with siblings that cost no drafting, or a tree grown level by level.

    A tree is grown for one greedy row. It has ``nodes`` nodes, else those that are worth their price (``Prices``; a
    chain if there are no prices). Raises SpecDecError if the head does not fit the target.

    siblings, nodes: see ``ChainShape``; with siblings, the draft is a chain.
    width: number of nodes of a level that get children.
    """

    name: ClassVar[str] = KIND
    summary: ClassVar[str] = "public EAGLE-3 head (speculators) on the states of three layers"
    needs_training: ClassVar[bool] = True
    whole_prompts = True

    def __init__(self, network: Eagle3, width: int = WIDTH, **shape: Unpack[ShapeOptions]) -> None:
        super().__init__(**shape)
        self.network, self.width = network, options.check_int("width", width, 1)
        self.path = str(network.config)

    @classmethod
    def load(cls, target: Target, source: str | None = None, **kwargs: Any) -> Eagle3Drafter:
        """From a folder, or a Hugging Face repository, in the speculators format."""
        options.check_names(cls.name, kwargs, (*SHAPE, "width"))
        if source is None:
            raise cls.not_shipped(target.model.config._name_or_path)
        folder = Path(source) if Path(source).is_dir() else hub.fetch_drafter(source)
        where, config = drafter_folder.display_name(folder), drafter_folder.read_config(folder, KIND)
        if "base" in config:  # ours; others do not say which weights a head is for
            drafter_folder.check_base(config, target, where)
        return cls(read_network(folder, Eagle3Config.read(config, target, where), target, where), **kwargs)

    @classmethod
    def not_shipped(cls, model: str) -> SpecDecError:
        return SpecDecError(f"no {cls.name} drafter is shipped; give a head with --drafter {cls.name}=DIR or =ORG/NAME")

    def bind(self, target: Target) -> None:
        network, config = self.network, self.network.config
        network.freeze(target)
        self.taps = tuple(sorted(set(config.layers)))
        few = config.vocab < target.vocab_size
        first = torch.arange(config.vocab, device=target.device) if few else None
        self.tokens = network.tokens if network.d2t is not None else first
        self.has_probabilities = self.shape.siblings is None and not is_asynchronous(target.device)
        self.start()

    def begin(self) -> Eagle3Row:
        return Eagle3Row()

    def observe(self, row_states: list[Any], paths: list[list[int]], taps: dict[int, Tensor]) -> None:
        for b, (row, path) in enumerate(zip(row_states, paths, strict=True)):
            if path:
                states = [taps[layer][b] for layer in self.network.config.layers]
                places = upload([path], states[0].device)[0]
                row.states.append(torch.cat([part[places] for part in states], -1))

    def candidates(
        self, state: State, limit: int, given: Sequence[Candidates] | None = None
    ) -> list[Candidates] | None:
        self._catch_up(state)
        return [self._tree(state, limit, self.width)] if self._drafts_tree(state) else None

    def propose(self, state: State, limit: int) -> Draft:
        self._catch_up(state)
        if self._drafts_tree(state):
            if self.has_probabilities and state.prices is not None and not state.prices.levels():
                return draft_best([Candidates.none()], limit, self.shape.nodes, state)
            found = self._tree(state, limit, self.width if self.shape.nodes or state.prices else 1)
            return draft_best([found], limit, self.shape.nodes, state, found.levels())
        rows: list[Eagle3Row] = state.row_states
        features, drafted = torch.cat([row.last for row in rows]), -1  # (B, 1, D'); number of drafted tokens

        def step(token: Tensor, positions: Tensor) -> Readout:
            nonlocal features, drafted
            drafted += 1
            if drafted:
                features = self._run(state, token, features, positions, [row.count + drafted - 1 for row in rows])
            return Readout(self.network.logits(features)[:, 0])

        return self.chain(state, limit, step, self.tokens)

    def _drafts_tree(self, state: State) -> bool:
        """Whether to grow a tree, for one greedy row. It is read before it is scored."""
        verified = state.threshold is None and state.sampler.best_allowed and len(state.ids) == 1
        worth = bool(self.shape.nodes) or not is_asynchronous(state.cache.device)
        return verified and worth and self.shape.siblings is None

    def _tree(self, state: State, limit: int, width: int) -> Candidates:
        [row] = state.row_states
        features, level, position = row.last, 0, len(state.ids[0]) - 1

        def step(tokens: Tensor, parents: Tensor, paths: Tensor) -> Tensor:
            nonlocal features, level
            if level:
                positions, before = torch.full_like(tokens, position + level), paths.shape[1] - 1 - tokens.shape[1]
                seen = paths.new_ones(len(paths), row.count)  # (W, count): every path has the whole text
                mask = torch.cat((seen, paths[:, 1:]), 1)
                features = self._run(state, tokens, features[:, parents], positions, [row.count + before], mask)
            level += 1
            return self.network.logits(features)[0]

        prices = state.prices
        limits = TreeLimits(limit, width) if prices is None else prices.limits(limit, width)
        table = prices.tables[0][0] if prices and prices.tables else None
        return by_levels(state.ids[0][-1], self.tokens, limits, state.cache.device, step, state.masks(0), table)

    def _catch_up(self, state: State) -> None:
        """Run the pairs of the new tokens of all rows, up to their roots."""
        rows: list[Eagle3Row] = state.row_states
        target, device, tapped = state.target, state.cache.device, len(self.network.config.layers)
        nothing = torch.empty(0, tapped * target.hidden_size, dtype=target.dtype, device=device)
        new = [torch.cat(row.states).to(device) if row.states else nothing for row in rows]  # (n, 3 D) each
        for states, counts, tokens, positions in pair_chunks(state, new, shift=0):
            features = self.network.fuse(states.chunk(tapped, -1))  # (B, T, D')
            out = self._run(state, tokens, features, positions, [row.count for row in rows], counts=counts)
            for b, (row, count) in enumerate(zip(rows, counts, strict=True)):
                if count:
                    row.count, row.last = row.count + count, out[b : b + 1, count - 1 : count].clone()
        for row in rows:
            row.states = []

    def _run(
        self,
        state: State,
        tokens: Tensor,
        features: Tensor,
        positions: Tensor,
        slots: Sequence[int],
        mask: Tensor | None = None,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Run pairs [B, T] through the head; return its outputs [B, T, D'].

        slots: each row's first slot for the new keys.
        mask: the slots that each pair sees, bool [T, S], for one row.
        counts: number of each row's pairs; they see all earlier ones.
        """
        rows, network = state.row_states, self.network

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = torch.zeros_like(q)
            for b, (row, slot) in enumerate(zip(rows, slots, strict=True)):
                count = q.shape[2] if counts is None else counts[b]
                if not count:
                    continue
                keys, values = row.put(slot, k[b : b + 1, :, :count], v[b : b + 1, :, :count])
                seen = mask
                if counts is not None and count > 1:
                    seen = torch.ones(count, keys.shape[2], dtype=torch.bool, device=q.device).tril(slot)
                own = q[b : b + 1, :, :count]
                out[b, :, :count] = F.scaled_dot_product_attention(own, keys, values, seen, enable_gqa=True)[0]
            return out

        embedding = network.value("embed_tokens.weight")
        embedded = state.target.embed(tokens, positions) if embedding is None else F.embedding(tokens, embedding)
        return network.layer(embedded, features, positions, attend)
