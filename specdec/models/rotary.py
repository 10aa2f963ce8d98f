"""Compute rotary embeddings: cosines and sines by position, for scaling types that depend on the position alone."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.base.errors import SpecDecError
from specdec.models.families import head_sizes

TYPES = "default", "linear", "llama3", "proportional", "yarn"


class Rotary:
    """The rotary embedding of a model: a callable that returns cosines and sines, as transformers' module bit by bit.

    config: the text model's config. Scaling types other than ``TYPES`` are refused at the call.

    inv_freq: layer type -> inverse frequencies, float32 [rotated / 2]; the key is "" if all layers have the same.
        "rotated" is the number of values of a head that rotate.
    scaling: layer type -> factor of the cosines and sines, with the same keys.
    rope_type: the scaling type, such as "yarn", or a mapping from layer type to scaling type.
    halved: whether results have each cosine and sine once instead of twice.
    wide: whether results are float32 instead of the input's dtype.
    """

    def __init__(self, config: Any, halved: bool = False, wide: bool = False) -> None:
        parameters, self.halved, self.wide = config.rope_parameters, halved, wide
        nested = bool(parameters) and all(isinstance(value, dict) for value in parameters.values())
        parts: dict[str, Any] = parameters if nested else {"": parameters}
        used = set(getattr(config, "layer_types", None) or parts) if nested else {""}
        parts = {kind: part for kind, part in parts.items() if kind in used}
        kinds = {kind: part.get("rope_type", "default") for kind, part in parts.items()}
        self.rope_type: Any = kinds if nested else kinds[""]
        self.inv_freq, self.scaling = dict[str, Tensor](), dict[str, float]()
        for kind, part in parts.items():
            if kinds[kind] in TYPES:  # a runtime refuses others
                layer = config.layer_types.index(kind) if kind else 0
                size, _ = head_sizes(config, layer)
                self.inv_freq[kind], self.scaling[kind] = _frequencies(config, part, kinds[kind], size)

    def __call__(self, x: Tensor, positions: Tensor, layer_type: str = "") -> tuple[Tensor, Tensor]:
        """Return (cosines, sines) for ``positions`` [B, T], each [B, T, rotated]; [B, T, rotated / 2] if ``halved``.

        "rotated" is the number of values of a head that rotate. Without ``halved``, the second half of the last
        dimension repeats the first.
        x: a tensor whose dtype the results get, unless ``wide``. layer_type: the layer type whose frequencies are used;
        "": all layers have the same. Raises SpecDecError for a scaling type that is not supported.
        """
        if layer_type not in self.inv_freq:
            raise SpecDecError(f"rotary embeddings of type '{self.rope_type}' are not supported here")
        angles = positions[..., None].float() * self.inv_freq[layer_type]
        angles = angles if self.halved else torch.cat((angles, angles), -1)
        scaling = self.scaling[layer_type]
        kind = torch.float32 if self.wide else x.dtype
        return (angles.cos() * scaling).to(kind), (angles.sin() * scaling).to(kind)

    def divide(self, factors: Tensor) -> None:
        """Divide the inverse frequencies by ``factors``, one for each, in place; later calls use the quotients.

        factors: [rotated / 2]. Only for models whose layers all have the same frequencies.
        """
        self.inv_freq[""] = self.inv_freq[""] / factors.to(self.inv_freq[""].dtype)


def _frequencies(config: Any, rope: dict[str, Any], kind: str, head: int) -> tuple[Tensor, float]:
    """Return (inverse frequencies, float32 [rotated / 2]; factor of the cosines and sines).

    "rotated" is the number of values of a head that rotate. config: the text model's config. rope: its
    ``rope_parameters``, or those of one layer type. kind: the scaling type, one of ``TYPES``. head: number of values in
    a head.
    """
    if kind == "proportional":  # all of the head rotates, most of it by 0
        count = int((rope.get("partial_rotary_factor") or 1.0) * head // 2)
        powers = rope["rope_theta"] ** (torch.arange(0, 2 * count, 2, dtype=torch.int64).float() / head)
        return F.pad(1.0 / powers, (0, head // 2 - count)) / (rope.get("factor") or 1.0), 1.0
    dim = int(head * (rope.get("partial_rotary_factor") or 1.0))
    if not 0 < dim <= head:
        raise SpecDecError(f"rotary embeddings of {dim} of the {head} values of a head are impossible")
    powers = rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if kind == "yarn":
        return _yarn(config, rope, powers, dim)
    found: Tensor = 1.0 / powers
    if kind == "linear":
        found = found / rope["factor"]
    if kind == "llama3":
        found = _llama3(rope, found)
    return found, 1.0


def _llama3(rope: dict[str, Any], frequencies: Tensor) -> Tensor:
    """Return rotary frequencies scaled as in Llama 3.1: low ones are divided by a factor, high ones stay.

    rope: the config's ``rope_parameters``, which have the factor and the limits. frequencies: inverse frequencies,
    float32 [rotated / 2], where "rotated" is the number of values of a head that rotate. The result has this shape.
    """
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context, waves = rope["original_max_position_embeddings"], 2 * math.pi / frequencies
    found = torch.where(waves > context / low, frequencies / factor, frequencies)
    smooth = (context / waves - low) / (high - low)
    between = ~(waves < context / high) * ~(waves > context / low)
    return torch.where(between, (1 - smooth) * found / factor + smooth * found, found)


def _yarn(config: Any, rope: dict[str, Any], powers: Tensor, dim: int) -> tuple[Tensor, float]:
    factor, context, theta = rope["factor"], rope["original_max_position_embeddings"], rope["rope_theta"]
    if factor is None:
        factor = config.max_position_embeddings / context

    def scale(by: float = 1) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    scaling = rope.get("attention_factor")
    if scaling is None:
        both = rope.get("mscale") and rope.get("mscale_all_dim")
        scaling = float(scale(rope["mscale"]) / scale(rope["mscale_all_dim"])) if both else scale()
    ends = [
        dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
    ]
    if config.rope_parameters.get("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], dim - 1)
    if first == last:
        last += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    own, stretched, share = 1.0 / powers, 1.0 / (factor * powers), 1 - ramp
    return stretched * (1 - share) + own * share, scaling
