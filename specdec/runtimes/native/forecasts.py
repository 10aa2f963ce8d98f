"""Forecasts of the experts that later layers take, from the residual at a layer's router.

One matrix for each layer maps the residual there, at unit RMS, to the logits of the next two layers' routers: it is the
projection onto the residual that such a router sees, and the router, merged, as both are linear. It begins as the
routers themselves. Ridge regression corrects it, in closed form, by what passes compute anyway. A wrong forecast costs
time and changes no result.
"""

from __future__ import annotations

import threading
from collections import deque

import torch
from torch import Tensor

from specdec.base.ridge import RIDGE, Sums, result
from specdec.runtimes.torch.linear import rms_unit

AHEAD = 2  # layers that are forecast
FORECAST_TOKENS = 16  # tokens of a pass that is forecast; more take most experts anyway
LIKELY = 0.4  # least probability of an expert that is read ahead
ROWS = 64  # that are added to the sums at once
FIRST, LAST = 256, 8192  # rows at the first fit, each further one at twice as many; then no more are learned from


class Forecast:
    """What one layer says of later ones.

    targets: these layers. routers: theirs, [n, E, D], for residuals at unit RMS. top_k: experts that a token takes.
    """

    def __init__(self, targets: list[int], routers: Tensor, top_k: int) -> None:
        self.targets, self.top_k, self.experts = targets, top_k, routers.shape[1]
        self.routers = self.weight = routers.flatten(0, 1)  # (n E, D)
        self.bias = torch.zeros(len(self.weight))
        self.slope = 4 / float(self.weight.norm(dim=1).mean().clamp_min(1e-6))  # log-odds of a need per unit of a logit
        self.sums: Sums | None = Sums(self.weight.shape[1], len(self.weight))
        self.rows, self.count, self.due = list[tuple[Tensor, Tensor]](), 0, FIRST

    def logits(self, x: Tensor) -> Tensor:
        """Estimated logits [T, n, E] of the targets' routers, from residuals [T, D] at unit RMS."""
        return torch.addmm(self.bias, x, self.weight.T).view(len(x), len(self.targets), self.experts)

    def likely(self, x: Tensor) -> list[tuple[int, list[int]]]:
        """The experts that any of the tokens x [T, D] is likely to take in each target, the likeliest first."""
        logits = self.logits(x)
        ranked = logits.topk(min(self.top_k + 1, self.experts)).values
        middle = ranked[..., -2:].mean(-1, keepdim=True)  # between the last expert that is taken and the next one
        needs = 1 - (1 - (self.slope * (logits - middle)).sigmoid()).prod(0)  # (n, E)
        order = needs.sort(descending=True)
        counts = (order.values >= LIKELY).sum(1).tolist()
        return [
            (target, row[:count])
            for target, row, count in zip(self.targets, order.indices.tolist(), counts, strict=True)
        ]

    def learn(self, x: Tensor, logits: Tensor) -> None:
        """Rows to learn from: residuals [T, D] at unit RMS, and the targets' logits [T, n E]."""
        if self.sums is not None:
            self.rows.append((x, logits))
            self.count += len(x)

    def work(self) -> bool:
        """Add what was learned, and fit the map if that is due; whether it was."""
        if self.sums is None or self.count < ROWS:
            return False
        x, logits = (torch.cat(parts) for parts in zip(*self.rows, strict=True))
        self.sums.add(x, logits - x @ self.routers.T)
        self.rows, self.count = [], 0
        if self.sums.rows < self.due:
            return False
        found = result(self.sums.solve(RIDGE))
        self.weight, self.bias = self.routers + found[:, :-1], found[:, -1].clone()
        self.due *= 2
        if self.sums.rows >= LAST:
            self.sums = None
        return True


class Forecasts:
    """Those of all layers. routers: [E, D] by layer, in order. width: D."""

    def __init__(self, routers: dict[int, Tensor], top_k: int) -> None:
        layers, self.width = list(routers), next(iter(routers.values())).shape[1]
        self.of = dict[int, Forecast]()
        for place, layer in enumerate(layers[:-1]):
            targets = layers[place + 1 : place + 1 + AHEAD]
            self.of[layer] = Forecast(targets, torch.stack([routers[target] for target in targets]), top_k)
        self.local = threading.local()  # passes of several threads run side by side

    def seen(self, layer: int, x: Tensor, logits: Tensor) -> list[tuple[int, list[int]]]:
        """A pass has the residual x [T, D] and the logits [T, E] at a layer's router. Returns what later layers are
        likely to take."""
        trail: deque[tuple[Forecast, Tensor, list[Tensor]]] = self.local.__dict__.setdefault("trail", deque())
        unit = rms_unit(x)
        for forecast, before, found in trail:
            if forecast.targets[len(found)] != layer or len(before) != len(unit):  # of another pass
                trail.clear()
                break
            found.append(logits)
        while trail and len(trail[0][2]) == len(trail[0][0].targets):
            forecast, before, found = trail.popleft()
            forecast.learn(before, torch.cat(found, 1))
        if (own := self.of.get(layer)) is None:
            trail.clear()
            return []
        trail.append((own, unit, []))
        return own.likely(unit) if len(unit) <= FORECAST_TOKENS else []

    def work(self) -> None:
        """Between two passes: learn; at most one map is fitted."""
        for forecast in self.of.values():
            if forecast.work():
                return
