"""Identify models, by hashes and by sampled values of their weights.

A trained drafter needs the model that it was trained for, in any precision; a stored KV cache needs one whose results
are equal bit for bit. ``fingerprint`` hashes some elements of each parameter, ``content`` hashes all. If fingerprints
differ, stored ``samples`` tell whether one model is the other in another precision: quantized weights lie on a grid
whose step a few neighbouring values show, and quantization moves a value by at most half a step. Smaller changes of a
model are not detected.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from specdec.base import memory
from specdec.base.errors import SpecDecError
from specdec.models.gguf.blocks import Blocks, named_weights

SAMPLES = 512  # elements of a parameter in a fingerprint
VECTORS, MATRICES = 4, 12  # maximum number of sampled vectors and matrices
WINDOWS, WINDOW = 2, 16  # windows of a sampled tensor, and consecutive values of one block in a window
MAX_TENSORS, MAX_TEXT = 64, 4096  # limits of samples that are read: tensors, and characters of a tensor's values
FINE = 160  # rounding to 8 bits or bfloat16 moves a value by at most 1 / FINE of the largest value of its window
HASHED = 1 << 24  # values that are hashed at a time
NAMES = {"_name_or_path", "transformers_version"}  # config fields that change no result
# Share of all sampled values, and of one tensor's, that may differ by more than rounding, as clipped values do.
BEYOND, BEYOND_ONE = 0.05, 0.5


def sample_positions(size: int) -> Tensor:
    """Return up to 512 evenly spaced indices below ``size``, int64 [n]."""
    count = min(size, SAMPLES)
    return torch.arange(count) * size // max(count, 1)


def sample(parameter: Tensor | Blocks) -> Tensor:
    """Return up to 512 evenly spaced elements of a parameter, [n], in its dtype and on its device.

    Elements of a parameter that is stored in GGUF blocks are dequantized to float32.
    If the parameter is mapped from a file, the memory that this read has filled is freed (``memory.release``).
    """
    positions = sample_positions(parameter.shape.numel())
    if isinstance(parameter, Blocks):
        found = parameter.at(positions // parameter.shape[-1], positions % parameter.shape[-1])
        memory.release(*parameter.memory)
        return found
    flat, index = positions.to(parameter.device), list[Tensor]()
    for size in parameter.shape[::-1]:  # torch.unravel_index imports SymPy
        index.append(flat % size)
        flat = flat // size
    values: Tensor = parameter.detach()[tuple(index[::-1])]
    memory.release(parameter.detach())
    return values


def fingerprint(model: nn.Module, sample: Callable[[Tensor | Blocks], Tensor] = sample) -> str:
    """Return 32 hex digits that identify a model's weights, whatever dtype and device they are loaded to.

    SHA-256 of each parameter's name, shape and up to 512 evenly spaced elements as bf16, in order of the names. Among
    parameters with equal content, such as tied ones, only the first counts. Parameters of one element do not count. The
    fingerprint of a merged LoRA adapter counts, too. Quantized weights give another fingerprint.
    sample: returns these elements of a parameter, as the function ``sample`` does; for callers that have a faster one.
    """
    digest, seen = hashlib.sha256(), set()
    if (merged := merged_adapter(model)) is not None:
        digest.update(f"{merged.fingerprint} ".encode())
    for name, parameter in sorted(named_weights(model), key=lambda pair: pair[0]):
        if parameter.shape.numel() == 1:
            continue
        values = sample(parameter).to(torch.bfloat16)
        # Values below 2^-16 become zero: float16 cannot represent them all, and zero then has one sign.
        values = torch.where(values.abs() < 2**-16, torch.zeros_like(values), values)
        content = f"{tuple(parameter.shape)}".encode() + values.cpu().view(torch.int16).numpy().tobytes()
        if content not in seen:
            seen.add(content)
            digest.update(f"{name} ".encode() + content)
    return digest.hexdigest()[:32]


def merged_adapter(model: nn.Module) -> Any:
    """Return the record of the LoRA adapter that is merged into ``model``, an ``adapter.Merged``; None: none is."""
    return getattr(model, "merged_adapter", None)


def numbers(target: Any, *more: object) -> str:
    """Return 64 hex digits, equal only for loaded models that compute keys, values and logits equal bit for bit.

    They are a SHA-256 of the weights' fingerprint (only samples of the weights), the text config, the model's buffers
    (such as rotary frequencies), dtypes and formats of weights, activations and KV cache, and the versions of libraries
    and kernels.
    target: a ``runtimes.target.Target``, a model with its runtime. more: further values that are hashed by their text.
    """
    model = target.model
    config = model.config.get_text_config()
    fields = {key: value for key, value in config.to_dict().items() if key not in NAMES}
    formats = target.runtime, target.weight_format, target.activations, target.kv_cache, target.dtype
    modules = config._attn_implementation, getattr(config, "_experts_implementation", ""), target.experts is not None
    torchs = torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_float32_matmul_precision()
    kernels = target.kernels, target.device.type, *map(metadata.version, ("transformers", "specdec-m2r2"))
    every = target.fingerprint, fields, formats, modules, torchs, kernels, more
    digest = hashlib.sha256(json.dumps(every, sort_keys=True, default=str).encode())
    frequencies = getattr(getattr(model.base_model, "rotary_emb", None), "inv_freq", None)
    beside = dict(model.named_buffers()) | (frequencies if isinstance(frequencies, dict) else {})
    for name, buffer in sorted(beside.items()):
        values = sample(buffer).reshape(-1).cpu().contiguous().view(torch.uint8)
        digest.update(f"\n{name} {buffer.dtype} {tuple(buffer.shape)} ".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def content(model: nn.Module) -> str:
    """Return 64 hex digits that identify all weights of a model, bit for bit, as a SHA-256.

    Weights that are mapped from a file are represented by the file's size, times and inode and their position in it,
    because reading them takes seconds per gigabyte.
    """
    digest, origin = hashlib.sha256(), getattr(model, "origin", None)
    if origin is not None:
        digest.update(f"{origin.stamp} {origin.adapter}".encode())
    for name, weight in sorted(named_weights(model), key=lambda pair: pair[0]):
        for part in weight.memory if isinstance(weight, Blocks) else (weight.detach(),):
            place = None if origin is None else origin.place(part)
            digest.update(f"\n{name} {part.dtype} {tuple(part.shape)} {place} ".encode())
            for piece in part.reshape(-1).split(HASHED) if place is None else ():
                digest.update(piece.cpu().view(torch.uint8).numpy().data)
            memory.release(part)
    return digest.hexdigest()


def samples(model: nn.Module) -> dict[str, Any]:
    """Return sampled values of some weights, for a drafter's config, as JSON values.

    The result is {name of a weight: {"shape": [...], "values": "0.12 -0.5 ..."}} for up to 4 vectors and 12 matrices;
    the text has up to 32 decimal numbers. ``difference`` compares a model with it.
    """
    found = dict[str, Any]()
    weights = {name: weight for name, weight in named_weights(model) if weight.shape.numel() > 1}
    for dimensions, most in ((1, VECTORS), (2, MATRICES)):
        names = sorted(name for name, weight in weights.items() if len(weight.shape) == dimensions)
        for name in names[:: max(1, len(names) // most)][:most]:  # the first matrix is the output head
            found |= samples_of({name: weights[name]})
    return found


def samples_of(weights: Mapping[str, Tensor | Blocks]) -> dict[str, Any]:
    """Return sampled values of ``weights``, vectors and matrices by name, in the form that ``samples`` returns."""
    return {n: {"shape": list(weight.shape), "values": _text(_values(weight))} for n, weight in weights.items()}


def difference(given: Any, model: nn.Module, where: str) -> str | None:
    """Compare a model with another one, of which only sampled weights are known; differences by rounding do not count.

    given: sampled values of the other model's weights as ``samples`` returns them, {weight: {"shape": [...],
        "values": "text"}}. They may come from an untrusted file.
    model: the loaded model. If a LoRA adapter is merged into it, its weights before the merge may match instead.
    where: name of the file that has ``given``, for error messages.

    Returns one sentence that says how the models differ, such as "the model has no 'lm_head.weight'"; None: they are
    the same model, perhaps in different precisions. Raises SpecDecError for broken samples.
    """
    wanted, own = _read(given, where), dict(named_weights(model))
    found = _difference(wanted, own, {}, where)
    if found is None or (merged := merged_adapter(model)) is None:
        return found
    return _difference(wanted, own, _read(merged.samples, merged.name), where)


def _difference(
    wanted: Mapping[str, tuple[list[int], Tensor]],
    own: Mapping[str, Tensor | Blocks],
    before: Mapping[str, tuple[list[int], Tensor]],
    where: str,
) -> str | None:
    """Return how weights differ by more than rounding from samples of another model, as text; None: they do not.

    wanted: {weight: (shape, sampled values, float32 [n])} of the other model. own: weights of this model by name.
    before: samples, in the same form, of this model's weights before a LoRA merge, which replace those of ``own``.
    where: the file with ``wanted``, for messages.
    Raises SpecDecError if ``wanted`` has another number of values than ``own``.
    """
    beyond, count = 0, 0
    for name, (shape, values) in wanted.items():
        if name not in own:
            return f"the model has no '{name}'"
        if list(own[name].shape) != shape:
            return f"'{name}' is {tuple(own[name].shape)} in the model and {tuple(shape)} in the other"
        found = before[name][1] if name in before else _values(own[name])
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
    """Return the values of a vector or matrix at fixed indices, float32 [n] on the CPU.

    They are two windows, one behind the other, of up to 16 neighbouring values of a row each.
    """
    rows, columns = (1, *weight.shape)[-2:]
    width = min(WINDOW, columns)
    starts = [(n * rows // WINDOWS, n * (columns // width) // WINDOWS * width) for n in range(WINDOWS)]
    row = torch.tensor([row for row, _ in starts]).repeat_interleave(width)
    column = torch.tensor([start + i for _, start in starts for i in range(width)])
    if isinstance(weight, Blocks):
        return weight.at(row, column)
    values = weight.detach().view(rows, columns) if weight.dim() == 1 else weight.detach()
    return values[row.to(values.device), column.to(values.device)].float().cpu()


def _beyond(found: Tensor, given: Tensor) -> int:
    """Return how many values of a weight differ between two models by more than the rounding of both explains.

    found, given: its values in either model at the same indices, float32 [n], as ``_values`` returns them.
    """
    count = 0
    for pair in zip(found.chunk(WINDOWS), given.chunk(WINDOWS), strict=True):
        largest = float(torch.stack(pair).abs().max())
        allowed = 0.55 * sum(_step(values) for values in pair) + largest / FINE
        count += int(((pair[0] - pair[1]).abs() > allowed).sum())
    return count


def _step(values: Tensor) -> float:
    """Return the step of the grid on which quantized values lie: their differences are multiples of it.

    Returns 0 if there is no such grid, or it is too fine to tell.
    values: neighbouring values of one row, float [n], which have a scale in common if the weight is quantized.
    """
    largest = float(values.abs().max())
    gaps = values.unique().diff()
    if not len(gaps) or float(gaps.min()) <= largest / FINE:
        return 0.0
    steps = (gaps / gaps.min()).round()
    step = float(gaps.sum() / steps.sum())
    on_grid = (gaps - steps * step).abs() <= 0.1 * step + largest / 256  # bfloat16's precision
    return step if bool(on_grid.all()) else 0.0


def _text(values: Tensor) -> str:
    return " ".join(f"{value:.5g}" for value in values.tolist())


def _read(given: Any, where: str) -> Mapping[str, tuple[list[int], Tensor]]:
    try:
        if not 0 < len(given) <= MAX_TENSORS or any(len(each["values"]) > MAX_TEXT for each in given.values()):
            raise ValueError
        read = {name: (each["shape"], [float(v) for v in each["values"].split()]) for name, each in given.items()}
        if not all(values and all(map(math.isfinite, values)) for _, values in read.values()):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise SpecDecError(f"'{where}' has broken samples of the base model; train or get the drafter again") from None
    return {name: (shape, torch.tensor(values)) for name, (shape, values) in read.items()}
