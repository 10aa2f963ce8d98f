"""Predictors: which experts the layers ahead will be routed to, from what is known at a layer.

A predictor is asked once per layer and pass, when the layer's routing is known, and answers for layers ahead with, for
every expert, how likely it is to be needed: the *need* [E], in [0, 1]. Layers are counted by rows of the packed file;
rows after the last are the first ones of the next token. Predictions never touch the computation: a wrong one costs
time. Knows nothing of caches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specdec import artifacts
from specdec.errors import SpecDecError
from specdec.experts.layers import MoELayer
from specdec.kernels import UNIT_EPS

PREDICTORS = ("none", "previous-token", "residual", "m2r2", "m2r2-paper", "oracle", "shuffled")
DISTANCES = (4, 2, 1)  # layers ahead that are predicted at a layer, far ones first
REACH = max(DISTANCES)

Forecast = list[tuple[int, list[float]]]  # row, need of each of its experts
Array = npt.NDArray[np.float32]
_NOTHING: Array = np.zeros((0, 0), np.float32)


@dataclass
class Sight:
    """What is known at a layer. residual, state [T, D]: before and after the norm in front of the router.

    routed: the experts of each token, [T][k].
    """

    row: int
    residual: Tensor
    state: Tensor
    routed: list[list[int]]


class Predictor(ABC):
    """``most_tokens``: passes over more tokens need most experts anyway and are not predicted."""

    name: ClassVar[str]
    most_tokens = 16

    @abstractmethod
    def ahead(self, sight: Sight) -> Forecast:
        """Needs of rows ahead, after a look at this one. Called for every row of every pass."""

    def look(self, sight: Sight) -> None:
        """As ``ahead``, where no forecast is wanted."""
        self.ahead(sight)


class PreviousToken(Predictor):
    """The experts that a layer's last token needed."""

    name = "previous-token"

    def __init__(self, rows: int, num_experts: int) -> None:
        self.seen: list[list[float] | None] = [None] * rows
        self.num_experts = num_experts

    def ahead(self, sight: Sight) -> Forecast:
        need = [0.0] * self.num_experts
        for expert in sight.routed[-1]:
            need[expert] = 1.0
        self.seen[sight.row] = need
        row = (sight.row + REACH) % len(self.seen)
        seen = self.seen[row]
        return [] if seen is None else [(row, seen)]


class Forecaster(Predictor):
    """A predictor that estimates the logits of routers ahead: those of rows ``targets[j]`` at row j."""

    targets: list[list[int]]
    slope: float
    top_k: int

    @abstractmethod
    def look(self, sight: Sight) -> None: ...

    @abstractmethod
    def logits(self, sight: Sight) -> Array:
        """[T, n, E]: the estimates at the row, after ``look``."""

    def ahead(self, sight: Sight) -> Forecast:
        self.look(sight)
        targets = self.targets[sight.row]
        return list(zip(targets, needs(self.logits(sight), self.top_k, self.slope), strict=True)) if targets else []


class Leaps(Forecaster):
    """Routers of layers ahead applied to an estimate of their residual that is linear in what is known here.

    now[j]: [n, E, D], for the residual at row j. before[j]: [n, E, D], for the previous token's router input at each
    target, or None. Both at unit RMS. bias[j]: [n, E]. targets[j]: n rows. slope: of a need's logit by the router's.

    Closed form: a leap of the residual is a ridge regression, which is linear in its goal; so the router applied to the
    leap's result *is* one regression from the same features to the router's logits, and only that is kept.
    In NumPy: a forecast costs each layer a few products of some 50 rows, where most of torch's time is calling it.
    """

    def __init__(
        self,
        name: str,
        targets: list[list[int]],
        now: list[Tensor],
        before: list[Tensor] | None,
        bias: list[Tensor],
        slope: float,
        top_k: int,
    ) -> None:
        self.name = name  # type: ignore[misc]
        self.targets, self.now, self.before, self.bias = targets, now, before, bias
        self.slope, self.top_k = slope, top_k
        self._now = [w.float().flatten(0, 1).T.contiguous().numpy() for w in now]  # (D, n E)
        # What each row's forecasts start from: the bias, and what the previous token's state at the target says.
        self._bias = [b.float().numpy() for b in bias]  # (n, E)
        self._start = [b.copy() for b in self._bias]
        self._into: list[list[tuple[int, int]]] = [[] for _ in targets]  # by target: the forecasts of it
        for j, rows in enumerate(targets):
            for i, row in enumerate(rows):
                self._into[row].append((j, i))
        if before is not None:
            stacks = [[before[j][i] for j, i in into] or [before[0][0, :0]] for into in self._into]
            self._before = [torch.cat(stack).float().numpy() for stack in stacks]  # (m E, D)

    def look(self, sight: Sight) -> None:
        if self.before is None or not (into := self._into[sight.row]):
            return
        said = (self._before[sight.row] @ _unit(sight.state[-1])).reshape(len(into), -1)
        for (j, i), part in zip(into, said, strict=True):
            np.add(part, self._bias[j][i], out=self._start[j][i])

    def logits(self, sight: Sight) -> Array:
        start = self._start[sight.row]
        estimates: Array = (_unit(sight.residual) @ self._now[sight.row]).reshape(-1, *start.shape) + start
        return estimates


def needs(logits: Array, top_k: int, slope: float) -> list[list[float]]:
    """Estimated router logits [T, n, E] -> how likely any of the T tokens needs an expert, [n][E].

    One halfway between the k-th and the next logit is as likely as not.
    """
    ranked = np.sort(logits, 2)[..., -top_k - 1 :]
    middle = ranked[..., :2].mean(2, keepdims=True)
    spared = 1 / (1 + np.exp(np.clip(slope * (logits - middle), -30, 30)))
    return (1 - spared.prod(0)).tolist()  # type: ignore[no-any-return]


def _rows(x: Tensor) -> Array:
    values: Array = x.float().cpu().numpy()
    return values


def _unit(x: Tensor) -> Array:
    return _unit_rows(_rows(x))


def _unit_rows(x: Array) -> Array:
    """x [..., D] / rms(x), as ``kernels.rms_unit``."""
    unit: Array = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + UNIT_EPS)
    return unit


class Accelerated(Forecaster):
    """The paper's form: a second residual p that runs ahead of the first at rate R, helped by low-rank adapters.

        p[0] = x[0] + up_0 down_0 u(x[0]);   p[j] = p[j-1] + (x[j] - x[j-1]) + up_j down_j u(p[j-1] + x[j] - x[j-1])

    x[j]: the residual in front of row j's router; u: at unit RMS; down [n, r, D], up [n, D, r]. At row j, p stands for
    the residual of row R j, and the routers of rows R j .. R j + R - 1 are applied to it. It shares what the layers
    add to x, where the paper runs them on p once more: that would need experts of its own.
    """

    name = "m2r2-paper"

    def __init__(self, layers: list[MoELayer], rate: int, down: Tensor, up: Tensor) -> None:
        rows = len(layers)
        self.rate, self.down, self.up = rate, down, up
        self.targets = [[t for t in range(rate * j, rate * j + rate) if j < t < rows] for j in range(rows)]
        self.slope, self.top_k, self.num_experts = slope_of(layers), layers[0].top_k, len(layers[0].router)
        self._down, self._up = down.transpose(1, 2).numpy(), up.transpose(1, 2).numpy()
        routers = _routers(layers)
        self._routers = [torch.cat([routers[t] for t in ts] or [routers[0][:0]]).T.numpy() for ts in self.targets]
        self._row, self._x, self._p = -1, _NOTHING, _NOTHING

    def look(self, sight: Sight) -> None:
        j, x = sight.row, _rows(sight.residual)
        if j >= len(self._down):
            return
        goes_on = j == self._row + 1 and j and x.shape == self._x.shape  # else: a pass that begins here
        p: Array = self._p + (x - self._x) if goes_on else x
        self._p = p + (_unit_rows(p) @ self._down[j]) @ self._up[j]
        self._row, self._x = j, x

    def logits(self, sight: Sight) -> Array:
        z: Array = (_unit_rows(self._p) @ self._routers[sight.row]).reshape(len(self._p), -1, self.num_experts)
        return z


def residual(layers: list[MoELayer], targets: list[list[int]] | None = None) -> Leaps:
    """The plain residual: routers ahead applied to the residual as it is here, to the last layer of this token."""
    if targets is None:
        targets = [[j + d for d in DISTANCES if j + d < len(layers)] for j in range(len(layers))]
    routers = _routers(layers)
    empty = torch.zeros(0, *routers[0].shape)
    now = [torch.stack([routers[t] for t in rows]) if rows else empty for rows in targets]
    bias = [torch.zeros(n.shape[:2]) for n in now]
    return Leaps("residual", targets, now, None, bias, slope_of(layers), layers[0].top_k)


def _routers(layers: list[MoELayer]) -> list[Tensor]:
    """Each row's router [E, D], for a residual at unit RMS."""
    return [layer.router.float().cpu() * layer.norm.weight.detach().float().cpu() for layer in layers]


def slope_of(layers: list[MoELayer]) -> float:
    """Router logits in units of their typical spread: what a random direction of unit RMS sees."""
    spread = torch.stack([(layer.router.float() * layer.norm.weight.float()).norm(dim=1).mean() for layer in layers])
    return 4.0 / max(float(spread.mean()), 1e-6)


class Oracle(Predictor):
    """For study: knows what follows wherever it has seen these very states before, such as in an earlier equal run."""

    name = "oracle"
    most_tokens = 1 << 30

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.follows: dict[bytes, list[tuple[int, frozenset[int]]]] = {}
        self.recent: deque[bytes] = deque(maxlen=REACH)

    def ahead(self, sight: Sight) -> Forecast:
        experts = frozenset(expert for token in sight.routed for expert in token)
        for key in self.recent:
            if len(self.follows[key]) < REACH:
                self.follows[key].append((sight.row, experts))
        state = sight.residual.detach().contiguous().view(torch.uint8)
        key = sight.row.to_bytes(4, "little") + state.cpu().numpy().tobytes()
        known = self.follows.setdefault(key, [])
        if key not in self.recent:
            self.recent.append(key)
        return [(row, [float(e in experts) for e in range(self.num_experts)]) for row, experts in known]


class Shuffled(Predictor):
    """For study: another predictor's needs, given to the wrong experts."""

    name = "shuffled"

    def __init__(self, inner: Predictor, rows: int, num_experts: int) -> None:
        self.inner = inner
        generator = torch.Generator().manual_seed(0)
        self.order = [torch.randperm(num_experts, generator=generator).tolist() for _ in range(rows)]

    def look(self, sight: Sight) -> None:
        self.inner.look(sight)

    def ahead(self, sight: Sight) -> Forecast:
        return [(row, [need[e] for e in self.order[row]]) for row, need in self.inner.ahead(sight)]


# -- on disk -------------------------------------------------------------------------------------------------------

LEAPS, ADAPTERS = "leaps", "adapters"  # folders beside the packed experts


def write_leaps(folder: Path, leaps: Leaps, fingerprint: str, figures: dict[str, Any]) -> None:
    """Keep fitted leaps beside the packed experts in ``folder``. Raises SpecDecError if the disk refuses."""
    assert leaps.before is not None
    tensors: dict[str, Tensor] = {}
    for j, (now, before, bias) in enumerate(zip(leaps.now, leaps.before, leaps.bias, strict=True)):
        tensors |= {f"{j}/now": now, f"{j}/before": before, f"{j}/bias": bias}
    config = {"drafter": "expert-leaps", "base": {"fingerprint": fingerprint}, "targets": leaps.targets}
    artifacts.write(folder / LEAPS, config | {"slope": leaps.slope, "top_k": leaps.top_k, "figures": figures}, tensors)


def read_leaps(folder: Path, fingerprint: str, num_experts: int, hidden: int) -> Leaps:
    """Inverse of ``write_leaps``. Raises SpecDecError if there are none, or not for this model."""
    config, tensors = _read(folder, LEAPS, fingerprint, "--fit ANSWERS")
    try:
        targets = [[int(t) for t in row] for row in config["targets"]]
        now, before, bias = ([tensors[f"{j}/{part}"].float() for j in range(len(targets))] for part in PARTS)
        for rows, a, b, c in zip(targets, now, before, bias, strict=True):
            shape = (len(rows), num_experts, hidden)
            if not (a.shape == b.shape == shape and c.shape == shape[:2] and all(0 <= t < len(targets) for t in rows)):
                raise ValueError("a tensor of another shape")
        return Leaps("m2r2", targets, now, before, bias, float(config["slope"]), int(config["top_k"]))
    except (KeyError, TypeError, ValueError) as error:
        raise _unfit(folder / LEAPS, error) from None


PARTS = ("now", "before", "bias")


def write_adapters(folder: Path, found: Accelerated, fingerprint: str, figures: dict[str, Any]) -> None:
    """Keep trained adapters beside the packed experts in ``folder``. Raises SpecDecError if the disk refuses."""
    config = {"drafter": "expert-adapters", "base": {"fingerprint": fingerprint}, "rate": found.rate}
    artifacts.write(folder / ADAPTERS, config | {"figures": figures}, {"down": found.down, "up": found.up})


def read_adapters(folder: Path, fingerprint: str, layers: list[MoELayer]) -> Accelerated:
    """Inverse of ``write_adapters``. Raises SpecDecError if there are none, or not for this model."""
    config, tensors = _read(folder, ADAPTERS, fingerprint, "--fit ANSWERS --rate R")
    try:
        rate, down, up = int(config["rate"]), tensors["down"].float(), tensors["up"].float()
        width = layers[0].router.shape[1]
        if rate < 2 or len(down) > len(layers) or not down.shape[::2] == up.shape[:2] == (len(down), width):
            raise ValueError("a tensor of another shape")
        return Accelerated(layers, rate, down, up)
    except (KeyError, TypeError, ValueError) as error:
        raise _unfit(folder / ADAPTERS, error) from None


def _read(folder: Path, name: str, fingerprint: str, how: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = folder / name
    if not path.is_dir():
        raise SpecDecError(
            f"no expert predictor in '{path}'; fit one with 'specdec pack-experts MODEL DIR {how}', or use "
            "--expert-prefetch residual"
        )
    config, tensors = artifacts.read_config(path), artifacts.read_tensors(path)
    artifacts.check_base(config, fingerprint, str(path))
    return config, tensors


def _unfit(path: Path, error: Exception) -> SpecDecError:
    return SpecDecError(f"'{path}' is no expert predictor for this model ({error!r}); fit it again")
