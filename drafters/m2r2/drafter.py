"""The drafter of M2R2: a chain token by token, or a tree level by level. The package describes the idea."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from specdec.base import options
from specdec.base.devices import is_asynchronous
from specdec.base.errors import SpecDecError
from specdec.models import drafter_folder
from specdec.runtimes.draft_path import WIDTH, DeviceChoice, DeviceTree, DraftPath, DraftRoots, TreeLimits
from specdec.runtimes.target import Target
from specdec.speculation.candidates import Candidates
from specdec.speculation.device_draft import DeviceDraft, choice_of
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Given, Traits, Trees
from specdec.speculation.state import State
from specdec.speculation.tree_builder import draft_best

from ..chain import ChainDrafter, ChainRow, Readout, best_probability, first_confident
from ..vocabulary import DraftVocabulary
from .learning import M2R2Learner, why_not
from .network import M2R2, Carry, load_network
from .path_pass import PathPass


class M2R2Row(ChainRow):
    """What an ``M2R2Drafter`` keeps of one row: where the model's states of the token before the root are.

    block: the states of the model's last pass with the row, [B, T, D] for each layer in ``Traits.taps``, in order.
    index: the row's index in ``block``, 0 .. B - 1.
    token: the index in ``block`` of the token before the root, 0 .. T - 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.block: list[Tensor] = []
        self.index = 0
        self.token = 0


class M2R2Drafter(ChainDrafter):
    """Drafts with an M2R2 network: a chain, or a tree that is grown level by level (a level is all nodes at one depth).

    An M2R2 network drafts with the model's own layers: each token runs through only a few of them, which low-rank
    adapters change, and projections estimate what the skipped layers would have computed. A token runs along this path
    to its end or, if there are several exits, leaves it at one before.

    A tree is grown for one row if the draft path has one exit and shares no layer with scoring.

    network: the trained network, or the one with which ``learner`` begins.
    width: number of nodes of each level that get children.
    exit_confidence: minimum probability, in [0, 1], with which a token leaves before the last exit (``State.exit``);
        where drafts are not verified, the verifier's threshold takes its place.
    learner: trains the network while requests run, so that nothing is drafted at first; None: the network is trained.
    nodes: number of nodes of a tree; None: as many nodes as are worth their cost (``Prices``), or a chain if costs are
        not known.
    """

    name: ClassVar[str] = "m2r2"
    summary: ClassVar[str] = "accelerated residual of the model itself; shipped, trained, or teaches itself"
    training: ClassVar[str] = "specdec train m2r2"
    needs_training: ClassVar[bool] = False
    teaches_itself: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ("nodes", "width", "exit_confidence")

    vocabulary: DraftVocabulary
    learner: M2R2Learner | None

    def __init__(
        self,
        network: M2R2,
        width: int = WIDTH,
        exit_confidence: float = 0.5,
        learner: M2R2Learner | None = None,
        nodes: int | None = None,
    ) -> None:
        self.nodes = None if nodes is None else options.check_int("nodes", nodes, 1)
        self.network, self.learner = network, learner
        self.num_exits = len(network.path.stages_to_exit)
        self.width = options.check_int("width", width, 1)
        self.exit_confidence = options.check_probability("exit_confidence", exit_confidence)

    @classmethod
    def load(cls, target: Target, source: str | None = None, **kwargs: Any) -> M2R2Drafter:
        """Load the drafter folder ``source``; None: the one shipped for the target's weights, else one that learns.

        Raises SpecDecError if no folder is shipped and a drafter cannot teach itself on this target, or if the folder
        does not fit the target. kwargs: the options named in ``options``, arguments of the constructor.
        """
        options.check_names(cls.name, kwargs, cls.options)
        if source is None and cls.teaches_itself and drafter_folder.find_shipped(cls.name, target) is None:
            if (why := why_not(target)) is not None:
                raise SpecDecError(
                    f"{drafter_folder.not_shipped(cls.name, cls.training, target.model.config._name_or_path)}; "
                    f"it cannot teach itself: {why}"
                )
            learner = M2R2Learner(target)
            return cls(learner.fits.network, learner=learner, **kwargs)
        folder = drafter_folder.find(cls.name, cls.training, target, source)
        return cls(load_network(target, folder, target.dtype), **kwargs)

    def bind(self, target: Target) -> None:
        if self.learner is None:
            self.network.freeze(target)
            self.network.adapters.lasting = True
        else:
            self.network = self.learner.fits.network
        head = None if self.learner is None else self.learner.fits.head
        self.vocabulary = DraftVocabulary(target, self.network.draft_vocab, head)
        self.draft_path: DraftPath | None = None
        path, layers = self.network.path, target.num_layers
        narrow = 0.4 if path.neurons else 1.0  # about the share of a layer that is read
        levels = bool(path.segments) and not path.exit_layer
        runs = [path.num_layers_run(exit) for exit in range(self.num_exits)]
        self.traits = Traits(
            (self.name,),
            # Without projections nothing reads a carry.
            taps=(*(lo for lo, _ in path.segments), layers) if self.network.projections else (),
            has_probabilities=self.num_exits == 1 and (levels or not is_asynchronous(target.device)),
            level_shares=tuple((1 + narrow * run) / (1 + layers) for run in runs),
            leaves_early=True,
            cost_key=str(path),
        )

    def begin(self) -> M2R2Row:
        return M2R2Row()

    def end(self, row_state: M2R2Row, ids: list[int], start: int, learn: bool = True) -> None:
        if self.learner is not None and learn:
            self.learner.add(ids, start)

    def _ready(self) -> bool:
        """Set ``network`` to the learner's latest one, and return whether there is a trained network to draft with.

        Without a learner, that is always so. With one, nothing is drafted before its first fit.
        """
        if self.learner is None:
            return True
        fits = self.learner.fits
        if fits.version and self.network is not fits.network:
            old, self.network, self.draft_path = self.network.draft_vocab, fits.network, None
            if self.network.draft_vocab is not old:
                self.vocabulary = DraftVocabulary(fits.target, self.network.draft_vocab, fits.head)
        return fits.version > 0

    def candidates(self, state: State, limit: int, given: Given = None, choice: DeviceChoice | None = None) -> Trees:
        if not self._ready():
            return [Candidates.none() for _ in state.ids]
        if not self._drafts_by_levels(state):
            return None
        width = self._width(state, given)
        path, cache, rows, token = self._draft_path(state), state.cache, state.row_states, 0
        tokens, sampled = [ids[-1] for ids in state.ids], state.sampler.sampled(state.ids)
        prices, masks = state.prices, None
        limits = TreeLimits(limit, width) if prices is None else prices.limits(limit, width)
        tables = prices.tables if prices and prices.tables else None
        if len(rows) == 1:
            token, masks = rows[0].token, None if choice is not None else state.masks(0)
            *inputs, final = (x if len(x) == 1 else x[rows[0].index :][:1] for x in rows[0].block)
        else:
            *inputs, final = self._states_before(rows)

        more = sampled, tables, given, masks, choice
        roots = DraftRoots(tokens, cache.rows, final, inputs, token, self.vocabulary.forbidden, *more)
        found = state.target.draft_rows(cache, roots, path, limits)
        return found if isinstance(found, DeviceTree) else [Candidates(*nodes) for nodes in found]

    def _width(self, state: State, given: Given = None) -> int:
        """Return the number of children of each node: 1 in a batch of several rows, where siblings do not pay.

        given: for each row, the candidates by n-grams, which the draft extends; None: there are none.
        """
        trees = bool(self.nodes) or (len(state.ids) == 1 and (bool(state.prices) or given is not None))
        return self.width if trees else 1

    def propose(self, state: State, limit: int) -> Draft:
        if not self._ready():
            return Draft.empty(len(state.ids), state.cache.device)
        if self._drafts_by_levels(state):
            worth = limit if state.prices is None else min(state.prices.levels(), limit)
            if not worth:
                return draft_best([Candidates.none() for _ in state.ids], limit, self.nodes, state)
            width = self._width(state)
            choice = choice_of(state, worth, self.nodes, width)
            found = self.candidates(state, limit if choice is None else worth, choice=choice)
            if isinstance(found, DeviceTree):
                return DeviceDraft(found, state, worth, chain=width == 1)
            assert found is not None
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
        """Run the last token of ``tokens`` to the first exit with enough confidence, and return its ``Readout`` there.

        In a batch, each row's token leaves at its own exit. Sets ``carry.final`` of the token, which the next token's
        projections read, to the estimate of its final state there.

        tokens: the draft's tokens so far, each on its way along the path. state: the rows of the batch.
        """
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
        """Return whether to draft level by level: a tree for one row, chains with siblings for several rows.

        False: ``propose`` drafts a chain, token by token. Level by level needs drafts that scoring verifies
        (``State.threshold`` is None); a draft path with projections and one exit, and without first layers whose
        results scoring takes over (E is 0); and no constraint, other than that of a single row.
        """
        path, masked = self.network.path, state.constrained and len(state.ids) > 1
        verified = state.threshold is None and not masked
        return verified and not path.exit_layer and not path.exits and bool(self.traits.taps)

    def _draft_path(self, state: State) -> DraftPath:
        """Return the draft path as ``Target.draft_rows`` runs it, with output heads for the current draft vocabulary.

        Adds the tokens of the rows' texts to this vocabulary first.
        """
        network, vocabulary = self.network, self.vocabulary
        vocabulary.follow(state, [row.context for row in state.row_states])
        if self.draft_path is None:
            maps, segments = network.inference_maps, network.path.segments
            self.draft_path = DraftPath(maps, segments, network.adapters, vocabulary.heads, vocabulary.tokens)
        elif self.draft_path.tokens is not vocabulary.tokens:  # the vocabulary has grown
            self.draft_path.heads, self.draft_path.tokens = vocabulary.heads, vocabulary.tokens
        return self.draft_path

    def _states_before(self, row_states: list[M2R2Row]) -> list[Tensor]:
        """Return the model's states of the token before each root: for each layer in ``Traits.taps``, [B, 1, D]."""
        parts = [
            [row.block[tap][row.index : row.index + 1, row.token : row.token + 1] for row in row_states]
            for tap in range(len(self.traits.taps))
        ]
        return [part[0] if len(part) == 1 else torch.cat(part) for part in parts]

    def observe(self, row_states: list[Any], paths: list[list[int]], taps: dict[int, Tensor]) -> None:
        states = [taps[layer] for layer in self.traits.taps]
        for index, (row, path) in enumerate(zip(row_states, paths, strict=True)):
            if path:
                row.block = states
                row.index = index
                row.token = path[-1]


class PaperM2R2Drafter(M2R2Drafter):
    """Drafts with the model's first E layers and adapters, as the abstract of the M2R2 paper (arXiv 2502.02040) says.

    E is the exit layer of the trained network (``M2R2Path.exit_layer``). Each drafted token also runs the E layers
    without adapters; these states are exact, so scoring resumes from them at layer E. Unlike ``M2R2Drafter``, no
    projection leads to later layers, drafts are chains, and it needs training: it does not teach itself.
    """

    name: ClassVar[str] = "m2r2-paper"
    summary: ClassVar[str] = (
        "M2R2 as published: accelerated early layers, from which scoring resumes; shipped or trained"
    )
    training: ClassVar[str] = "specdec train m2r2 --preset m2r2-paper"
    needs_training: ClassVar[bool] = True
    teaches_itself: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ("exit_confidence",)
