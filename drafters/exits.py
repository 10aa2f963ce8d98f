"""Drafting through the model's first layers: one drafter, whose presets say where a token leaves.

A drafted token runs layer by layer and leaves at an exit; its readout there is the draft. Its states are exact, so
scoring resumes where the deepest token left. When a later token goes deeper, the layers that earlier tokens of the
draft have not run are run for all of them at once. Knows nothing of acceptance.

    early-exit         every token leaves at one exit (LayerSkip, Elhoushi et al. 2024, arXiv 2404.16710)
    deed               each at the first exit with enough confidence (Tang et al. 2023, arXiv 2311.08623)
    skip-decode        the later in the answer, the earlier (Del Corro et al. 2023, arXiv 2307.02628)
    mixture-of-depths  a router at each layer lets a token run or skip it (Raposo et al. 2024, arXiv 2404.02258)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.base.settings import keywords
from specdec.kvcache.cache import KVCache
from specdec.models import drafter_folder
from specdec.runtimes.target import Pass, Target
from specdec.runtimes.torch.linear import rms_unit
from specdec.speculation.draft import Draft, Drafter, State

from .chain import ChainDrafter, ChainRow, Readout, best_probability, first_confident
from .vocabulary import DraftVocabulary


class PartialPass:
    """The tokens of a draft, each run through some of the layers; earlier tokens at least as far as later ones."""

    def __init__(self, target: Target, cache: KVCache) -> None:
        self.target, self.cache = target, cache
        self.groups: list[tuple[int, Tensor, Tensor]] = []  # (layer reached, states [B, n, D], positions [B, n])
        self.count = 0  # number of tokens

    def push(self, token: Tensor, positions: Tensor) -> None:
        """Add a token, int64 [B, 1], at layer 0."""
        self.count += 1
        self.groups.append((0, self.target.embed(token, positions), positions))

    def to(self, layer: int) -> Tensor:
        """Run every token that is below ``layer`` up to it; return the last token's states there [B, 1, D]."""
        while (level := self.groups[-1][0]) < layer:
            _, x, positions = self.groups.pop()
            above = self.groups[-1][0] if self.groups else layer
            goal = min(above, layer)
            x = self.target.layers(x, level, goal, Pass(positions, self.cache.register(level, positions), self.cache))
            if self.groups and above == goal:
                _, earlier, before = self.groups.pop()
                x, positions = torch.cat((earlier, x), 1), torch.cat((before, positions), 1)
            self.groups.append((goal, x, positions))
        return self.groups[-1][1][:, -1:]

    def finish(self) -> tuple[Tensor | None, int]:
        """All tokens' states [B, n, D] at the deepest layer that any of them has reached, and that layer."""
        if not self.groups:
            return None, 0
        deepest = self.groups[0][0]
        self.to(deepest)
        return self.groups[0][1], deepest


class ExitHeads(nn.Module):
    """A small trained module at each exit, from h[E] towards h[N]; they share the output head.

    final = map(u) + up(silu(down(u))) with u = h / rms(h). map is the identity at first: untrained, h is read out.

    exits: layers, in rising order.
    draft_vocab: int32 [V'], or None for the full vocabulary.
    """

    def __init__(self, exits: Sequence[int], width: int, target: Target, draft_vocab: Tensor | None = None) -> None:
        super().__init__()
        self.exits, self.width, d = check_exits(exits, target.num_layers), width, target.hidden_size
        self.map = nn.ModuleList(nn.Linear(d, d) for _ in self.exits)
        self.down = nn.ModuleList(nn.Linear(d, width) for _ in self.exits)
        self.up = nn.ModuleList(nn.Linear(width, d, bias=False) for _ in self.exits)
        for parameter in (*self.map.parameters(), *self.up.parameters()):
            nn.init.zeros_(parameter)
        for straight in self.map:
            nn.init.eye_(straight.get_parameter("weight"))
        self.register_buffer("draft_vocab", draft_vocab)
        self.draft_vocab: Tensor | None

    def forward(self, index: int, h: Tensor) -> Tensor:
        """States h [B, T, D] at exit ``index`` -> the estimate of h[N] [B, T, D] that the head reads."""
        unit = rms_unit(h)
        out: Tensor = self.map[index](unit) + self.up[index](F.silu(self.down[index](unit)))
        return out

    def config(self) -> dict[str, Any]:
        """The entries of a drafter folder's config.json."""
        return {"exits": list(self.exits), "width": self.width}

    @classmethod
    def from_config(cls, config: dict[str, Any], target: Target, draft_vocab: Tensor | None) -> ExitHeads:
        """From a drafter folder's config.json. Raises SpecDecError for what does not fit the target."""
        width = drafter_folder.check_inner_size("width", config.get("width"), target.hidden_size)
        return cls(config.get("exits", ()), width, target, draft_vocab)


def check_exits(exits: Any, num_layers: int) -> tuple[int, ...]:
    """``exits``, if they rise within the model. Raises SpecDecError otherwise."""
    layers = options.check_ints("exits", exits, 1)
    if not layers or max(layers) >= num_layers or list(layers) != sorted(set(layers)):
        raise SpecDecError(f"exits must be rising layers in 1 .. {num_layers - 1}; got {list(layers)}")
    return layers


class ExitDrafter(ChainDrafter):
    """Drafts a chain of tokens that leave the model early; subclasses choose each token's exit.

    network: trained modules; None: the model's own norm and head read out.
    """

    leaves_early = True
    network_class: ClassVar[type[ExitHeads] | type[Routers]] = ExitHeads
    network: Any = None
    vocabulary: DraftVocabulary

    @classmethod
    def load(cls, target: Target, source: str | None = None, **kwargs: Any) -> Drafter:
        """With the network in a folder, or the one shipped for the target, if it needs one.

        Raises SpecDecError if there is none, and for a folder of another drafter or model.
        """
        if not cls.needs_training:
            return super().load(target, source, **kwargs)
        options.check_names(cls.name, kwargs, [name for name in keywords(cls) if name != "network"])
        folder = cls.find(target, source)
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

    def begin_draft(self, state: State) -> Any:
        """The pass that runs the draft's tokens: a ``PartialPass``, or an object with its ``push`` and ``finish``."""
        return PartialPass(state.target, state.cache)

    @abstractmethod
    def run_to_exit(self, tokens: Any, state: State) -> tuple[Any, ...]:
        """Run the last of ``tokens`` to its exit, and read it out: the three parts of a ``Readout``."""

    def read(self, tokens: PartialPass, layer: int, index: int = 0) -> tuple[Tensor, ...]:
        """Run the last token to ``layer``, which is exit ``index``, and read it out."""
        h = tokens.to(layer)
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
    """Drafts a chain through layers [0, E), read out by the model's own norm and head.

    Models that were not trained to exit early rarely agree with their first layers. Raises SpecDecError, when bound, if
    the exit layer is outside the model.

    exit_layer: E, 1 <= E < N; None: a third of the layers, about where models trained for it exit.
    """

    name: ClassVar[str] = "early-exit"
    summary: ClassVar[str] = "the model's own first layers and head; no training"

    def __init__(self, exit_layer: int | None = None) -> None:
        self.requested = exit_layer

    def bind(self, target: Target) -> None:
        count = target.num_layers
        layer = max(count // 3, 1) if self.requested is None else self.requested
        self.exit_layer = options.check_int("exit_layer", layer, 1, count - 1)
        self.path, self.level_share = str(self.exit_layer), (self.exit_layer / count,)
        super().bind(target)

    def run_to_exit(self, tokens: PartialPass, state: State) -> tuple[Any, ...]:
        return self.read(tokens, self.exit_layer)


class DeedDrafter(ExitDrafter):
    """Drafts a chain whose tokens leave at the first exit with enough confidence, or at the last (``State.exit``).

    Each exit has a trained module; all share one head. The paper trains a model together with its exits; here the base
    stays frozen.

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
        self.num_exits, self.path = len(self.exits), f"{self.exits} {self.exit_confidence}"

    def bind(self, target: Target) -> None:
        self.level_share = tuple(layer / target.num_layers for layer in self.exits)
        super().bind(target)

    def run_to_exit(self, tokens: PartialPass, state: State) -> tuple[Any, ...]:
        exit_confidence = self.exit_confidence if state.threshold is None else state.threshold
        last = self.num_exits if state.exit is None else state.exit + 1
        return first_confident(lambda index: self.read(tokens, self.exits[index], index), last, exit_confidence)


class SkipDecodeRow(ChainRow):
    """prompt: number of prompt tokens; 0: not known yet."""

    prompt = 0


class SkipDecodeDrafter(ExitDrafter):
    """Drafts a chain through a number of layers that falls from ``deepest`` to ``shallowest`` over ``horizon`` tokens.

    No token needs keys and values above an earlier one's exit. The paper accepts every token (here: the confident
    verifier with threshold 0) and never runs the skipped layers; here the next deep pass fills them in. Raises
    SpecDecError, when bound, if the exits are outside the model or in the wrong order.

    deepest, shallowest: exits of the first and of the last tokens, 1 <= shallowest <= deepest < N; None: four and two
        fifths of the layers.
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
        self.path = f"{self.low} {self.high} {self.horizon}"
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


# --- depth routers ---------------------------------------------------------------------------------------------------


class Routers(nn.Module):
    """One linear score of the residual for each layer from ``first`` on; a token runs the layer if it is positive.

    first: number of layers that are always run, 1 <= first < N.
    draft_vocab: int32 [V'], or None for the full vocabulary.
    """

    def __init__(self, first: int, target: Target, draft_vocab: Tensor | None = None) -> None:
        super().__init__()
        self.first = options.check_int("first", first, 1, target.num_layers - 1)
        count = target.num_layers - first
        self.weight = nn.Parameter(torch.zeros(count, target.hidden_size))
        self.bias = nn.Parameter(torch.ones(count))  # untrained, every layer is run
        self.register_buffer("draft_vocab", draft_vocab)
        self.draft_vocab: Tensor | None

    def score(self, layer: int, x: Tensor) -> Tensor:
        """Residual x [B, T, D] before ``layer`` -> score [B, T, 1]."""
        return F.linear(rms_unit(x), self.weight[layer - self.first, None], self.bias[layer - self.first, None])

    @classmethod
    def from_config(cls, config: dict[str, Any], target: Target, draft_vocab: Tensor | None) -> Routers:
        """From a drafter folder's config.json. Raises SpecDecError for what does not fit the target."""
        return cls(config.get("first", 0), target, draft_vocab)


class RoutedPass:
    """The tokens of a draft, each run through the first layers, which are exact, and those that a router chooses.

    A token that skips a layer leaves keys and values there as soon as a later token runs it.

    states: [B, 1, D] of each token behind the first layers.
    skipped: by layer, the inputs of tokens that have skipped it so far.
    last, layers_run: final state [B, 1, D] of the last token, and number of layers that it ran.
    """

    def __init__(self, target: Target, cache: KVCache, routers: Routers) -> None:
        self.target, self.cache, self.routers = target, cache, routers
        self.states: list[Tensor] = []
        self.skipped: dict[int, list[Tensor]] = {layer: [] for layer in range(routers.first, target.num_layers)}

    def push(self, token: Tensor, positions: Tensor) -> None:
        """Run a token, int64 [B, 1]."""
        target, cache, first = self.target, self.cache, self.routers.first
        ctx = Pass(positions, cache.register(0, positions), cache)
        x = target.layers(target.embed(token, positions), 0, first, ctx)
        self.states.append(x)
        self.layers_run = first
        for layer, waiting in self.skipped.items():
            waiting.append(x)
            if bool((self.routers.score(layer, x) > 0).any()):
                block = torch.cat(waiting, 1)  # (B, n, D)
                own = positions + torch.arange(1 - block.shape[1], 1, device=positions.device)
                x = target.layers(block, layer, layer + 1, Pass(own, cache.register(layer, own), cache))[:, -1:]
                waiting.clear()
                self.layers_run += 1
        self.last = x

    def finish(self) -> tuple[Tensor | None, int]:
        """All tokens' states [B, n, D] behind the first layers, and their number; drops provisional entries above."""
        if not self.states:
            return None, 0
        for layer, waiting in self.skipped.items():
            self.cache.trim(len(self.states) - len(waiting), layer, layer + 1)
        return torch.cat(self.states, 1), self.routers.first


class MixtureOfDepthsDrafter(ExitDrafter):
    """Drafts a chain through the layers that trained routers choose for each token; a batch runs what any row needs.

    The routers learn on a frozen base to run a share of the routed layers, their capacity. The paper picks the top
    tokens of a sequence for each layer; that looks ahead, so here a token runs a layer where its score is positive.
    """

    name: ClassVar[str] = "mixture-of-depths"
    summary: ClassVar[str] = "the layers that a trained router chooses for each token"
    training: ClassVar[str] = "specdec train mixture-of-depths"
    needs_training: ClassVar[bool] = True
    network_class = Routers

    def __init__(self, network: Routers) -> None:
        self.network = network

    def bind(self, target: Target) -> None:
        super().bind(target)
        self.path = f"{self.network.first} {float(self.network.weight.sum())}"

    def begin_draft(self, state: State) -> RoutedPass:
        return RoutedPass(state.target, state.cache, self.network)

    def run_to_exit(self, tokens: RoutedPass, state: State) -> tuple[Any, ...]:
        logits = self.vocabulary.logits(tokens.last)[:, 0]
        return logits, None, torch.full_like(logits[:, :1], tokens.layers_run, dtype=torch.long)
