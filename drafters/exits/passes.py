"""Running the tokens of a draft through some of the model's layers."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kvcache.cache import KVCache
from specdec.runtimes.target import Pass, Target

from .networks import Routers


class PartialPass:
    """Runs the tokens of a draft through the first layers, an earlier token at least as far as a later one.

    ``push`` adds a token of each row, ``to`` runs it, ``finish`` ends the draft. Keys and values of the layers that are
    run go to ``cache``, the model's, uncommitted.

    groups: the tokens by the layer that they have reached, deepest first: layer, states [B, n, D], positions [B, n] and
        token ids [B, n].
    count: number of tokens of each row.
    """

    def __init__(self, target: Target, cache: KVCache) -> None:
        self.target, self.cache = target, cache
        self.groups: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self.count = 0

    def push(self, token: Tensor, positions: Tensor) -> Tensor:
        """Add one token of each row and its position, int64 [B, 1] each, at layer 0; return its embedding [B, 1, D]."""
        x = self.target.embed(token, positions)
        self.count += 1
        self.groups.append((0, x, positions, token))
        return x

    def to(self, layer: int) -> Tensor:
        """Run all tokens that have not reached ``layer`` through the layers below it.

        Return the inputs of ``layer`` for the n tokens that have reached just this layer and no deeper one, [B, n, D];
        the last of them is the draft's last token. The tensor is kept; do not change it.
        """
        while (level := self.groups[-1][0]) < layer:
            _, x, positions, ids = self.groups.pop()
            above = self.groups[-1][0] if self.groups else layer
            goal = min(above, layer)
            given = Pass(positions, self.cache.register(level, positions), self.cache, ids=ids)
            x = self.target.layers(x, level, goal, given)
            if self.groups and above == goal:
                _, *earlier = self.groups.pop()
                x, positions, ids = (torch.cat(pair, 1) for pair in zip(earlier, (x, positions, ids), strict=True))
            self.groups.append((goal, x, positions, ids))
        return self.groups[-1][1]

    def finish(self) -> tuple[Tensor | None, int]:
        """Run all tokens to the deepest layer that any token has reached, so that scoring can resume there.

        Return the input states of that layer, [B, n, D] for the n tokens in order, and its index; (None, 0): there is
        no token.
        """
        if not self.groups:
            return None, 0
        deepest = self.groups[0][0]
        return self.to(deepest), deepest


class RoutedPass:
    """Runs the tokens of a draft through the first layers, and through the later layers that a router chooses.

    A token that skips a layer gets keys and values there, in ``cache``, as soon as a later token runs the layer.

    routers: choose the layers; a layer runs if they choose it for any row. The first layers are those without routers.
    states: the state of each token after the first layers, [B, 1, D] each.
    skipped: for each routed layer, the inputs of tokens that have skipped it so far, [B, 1, D] each.
    ids: the ids of the tokens, [B, 1] each.
    last: final state of the last token, before the final norm, [B, 1, D]; set by ``push``.
    layers_run: number of layers that the last token has run; set by ``push``.
    """

    def __init__(self, target: Target, cache: KVCache, routers: Routers) -> None:
        self.target = target
        self.cache = cache
        self.routers = routers
        self.states: list[Tensor] = []
        self.ids: list[Tensor] = []
        self.skipped: dict[int, list[Tensor]] = {layer: [] for layer in range(routers.first, target.num_layers)}

    def push(self, token: Tensor, positions: Tensor) -> None:
        """Run one token of each row at its position, int64 [B, 1] each, through the layers that are chosen for it."""
        target, cache, first = self.target, self.cache, self.routers.first
        self.ids.append(token)
        ctx = Pass(positions, cache.register(0, positions), cache, ids=token)
        x = target.layers(target.embed(token, positions), 0, first, ctx)
        self.states.append(x)
        self.layers_run = first
        for layer, waiting in self.skipped.items():
            waiting.append(x)
            if bool((self.routers.score(layer, x) > 0).any()):
                block = torch.cat(waiting, 1)  # (B, n, D)
                own = positions + torch.arange(1 - block.shape[1], 1, device=positions.device)
                ids = torch.cat(self.ids[-block.shape[1] :], 1)
                given = Pass(own, cache.register(layer, own), cache, ids=ids)
                x = target.layers(block, layer, layer + 1, given)[:, -1:]
                waiting.clear()
                self.layers_run += 1
        self.last = x

    def finish(self) -> tuple[Tensor | None, int]:
        """Return all tokens' states [B, n, D] after the first layers, which are exact, and the number of these layers.

        (None, 0): there is no token.

        The drafted tokens' keys and values of later layers, which are not exact, are removed from the cache.
        """
        if not self.states:
            return None, 0
        for layer, waiting in self.skipped.items():
            self.cache.trim(len(self.states) - len(waiting), layer, layer + 1)
        return torch.cat(self.states, 1), self.routers.first
