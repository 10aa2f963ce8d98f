"""A draft along a path of layers as one captured function: all levels, and which nodes are taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.base.devices import upload
from specdec.kvcache.cache import KVCache
from specdec.runtimes.decoder_layer import Adapters
from specdec.runtimes.draft_path import DeviceChoice, DeviceTree, DraftPath, DraftRoots, LevelNodes, Nodes, TreeLimits
from specdec.runtimes.target import GrowingLinear
from specdec.runtimes.torch.draft import (
    Given,
    PathStep,
    Rules,
    choose,
    given_of,
    grow,
    limits_of,
    noise_of,
    sampling_of,
)
from specdec.runtimes.torch.linear import Linear, dense
from specdec.runtimes.torch.model import Attend, Layer, Network, Tables, context
from specdec.runtimes.torch.static_cache import SPARE, StaticCache, bucket

Inputs = dict[str, Tensor]


class Passes(Protocol):
    """The parts of ``CapturedTarget`` that a draft needs."""

    device: torch.device
    vocab_size: int
    network: Network

    def attention(self, count: int) -> Callable[..., tuple[Tables, Attend]]:
        """Return the function that makes the attention of passes over ``count`` lanes."""

    def capture(self, key: Any, make: Callable[[], tuple[Callable[..., Sequence[Tensor]], Sequence[Tensor]]]) -> Any:
        """Return the captured function of ``key``; at the first call, capture the function and inputs of ``make()``."""

    def select_layers(self, lo: int, hi: int, adapters: Adapters | None) -> Sequence[Layer]:
        """Return the layers [lo, hi) with ``adapters``; None: without adapters."""

    def head_map(self, head: nn.Linear | None) -> Linear:
        """Return an output head as a function of normalized states; None: the model's own head."""


class CapturedDraft:
    """Drafts by a captured function; made from the arguments of ``Target.draft_rows``.

    growing: the output head that grows; its whole memory is read, and outputs that are not used yet are forbidden.
    keep: number of nodes of a level that get children.
    slots: number of tokens of each row that run through the path.
    """

    def __init__(
        self, target: Passes, roots: DraftRoots, path: DraftPath, limits: TreeLimits, choice: DeviceChoice | None
    ) -> None:
        self.target, self.roots, self.path, self.limits, self.choice = target, roots, path, limits, choice
        last = path.heads[-1]
        self.growing = last if isinstance(last, GrowingLinear) else None
        self.keep = limits.width if len(roots.tokens) == 1 else 1
        self.slots = 1 + (limits.levels - 1) * self.keep

    @property
    def fits(self) -> bool:
        """Return whether this draft can be captured."""
        return self.slots <= SPARE and (self.growing is None or self.growing.bias is None)

    def run(self, cache: KVCache, static: StaticCache) -> list[Nodes] | DeviceTree:
        """Return the result of ``Target.draft_rows``. The caller holds the target's lock."""
        target, path, batch = self.target, self.path, len(self.roots.tokens)
        lanes = static.place(cache.entries, cache.committed + self.slots)
        assert static.whole is not None
        count, order = bucket(max(lanes) + 1), None if lanes == list(range(batch)) else upload(lanes, target.device)
        every, own = self._inputs(lanes, count, cache.rows, static.whole.shape[4])
        layers, weights = [target.select_layers(lo, hi, path.adapters) for lo, hi in path.segments], list[Any]()
        shapes = [(name, *x.shape[1:]) for name, x in (every | own).items()]
        weights += [getattr(head, "memory", head) for head in path.heads]  # a head that grows is its memory
        weights += [layer for part in layers for layer in part]
        sizes = count, self.limits.levels, self.limits.width, self.keep, self.choice and self.choice.nodes
        key = "draft", path, *weights, *sizes, *shapes

        def make() -> tuple[Callable[..., Sequence[Tensor]], Sequence[Tensor]]:
            held = {name: x.clone() for name, x in every.items()}  # it runs at once, and writes where they say
            held |= {name: x.new_zeros(count, *x.shape[1:]) for name, x in own.items()}
            return self._function([*held], count, layers), [*held.values()]

        held = target.capture(key, make)
        for into, x in zip(held.inputs, every.values(), strict=False):
            into.copy_(x)
        for into, x in zip(held.inputs[len(every) :], own.values(), strict=True):
            into[slice(batch) if order is None else order] = x
        found = [out[:batch] if order is None else out[order] for out in held()]
        if self.choice is not None:
            return DeviceTree(found[0], found[1], found[2], found[3], 1 if self.roots.given is None else 3)
        return [LevelNodes.unpacked(row, len(row) // 4) for row in found[0].tolist()]

    def _inputs(self, lanes: Sequence[int], count: int, committed: Sequence[int], slots: int) -> tuple[Inputs, Inputs]:
        """Return the captured function's inputs for all ``count`` lanes, and the inputs of the rows, by the same names.

        lanes: the lane of each row. committed: number of committed tokens of each row.
        """
        roots, path, choice, device = self.roots, self.path, self.choice, self.target.device
        used = 0 if self.growing is None else self.growing.out_features
        numbers = [[0, 0, slots - SPARE, 0, used] for _ in range(count)]  # of a lane without a row
        depths = [0] * len(lanes) if choice is None else choice.depths
        for lane, token, n, most in zip(lanes, roots.tokens, committed, depths, strict=True):
            numbers[lane][:4] = token, n, n, most
        every, own = {"numbers": upload(numbers, device)}, Inputs()
        if choice is not None and choice.prices:
            _, prices = limits_of(choice._replace(depths=[0] * count), device)
            assert prices is not None
            every["prices"] = prices
        if self.growing is not None and path.tokens is not None:
            every["added"] = F.pad(path.tokens[-used:], (0, len(self.growing.memory.values) - used))
        for number, x in enumerate((roots.final, *roots.carried)):
            own[f"state {number}"] = x[:, roots.place]
        if roots.forbidden is not None:
            spare = 0 if self.growing is None else len(self.growing.memory.values) - used
            own["forbidden"] = F.pad(roots.forbidden, (0, spare))
        if roots.tables is not None:
            own["tables"] = upload(roots.tables, device, torch.float32)
        if (given := given_of(roots.given, device)) is not None:
            own |= {f"given {name}": part for name, part in given._asdict().items()}
        if roots.sampled is not None:
            size, levels = self.target.vocab_size, range(self.limits.levels)
            noise = torch.stack([noise_of(roots.sampled, level, size, None) for level in levels], 1)
            own["noise"] = upload(noise, device, torch.float32)
            own["sampling"] = upload(sampling_of(roots.sampled), device, torch.float32)
        return every, own

    def _function(
        self, names: Sequence[str], count: int, layers: Sequence[Sequence[Layer]]
    ) -> Callable[..., Sequence[Tensor]]:
        """Return the draft as a function of tensors with these ``names``, over ``count`` lanes, to be captured."""
        target, path, choice, growing = self.target, self.path, self.choice, self.growing
        limits = replace(self.limits, level=0.0, node=0.0)  # the host does not wait
        attention, device, states = target.attention(count), target.device, sum(n.startswith("state") for n in names)
        waits = self.roots.given is not None and choice is None
        vocab = path.tokens
        if vocab is not None and growing is not None:
            vocab = vocab[: -growing.out_features].clone()
        heads = [target.head_map(head) for head in path.heads if head is not growing]
        heads += [] if growing is None else [dense(growing.memory.values)]
        outputs = torch.arange(0 if growing is None else len(growing.memory.values), device=device)

        def function(*inputs: Tensor) -> Sequence[Tensor]:
            given = dict(zip(names, inputs, strict=True))
            tokens, committed, starts, most, used = given["numbers"].unbind(1)
            ids, forbidden = vocab, given.get("forbidden")
            if growing is not None and vocab is not None:
                ids, unused = torch.cat((vocab, given["added"])), outputs >= used[:, None]
                forbidden = unused if forbidden is None else forbidden | unused
            rules = Rules(ids, given.get("tables"))
            if "noise" in given:
                noise = given["noise"] if ids is None else given["noise"][..., ids]
                rules.noise, rules.sampling = lambda level: noise[:, level], given["sampling"]
            if "given tokens" in given:
                rules.given = Given(*(given[f"given {name}"] for name in Given._fields))
            final, *carried = (given[f"state {number}"][:, None] for number in range(states))
            places, passes = list[Tensor](), list[tuple[Tables, Attend]]()

            def run(number: int, x: Tensor, level: int, paths: Tensor | None) -> Tensor:
                if not number:  # all segments of a level see the same tokens
                    t, ahead = x.shape[1], sum(part.shape[1] for part in places)
                    places.append((committed[:, None] + level).expand(-1, t))
                    tree = torch.ones(count, t, ahead + t, dtype=torch.bool, device=device) if paths is None else paths
                    passes[:] = [attention(committed, starts, ahead, t, torch.cat(places, 1), tree)]
                lo, _ = path.segments[number]
                return target.network.run(x, lo, layers[number], context(), *passes[0])

            embed = lambda tokens, level: target.network.embed(tokens)  # noqa: E731
            readouts = [lambda x, head=head: target.network.readout(x, head) for head in heads]
            step = PathStep(path, final, carried, embed, run, readouts, forbidden)
            grown = grow(step, tokens[:, None], limits, rules, self.keep, waits)
            if choice is None:
                return [grown.packed()]
            return choose(grown, choice.nodes, most[:, None], given.get("prices"))[:4]

        return function
