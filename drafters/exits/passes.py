"""Running the tokens of a draft through some of the model's layers."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kvcache.cache import KVCache
from specdec.runtimes.target import Pass, Target

from .networks import Routers


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
