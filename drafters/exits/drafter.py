"""The drafters that run the model's first layers: what they share, and one class for each exit rule."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.base.settings import keywords
from specdec.models import drafter_folder
from specdec.runtimes.target import Target
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Drafter, Traits
from specdec.speculation.state import State

from ..chain import ChainDrafter, ChainRow, Readout, best_probability, first_confident
from ..vocabulary import DraftVocabulary
from .networks import ExitHeads, Routers
from .passes import PartialPass, RoutedPass


class ExitDrafter(ChainDrafter):
    """Base class of drafters whose tokens leave the model before its last layer, at an exit that a subclass chooses.

    An *exit* is a layer whose input for the token is read for draft logits; exits are numbered from 0. A subclass
    implements ``run_to_exit``, and sets ``level_shares`` before ``bind`` of this class.

    network_class: class of the trained modules, if there are any, which ``load`` reads from a folder.
    network: the trained modules; None: the model's own norm and head compute draft logits.
    vocabulary: the tokens that are drafted, with the output heads for them.
    level_shares: for each exit, the bytes that drafting one token of each row reads, as a share of the bytes that a
        pass of the whole model reads.
    cost_key: distinguishes drafters of the same name that need different times to draft.
    """

    network_class: ClassVar[type[ExitHeads] | type[Routers]] = ExitHeads
    network: Any = None
    level_shares: tuple[float, ...] = (0.1,)
    cost_key = ""
    vocabulary: DraftVocabulary

    @classmethod
    def load(cls, target: Target, source: str | None = None, **kwargs: Any) -> Drafter:
        """Load the trained modules, if the drafter needs any, and make the drafter.

        Raises SpecDecError if no folder is shipped, or ``source`` is of another drafter or model, and for unknown
        options.
        target: the model to draft for. source: a drafter folder; None: the one shipped for the model.
        kwargs: the drafter's options: arguments of its constructor other than ``network``.
        """
        if not cls.needs_training:
            return super().load(target, source, **kwargs)
        options.check_names(cls.name, kwargs, [name for name in keywords(cls) if name != "network"])
        folder = drafter_folder.find(cls.name, cls.training, target, source)
        config = drafter_folder.read_config(folder, cls.name, target)
        make: Any = cls
        return make(
            drafter_folder.load(
                folder, target.vocab_size, lambda vocab: cls.network_class.from_config(config, target, vocab)
            ),
            **kwargs,
        )

    def bind(self, target: Target) -> None:
        if self.network is not None:
            self.network.to(target.device, target.dtype).requires_grad_(False).eval()
        self.vocabulary = DraftVocabulary(target, None if self.network is None else self.network.draft_vocab)
        self.traits = Traits((self.name,), level_shares=self.level_shares, leaves_early=True, cost_key=self.cost_key)

    def begin_draft(self, state: State) -> Any:
        """Return a new object that runs the tokens of a draft through the model's layers, a ``PartialPass`` by default.

        ``propose`` calls this once per draft. A subclass may return another object with the methods ``push`` and
        ``finish`` of ``PartialPass``; its own ``run_to_exit`` then gets this object.
        """
        return PartialPass(state.target, state.cache)

    @abstractmethod
    def run_to_exit(self, tokens: Any, state: State) -> tuple[Any, ...]:
        """Run the last token of each row's draft to the exit where it leaves the model, and read draft logits there.

        ``propose`` calls this for each row's root, then for each drafted token but the last.

        Returns the fields of ``Readout``: draft logits of the next token [B, V'], the probability that the best one is
        right [B, 1] (None: its softmax is used), and the number of layers that the token has run, int64 [B, 1].

        tokens: the pass that ``begin_draft`` has made, with the draft's tokens so far. state: the batch.
        """

    def read(self, tokens: PartialPass, layer: int, index: int = 0) -> tuple[Tensor, ...]:
        """Run the last token of each row's draft through the layers below ``layer``, and read draft logits there.

        Returns draft logits of the next token [B, V'], the softmax probability of the best one [B, 1], and ``layer`` as
        the number of layers that the token has run, int64 [B, 1].

        tokens: the pass that ``begin_draft`` has made, with the draft's tokens so far.
        layer: index of the layer before which the token leaves. index: number of this exit, from 0.
        """
        h = tokens.to(layer)[:, -1:]
        logits = self.vocabulary.logits(h if self.network is None else self.network(index, h))[:, 0]
        certainty = best_probability(logits)
        return logits, certainty, torch.full_like(certainty, layer, dtype=torch.long)

    def propose(self, state: State, limit: int) -> Draft:
        tokens = self.begin_draft(state)

        def step(token: Tensor, positions: Tensor) -> Readout:
            tokens.push(token, positions)
            return Readout(*self.run_to_exit(tokens, state))

        draft = self.chain(state, limit, step)
        draft.states, draft.exit_layer = tokens.finish()
        return draft


class EarlyExitDrafter(ExitDrafter):
    """Drafts a chain through layers [0, E), with draft logits from the model's own norm and output head.

    Models that were not trained to exit early rarely agree with their first layers. Raises SpecDecError, when bound, if
    the exit layer is outside the model.

    exit_layer: E, 1 <= E < N for a model of N layers; None: a third of them, about where models trained for it exit.
    """

    name: ClassVar[str] = "early-exit"
    summary: ClassVar[str] = "the model's own first layers and head; no training"

    def __init__(self, exit_layer: int | None = None) -> None:
        self.requested = exit_layer

    def bind(self, target: Target) -> None:
        count = target.num_layers
        layer = max(count // 3, 1) if self.requested is None else self.requested
        self.exit_layer = options.check_int("exit_layer", layer, 1, count - 1)
        self.level_shares = (self.exit_layer / count,)
        self.cost_key = str(self.exit_layer)
        super().bind(target)

    def run_to_exit(self, tokens: PartialPass, state: State) -> tuple[Any, ...]:
        return self.read(tokens, self.exit_layer)


class DeedDrafter(ExitDrafter):
    """Drafts a chain whose tokens leave at the first exit with enough confidence, or at the last exit (``State.exit``).

    An exit is a layer at which a token may leave the model. Each has a trained module, which estimates the final state;
    all share the model's output head. DEED (arXiv 2311.08623) trains a model together with its exits; here the model
    stays frozen.

    network: the modules of the exits.
    exit_confidence: minimum probability of the best token, in [0, 1]; where drafts are not verified, the verifier's
        threshold takes its place.
    """

    name: ClassVar[str] = "deed"
    summary: ClassVar[str] = "several trained exits; a token leaves at the first exit that is sure of it"
    training: ClassVar[str] = "specdec train deed"
    needs_training: ClassVar[bool] = True

    def __init__(self, network: ExitHeads, exit_confidence: float = 0.5) -> None:
        self.network = network
        self.exits, self.exit_confidence = network.exits, options.check_probability("exit_confidence", exit_confidence)

    def bind(self, target: Target) -> None:
        self.level_shares = tuple(layer / target.num_layers for layer in self.exits)
        self.cost_key = f"{self.exits} {self.exit_confidence}"
        super().bind(target)

    def run_to_exit(self, tokens: PartialPass, state: State) -> tuple[Any, ...]:
        exit_confidence = self.exit_confidence if state.threshold is None else state.threshold
        last = len(self.exits) if state.exit is None else state.exit + 1
        return first_confident(lambda index: self.read(tokens, self.exits[index], index), last, exit_confidence)


class SkipDecodeRow(ChainRow):
    """What a ``SkipDecodeDrafter`` keeps of one row (sequence).

    prompt: number of prompt tokens; 0: not known before the row's first draft.
    """

    prompt = 0


class SkipDecodeDrafter(ExitDrafter):
    """Drafts a chain through a number of layers that falls from ``deepest`` to ``shallowest`` over ``horizon`` tokens.

    So no token needs keys and values of layers that an earlier token has skipped. SkipDecode (arXiv 2307.02628) accepts
    every token (as the confident verifier does here, with the threshold 0) and never runs the skipped layers; here the
    next scoring pass runs them.
    Raises SpecDecError, when bound, if the exits are outside the model or in the wrong order.

    deepest, shallowest: number of layers of the first and of the last tokens, 1 <= shallowest <= deepest < N; None:
        four fifths and two fifths of the model's layers.
    horizon: number of new tokens until the shallowest exit is reached.
    """

    name: ClassVar[str] = "skip-decode"
    summary: ClassVar[str] = "the model's own first layers, fewer for later tokens; no training"

    def __init__(self, deepest: int | None = None, shallowest: int | None = None, horizon: int = 128) -> None:
        self.bounds, self.horizon = (shallowest, deepest), options.check_int("horizon", horizon, 1)

    def bind(self, target: Target) -> None:
        count, (low, high) = target.num_layers, self.bounds
        self.low = options.check_int("shallowest", max(2 * count // 5, 1) if low is None else low, 1, count - 1)
        self.high = options.check_int("deepest", max(4 * count // 5, 1) if high is None else high, 1, count - 1)
        if self.low > self.high:
            raise SpecDecError(f"the exit falls from deepest to shallowest; got {self.high} and {self.low}")
        self.cost_key = f"{self.low} {self.high} {self.horizon}"
        super().bind(target)

    def begin(self) -> SkipDecodeRow:
        return SkipDecodeRow()

    def run_to_exit(self, tokens: PartialPass, state: State) -> tuple[Any, ...]:
        new = list[int]()
        for row, ids in zip(state.row_states, state.ids, strict=True):
            row.prompt = row.prompt or len(ids) - 1  # the text has one new token by now
            new.append(len(ids) - row.prompt)
        done = min(new) + tokens.count - 1  # all rows run the layers of the row with the fewest new tokens
        layer = self.high - round((self.high - self.low) * min(done / self.horizon, 1.0))
        return self.read(tokens, layer)


class MixtureOfDepthsDrafter(ExitDrafter):
    """Drafts a chain through the layers that trained routers choose for each token.

    In a batch, a layer runs if any row's router chooses it. The routers are trained, with the model frozen, to choose a
    given share of the layers. Mixture-of-depths (arXiv 2404.02258) picks the top tokens of a sequence for each layer;
    that looks ahead, so here a token runs a layer where its router's output is positive.

    network: the routers, one for each layer from the first routed one on.
    """

    name: ClassVar[str] = "mixture-of-depths"
    summary: ClassVar[str] = "the layers that a trained router chooses for each token"
    training: ClassVar[str] = "specdec train mixture-of-depths"
    needs_training: ClassVar[bool] = True
    network_class = Routers

    def __init__(self, network: Routers) -> None:
        self.network = network
        self.cost_key = f"{network.first} {float(network.weight.detach().sum())}"

    def begin_draft(self, state: State) -> RoutedPass:
        return RoutedPass(state.target, state.cache, self.network)

    def run_to_exit(self, tokens: RoutedPass, state: State) -> tuple[Any, ...]:
        logits = self.vocabulary.logits(tokens.last)[:, 0]
        return logits, None, torch.full_like(logits[:, :1], tokens.layers_run, dtype=torch.long)
