"""Predictors of the experts that a layer and those ahead will need.

A predictor is called once per layer and pass, before the layer's attention. It returns for this layer and layers ahead
the probability that each expert is needed: its *need* [E]. Layers are rows of the packed file; rows after the last are
the first ones of the next token. A wrong prediction costs time; it never changes the result.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specdec.base.errors import SpecDecError
from specdec.models import drafter_folder
from specdec.runtimes.experts.layers import MoELayer
from specdec.runtimes.linear_maps import UNIT_EPS

DISTANCES = (2, 1, 0)  # distances to the layers that are predicted at a layer
FOLDER = "predictor"  # subfolder of the packed experts

Needs = list[tuple[int, list[float]]]  # row, need of each of its experts
Array = npt.NDArray[np.float32]


class Predictor(ABC):
    """most_tokens: passes over more tokens, which need most experts anyway, are not predicted."""

    most_tokens = 16

    @abstractmethod
    def ahead(self, row: int, x: Tensor) -> Needs:
        """The needs of this row and rows ahead, from the residual [T, D] that enters it."""

    def routed(self, row: int, experts: list[list[int]]) -> None:  # noqa: B027 (optional)
        """Receive the experts that the row's router chose for each token, [T][k]."""


class PreviousToken(Predictor):
    """Predicts the experts that the next layer needed for the previous token."""

    def __init__(self, rows: int, num_experts: int) -> None:
        self.seen: list[list[float] | None] = [None] * rows
        self.num_experts = num_experts

    def ahead(self, row: int, x: Tensor) -> Needs:
        target = (row + 1) % len(self.seen)
        seen = self.seen[target]
        return [] if seen is None else [(target, seen)]

    def routed(self, row: int, experts: list[list[int]]) -> None:
        need = [0.0] * self.num_experts
        for expert in experts[-1]:
            need[expert] = 1.0
        self.seen[row] = need


class LinearPredictor(Predictor):
    """Estimates the logits of routers ahead from the residual that enters a row, at unit RMS.

    targets[j]: the n rows that row j predicts.
    weight[j], bias[j]: [n, E, D], [n, E].
    slope: log-odds of a need per unit of a router's logit.
    """

    def __init__(
        self, targets: list[list[int]], weight: list[Tensor], bias: list[Tensor], slope: float, top_k: int
    ) -> None:
        self.targets, self.weight, self.bias = targets, weight, bias
        self.slope, self.top_k = slope, top_k
        # All weights of a row for one product, (D, n E).
        self._columns: list[Array] = [w.float().flatten(0, 1).T.contiguous().numpy() for w in weight]
        self._bias: list[Array] = [b.float().numpy() for b in bias]

    def logits(self, row: int, x: Tensor) -> Array:
        """[T, n, E]: estimates of the router logits at ``targets[row]``."""
        values: Array = x.float().cpu().numpy()  # (T, D)
        scale = 1 / np.sqrt(np.square(values).mean(1, keepdims=True) + UNIT_EPS)
        estimates: Array = (values @ self._columns[row] * scale).reshape(len(values), *self._bias[row].shape)
        return estimates + self._bias[row]

    def ahead(self, row: int, x: Tensor) -> Needs:
        return list(zip(self.targets[row], needs(self.logits(row, x), self.top_k, self.slope), strict=True))


def needs(logits: Array, top_k: int, slope: float) -> list[list[float]]:
    """Estimated router logits [T, n, E] -> the probability that any of the T tokens needs an expert, [n][E].

    It is one half for a logit halfway between the k-th largest and the next one.
    """
    ranked = np.sort(logits, 2)
    middle = (ranked[..., -top_k] + ranked[..., -top_k - 1]) / 2 if top_k < logits.shape[2] else ranked[..., 0]
    unneeded = 1 / (1 + np.exp(np.minimum(slope * (logits - middle[..., None]), 30)))
    return (1 - unneeded.prod(0)).tolist()  # type: ignore[no-any-return]


def residual(layers: list[MoELayer]) -> LinearPredictor:
    """Applies routers of layers ahead to the residual as it enters a layer, up to the last layer of this token."""
    targets = [[j + d for d in DISTANCES if j + d < len(layers)] for j in range(len(layers))]
    routers = [layer.router.float().cpu() * layer.norm.weight.detach().float().cpu() for layer in layers]
    weight = [torch.stack([routers[t] for t in ts]) for ts in targets]
    bias = [each.new_zeros(each.shape[:2]) for each in weight]
    return LinearPredictor(targets, weight, bias, slope_of(layers), layers[0].top_k)


def slope_of(layers: list[MoELayer]) -> float:
    """The slope for router logits in units of their standard deviation over random directions of unit RMS."""
    deviation = torch.stack([(layer.router.float() * layer.norm.weight.float()).norm(dim=1).mean() for layer in layers])
    return 4.0 / max(float(deviation.mean()), 1e-6)


# -- on disk -------------------------------------------------------------------------------------------------------


def write_predictor(folder: Path, predictor: LinearPredictor, fingerprint: str, figures: dict[str, Any]) -> None:
    """Write a fitted predictor beside the packed experts in ``folder``. Raises SpecDecError if the disk refuses."""
    parts = {"weight": predictor.weight, "bias": predictor.bias}
    tensors = {f"{j}/{name}": tensor for name, each in parts.items() for j, tensor in enumerate(each)}
    config = {
        "drafter": "expert-predictor",
        "base": {"fingerprint": fingerprint},
        "targets": predictor.targets,
        "slope": predictor.slope,
        "top_k": predictor.top_k,
        "figures": figures,
    }
    drafter_folder.write(folder / FOLDER, config, tensors)


def read_predictor(folder: Path, fingerprint: str, num_experts: int, hidden: int) -> LinearPredictor:
    """Inverse of ``write_predictor``. Raises SpecDecError if there is none, or not for this model."""
    path = folder / FOLDER
    if not path.is_dir():
        raise SpecDecError(
            f"no expert predictor in '{path}'; fit one with 'specdec pack-experts MODEL DIR --fit ANSWERS', or use "
            "--expert-prefetch residual"
        )
    config = drafter_folder.read_config(path)
    if (trained := config.get("base", {}).get("fingerprint")) != fingerprint:
        raise SpecDecError(
            f"the expert predictor in '{path}' was fitted for base weights {trained}, but the loaded model's are "
            f"{fingerprint}; fit one for this model with 'specdec pack-experts MODEL DIR --fit ANSWERS'"
        )
    try:
        targets = [[int(t) for t in row] for row in config["targets"]]
        if not all(0 <= t < len(targets) for row in targets for t in row):
            raise ValueError("a layer that is not there")
        slope, top_k = float(config["slope"]), int(config["top_k"])
        if not math.isfinite(slope) or not 1 <= top_k <= num_experts:
            raise ValueError("slope or top_k out of range")
        with drafter_folder.open_tensors(path / drafter_folder.WEIGHTS) as stored:

            def tensors(name: str, *last: int) -> list[Tensor]:
                shapes = {f"{j}/{name}": (len(row), num_experts, *last) for j, row in enumerate(targets)}
                if odd := [key for key, shape in shapes.items() if tuple(stored.header[key].shape) != shape]:
                    raise ValueError(f"'{odd[0]}' has another shape")
                return [stored.read(key).float() for key in shapes]

            return LinearPredictor(targets, tensors("weight", hidden), tensors("bias"), slope, top_k)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SpecDecError(f"'{path}' is not an expert predictor for this model ({error!r}); fit it again") from None
