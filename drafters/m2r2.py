"""M2R2: the model drafts for itself through an accelerated residual (arXiv 2502.02040).

A second residual p runs beside the slow residual h through the first E layers, helped by low-rank adapters and
attending to h's exact keys and values. Then, optionally, one matrix projects it, with the previous token's deep states
(the carry), to the input of a later segment of the model's own layers, and a last one projects it onto the final state
h[N]. Its readout is the draft. h[E] and everything cached below E are exact and kept, so scoring resumes at E.

There may be several exits, each with a rate of its own (the mixture): a token leaves at the first whose router (ARLA)
is sure enough of it.

The published abstract describes early layers with adapters and shared KV (here: a path without segments and
projections). The projections, the carry and the fit by ridge regression are our own extension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from specdec.base import options
from specdec.base.devices import upload, waits
from specdec.runtimes.target import Target
from specdec.runtimes.tree_drafting import WIDTH, Bounds, DraftPath, Seed
from specdec.speculation.draft import Draft, State

from . import trained
from .chain import SHAPE, ChainDrafter, best_probability, first_sure
from .m2r2_network import M2R2, Carry, load_network
from .m2r2_pass import PathPass
from .m2r2_path import M2R2Path
from .tree import likeliest
from .vocabulary import DraftVocabulary

__all__ = ["M2R2", "M2R2Drafter", "M2R2Path", "PaperM2R2Drafter", "load_network"]


class M2R2Drafter(ChainDrafter):
    """Drafts with a trained M2R2: a chain with siblings that cost no drafting, or a tree that is grown level by level.

    A tree is grown where the whole path is one exit that shares no layer with scoring, for one greedy row; it has
    ``nodes`` nodes, else those that scoring has room for (a chain if it has none), and ``width`` nodes of a level are
    drafted on from.
    siblings, nodes: see ``Shape``; siblings that are given make a chain.
    exit_confidence: how sure, in [0, 1], a token must be to leave before the last exit; where drafts are not verified,
        the verifier's threshold takes its place. Which exit is the last, is for the controller to choose.
    Raises SpecDecError if no trained drafter fits the target.
    """

    name: ClassVar[str] = "m2r2"
    summary: ClassVar[str] = "accelerated residual of the model itself; trained, shipped for the default model"
    training: ClassVar[str] = "specdec train m2r2"
    leaves_early = True

    def __init__(
        self,
        network: M2R2,
        siblings: Sequence[int] | None = None,
        nodes: int | None = None,
        width: int = WIDTH,
        exit_confidence: float = 0.5,
    ) -> None:
        super().__init__(siblings, nodes)
        self.network = network
        path = network.path
        self.path, self.num_exits = str(path), len(path.reach)
        self.leaves_state = path.exit_layer > 0 and not path.segments
        if network.projections:  # else nothing reads a carry
            self.taps = (*(lo for lo, _ in path.segments), network.num_layers)
        self.width = options.whole("width", width, 1)
        self.bar = options.probability("exit_confidence", exit_confidence)
        # The states of the last block's tokens, and which token the carry is of: to slice them costs more between two
        # passes than to point at them. Of several rows, that token's alone.
        self.block: Carry | None = None
        self.place = 0

    @classmethod
    def load(cls, target: Target, source: str | None = None, **given: Any) -> M2R2Drafter:
        """From a drafter folder, or (``source`` None) the one shipped for the target's weights."""
        options.check(cls.name, given, (*SHAPE, "width", "exit_confidence"))
        return cls(load_network(target, trained.find(cls, target, source)), **given)

    def bind(self, target: Target) -> None:
        self.network.freeze(target)
        self.vocabulary = DraftVocabulary(target, self.network.draft_vocab)
        self.route: DraftPath | None = None  # the draft path, for trees
        self.start(1)

    def start(self, batch: int) -> None:
        super().start(batch)
        self.block, self.place = None if self.taps else Carry(torch.empty(0), []), 0
        self.vocabulary.start()

    def propose(self, state: State, limit: int) -> Draft:
        assert self.block is not None, "observe() runs before propose()"
        self.vocabulary.follow(state)
        if self._grows(state):
            return self._tree(state, limit, self.block)
        network, path, vocabulary = self.network, self.network.path, self.vocabulary
        tokens = PathPass(network, state.target, state.cache, self._carry(self.block))
        bar = self.bar if state.threshold is None else state.threshold
        decides = network.routers is not None or len(path.reach) > 1
        last = self.num_exits if state.exit is None else state.exit + 1
        certainty, layers = torch.empty(0), list[Tensor]()

        def read(exit: int) -> tuple[Tensor, ...]:
            final, passed = tokens.to(exit)
            logits = vocabulary.logits(final)[:, 0]
            sure = logits[:, :1]  # not used
            if network.routers is not None:
                sure = network.routers[exit](passed, logits[:, None]).sigmoid()
            elif decides:
                sure = best_probability(logits)
            return sure, logits, final, torch.full_like(sure, path.layers_run(exit), dtype=torch.long)

        def step(token: Tensor, positions: Tensor) -> Tensor:
            nonlocal certainty
            tokens.push(token, positions)
            certainty, logits, tokens.tokens[-1].own.final, run = first_sure(read, last, bar)
            layers.append(run)
            return logits

        routed = (lambda logits: certainty) if decides else None
        draft = self.chain(state, limit, step, vocabulary.tokens, routed)
        draft.states, draft.exit_layer = tokens.finish()
        if state.threshold is not None:
            draft.layers = torch.cat(layers, 1)[:, : draft.tokens.shape[1]]
        return draft

    def _grows(self, state: State) -> bool:
        """Whether a draft grows level by level: it has to pay in scoring alone, and to be one greedy row's."""
        path = self.network.path
        verified = state.threshold is None and state.sampler.plain_greedy and state.cache.batch == 1
        worth = bool(self.shape.nodes) or not waits(state.cache.device)  # what has grown is read before it is scored
        return verified and worth and self.shape.siblings is None and not path.exit_layer and not path.exits

    def _carry(self, block: Carry) -> Carry:
        """Of the token before each root."""
        if not self.taps or block.final.shape[1] == 1:
            return block
        final, *inputs = (x.narrow(1, self.place, 1) for x in (block.final, *block.inputs))
        return Carry(final, inputs)

    def _tree(self, state: State, limit: int, block: Carry) -> Draft:
        network, vocabulary, route = self.network, self.vocabulary, self.route
        if route is None or route.tokens is not vocabulary.tokens:  # the vocabulary has grown
            heads, tokens = vocabulary.heads, vocabulary.tokens
            route = self.route = DraftPath(network.frozen, network.path.segments, network.adapters, heads, tokens)
        seed = Seed(state.ids[0][-1], state.cache.rows[0], block.final, block.inputs, self.place)
        width = self.width if self.shape.nodes or state.extra_nodes else 1
        found = state.target.grow(state.cache, seed, route, Bounds(limit, width, state.confidence))
        return likeliest(found, self.shape.nodes or limit + state.extra_nodes, state.cache.device)

    def observe(self, paths: list[list[int]], taps: dict[int, Tensor]) -> None:
        super().observe(paths, taps)
        if not self.taps:
            return
        if len(paths) == 1 and paths[0]:
            self.block, self.place = Carry(taps[self.taps[-1]], [taps[layer] for layer in self.taps[:-1]]), paths[0][-1]
            return
        last = upload([[path[-1]] if path else [0] for path in paths], taps[self.taps[-1]].device)
        alive = upload([bool(path) for path in paths], last.device, torch.bool)[:, None, None]

        def at_last(layer: int, old: Tensor | None) -> Tensor:
            x = taps[layer].gather(1, last[:, :, None].expand(-1, -1, taps[layer].shape[2]))  # (B, 1, D)
            return x if old is None else torch.where(alive, x, old)

        old = None if self.block is None else self._carry(self.block)
        final = at_last(self.taps[-1], old.final if old else None)
        inputs = [at_last(lo, old.inputs[s] if old else None) for s, (lo, _) in enumerate(self.network.path.segments)]
        self.block, self.place = Carry(final, inputs), 0

    def select(self, rows: list[int]) -> None:
        if self.taps and self.block is not None:
            carry = self._carry(self.block)
            self.block, self.place = Carry(carry.final[rows], [x[rows] for x in carry.inputs]), 0


class PaperM2R2Drafter(M2R2Drafter):
    """The published form: early layers with adapters on shared keys and values, no projection; scoring resumes at E."""

    name: ClassVar[str] = "m2r2-paper"
    summary: ClassVar[str] = "M2R2 as published: accelerated early layers, scoring resumes from them; shipped likewise"
    training: ClassVar[str] = "specdec train m2r2 --preset m2r2-paper"
