"""M2R2: the model drafts for itself through an accelerated residual (arXiv 2502.02040).

A second residual p runs beside the slow residual h through the first E layers, helped by low-rank adapters and
attending to h's exact keys and values; then, optionally, it *leaps*: one matrix maps it, with the previous token's
deep states (the carry), to the input of a later segment of the model's own layers, and a last leap lands on the final
state h[N]. Its readout is the draft. h[E] and everything cached below E are exact and kept, so scoring resumes at E.

The published abstract describes early layers with adapters and shared KV (here: a path without segments and leaps).
The leap, the carry and the fit by ridge regression are our own extension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from specdec import artifacts, kernels, options
from specdec.adapters import Adapters
from specdec.cache import KVCache, Mask
from specdec.draft import Draft, State
from specdec.errors import SpecDecError
from specdec.kernels import rms_unit
from specdec.target import Target

from .arla import Router
from .beam import draft_beam
from .chain import draft_chain, within
from .vocabulary import DraftVocabulary, check_vocabulary

BEAM = 4  # nodes of a level that are drafted from: together they cost about what one costs


@dataclass(frozen=True)
class M2R2Path:
    """The way of the accelerated residual through the model.

    exit_layer: E; layers [0, E) are shared with the slow residual, scoring resumes there.
    segments: later layer ranges [lo, hi) the residual leaps to, in order.
    final_leap: whether a last leap maps the end of the path to the final state (else it is read out as it is).
    adapters: ``{layer: [module paths]}`` that carry low-rank adapters of rank ``rank``.
    """

    exit_layer: int
    segments: tuple[tuple[int, int], ...] = ()
    final_leap: bool = False
    rank: int = 32
    adapters: dict[int, list[str]] = field(default_factory=dict)

    @property
    def adapts_early(self) -> bool:
        """Whether p differs from h below the exit layer."""
        return any(layer < self.exit_layer for layer in self.adapters)

    @property
    def layers_run(self) -> int:
        """Layers a drafted token runs through."""
        return self.exit_layer + sum(hi - lo for lo, hi in self.segments)

    @property
    def residuals(self) -> int:
        """Residuals that a router sees on this way: the early ones, those in and behind the segments, the last."""
        early = self.exit_layer if self.adapts_early else min(self.exit_layer, 1)
        return early + sum(hi - lo + 1 for lo, hi in self.segments) + self.final_leap

    def check(self, num_layers: int) -> None:
        """Raise SpecDecError unless 0 <= E <= lo < hi <= ... <= N."""
        edge = self.exit_layer
        good = 0 <= edge < num_layers and self.layers_run > 0 and self.rank > 0
        for lo, hi in self.segments:
            good, edge = good and edge <= lo < hi <= num_layers, hi
        if not good:
            raise SpecDecError(
                f"an M2R2 path with exit layer {self.exit_layer} and segments {[list(s) for s in self.segments]} "
                f"does not fit a model of {num_layers} layers: need 0 <= exit <= lo < hi <= ... <= {num_layers}"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> M2R2Path:
        """Inverse of ``to_json``. Raises SpecDecError for anything that is not one."""
        try:
            return cls(
                int(data["exit_layer"]),
                tuple((int(lo), int(hi)) for lo, hi in data["segments"]),
                bool(data["final_leap"]),
                int(data["rank"]),
                {int(layer): [str(p) for p in paths] for layer, paths in data["adapters"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SpecDecError(f"the drafter's config.json has no valid M2R2 path ({error!r})") from None


@dataclass
class Carry:
    """Deep states of the previous token: ``final`` [B, T, D], and ``inputs[s]`` [B, T, D] of segment s.

    passed: the residuals [B, T, D] beyond E that led to ``final``, where there is a router to see them.
    """

    final: Tensor
    inputs: list[Tensor]
    passed: list[Tensor] = field(default_factory=list)


class M2R2(nn.Module):
    """Parameters and forward of the accelerated residual; used alike for drafting and for training.

    router: width of the latents of a router that says how likely the draft is right; 0: none.
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
        # Segment leaps see [p; previous final state; previous state at the landing]; at the final leap the last two
        # are one and the same.
        self.leaps = nn.ModuleList(nn.Linear(3 * d, d) for _ in path.segments)
        if path.final_leap:
            self.leaps.append(nn.Linear(2 * d, d))
        self.router = Router(path.residuals, d, router) if router else None
        self.frozen: list[Callable[[Sequence[Tensor]], Tensor]] = []  # the leaps, once nothing is trained any more
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
        """Leap ``index`` of residual ``x`` [B, T, D] -> [B, T, D]."""
        if self.frozen:
            return self.frozen[index](self.parts(index, x, carry))
        layer = self.leaps[index]
        assert isinstance(layer, nn.Linear)
        features = self.features(index, x, carry)
        return nn.functional.linear(features, layer.weight.to(x.dtype), layer.bias.to(x.dtype))

    def freeze(self, target: Target) -> None:
        """Prepare for drafting: parameters in the target's dtype and place, leaps in their fastest storage."""
        self.to(target.device, target.dtype).requires_grad_(False).eval()
        leaps = [leap for leap in self.leaps if isinstance(leap, nn.Linear)]
        self.frozen = [kernels.frozen_of_units(leap.weight, leap.bias) for leap in leaps]

    def beyond(
        self, target: Target, p: Tensor, carry: Carry, positions: Tensor, mask: Callable[[int], Mask], cache: KVCache
    ) -> Carry:
        """From p[E] [B, T, D] along the leaps and segments to the estimate of h[N], given the previous carry.

        ``mask(lo)`` is asked for the mask of the segment that begins at layer ``lo``. Returns this token's carry; its
        ``final`` is what the head reads.
        """
        inputs, passed = [], list[Tensor]()
        for s, (lo, hi) in enumerate(self.path.segments):
            p = self.leap(s, p, carry)
            inputs.append(p)
            taps = self.watch(lo, hi)
            p = target.layers(p, lo, hi, positions, mask(lo), cache, taps=taps, adapters=self.adapters)
            passed += (taps or {}).values()
        if self.path.final_leap:
            p = self.leap(len(self.path.segments), p, carry)
            passed.append(p)
        return Carry(p, inputs, passed)

    def watch(self, lo: int, hi: int) -> dict[int, Tensor] | None:
        """Taps for the residuals before, in and behind layers [lo, hi), where there is a router to see them."""
        return None if self.router is None else {layer: torch.empty(0) for layer in range(lo, hi + 1)}


class M2R2Drafter:
    """Drafts with a trained M2R2: a chain, and optionally siblings beside it that cost no drafting.

    siblings: number of further candidates at each depth of the chain (depths beyond its length have none). Without
        them, those of ``suggested`` are used that scoring has room for (``State.spare``).
    Raises SpecDecError if no trained drafter fits the target.
    """

    name: ClassVar[str] = "m2r2"
    summary: ClassVar[str] = "accelerated residual of the model itself; trained, shipped for the default model"
    training: ClassVar[str] = "specdec train m2r2"
    leaves_early: ClassVar[bool] = True

    def __init__(self, network: M2R2, siblings: Sequence[int] | None = None, suggested: Sequence[int] = ()) -> None:
        self.network, self.suggested = network, options.wholes("suggested siblings", suggested, 0)
        self.siblings = None if siblings is None else options.wholes("siblings", siblings, 0)
        self.path = network.path
        self.carry: Carry | None = None

    @classmethod
    def load(cls, target: Target, source: str | None = None, **given: Any) -> M2R2Drafter:
        """From a drafter folder, or (``source`` None) the one shipped for the target's weights."""
        options.check(cls.name, given, ("siblings",))
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
        network = load_network(target, config, artifacts.read_tensors(folder))
        return cls(network, given.get("siblings"), config.get("siblings", ()))

    @property
    def taps(self) -> tuple[int, ...]:
        return (*(lo for lo, _ in self.path.segments), self.network.num_layers)

    def bind(self, target: Target) -> None:
        self.network.freeze(target)
        self.vocabulary = DraftVocabulary(target, self.network.draft_vocab)
        self.start(1)

    def start(self, batch: int) -> None:
        self.carry = None
        self.vocabulary.start()

    def propose(self, state: State, limit: int) -> Draft:
        target, cache, carry, vocabulary = state.target, state.cache, self.carry, self.vocabulary
        assert carry is not None, "observe() runs before propose()"
        vocabulary.follow(state)
        if self.siblings is None and self._grows(state):
            return self._tree(state, limit)
        siblings = within(self.suggested, limit, state.spare) if self.siblings is None else self.siblings
        states: list[Tensor] = []
        passed: list[Tensor] = []
        router = self.network.router

        def step(token: Tensor, positions: Tensor) -> Tensor:
            nonlocal carry, passed
            assert carry is not None
            h, p, passed = self._early(target, target.embed(token, positions), positions, cache)
            states.append(h)
            carry = self.network.beyond(target, p, carry, positions, partial(cache.mask, positions=positions), cache)
            return vocabulary.logits(carry.final)[:, 0]

        def certainty(logits: Tensor) -> Tensor:
            assert carry is not None and router is not None
            return router([*passed, *carry.passed], logits[:, None]).sigmoid()

        routed = None if router is None else certainty
        draft = draft_chain(state, limit, step, siblings, vocabulary.tokens, routed)
        for lo, hi in self.path.segments:
            cache.trim(len(states), lo, hi)  # provisional entries: exact ones come with the scoring pass
        if self.path.exit_layer:
            draft.states, draft.exit_layer = torch.cat(states, 1), self.path.exit_layer
        if state.threshold is not None:
            draft.layers = torch.full_like(draft.tokens, self.path.layers_run)
        return draft

    def _grows(self, state: State) -> bool:
        """Whether a tree is drafted level by level: it has to pay in scoring alone, and to be one greedy row's."""
        judged = state.threshold is None and state.sampler.plain_greedy
        return judged and state.spare > 0 and not self.path.exit_layer and state.cache.batch == 1

    def _tree(self, state: State, limit: int) -> Draft:
        target, cache, carry, run = state.target, state.cache, self.carry, 0

        def step(tokens: Tensor, positions: Tensor, parents: Tensor, paths: Tensor) -> Tensor:
            nonlocal carry, run
            assert carry is not None
            carry, run = Carry(carry.final[:, parents], [x[:, parents] for x in carry.inputs]), run + len(parents)
            mask = partial(cache.mask, positions=positions, tree=paths)
            carry = self.network.beyond(target, target.embed(tokens, positions), carry, positions, mask, cache)
            return self.vocabulary.logits(carry.final)

        draft = draft_beam(state, limit, limit + state.spare, BEAM, step, self.vocabulary.tokens)
        for lo, hi in self.path.segments:
            cache.trim(run, lo, hi)
        return draft

    def _early(
        self, target: Target, x: Tensor, positions: Tensor, cache: KVCache
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Layers [0, E) for h and p of one token: x [B, 1, D] -> h[E], p[E], and the residuals that a router sees.

        Only h stays in the cache.
        """
        e, router = self.path.exit_layer, self.network.router
        if not self.path.adapts_early:
            h = target.layers(x, 0, e, positions, cache.mask(0, positions), cache) if e else x
            return h, h, [h] if e and router is not None else []
        # h and p as two tokens at one position: both see h's keys (shared KV), nobody sees p's.
        both = positions.expand(-1, 2)
        tree = torch.ones(2, cache.lengths[0] + 2 - cache.committed, dtype=torch.bool)
        tree[:, -1] = False
        mask = cache.mask(0, both, tree)
        taps = self.network.watch(1, e)
        adapters = self.network.adapters
        y = target.layers(torch.cat((x, x), 1), 0, e, both, mask, cache, taps=taps, adapters=adapters, adapted=1)
        cache.trim(1, 0, e)
        return y[:, :1], y[:, 1:], [p[:, 1:] for p in (taps or {}).values()]

    def observe(self, paths: list[list[int]], taps: dict[int, Tensor]) -> None:
        last = torch.tensor([[path[-1]] if path else [0] for path in paths], device=taps[self.taps[-1]].device)
        alive = torch.tensor([bool(path) for path in paths], device=last.device)[:, None, None]

        def at_last(layer: int, old: Tensor | None) -> Tensor:
            x = taps[layer].gather(1, last[:, :, None].expand(-1, -1, taps[layer].shape[2]))  # (B, 1, D)
            return x if old is None else torch.where(alive, x, old)

        old = self.carry
        self.carry = Carry(
            at_last(self.taps[-1], old.final if old else None),
            [at_last(lo, old.inputs[s] if old else None) for s, (lo, _) in enumerate(self.path.segments)],
        )

    def select(self, rows: list[int]) -> None:
        if self.carry is not None:
            self.carry = Carry(self.carry.final[rows], [x[rows] for x in self.carry.inputs])


class PaperM2R2Drafter(M2R2Drafter):
    """The published form: early layers with adapters on shared keys and values, no leap; scoring resumes at E."""

    name: ClassVar[str] = "m2r2-paper"
    summary: ClassVar[str] = "M2R2 as published: accelerated early layers, scoring resumes from them; shipped likewise"
    training: ClassVar[str] = "specdec train m2r2 --preset m2r2-paper"


def load_network(target: Target, config: dict[str, Any], tensors: dict[str, Tensor]) -> M2R2:
    """Build the network a drafter folder describes. Raises SpecDecError if its files do not belong together."""
    if config.get("drafter") != "m2r2":
        raise SpecDecError(f"the folder holds a '{config.get('drafter')}' drafter, not an m2r2 one")
    vocab = tensors.get("draft_vocab")
    check_vocabulary(vocab, target)
    router = options.whole("the drafter's router width", config.get("router", 0), 0)
    network = M2R2(M2R2Path.from_json(config.get("path", {})), target, vocab, router)
    own = network.state_dict()
    if set(own) != set(tensors) or any(own[key].shape != tensors[key].shape for key in own):
        odd = sorted(set(own) ^ set(tensors)) or sorted(k for k in own if own[k].shape != tensors[k].shape)
        raise SpecDecError(f"the drafter's config.json and model.safetensors do not fit each other (tensor '{odd[0]}')")
    network.load_state_dict(tensors)
    return network
