"""M2R2: the model drafts for itself through an accelerated residual (arXiv 2502.02040).

A second residual p runs beside the slow residual h through the first E layers, helped by low-rank adapters and
attending to h's exact keys and values. Then, optionally, one matrix projects it, with the previous token's deep states
(the carry), to the input of a later segment of the model's own layers, and a last one projects it onto the final state
h[N]. Its readout is the draft. h[E] and everything cached below E are exact, so scoring resumes at E.

There may be several exits, each with a rate of its own (the mixture): a token leaves at the first exit whose router
(ARLA) is confident enough.

The published abstract describes early layers with adapters and shared KV (here: a path without segments and
projections). The projections, the carry and the fit by ridge regression are our own extension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from specdec.base import options
from specdec.base.devices import is_asynchronous
from specdec.base.errors import SpecDecError
from specdec.models import drafter_folder
from specdec.runtimes.draft_path import WIDTH, DraftPath, DraftRoots, TreeLimits
from specdec.runtimes.target import Target
from specdec.speculation import tree_drafting
from specdec.speculation.candidates import Candidates
from specdec.speculation.draft import Draft, State
from specdec.speculation.tree_builder import draft_best

from ..chain import ChainDrafter, ChainRow, Readout, best_probability, first_confident
from ..vocabulary import DraftVocabulary
from .learning import Learner, why_not
from .network import M2R2, Carry, load_network
from .path_pass import PathPass


class M2R2Row(ChainRow):
    """A row's states before its root. Indices cost less between two passes than slices.

    block: tapped states [B, T, D] of the last block with the row.
    number, place: the row's index in it, and the index of the token before its root.
    """

    def __init__(self) -> None:
        super().__init__()
        self.block: list[Tensor] = []
        self.number = self.place = 0


class M2R2Drafter(ChainDrafter):
    """Drafts with an M2R2: a chain, or a tree that is grown level by level.

    Where none is trained for the model, it teaches itself (``Learner``), and drafts nothing until its first fit serves.
    A tree is grown for one greedy row if the path has one exit and shares no layer with scoring. It has ``nodes``
    nodes, else those that are worth their price (``Prices``; a chain if there are no prices). Raises SpecDecError if no
    trained drafter fits the target and none can teach itself.

    nodes: number of nodes of a tree; None: as many as are worth their price.
    width: number of nodes of a level that get children.
    exit_confidence: minimum probability, in [0, 1], with which a token leaves before the last exit (``State.exit``);
        where drafts are not verified, the verifier's threshold takes its place.
    """

    name: ClassVar[str] = "m2r2"
    summary: ClassVar[str] = "accelerated residual of the model itself; shipped, trained, or teaches itself"
    training: ClassVar[str] = "specdec train m2r2"
    needs_training: ClassVar[bool] = False
    teaches_itself: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ("nodes", "width", "exit_confidence")
    leaves_early = True

    vocabulary: DraftVocabulary

    def __init__(
        self,
        network: M2R2,
        width: int = WIDTH,
        exit_confidence: float = 0.5,
        learner: Learner | None = None,
        nodes: int | None = None,
    ) -> None:
        self.nodes = None if nodes is None else options.check_int("nodes", nodes, 1)
        self.network, self.learner = network, learner
        self.learns = learner is not None
        self.served = None if learner is None else learner.fits
        path = network.path
        self.path, self.num_exits = str(path), len(path.stages_to_exit)
        if network.projections:  # else nothing reads a carry
            self.taps = (*(lo for lo, _ in path.segments), network.num_layers)
        self.width = options.check_int("width", width, 1)
        self.exit_confidence = options.check_probability("exit_confidence", exit_confidence)

    @classmethod
    def load(cls, target: Target, source: str | None = None, **kwargs: Any) -> M2R2Drafter:
        """From a drafter folder, or (``source`` None) the one shipped for the target's weights, or none yet."""
        options.check_names(cls.name, kwargs, cls.options)
        if source is None and cls.teaches_itself and drafter_folder.find_shipped(cls.name, target) is None:
            if (why := why_not(target)) is not None:
                raise SpecDecError(
                    f"{cls.not_shipped(target.model.config._name_or_path)}; it cannot teach itself: {why}"
                )
            learner = Learner(target)
            return cls(learner.fits.network, learner=learner, **kwargs)
        return cls(load_network(target, cls.find(target, source)), **kwargs)

    def bind(self, target: Target) -> None:
        if self.learner is None:
            self.network.freeze(target)
            self.network.adapters.lasting = True
        head = None if self.served is None else self.served.head
        self.vocabulary = DraftVocabulary(target, self.network.draft_vocab, head)
        self.draft_path: DraftPath | None = None
        layers, narrow = target.num_layers, 0.4 if self.network.path.neurons else 1.0
        runs = [self.network.path.num_layers_run(exit) for exit in range(self.num_exits)]
        self.level_share = tuple((1 + narrow * run) / (1 + layers) for run in runs)
        self.has_probabilities = self.num_exits == 1 and not is_asynchronous(target.device)
        self.start()

    def begin(self) -> M2R2Row:
        return M2R2Row()

    @property
    def version(self) -> int:  # type: ignore[override]
        return 0 if self.served is None else self.served.version

    def end(self, row_state: M2R2Row, ids: list[int], start: int, learn: bool = True) -> None:
        if self.learner is not None and learn:
            self.learner.add(ids, start)

    def claim(self) -> None:
        if self.learner is not None:
            self.learner.fits.claim()

    def learn(self) -> bool:
        if self.learner is None or self.served is None or not self.learner.work():
            return False
        if self.network is not self.served.network and self.version:
            old, self.network, self.draft_path = self.network.draft_vocab, self.served.network, None
            if self.network.draft_vocab is not old:
                self.vocabulary = DraftVocabulary(self.served.target, self.network.draft_vocab, self.served.head)
        return True

    def save(self) -> None:
        if self.learner is not None:
            self.learner.save()

    def _knows_nothing(self) -> bool:
        """Whether no fit serves yet."""
        return self.learner is not None and not self.version

    def candidates(
        self, state: State, limit: int, given: Sequence[Candidates] | None = None
    ) -> list[Candidates] | None:
        if self._knows_nothing():
            return [Candidates.none() for _ in state.ids]
        if not self._drafts_by_levels(state):
            return None
        width = self.width if self.nodes or state.prices or given is not None else 1
        path, cache, rows, place = self._draft_path(state), state.cache, state.row_states, 0
        tokens, sampled = [ids[-1] for ids in state.ids], state.sampler.sampled(state.ids)
        if len(rows) > 1 and not self.nodes:
            width = 1  # siblings of several rows do not pay
        prices, masks = state.prices, None
        limits = TreeLimits(limit, width) if prices is None else prices.limits(limit, width)
        tables = prices.tables if prices and prices.tables else None
        if len(rows) == 1:
            place, masks = rows[0].place, state.masks(0)
            *inputs, final = (x if len(x) == 1 else x[rows[0].number :][:1] for x in rows[0].block)
        else:
            *inputs, final = self._states_before(rows)
        forbidden = self.vocabulary.forbidden
        roots = DraftRoots(tokens, cache.rows, final, inputs, place, forbidden, sampled, tables, given)
        return tree_drafting.along(state.target, cache, roots, path, limits, masks)

    def propose(self, state: State, limit: int) -> Draft:
        if self._knows_nothing():
            return Draft.empty(len(state.ids), state.cache.device)
        by_levels = self.has_probabilities and self._drafts_by_levels(state)
        if by_levels and state.prices is not None and not state.prices.levels():
            return draft_best([Candidates.none() for _ in state.ids], limit, self.nodes, state)
        if (found := self.candidates(state, limit)) is not None:
            return draft_best(found, limit, self.nodes, state, max(each.levels() for each in found))
        *inputs, final = self._states_before(state.row_states) or [torch.empty(0)]
        tokens = PathPass(self.network, state.target, state.cache, Carry(final, inputs))

        def step(token: Tensor, positions: Tensor) -> Readout:
            tokens.push(token, positions)
            return self._run_to_exit(tokens, state)

        draft = self.chain(state, limit, step)
        draft.states, draft.exit_layer = tokens.finish()
        return draft

    def _run_to_exit(self, tokens: PathPass, state: State) -> Readout:
        """Run the last token to the first exit with enough confidence, and read it out there."""
        path, routers = self.network.path, self.network.routers
        exit_confidence = self.exit_confidence if state.threshold is None else state.threshold
        last = self.num_exits if state.exit is None else state.exit + 1

        def read(exit: int) -> tuple[Tensor, ...]:
            final, passed = tokens.to(exit)
            logits = self.vocabulary.logits(final)[:, 0]
            certainty = logits[:, :1]  # not read
            if routers is not None:
                certainty = routers[exit](passed, logits[:, None]).sigmoid()
            elif self.num_exits > 1:
                certainty = best_probability(logits)
            return logits, certainty, torch.full_like(certainty, path.num_layers_run(exit), dtype=torch.long), final

        logits, certainty, layers, tokens.tokens[-1].carry.final = first_confident(read, last, exit_confidence)
        return Readout(logits, None if routers is None and self.num_exits == 1 else certainty, layers)

    def _drafts_by_levels(self, state: State) -> bool:
        """Whether to draft a tree for a single row, or chains with siblings for several: if drafting runs no layer that
        scoring needs, and logits are changed only by constraints of a single row."""
        path, one = self.network.path, len(state.ids) == 1
        verified = state.threshold is None
        worth = bool(self.nodes) or not is_asynchronous(state.cache.device)  # it is read before it is scored
        plain = not state.sampler.needs_prefixes and (one or not state.constrained)
        return verified and worth and plain and not path.exit_layer and not path.exits and bool(self.taps)

    def _draft_path(self, state: State) -> DraftPath:
        """The draft path with heads for the current draft vocabulary."""
        network, vocabulary = self.network, self.vocabulary
        vocabulary.follow(state, [row.context for row in state.row_states])
        if self.draft_path is None:
            maps, segments = network.inference_maps, network.path.segments
            self.draft_path = DraftPath(maps, segments, network.adapters, vocabulary.heads, vocabulary.tokens)
        elif self.draft_path.tokens is not vocabulary.tokens:  # the vocabulary has grown
            self.draft_path.heads, self.draft_path.tokens = vocabulary.heads, vocabulary.tokens
        return self.draft_path

    def _states_before(self, row_states: list[M2R2Row]) -> list[Tensor]:
        """The tapped states [B, 1, D] of the token before each root."""
        parts = [
            [row.block[tap][row.number : row.number + 1, row.place : row.place + 1] for row in row_states]
            for tap in range(len(self.taps))
        ]
        return [part[0] if len(part) == 1 else torch.cat(part) for part in parts]

    def observe(self, row_states: list[Any], paths: list[list[int]], taps: dict[int, Tensor]) -> None:
        states = [taps[layer] for layer in self.taps]
        for number, (row, path) in enumerate(zip(row_states, paths, strict=True)):
            if path:
                row.block, row.number, row.place = states, number, path[-1]


class PaperM2R2Drafter(M2R2Drafter):
    """The published form: early layers with adapters on shared keys and values, no projection; scoring resumes at E."""

    name: ClassVar[str] = "m2r2-paper"
    summary: ClassVar[str] = (
        "M2R2 as published: accelerated early layers, from which scoring resumes; shipped or trained"
    )
    training: ClassVar[str] = "specdec train m2r2 --preset m2r2-paper"
    needs_training: ClassVar[bool] = True
    teaches_itself: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ("exit_confidence",)
