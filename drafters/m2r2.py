"""M2R2: the model drafts for itself through an accelerated residual (arXiv 2502.02040).

A second residual p runs beside the slow residual h through the first E layers, helped by low-rank adapters and
attending to h's exact keys and values; then, optionally, it *leaps*: one matrix maps it, with the previous token's
deep states (the carry), to the input of a later segment of the model's own layers, and a last leap lands on the final
state h[N]. Its readout is the draft. h[E] and everything cached below E are exact and kept, so scoring resumes at E.

There may be several exits on the way, each with a rate of its own (the mixture): a token leaves at the first whose
router (ARLA) is sure enough of it. What earlier tokens of the draft have not run is run for all of them at once when a
later token goes deeper.

The published abstract describes early layers with adapters and shared KV (here: a path without segments and leaps).
The leap, the carry and the fit by ridge regression are our own extension.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from specdec import artifacts, kernels, options
from specdec.adapters import Adapters
from specdec.cache import KVCache, Mask
from specdec.draft import Draft, State
from specdec.errors import SpecDecError
from specdec.growth import WIDTH, Bounds, Route, Seed, likeliest
from specdec.kernels import rms_unit
from specdec.target import Target
from specdec.transfer import upload, waits

from .arla import Router
from .chain import SHAPE, ChainDrafter, best_probability, first_sure
from .vocabulary import DraftVocabulary


@dataclass(frozen=True)
class M2R2Path:
    """The way of the accelerated residual through the model.

    exit_layer: E; layers [0, E) are shared with the slow residual, scoring resumes there.
    segments: later layer ranges [lo, hi) the residual leaps to, in order.
    final_leap: whether a last leap maps the end of the path (each exit) to the final state, or it is read out as it is.
    adapters: ``{layer: [module paths]}`` that carry low-rank adapters of rank ``rank``.
    exits: layers, rising, behind which a token may leave before the end of the path: up to E, where p then starts again
        from h, or the ends of segments.
    """

    exit_layer: int
    segments: tuple[tuple[int, int], ...] = ()
    final_leap: bool = False
    rank: int = 32
    adapters: dict[int, list[str]] = field(default_factory=dict)
    exits: tuple[int, ...] = ()

    @property
    def adapts_early(self) -> bool:
        """Whether p differs from h below the exit layer."""
        return any(layer < self.exit_layer for layer in self.adapters)

    @property
    def end(self) -> int:
        """The last exit: the layer behind which the path ends."""
        return self.segments[-1][1] if self.segments else self.exit_layer

    @property
    def shared(self) -> list[tuple[int, int]]:
        """Stretches [lo, hi) of the layers that h runs, too; p starts each from h."""
        stops = sorted({*(layer for layer in self.exits if layer < self.exit_layer), self.exit_layer})
        return list(zip([0, *stops], stops, strict=False)) if self.exit_layer else []

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """All layers that a token may run, in order: ``shared``, then the segments."""
        return [*self.shared, *self.segments]

    @property
    def reach(self) -> list[int]:
        """For each exit, the last one included: stretches run before a token leaves there."""
        ends = [hi for _, hi in self.stretches]
        return [ends.index(layer) + 1 for layer in (*self.exits, self.end)]

    def layers_run(self, exit: int = -1) -> int:
        """Layers that a token runs which leaves at exit number ``exit``."""
        return sum(hi - lo for lo, hi in self.stretches[: self.reach[exit]])

    def residuals(self, exit: int = -1) -> int:
        """Residuals that the router at an exit sees: the early ones, those in and behind the segments, the last."""
        run, early = self.stretches[: self.reach[exit]], len(self.shared)
        seen = sum(hi - lo if self.adapts_early else 1 for lo, hi in run[:early])
        return seen + sum(hi - lo + 1 for lo, hi in run[early:]) + self.final_leap

    def aims(self, num_layers: int) -> list[int]:
        """For each residual that the last exit's router sees: the layer whose input h it runs ahead to.

        A stretch [lo, hi) that ends at an exit goes from h[lo] to h[N], at rate (N - lo) / (hi - lo), where no leap
        goes on from there; any other goes at rate 1.
        """
        found, last = list[int](), {*self.exits, self.end}
        for number, (lo, hi) in enumerate(self.stretches):
            rate = (num_layers - lo) / (hi - lo) if hi in last and not self.final_leap else 1
            first = lo if number >= len(self.shared) else lo + 1 if self.adapts_early else hi
            found += [lo + round(rate * (layer - lo)) for layer in range(first, hi + 1)]
        return found + [num_layers] * self.final_leap

    def check(self, num_layers: int) -> None:
        """Raise SpecDecError unless 0 <= E <= lo < hi <= ... <= N, and all exits are stops on that way."""
        edge = self.exit_layer
        good = 0 <= edge < num_layers and (edge > 0 or len(self.segments) > 0) and self.rank > 0
        for lo, hi in self.segments:
            good, edge = good and edge <= lo < hi <= num_layers, hi
        if not good:
            raise SpecDecError(
                f"an M2R2 path with exit layer {self.exit_layer} and segments {[list(s) for s in self.segments]} "
                f"does not fit a model of {num_layers} layers: need 0 <= exit <= lo < hi <= ... <= {num_layers}"
            )
        stops = {*range(1, self.exit_layer + 1), *(hi for _, hi in self.segments)} - {self.end}
        if not set(self.exits) <= stops or list(self.exits) != sorted(set(self.exits)):
            raise SpecDecError(
                f"exits of an M2R2 path must be rising layers before its end, up to the exit layer {self.exit_layer} "
                f"or at the end of a segment; got {list(self.exits)} on a path that ends at {self.end}"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> M2R2Path:
        """Inverse of ``to_json``. Raises SpecDecError for anything that is not one."""
        try:
            path = cls(
                data["exit_layer"],
                tuple((lo, hi) for lo, hi in data["segments"]),
                bool(data["final_leap"]),
                data["rank"],
                {int(layer): [str(p) for p in paths] for layer, paths in data["adapters"].items()},
                tuple(data.get("exits", ())),
            )
            numbers = (path.exit_layer, path.rank, *path.exits, *(n for segment in path.segments for n in segment))
            if odd := [n for n in numbers if type(n) is not int]:
                raise ValueError(f"{odd[0]!r} is no whole number")
            return path
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SpecDecError(f"the drafter's config.json has no valid M2R2 path ({error!r})") from None


@dataclass
class Carry:
    """Deep states of the previous token: ``final`` [B, T, D], and ``inputs[s]`` [B, T, D] of segment s, as far as run.

    A drafted token's are what its own leaps landed on.
    """

    final: Tensor
    inputs: list[Tensor]


class M2R2(nn.Module):
    """Parameters and forward of the accelerated residual; used alike for drafting and for training.

    router: width of the latents of a router at each exit that says how likely the draft is right; 0: none.
    """

    def __init__(self, path: M2R2Path, target: Target, draft_vocab: Tensor | None = None, router: int = 0) -> None:
        super().__init__()
        path.check(target.num_layers)
        self.path, self.num_layers = path, target.num_layers
        shapes = {}
        for layer, names in path.adapters.items():
            if not 0 <= layer < target.num_layers:
                raise SpecDecError(f"the drafter has adapters on layer {layer}; the model has {target.num_layers}")
            linears = target.linears(layer)
            if missing := [name for name in names if name not in linears]:
                raise SpecDecError(f"the drafter has adapters on '{missing[0]}', which layer {layer} does not have")
            shapes[layer] = {name: linears[name] for name in names}
        self.adapters = Adapters(shapes, path.rank)
        d = target.hidden_size
        # Segment leaps see [p; previous final state; previous state at the landing]; at a final leap the last two
        # are one and the same.
        self.leaps = nn.ModuleList(nn.Linear(3 * d, d) for _ in path.segments)
        if path.final_leap:
            self.leaps.extend(nn.Linear(2 * d, d) for _ in path.reach)
        counts = [path.residuals(index) for index in range(len(path.reach))]
        self.routers = nn.ModuleList(Router(count, d, router) for count in counts) if router else None
        self.frozen: list[kernels.UnitMap] = []  # the leaps, once nothing is trained any more
        self.register_buffer("draft_vocab", draft_vocab)  # int32 [V'], or None: the full vocabulary
        self.draft_vocab: Tensor | None

    def parts(self, index: int, x: Tensor, carry: Carry) -> list[Tensor]:
        """What leap ``index`` of residual ``x`` [B, T, D] is a linear map of, once each has unit RMS: 2 or 3 of it."""
        inputs = [carry.inputs[index]] if index < len(self.path.segments) else []
        return [x, carry.final, *inputs]

    def features(self, index: int, x: Tensor, carry: Carry) -> Tensor:
        """The input of leap ``index``: [B, T, 2 D or 3 D]."""
        return torch.cat([rms_unit(part) for part in self.parts(index, x, carry)], -1)

    def leap(self, index: int, x: Tensor, carry: Carry) -> Tensor:
        """Leap ``index`` of residual ``x`` [B, T, D] -> [B, T, D]: to that segment, or, numbered on, at an exit."""
        if self.frozen:
            return self.frozen[index](self.parts(index, x, carry))
        layer = self.leaps[index]
        assert isinstance(layer, nn.Linear)
        features = self.features(index, x, carry)
        return nn.functional.linear(features, layer.weight.to(x.dtype), layer.bias.to(x.dtype))

    def estimate(self, exit: int, p: Tensor, carry: Carry) -> Tensor:
        """The estimate of h[N] [B, T, D] that the head reads, from the residual p at exit number ``exit``."""
        return self.leap(len(self.path.segments) + exit, p, carry) if self.path.final_leap else p

    def freeze(self, target: Target) -> None:
        """Prepare for drafting: parameters in the target's dtype and place, leaps in their fastest storage."""
        self.to(target.device, target.dtype).requires_grad_(False).eval()
        self.adapters.coarse = True
        leaps = [leap for leap in self.leaps if isinstance(leap, nn.Linear)]
        self.frozen = [kernels.UnitMap(leap.weight, leap.bias) for leap in leaps]

    def beyond(
        self,
        target: Target,
        p: Tensor,
        carry: Carry,
        positions: Tensor,
        mask: Callable[[int], Mask],
        cache: KVCache,
        watched: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
        """From p[E] [B, T, D] along the leaps and segments, given the previous carry.

        ``mask(lo)`` is asked for the mask of the segment that begins at layer ``lo``. Yields for each segment where the
        residual landed and where it got to, and, if ``watched``, the residuals that a router sees.
        """
        for s, (lo, hi) in enumerate(self.path.segments):
            landed = self.leap(s, p, carry)
            taps = watch(lo, hi) if watched else None
            p = target.layers(landed, lo, hi, positions, mask(lo), cache, taps=taps, adapters=self.adapters)
            yield landed, p, list((taps or {}).values())

    def beside(
        self, target: Target, x: Tensor, lo: int, hi: int, positions: Tensor, cache: KVCache, watched: bool = False
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Shared layers [lo, hi) for h and p of the next tokens of a chain, both from ``x`` = h[lo] [B, n, D].

        Returns h[hi], p[hi] and, if ``watched``, the residuals that a router sees. Only h stays in the cache.
        """
        if not self.path.adapts_early:
            h = target.layers(x, lo, hi, positions, cache.mask(lo, positions), cache)
            return h, h, [h]
        # h and p as two tokens at one position: both see h's keys (shared KV), nobody sees p's.
        n, old = x.shape[1], cache.lengths[lo] - cache.committed
        chain = torch.ones(n, old + n, dtype=torch.bool).tril(old)
        tree = torch.cat((chain, torch.zeros(n, n, dtype=torch.bool)), 1).repeat(2, 1)
        both = torch.cat((positions, positions), 1)
        mask = cache.mask(lo, both, tree)
        taps = watch(lo + 1, hi) if watched else None
        y = target.layers(torch.cat((x, x), 1), lo, hi, both, mask, cache, taps=taps, adapters=self.adapters, adapted=n)
        cache.trim(n, lo, hi)
        return y[:, :n], y[:, n:], [p[:, n:] for p in (taps or {}).values()]


def watch(lo: int, hi: int) -> dict[int, Tensor]:
    """Taps for the residuals before, in and behind layers [lo, hi), for a router to see."""
    return {layer: torch.empty(0) for layer in range(lo, hi + 1)}


@dataclass
class _Token:
    """A drafted token on its way. run: stretches behind it; h, p: its residuals there [B, 1, D].

    before: the previous token's carry. own: what it carries on. passed: what a router has seen of it.
    """

    positions: Tensor
    h: Tensor
    p: Tensor
    before: Carry
    own: Carry
    run: int = 0
    passed: list[Tensor] = field(default_factory=list)


class _Passage:
    """The tokens of a draft on their way along the path. Earlier tokens are never behind later ones."""

    def __init__(self, network: M2R2, target: Target, cache: KVCache, carry: Carry) -> None:
        self.network, self.target, self.cache, self.carry = network, target, cache, carry
        self.tokens: list[_Token] = []

    def push(self, token: Tensor, positions: Tensor) -> None:
        """Add a token, int64 [B, 1], at the beginning of the path."""
        before = self.tokens[-1].own if self.tokens else self.carry
        x = self.target.embed(token, positions)
        self.tokens.append(_Token(positions, x, x, before, Carry(x, [])))

    def to(self, exit: int) -> tuple[Tensor, list[Tensor]]:
        """Take the last token to an exit: the estimate of h[N] [B, 1, D] there, and the residuals a router sees."""
        network, token = self.network, self.tokens[-1]
        self._run(network.path.reach[exit])
        final = network.estimate(exit, token.p, token.before)
        return final, [*token.passed, final] if network.path.final_leap else token.passed

    def _run(self, stretches: int) -> None:
        """Run so many stretches of the last token, and what earlier ones have not run of them."""
        network, target, cache = self.network, self.target, self.cache
        shared, watched = network.path.shared, network.routers is not None
        for stretch in range(self.tokens[-1].run, stretches):
            late = [token for token in self.tokens if token.run == stretch]
            positions = torch.cat([token.positions for token in late], 1)  # (B, n)
            lo, hi = network.path.stretches[stretch]
            if stretch < len(shared):
                x = torch.cat([token.h for token in late], 1)
                h, p, passed = network.beside(target, x, lo, hi, positions, cache, watched)
                for place, token in enumerate(late):
                    token.h = h[:, place : place + 1]
            else:
                segment, landed = stretch - len(shared), list[Tensor]()
                for token in late:  # one after another: each lands by the one before
                    landed.append(network.leap(segment, token.p, token.before))
                    token.own.inputs.append(landed[-1])
                mask, taps = cache.mask(lo, positions), watch(lo, hi) if watched else None
                x = torch.cat(landed, 1)
                p = target.layers(x, lo, hi, positions, mask, cache, taps=taps, adapters=network.adapters)
                passed = list((taps or {}).values())
            for place, token in enumerate(late):
                token.p, token.run = p[:, place : place + 1], stretch + 1
                token.passed += [residual[:, place : place + 1] for residual in passed]

    def finish(self) -> tuple[Tensor | None, int]:
        """Exact states [B, n, D] at the deepest shared layer that a token has run, and that layer; None at layer 0.

        Provisional entries leave the cache: exact ones come with the scoring pass.
        """
        path, cache = self.network.path, self.cache
        for segment, (lo, hi) in enumerate(path.segments, start=len(path.shared)):
            cache.trim(sum(token.run > segment for token in self.tokens), lo, hi)
        if not path.shared:
            return None, 0
        deepest = min(self.tokens[0].run, len(path.shared))
        for stretch in range(deepest):
            if late := [token for token in self.tokens if token.run == stretch]:
                positions = torch.cat([token.positions for token in late], 1)
                lo, hi = path.shared[stretch]
                x, mask = torch.cat([token.h for token in late], 1), cache.mask(lo, positions)
                h = self.target.layers(x, lo, hi, positions, mask, cache)
                for place, token in enumerate(late):
                    token.h, token.run = h[:, place : place + 1], stretch + 1
        return torch.cat([token.h for token in self.tokens], 1), path.shared[deepest - 1][1]


class M2R2Drafter(ChainDrafter):
    """Drafts with a trained M2R2: a chain with siblings that cost no drafting, or a tree that is grown level by level.

    A tree is grown where the whole path is one exit that shares no layer with scoring, for one greedy row; it has
    ``nodes`` nodes, else those that scoring has room for (a chain if it has none), and ``width`` nodes of a level are
    drafted on from.
    siblings, nodes: see ``Shape``; siblings that are given make a chain.
    exit_confidence: how sure, in [0, 1], a token must be to leave before the last exit; where drafts stand unjudged,
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
        if network.leaps:  # else nothing reads a carry
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
        mark = target.fingerprint
        folder = Path(source) if source is not None else artifacts.shipped(cls.name, mark)
        if folder is None:
            name = target.model.config._name_or_path or "MODEL"
            raise SpecDecError(
                f"no M2R2 drafter is shipped for this model; train one: specdec train m2r2 --model {name} "
                f"--preset {cls.name} --prompts FILE --output DIR, then pass --drafter DIR"
            )
        config = artifacts.read_config(folder)
        artifacts.check_base(config, mark, str(folder))
        return cls(load_network(target, config, folder), **given)

    def bind(self, target: Target) -> None:
        self.network.freeze(target)
        self.vocabulary = DraftVocabulary(target, self.network.draft_vocab)
        self.route: Route | None = None  # what trees grow along
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
        passage = _Passage(network, state.target, state.cache, self._carry(self.block))
        bar = self.bar if state.threshold is None else state.threshold
        decides = network.routers is not None or len(path.reach) > 1
        last = self.num_exits if state.exit is None else state.exit + 1
        certainty, layers = torch.empty(0), list[Tensor]()

        def read(exit: int) -> tuple[Tensor, ...]:
            final, passed = passage.to(exit)
            logits = vocabulary.logits(final)[:, 0]
            sure = logits[:, :1]  # not asked for
            if network.routers is not None:
                sure = network.routers[exit](passed, logits[:, None]).sigmoid()
            elif decides:
                sure = best_probability(logits)
            return sure, logits, final, torch.full_like(sure, path.layers_run(exit), dtype=torch.long)

        def step(token: Tensor, positions: Tensor) -> Tensor:
            nonlocal certainty
            passage.push(token, positions)
            certainty, logits, passage.tokens[-1].own.final, run = first_sure(read, last, bar)
            layers.append(run)
            return logits

        routed = (lambda logits: certainty) if decides else None
        draft = self.chain(state, limit, step, vocabulary.tokens, routed)
        draft.states, draft.exit_layer = passage.finish()
        if state.threshold is not None:
            draft.layers = torch.cat(layers, 1)[:, : draft.tokens.shape[1]]
        return draft

    def _grows(self, state: State) -> bool:
        """Whether a draft grows level by level: it has to pay in scoring alone, and to be one greedy row's."""
        path = self.network.path
        judged = state.threshold is None and state.sampler.plain_greedy and state.cache.batch == 1
        worth = bool(self.shape.nodes) or not waits(state.cache.device)  # what has grown is read before it is scored
        return judged and worth and self.shape.siblings is None and not path.exit_layer and not path.exits

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
            route = self.route = Route(network.frozen, network.path.segments, network.adapters, heads, tokens)
        seed = Seed(state.ids[0][-1], state.cache.rows[0], block.final, block.inputs, self.place)
        width = self.width if self.shape.nodes or state.spare else 1
        found = state.target.grow(state.cache, seed, route, Bounds(limit, width, state.confidence))
        return likeliest(found, self.shape.nodes or limit + state.spare, state.cache.device)

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
    """The published form: early layers with adapters on shared keys and values, no leap; scoring resumes at E."""

    name: ClassVar[str] = "m2r2-paper"
    summary: ClassVar[str] = "M2R2 as published: accelerated early layers, scoring resumes from them; shipped likewise"
    training: ClassVar[str] = "specdec train m2r2 --preset m2r2-paper"


def load_network(target: Target, config: dict[str, Any], folder: Path) -> M2R2:
    """The network that a drafter folder with this config holds. Raises SpecDecError if its files do not fit."""
    if config.get("drafter") != "m2r2":
        raise SpecDecError(f"'{folder}' holds a '{config.get('drafter')}' drafter, not an m2r2 one")
    path, router = M2R2Path.from_json(config.get("path", {})), config.get("router", 0)
    artifacts.inner("the rank", path.rank, target.hidden_size)
    router = router and artifacts.inner("the router's width", router, target.hidden_size)
    rename = lambda name: re.sub(r"^router\.", "routers.0.", name)  # noqa: E731 (of one exit, once)
    return artifacts.load(folder, target.vocab_size, lambda vocab: M2R2(path, target, vocab, router), rename)
