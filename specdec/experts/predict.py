"""Predictors: which experts a layer and those ahead will be routed to, from what is known as a pass enters the layer.

A predictor is asked once per layer and pass, before the layer's attention, and answers for this layer and layers ahead
with, for every expert, how likely it is to be needed: the *need* [E], in [0, 1]. Layers are counted by rows of the
packed file; rows after the last are the first ones of the next token. Predictions never touch the computation: a wrong
one costs time. Knows nothing of caches.
"""

from __future__ import annotations

import ctypes
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specdec import artifacts, native
from specdec.errors import SpecDecError
from specdec.experts.layers import MoELayer
from specdec.kernels import UNIT_EPS

PREDICTORS = ("none", "previous-token", "residual", "m2r2", "oracle", "shuffled")
DISTANCES = (2, 1, 0)  # layers ahead that are predicted at a layer
REACH = 4  # layers ahead that the oracle knows
PAST = ("last", "before", "router")  # what leaps know beside the residual that enters

Forecast = list[tuple[int, list[float]]]  # row, need of each of its experts
Array = npt.NDArray[np.float32]


class Predictor(ABC):
    """``most_tokens``: passes over more tokens need most experts anyway and are not predicted.

    ``learns``: from every pass. Others are told nothing of passes without prefetching, and begin anew after them.
    ``refines``: knows more of a row as a pass enters it than before.
    """

    name: ClassVar[str]
    most_tokens = 16
    learns = False
    refines = False

    @abstractmethod
    def ahead(self, row: int, x: Tensor) -> Forecast:
        """Needs of this row and rows ahead, from the residual [T, D] that enters it. Called for every row of a pass."""

    def look(self, row: int, x: Tensor) -> None:
        """As ``ahead``, where no forecast is wanted."""
        self.ahead(row, x)

    def routed(self, row: int, x: Tensor, experts: list[list[int]]) -> None:  # noqa: B027 (some need not know)
        """Told what the row's router chose for each token, [T][k], given x [T, D]."""


class PreviousToken(Predictor):
    """The experts that a layer's last token needed."""

    name = "previous-token"

    def __init__(self, rows: int, num_experts: int) -> None:
        self.seen: list[list[float] | None] = [None] * rows
        self.num_experts = num_experts

    def ahead(self, row: int, x: Tensor) -> Forecast:
        target = (row + 1) % len(self.seen)
        seen = self.seen[target]
        return [] if seen is None else [(target, seen)]

    def routed(self, row: int, x: Tensor, experts: list[list[int]]) -> None:
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
    """Routers applied to an estimate of their input that is linear in what is known at a layer.

    now[j]: [n, E, D], for the residual that enters row j, at unit RMS. past: the like for what else is known, by name
    (``PAST``), or nothing: "last", for the router's input a row before (of this token; at row 0 of the one before);
    "before", for the residual that entered each target with the previous token, at unit RMS; "router", for the router's
    input there. bias[j]: [n, E]. targets[j]: n rows. slope: of a need's logit by the router's.

    Closed form: a leap of the residual is a ridge regression, which is linear in its goal; so the router applied to the
    leap's result *is* one regression from the same features to the router's logits, and only that is kept.
    In NumPy, all a state is multiplied with in one product: the time of a forecast is that of calling things. Where the
    native kernels run, a forecast is one call: between two layers all code is cold, and calls are dear.
    """

    def __init__(
        self,
        name: str,
        targets: list[list[int]],
        now: list[Tensor],
        past: dict[str, list[Tensor]],
        bias: list[Tensor],
        slope: float,
        top_k: int,
    ) -> None:
        self.name = name  # type: ignore[misc]
        self.targets, self.now, self.past, self.bias = targets, now, past, bias
        self.slope, self.top_k = slope, top_k
        self.refines = all(j in rows for j, rows in enumerate(targets))
        # Forecasts lie in the order of their targets, so that those of one target are a slice.
        order = sorted((t, j, i) for j, rows in enumerate(targets) for i, t in enumerate(rows))
        place = {(j, i): p for p, (_, j, i) in enumerate(order)}
        self._from = [np.array([place[j, i] for i in range(len(rows))], int) for j, rows in enumerate(targets)]
        ends = np.searchsorted([t for t, _, _ in order], range(len(targets) + 1)).tolist()
        self._into = [slice(a, b if past else a) for a, b in pairwise(ends)]
        # What each forecast starts from: the bias, and what the previous token's states at the target say.
        experts = bias[0].shape[1]
        self._bias: Array = np.stack([bias[j][i].float().numpy() for _, j, i in order])  # (forecasts, E)
        self._start = self._bias.copy()
        # What the row before said of each token, and of how many.
        self._last = [np.zeros((self.most_tokens, len(rows), experts), np.float32) for rows in targets]
        self._known = [1] * len(targets)
        # What the states of a row are multiplied with: the one that enters, (D, (n + m) E), and the router's input.
        known = {name: [each[j][i] for _, j, i in order] for name, each in past.items()}
        self._weights = [_columns(n, known.get("before", [])[at]) for n, at in zip(now, self._into, strict=True)]
        after = [*past["last"][1:], past["last"][0]] if past else []
        self._routers = [_columns(n, known["router"][at]) for n, at in zip(after, self._into, strict=False)]
        self._need = np.empty((max(map(len, targets)), experts), np.float32)
        self._native = self._foresights()

    def ahead(self, row: int, x: Tensor) -> Forecast:
        if not self._native or not _plain(x):
            return super().ahead(row, x)
        need, wide = self._need[: len(self.targets[row])], x.dtype == torch.float32
        native.at_once().specdec_foresee(
            self._native[row], x.data_ptr(), wide, len(x), self._known[row], need.ctypes.data
        )
        return list(zip(self.targets[row], need.tolist(), strict=True))

    def logits(self, row: int, x: Tensor) -> Array:
        values, last = _rows(x), self._last[row][: self._known[row]]
        count, into = len(self._from[row]), self._into[row]
        said = values @ self._weights[row] * _to_unit(values)
        said = said.reshape(len(x), -1, self._bias.shape[1])  # (T, n + m, E)
        if len(last) != len(x):
            last = last[-1:]
        estimates: Array = said[:, :count] + (self._start[self._from[row]] + last)
        np.add(said[-1, count:], self._bias[into], out=self._start[into])
        return estimates

    def look(self, row: int, x: Tensor) -> None:
        self.logits(row, x[-1:])

    def routed(self, row: int, x: Tensor, experts: list[list[int]]) -> None:
        if not self._routers:
            return
        after, into = (row + 1) % len(self.targets), self._into[row]
        if not after or len(x) > self.most_tokens:
            x = x[-1:]
        self._known[after] = len(x)
        if self._native and _plain(x):
            wide = x.dtype == torch.float32
            native.at_once().specdec_routed(self._native[row], x.data_ptr(), wide, len(x))
            return
        values = _rows(x)
        said = (values @ self._routers[row]).reshape(len(values), -1, self._bias.shape[1])
        count = len(self._from[after])
        self._last[after][: len(x)] = said[:, :count]
        self._start[into] += said[-1, count:]

    def _foresights(self) -> list[Any]:
        """Pointers to what the native kernels need of each row; empty where there are none."""
        try:
            native.at_once()
        except SpecDecError:
            return []
        rows, (_, experts) = len(self.targets), self._bias.shape
        self._held = [np.ascontiguousarray(places, np.int32) for places in self._from]  # what pointers point to
        made = []
        for row, into in enumerate(self._into):
            after = (row + 1) % rows
            entering, routing = self._weights[row], self._routers[row] if self._routers else None
            made.append(
                native.Foresight(
                    *(len(entering), experts, len(self._from[row]), len(self._from[after])),
                    *(into.stop - into.start, into.start, self.top_k, 0, self.slope, UNIT_EPS),
                    *(entering.ctypes.data, routing.ctypes.data if routing is not None else None),
                    *(each.ctypes.data for each in (self._held[row], self._bias, self._start)),
                    *(self._last[row].ctypes.data, self._last[after].ctypes.data),
                )
            )
        return [ctypes.pointer(each) for each in made]

    def within(self, distances: Sequence[int]) -> Leaps:
        """Only those to rows that far ahead."""
        rows = len(self.targets)
        kept = [[i for i, t in enumerate(ts) if (t - j) % rows in distances] for j, ts in enumerate(self.targets)]

        def some(each: list[Tensor]) -> list[Tensor]:
            return [w[i] for w, i in zip(each, kept, strict=True)]

        targets = [[ts[i] for i in these] for ts, these in zip(self.targets, kept, strict=True)]
        past = {name: some(each) for name, each in self.past.items()}
        return Leaps(self.name, targets, some(self.now), past, some(self.bias), self.slope, self.top_k)


def _columns(first: Tensor, others: list[Tensor]) -> Array:
    """[n, E, D] and m times [E, D] -> (D, (n + m) E)."""
    columns: Array = torch.cat([first, *(each[None] for each in others)]).float().flatten(0, 1).T.contiguous().numpy()
    return columns


def needs(logits: Array, top_k: int, slope: float) -> list[list[float]]:
    """Estimated router logits [T, n, E] -> how likely any of the T tokens needs an expert, [n][E].

    One halfway between the k-th and the next logit is as likely as not.
    """
    ranked = np.sort(logits, 2)
    middle = (ranked[..., -top_k] + ranked[..., -top_k - 1]) / 2 if top_k < logits.shape[2] else ranked[..., 0]
    spared = 1 / (1 + np.exp(np.minimum(slope * (logits - middle[..., None]), 30)))
    return (1 - (spared[0] if len(spared) == 1 else spared.prod(0))).tolist()  # type: ignore[no-any-return]


def _plain(x: Tensor) -> bool:
    """Whether the native kernels can read it."""
    return x.dtype in (torch.bfloat16, torch.float32) and x.device.type == "cpu" and x.is_contiguous()


def _rows(x: Tensor) -> Array:
    values: Array = x.float().cpu().numpy()
    return values


def _to_unit(x: Array) -> Array:
    """What makes rows x [T, D] those of ``kernels.rms_unit``: [T, 1]."""
    scale: Array = 1 / np.sqrt((x @ x.T).diagonal()[:, None] / x.shape[1] + UNIT_EPS)
    return scale


def residual(layers: list[MoELayer], distances: Sequence[int] = DISTANCES) -> Leaps:
    """The plain residual: routers applied to the residual as it enters a layer, up to the last layer of this token."""
    targets = [[j + d for d in distances if j + d < len(layers)] for j in range(len(layers))]
    routers = _routers(layers)
    empty = torch.zeros(0, *routers[0].shape)
    now = [torch.stack([routers[t] for t in rows]) if rows else empty for rows in targets]
    bias = [torch.zeros(n.shape[:2]) for n in now]
    return Leaps("residual", targets, now, {}, bias, slope_of(layers), layers[0].top_k)


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
    learns = True

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

    def routed(self, row: int, x: Tensor, experts: list[list[int]]) -> None:
        chosen = frozenset(expert for token in experts for expert in token)
        for key in self.recent:
            if len(self.follows[key]) <= REACH:
                self.follows[key].append((row, chosen))


class Shuffled(Predictor):
    """For study: another predictor's needs, given to the wrong experts."""

    name = "shuffled"

    def __init__(self, inner: Predictor, rows: int, num_experts: int) -> None:
        self.inner, self.refines = inner, inner.refines
        generator = torch.Generator().manual_seed(0)
        self.order = [torch.randperm(num_experts, generator=generator).tolist() for _ in range(rows)]

    def look(self, row: int, x: Tensor) -> None:
        self.inner.look(row, x)

    def routed(self, row: int, x: Tensor, experts: list[list[int]]) -> None:
        self.inner.routed(row, x, experts)

    def ahead(self, row: int, x: Tensor) -> Forecast:
        return [(target, [need[e] for e in self.order[target]]) for target, need in self.inner.ahead(row, x)]


# -- on disk -------------------------------------------------------------------------------------------------------

LEAPS = "leaps"  # folder beside the packed experts


def write_leaps(folder: Path, leaps: Leaps, fingerprint: str, figures: dict[str, Any]) -> None:
    """Keep fitted leaps beside the packed experts in ``folder``. Raises SpecDecError if the disk refuses."""
    parts = {"now": leaps.now, **leaps.past, "bias": leaps.bias}
    tensors = {f"{j}/{name}": tensor for name, each in parts.items() for j, tensor in enumerate(each)}
    config = {"drafter": "expert-leaps", "base": {"fingerprint": fingerprint}, "targets": leaps.targets}
    artifacts.write(folder / LEAPS, config | {"slope": leaps.slope, "top_k": leaps.top_k, "figures": figures}, tensors)


def read_leaps(folder: Path, fingerprint: str, num_experts: int, hidden: int) -> Leaps:
    """Inverse of ``write_leaps``. Raises SpecDecError if there are none, or not for this model."""
    path = folder / LEAPS
    config = _config(path, fingerprint)
    try:
        targets = [[int(t) for t in row] for row in config["targets"]]
        if not all(0 <= t < len(targets) for row in targets for t in row):
            raise ValueError("a layer that is not there")
        shapes = {
            f"{j}/{name}": (len(row), num_experts, hidden)[: 2 if name == "bias" else 3]
            for j, row in enumerate(targets)
            for name in ("now", *PAST, "bias")
        }
        tensors = _tensors(path, shapes)
        parts = {name: [tensors[f"{j}/{name}"] for j in range(len(targets))] for name in ("now", *PAST, "bias")}
        past = {name: parts[name] for name in PAST}
        slope, top_k = float(config["slope"]), int(config["top_k"])
        if not math.isfinite(slope) or not 1 <= top_k <= num_experts:
            raise ValueError("slope or top_k out of range")
        return Leaps("m2r2", targets, parts["now"], past, parts["bias"], slope, top_k)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _unfit(path, error) from None


def _config(path: Path, fingerprint: str) -> dict[str, Any]:
    if not path.is_dir():
        raise SpecDecError(
            f"no expert predictor in '{path}'; fit one with 'specdec pack-experts MODEL DIR --fit ANSWERS', or use "
            "--expert-prefetch residual"
        )
    config = artifacts.read_config(path)
    artifacts.check_base(config, fingerprint, str(path))
    return config


def _tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a predictor, float32. Raises ValueError, before anything is read, for those of another shape."""
    with artifacts.opened(path / artifacts.WEIGHTS) as stored:
        if odd := [name for name, shape in shapes.items() if tuple(stored.header[name].shape) != shape]:
            raise ValueError(f"'{odd[0]}' has another shape")
        return {name: stored.read(name).float() for name in shapes}


def _unfit(path: Path, error: Exception) -> SpecDecError:
    return SpecDecError(f"'{path}' is not an expert predictor for this model ({error!r}); fit it again")
