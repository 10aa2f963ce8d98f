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

PREDICTORS = ("none", "previous-token", "residual", "m2r2", "oracle", "shuffled")
DISTANCES = (4, 2, 1)  # layers ahead that are predicted at a layer, far ones first
REACH = max(DISTANCES)

Forecast = list[tuple[int, list[float]]]  # row, need of each of its experts
Array = npt.NDArray[np.float32]


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


class Leaps(Predictor):
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
        """[T, n, E]: estimates of the routers' logits at the row's targets."""
        start = self._start[sight.row]
        return (_unit(sight.residual) @ self._now[sight.row]).reshape(-1, *start.shape) + start

    def ahead(self, sight: Sight) -> Forecast:
        targets = self.targets[sight.row]
        self.look(sight)
        return list(zip(targets, needs(self.logits(sight), self.top_k, self.slope), strict=True)) if targets else []


def needs(logits: Array, top_k: int, slope: float) -> list[list[float]]:
    """Estimated router logits [T, n, E] -> how likely any of the T tokens needs an expert, [n][E].

    One halfway between the k-th and the next logit is as likely as not.
    """
    ranked = np.sort(logits, 2)[..., -top_k - 1 :]
    middle = ranked[..., :2].mean(2, keepdims=True)
    spared = 1 / (1 + np.exp(np.clip(slope * (logits - middle), -30, 30)))
    return (1 - spared.prod(0)).tolist()  # type: ignore[no-any-return]


def _unit(x: Tensor) -> Array:
    """x [..., D] / rms(x), as ``kernels.rms_unit``."""
    values: Array = x.float().cpu().numpy()
    return values / np.sqrt(np.square(values).mean(-1, keepdims=True) + UNIT_EPS)


def residual(layers: list[MoELayer]) -> Leaps:
    """The plain residual: routers ahead applied to the residual as it is here, to the last layer of this token."""
    targets = [[j + d for d in DISTANCES if j + d < len(layers)] for j in range(len(layers))]
    routers = [layer.router.float().cpu() * layer.norm.weight.detach().float().cpu() for layer in layers]
    empty = torch.zeros(0, *routers[0].shape)
    now = [torch.stack([routers[t] for t in rows]) if rows else empty for rows in targets]
    bias = [torch.zeros(n.shape[:2]) for n in now]
    return Leaps("residual", targets, now, None, bias, slope_of(layers), layers[0].top_k)


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

LEAPS = "leaps"  # folder beside the packed experts


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
    if not (folder / LEAPS).is_dir():
        raise SpecDecError(
            f"no expert predictor in '{folder}'; fit one with 'specdec pack-experts MODEL DIR --fit ANSWERS', or use "
            "--expert-prefetch residual"
        )
    config, tensors = artifacts.read_config(folder / LEAPS), artifacts.read_tensors(folder / LEAPS)
    artifacts.check_base(config, fingerprint, str(folder / LEAPS))
    try:
        targets = [[int(t) for t in row] for row in config["targets"]]
        now, before, bias = ([tensors[f"{j}/{part}"].float() for j in range(len(targets))] for part in PARTS)
        for rows, a, b, c in zip(targets, now, before, bias, strict=True):
            shape = (len(rows), num_experts, hidden)
            if not (a.shape == b.shape == shape and c.shape == shape[:2] and all(0 <= t < len(targets) for t in rows)):
                raise ValueError("a tensor of another shape")
        return Leaps("m2r2", targets, now, before, bias, float(config["slope"]), int(config["top_k"]))
    except (KeyError, TypeError, ValueError) as error:
        raise SpecDecError(
            f"'{folder / LEAPS}' is no expert predictor for this model ({error!r}); fit it again"
        ) from None


PARTS = ("now", "before", "bias")
