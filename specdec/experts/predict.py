"""Predictors: which experts a layer and those ahead will be routed to, from what is known as a pass enters the layer.

A predictor is asked once per layer and pass, before the layer's attention, and answers for this layer and layers ahead
with, for every expert, how likely it is to be needed: the *need* [E], in [0, 1]. Layers are counted by rows of the
packed file; rows after the last are the first ones of the next token. Predictions never touch the computation: a wrong
one costs time. Knows nothing of caches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
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
DISTANCES = (1, 0)  # layers ahead that are predicted at a layer, far ones first
REACH = 4  # layers ahead that the oracle knows

Forecast = list[tuple[int, list[float]]]  # row, need of each of its experts
Array = npt.NDArray[np.float32]
_NOTHING: Array = np.zeros((0, 0), np.float32)


class Predictor(ABC):
    """``most_tokens``: passes over more tokens need most experts anyway and are not predicted."""

    name: ClassVar[str]
    most_tokens = 16

    @abstractmethod
    def ahead(self, row: int, x: Tensor) -> Forecast:
        """Needs of this row and rows ahead, from the residual [T, D] that enters it. Called for every row of a pass."""

    def look(self, row: int, x: Tensor) -> None:
        """As ``ahead``, where no forecast is wanted."""
        self.ahead(row, x)

    def routed(self, row: int, experts: list[list[int]]) -> None:  # noqa: B027 (most predictors need not know)
        """Told what the row's router chose for each token, [T][k]."""


class PreviousToken(Predictor):
    """The experts that a layer's last token needed."""

    name = "previous-token"

    def __init__(self, rows: int, num_experts: int) -> None:
        self.seen: list[list[float] | None] = [None] * rows
        self.num_experts = num_experts

    def ahead(self, row: int, x: Tensor) -> Forecast:
        target = (row + DISTANCES[0]) % len(self.seen)
        seen = self.seen[target]
        return [] if seen is None else [(target, seen)]

    def routed(self, row: int, experts: list[list[int]]) -> None:
        need = [0.0] * self.num_experts
        for expert in experts[-1]:
            need[expert] = 1.0
        self.seen[row] = need


class Forecaster(Predictor):
    """A predictor that estimates the logits of routers: those of rows ``targets[j]`` at row j."""

    targets: list[list[int]]
    slope: float
    top_k: int

    @abstractmethod
    def logits(self, row: int, x: Tensor) -> Array:
        """[T, n, E]: the estimates at the row, in a pass that has been at the rows before."""

    def ahead(self, row: int, x: Tensor) -> Forecast:
        return list(zip(self.targets[row], needs(self.logits(row, x), self.top_k, self.slope), strict=True))

    def look(self, row: int, x: Tensor) -> None:
        self.logits(row, x)


class Leaps(Forecaster):
    """Routers applied to an estimate of their residual that is linear in what is known at a layer.

    now[j]: [n, E, D], for the residual that enters row j. before[j]: [n, E, D], for the one that entered each target
    with the previous token, or None. Both at unit RMS. bias[j]: [n, E]. targets[j]: n rows. slope: of a need's logit by
    the router's.

    Closed form: a leap of the residual is a ridge regression, which is linear in its goal; so the router applied to the
    leap's result *is* one regression from the same features to the router's logits, and only that is kept.
    In NumPy, all a row's state is multiplied with in one product: the time of a forecast is that of calling things.
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
        # What each row's forecasts start from: the bias, and what the previous token's state at the target says.
        self._bias = [b.float().numpy() for b in bias]  # (n, E)
        self._start = [b.copy() for b in self._bias]
        self._into: list[list[tuple[int, int]]] = [[] for _ in targets]  # by target: the forecasts of it
        for j, rows in enumerate(targets):
            for i, row in enumerate(rows):
                if before is not None:
                    self._into[row].append((j, i))
        self._weights = []  # what a row's state is multiplied with, (D, (n + m) E)
        for n, into in zip(now, self._into, strict=True):
            stack = torch.cat([n, *(before[j][i : i + 1] for j, i in into if before)])
            self._weights.append(stack.float().flatten(0, 1).T.contiguous().numpy())

    def logits(self, row: int, x: Tensor) -> Array:
        start, into = self._start[row], self._into[row]
        said = (_unit_rows(_rows(x)) @ self._weights[row]).reshape(len(x), -1, start.shape[1])  # (T, n + m, E)
        estimates: Array = said[:, : len(start)] + start
        for (j, i), part in zip(into, said[-1, len(start) :], strict=True):
            np.add(part, self._bias[j][i], out=self._start[j][i])
        return estimates

    def within(self, distances: Sequence[int]) -> Leaps:
        """Only those to rows that far ahead."""
        rows = len(self.targets)
        kept = [[i for i, t in enumerate(ts) if (t - j) % rows in distances] for j, ts in enumerate(self.targets)]
        now, before, bias = (
            None if each is None else [w[i] for w, i in zip(each, kept, strict=True)]
            for each in (self.now, self.before, self.bias)
        )
        targets = [[ts[i] for i in some] for ts, some in zip(self.targets, kept, strict=True)]
        assert now is not None and bias is not None
        return Leaps(self.name, targets, now, before, bias, self.slope, self.top_k)


def needs(logits: Array, top_k: int, slope: float) -> list[list[float]]:
    """Estimated router logits [T, n, E] -> how likely any of the T tokens needs an expert, [n][E].

    One halfway between the k-th and the next logit is as likely as not.
    """
    ranked = np.sort(logits, 2)
    middle = (ranked[..., -top_k] + ranked[..., -top_k - 1]) / 2 if top_k < logits.shape[2] else ranked[..., 0]
    spared = 1 / (1 + np.exp(np.minimum(slope * (logits - middle[..., None]), 30)))
    return (1 - (spared[0] if len(spared) == 1 else spared.prod(0))).tolist()  # type: ignore[no-any-return]


def _rows(x: Tensor) -> Array:
    values: Array = x.float().cpu().numpy()
    return values


def _unit_rows(x: Array) -> Array:
    """x [T, D] / rms(x), as ``kernels.rms_unit``."""
    unit: Array = x / np.sqrt(np.einsum("td,td->t", x, x)[:, None] / x.shape[1] + UNIT_EPS)
    return unit


class Accelerated(Forecaster):
    """The paper's form: a second residual p that runs ahead of the first at rate R, helped by low-rank adapters.

        p[0] = x[0] + up_0 down_0 u(x[0]);   p[j] = p[j-1] + (x[j] - x[j-1]) + up_j down_j u(p[j-1] + x[j] - x[j-1])

    x[j]: the residual that enters row j; u: at unit RMS; down [n, r, D], up [n, D, r]. At row j, p stands for the
    residual in front of the router of row R j, and the routers of rows R j .. R j + R - 1 are applied to it. It shares
    what the layers add to x, where the paper runs them on p once more: that would need experts of its own.
    """

    name = "m2r2-paper"

    def __init__(self, layers: list[MoELayer], rate: int, down: Tensor, up: Tensor) -> None:
        rows = len(layers)
        self.rate, self.down, self.up = rate, down, up
        self.targets = [[t for t in range(rate * j, rate * j + rate) if t < rows] for j in range(rows)]
        self.slope, self.top_k, self.num_experts = slope_of(layers), layers[0].top_k, len(layers[0].router)
        self._down, self._up = down.transpose(1, 2).numpy(), up.transpose(1, 2).numpy()
        routers = _routers(layers)
        self._routers = [torch.cat([routers[t] for t in ts] or [routers[0][:0]]).T.numpy() for ts in self.targets]
        self._row, self._x, self._p = -1, _NOTHING, _NOTHING

    def logits(self, row: int, x: Tensor) -> Array:
        if row < len(self._down):
            entering = _rows(x)
            goes_on = row == self._row + 1 and row and entering.shape == self._x.shape  # else: a pass that begins here
            p: Array = self._p + (entering - self._x) if goes_on else entering
            self._p = p + (_unit_rows(p) @ self._down[row]) @ self._up[row]
            self._row, self._x = row, entering
        z: Array = _unit_rows(self._p) @ self._routers[row]
        return z.reshape(len(z), len(self.targets[row]), self.num_experts)


def residual(
    layers: list[MoELayer], targets: list[list[int]] | None = None, distances: Sequence[int] = DISTANCES
) -> Leaps:
    """The plain residual: routers applied to the residual as it enters a layer, up to the last layer of this token."""
    if targets is None:
        targets = [[j + d for d in distances if j + d < len(layers)] for j in range(len(layers))]
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
        self.recent: deque[bytes] = deque(maxlen=REACH + 1)

    def ahead(self, row: int, x: Tensor) -> Forecast:
        key = row.to_bytes(4, "little") + x.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()
        known = self.follows.setdefault(key, [])
        if key not in self.recent:
            self.recent.append(key)
        return [(row, [float(e in experts) for e in range(self.num_experts)]) for row, experts in known]

    def routed(self, row: int, experts: list[list[int]]) -> None:
        chosen = frozenset(expert for token in experts for expert in token)
        for key in self.recent:
            if len(self.follows[key]) <= REACH:
                self.follows[key].append((row, chosen))


class Shuffled(Predictor):
    """For study: another predictor's needs, given to the wrong experts."""

    name = "shuffled"

    def __init__(self, inner: Predictor, rows: int, num_experts: int) -> None:
        self.inner = inner
        generator = torch.Generator().manual_seed(0)
        self.order = [torch.randperm(num_experts, generator=generator).tolist() for _ in range(rows)]

    def look(self, row: int, x: Tensor) -> None:
        self.inner.look(row, x)

    def ahead(self, row: int, x: Tensor) -> Forecast:
        return [(target, [need[e] for e in self.order[target]]) for target, need in self.inner.ahead(row, x)]


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
