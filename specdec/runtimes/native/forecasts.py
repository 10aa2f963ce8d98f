"""Forecasts of the experts that later layers will use, from the residual stream at an earlier layer's router.

For each layer, one matrix maps the residual, divided by its RMS, to the router logits of the next two layers with
experts. The matrix starts as the weights of these routers, and is refined by ridge regression on the logits that passes
compute anyway. A wrong forecast costs time and changes no result.
"""

from __future__ import annotations

import threading
from collections import deque

import torch
from torch import Tensor

from specdec.base.ridge import RIDGE, Sums, result
from specdec.runtimes.torch.linear import rms_unit

AHEAD = 2  # number of later layers that are forecast
FORECAST_TOKENS = 16  # a pass with more tokens uses most experts and is not forecast
LIKELY = 0.4  # experts with at least this probability are read ahead
ROWS = 64  # rows that are added to the sums at once
FIRST, LAST = 256, 8192  # rows at the first fit, and at the last one; the number doubles between fits


class Forecast:
    """Predicts from the residual stream at one layer's router which experts a few later layers will use.

    A router is the linear layer of a mixture of experts whose logits choose the experts of each token.

    One linear layer (``weight``, ``bias``) maps the residual of a token, divided by its RMS, to estimates of the later
    layers' router logits. n is the number of later layers, E the number of experts of each, D the hidden size.

    targets: numbers of the later layers, [n].
    routers: weights of their routers with the norm's factors multiplied in, given as [n, E, D], stored as [n E, D].
    top_k: number of experts that a token uses in a layer.
    experts: E.
    weight, bias: the fitted routers, [n E, D] and [n E].
    slope: factor from a difference of logits to the log-odds that an expert is used.
    sums: sums of all training rows for the next fit; None: there is no further fit.
    rows, count: training rows that are not in ``sums`` yet, as pairs (residuals [T, D], logits of the later layers [T,
        n E]), and the number of tokens in them.
    next_fit: number of training rows at the next fit.
    """

    def __init__(self, targets: list[int], routers: Tensor, top_k: int) -> None:
        self.targets = targets
        self.top_k = top_k
        self.experts = routers.shape[1]
        self.routers = self.weight = routers.flatten(0, 1)  # (n E, D)
        self.bias = torch.zeros(len(self.weight))
        self.slope = 4 / float(self.weight.norm(dim=1).mean().clamp_min(1e-6))  # log-odds of a need per unit of a logit
        self.sums: Sums | None = Sums(self.weight.shape[1], len(self.weight))
        self.rows = list[tuple[Tensor, Tensor]]()
        self.count = 0
        self.next_fit = FIRST

    def logits(self, x: Tensor) -> Tensor:
        """Return estimates of the router logits of the n later layers, in the order of ``targets``, float32 [T, n, E].

        E is the number of experts of a layer.

        x: the residuals of T tokens at this layer's router, each divided by its RMS, float32 [T, D].
        """
        return torch.addmm(self.bias, x, self.weight.T).view(len(x), len(self.targets), self.experts)

    def likely(self, x: Tensor) -> list[tuple[int, list[int]]]:
        """Return for each later layer a pair (layer number, numbers of the experts that it will probably use).

        An expert is listed if the probability that any of the T tokens uses it is at least ``LIKELY`` (0.4); the
        likeliest comes first.

        x: the residuals of T tokens at this layer's router, each divided by its RMS, [T, D].
        """
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
        """Store training rows for the next fit; no effect after the last fit.

        x: the residuals of T tokens at this layer's router, each divided by its RMS, [T, D].
        logits: the later layers' true router logits for these tokens, in the order of ``targets``, [T, n E].
        """
        if self.sums is not None:
            self.rows.append((x, logits))
            self.count += len(x)

    def work(self) -> bool:
        """Add the stored training rows to the sums if there are at least 64, and fit the matrix if a fit is due.

        A fit replaces ``weight`` and ``bias``. Fits are due at ``FIRST`` (256) training rows and at each doubling. At
        ``LAST`` (8192) rows, learning ends.

        Returns whether a fit was made.
        """
        if self.sums is None or self.count < ROWS:
            return False
        x, logits = (torch.cat(parts) for parts in zip(*self.rows, strict=True))
        self.sums.add(x, logits - x @ self.routers.T)
        self.rows = []
        self.count = 0
        if self.sums.rows < self.next_fit:
            return False
        found = result(self.sums.solve(RIDGE))
        self.weight = self.routers + found[:, :-1]
        self.bias = found[:, -1].clone()
        self.next_fit *= 2
        if self.sums.rows >= LAST:
            self.sums = None
        return True


class Forecasts:
    """The forecasts of all layers of a model that have experts.

    Several threads may call ``seen``; ``work`` needs a lock that its caller holds.

    of: the forecast that starts at each layer, by layer number.
    width: hidden size D.
    local: for each thread, the forecasts of its present pass whose later layers have not all run.
    """

    def __init__(self, routers: dict[int, Tensor], top_k: int) -> None:
        """Make a forecast of the next two layers with experts for each layer with experts but the last.

        routers: router weights [E, D] by layer number, ascending, with the factors of the norm before them multiplied
            in.
        top_k: number of experts that a token uses in a layer.
        """
        layers, self.width = list(routers), next(iter(routers.values())).shape[1]
        self.of = dict[int, Forecast]()
        for n, layer in enumerate(layers[:-1], 1):
            targets = layers[n : n + AHEAD]
            self.of[layer] = Forecast(targets, torch.stack([routers[target] for target in targets]), top_k)
        self.local = threading.local()

    def seen(self, layer: int, x: Tensor, logits: Tensor) -> list[tuple[int, list[int]]]:
        """Learn from the router of a layer in a running pass, and forecast the experts of later layers.

        The expert cache calls it for each layer with experts, in the order in which a pass runs them.

        layer: number of the layer.
        x: residuals of the T tokens of the pass at its router, [T, D].
        logits: the router's logits, [T, E].

        Returns pairs (later layer, numbers of the experts that it will probably use); [] for a pass of more than
        ``FORECAST_TOKENS`` (16) tokens, and at the last layer with experts.
        """
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
        """Let the forecasts learn from their stored training rows, layer by layer, until one of them makes a fit.

        A fit takes time, so this is called between two passes.
        """
        for forecast in self.of.values():
            if forecast.work():
                return
