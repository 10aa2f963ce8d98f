"""Whether a model is the one that something was made for, in whatever precision its weights are.

A fingerprint says whether two models have the same weights. Where they differ, sampled values say whether one is the
other in another precision: weights in blocks lie on a grid, whose step shows in any few of them, and rounding to it
moves a value by half a step at most. A change smaller than that rounding cannot be seen.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from specdec.base import memory
from specdec.base.errors import SpecDecError
from specdec.models import checkpoint
from specdec.models.gguf.blocks import Blocks, named_weights

VECTORS, MATRICES = 4, 12  # that are sampled,
WINDOWS, WINDOW = 2, 16  # at so many places each, and so many values in a row there (of one block)
MOST_TENSORS, MOST_TEXT = 64, 4096  # that are read
FINE = 160  # the part of the largest value nearby that rounding to 8 bits, or to bfloat16, may move one
BEYOND, BEYOND_ONE = 0.05, 0.5  # shares of all values, and of one tensor's, that may lie farther away: some are clipped


def fingerprint(model: nn.Module) -> str:
    """32 hex digits that identify a model's weights, the same whatever dtype or device they are loaded in.

    SHA-256 over every parameter's name, shape and up to 512 evenly strided elements as bf16, in order of names; of
    parameters with equal content (tied ones among them, tied or not after a runtime rearranged them) only the first.
    """
    digest, seen = hashlib.sha256(), set()
    for name, parameter in sorted(named_weights(model), key=lambda pair: pair[0]):
        sample = checkpoint.sample(parameter).to(torch.bfloat16)
        # Below 2^-16 float16 cannot hold every bf16 value; zero also has one sign only.
        sample = torch.where(sample.abs() < 2**-16, torch.zeros_like(sample), sample)
        content = f"{tuple(parameter.shape)}".encode() + sample.cpu().view(torch.int16).numpy().tobytes()
        if content not in seen:
            seen.add(content)
            digest.update(f"{name} ".encode() + content)
        memory.release(parameter.data if isinstance(parameter, Blocks) else parameter.detach())
    return digest.hexdigest()[:32]


def samples(model: nn.Module) -> dict[str, Any]:
    """Of some of the model's tensors, by name: the shape, and values at fixed places as text."""
    weights, found = dict(named_weights(model)), dict[str, Any]()
    for dimensions, most in ((1, VECTORS), (2, MATRICES)):
        names = sorted(name for name, weight in weights.items() if len(weight.shape) == dimensions)
        for name in names[:: max(1, len(names) // most)][:most]:  # the output head is the first of the matrices
            found[name] = {"shape": list(weights[name].shape), "values": _text(_values(weights[name]))}
    return found


def difference(given: Any, model: nn.Module, where: str) -> str | None:
    """How the model differs from the one of these ``samples`` by more than rounding; None if it does not.

    Raises SpecDecError, which names ``where`` they are from, if they are none.
    """
    own, beyond, count = dict(named_weights(model)), 0, 0
    for name, (shape, values) in _read(given, where).items():
        if name not in own:
            return f"the model has no '{name}'"
        if list(own[name].shape) != shape:
            return f"'{name}' is {tuple(own[name].shape)} in the model and {tuple(shape)} in the other"
        found = _values(own[name])
        if len(found) != len(values):
            raise SpecDecError(f"'{where}' has broken samples of the base model; train or get the drafter again")
        far = _beyond(found, values)
        if far > BEYOND_ONE * len(values):
            return f"the values of '{name}' differ by more than rounding"
        beyond, count = beyond + far, count + len(values)
    if beyond > BEYOND * count:
        return f"{beyond} of {count} sampled values differ by more than rounding"
    return None


def _values(weight: Tensor | Blocks) -> Tensor:
    """The values of a tensor at fixed places, float32: rows of at most ``WINDOW``, each in one block."""
    rows, columns = (1, *weight.shape)[-2:]
    width = min(WINDOW, columns)
    places = [(n * rows // WINDOWS, n * (columns // width) // WINDOWS * width) for n in range(WINDOWS)]
    row = torch.tensor([row for row, _ in places]).repeat_interleave(width)
    column = torch.tensor([start + i for _, start in places for i in range(width)])
    if isinstance(weight, Blocks):
        return weight.at(row, column)
    values = weight.detach().view(rows, columns) if weight.dim() == 1 else weight.detach()
    return values[row.to(values.device), column.to(values.device)].float().cpu()


def _beyond(found: Tensor, given: Tensor) -> int:
    """How many values lie farther apart than the rounding of both explains."""
    count = 0
    for pair in zip(found.chunk(WINDOWS), given.chunk(WINDOWS), strict=True):
        largest = float(torch.stack(pair).abs().max())
        allowed = 0.55 * sum(_step(values) for values in pair) + largest / FINE
        count += int(((pair[0] - pair[1]).abs() > allowed).sum())
    return count


def _step(values: Tensor) -> float:
    """The step of the grid that a few values of one block lie on; 0 if it is too fine to be seen, or there is none."""
    largest = float(values.abs().max())
    gaps = values.unique().diff()
    if not len(gaps) or float(gaps.min()) <= largest / FINE:
        return 0.0
    steps = (gaps / gaps.min()).round()
    step = float(gaps.sum() / steps.sum())
    on_grid = (gaps - steps * step).abs() <= 0.1 * step + largest / 256  # in bfloat16
    return step if bool(on_grid.all()) else 0.0


def _text(values: Tensor) -> str:
    return " ".join(f"{value:.5g}" for value in values.tolist())


def _read(given: Any, where: str) -> Mapping[str, tuple[list[int], Tensor]]:
    """Untrusted ``samples`` as shapes and values."""
    try:
        if not 0 < len(given) <= MOST_TENSORS or any(len(each["values"]) > MOST_TEXT for each in given.values()):
            raise ValueError
        read = {name: (each["shape"], [float(v) for v in each["values"].split()]) for name, each in given.items()}
        if not all(values and all(map(math.isfinite, values)) for _, values in read.values()):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise SpecDecError(f"'{where}' has broken samples of the base model; train or get the drafter again") from None
    return {name: (shape, torch.tensor(values)) for name, (shape, values) in read.items()}
