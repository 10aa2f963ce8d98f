"""Chooses the runtime of a model: the fastest one that supports it on this machine, or the one that is named."""

from __future__ import annotations

from typing import get_args

import torch

from specdec.base.errors import (
    MemoryFullError,
    NotFiniteError,
    SettingError,
    SpecDecError,
    did_you_mean,
    one_line,
    out_of_memory,
)
from specdec.base.options import KVCacheFormat, Runtime, Weights
from specdec.models.gguf.blocks import densify
from specdec.models.native_model import AnyModel, as_transformers
from specdec.runtimes.checks import refuse_unsupported
from specdec.runtimes.native.target import native_target
from specdec.runtimes.target import Target, lock_of
from specdec.runtimes.torch.graphs import CapturedTarget
from specdec.runtimes.torch.target import TorchTarget

CHOICES = {"runtime": Runtime, "weights": Weights, "kv_cache": KVCacheFormat}
FORMER = {"graphs": "torch", "fused": "torch", "reference": "transformers"}  # names of earlier versions
ONLY_NATIVE = {"weights": "weights in fewer bits", "kv_cache": "8-bit KV cache", "expert_cache": "expert cache"}


def needs_cpu(runtime: str, weights: str, kv_cache: str = "auto") -> bool:
    """Return whether these settings are possible only in the native runtime, which runs on CPUs.

    runtime: "auto", "native", "torch" or "transformers". weights: "auto", "dense", "int8" or "int4".
    kv_cache: "auto" or "int8".
    """
    return runtime == "native" or weights in ("int8", "int4") or kv_cache == "int8"


def check_names(runtime: str = "auto", weights: str = "auto", kv_cache: str = "auto") -> None:
    """Raise SpecDecError if a setting is not one of its known values, with a suggestion if the value looks mistyped.

    runtime: "auto", "native", "torch" or "transformers". weights: "auto", "dense", "int8" or "int4".
    kv_cache: "auto" or "int8".
    """
    for (what, kind), value in zip(CHOICES.items(), (runtime, weights, kv_cache), strict=True):
        if value not in (known := get_args(kind)):
            meant = did_you_mean(FORMER.get(value, value) if what == "runtime" else value, known)
            raise SpecDecError(f"unknown {what} '{value}'{meant}; there are: {', '.join(known)}")


def make_target(
    model: AnyModel,
    runtime: str = "auto",
    weights: str = "auto",
    kv_cache: str = "auto",
    expert_cache: float | None = None,
    expert_prefetch: bool = False,
    packed: bool = True,
) -> tuple[Target, str]:
    """Make the target: ``model`` in the runtime that runs it.

    runtime: "native" (compiled CPU kernels), "torch", "transformers" (the model's own forward), or "auto": the first of
        these that supports the model on this machine.
    weights: "auto": as loaded; GGUF blocks stay, and the native runtime multiplies them with activations in 8 bits.
        "dense": dequantized to 16 or 32 bits. "int8", "int4" (native runtime): layers are quantized, also in ``model``.
    kv_cache: format of keys and values. "auto": the model's dtype. "int8" (native runtime): 8 bits.
    expert_cache: how many of a mixture's experts stay in memory, as a share (float) or in bytes (int) (native runtime);
        None: all experts, or as many as there is memory for.
    expert_prefetch: whether experts are read ahead by forecasts.
    packed: whether the native runtime reads packed weights from a file in the model's cache entry, or writes that file.

    Returns the target, and a one-line note for the user why faster runtimes are not used, or "".

    Raises SpecDecError if the runtime does not support the model or the settings, MemoryFullError if memory is full.
    """
    check_names(runtime, weights, kv_cache)
    asked = {"weights": weights, "kv_cache": kv_cache, "expert_cache": expert_cache}
    special = [name for name, value in asked.items() if value not in ("auto", "dense", None)]
    if special and runtime not in ("auto", "native"):
        what = ONLY_NATIVE[special[0]]
        raise SpecDecError(f"the {runtime} runtime has no {what}, the native one has; use runtime 'auto'")
    refuse_unsupported(model)
    if expert_prefetch and expert_cache is None:
        raise SpecDecError("expert_prefetch goes with expert_cache; give its size, such as 0.25")
    native = ["native"] if special or model.dtype == torch.bfloat16 else []
    first = native if model.device.type == "cpu" else []
    every = [runtime] if runtime != "auto" else native if special else [*first, "torch", "transformers"]
    reasons = list[str]()
    with lock_of(model):  # a runtime may put its own form of the weights into the model
        for name in every:
            try:
                if name == "native":
                    how = weights, kv_cache, expert_cache, expert_prefetch
                    return native_target(model, *how, keep=packed), ""
                return _other(name, model), "; ".join(reasons)
            except (NotFiniteError, SettingError, MemoryFullError):
                raise
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                what = "the memory of this device is full while the model loads; take a smaller model, or bfloat16"
                raise MemoryFullError(f"{model.device}: {what} ({one_line(error)})") from error
            except SpecDecError as error:
                if runtime != "auto" or name == "transformers":  # it is about the model: that one serves all supported
                    raise
                reasons.append(f"no {name} runtime: {error}")
    what = f"{special[0]} '{asked[special[0]]}'"
    raise SpecDecError(f"{what} is not possible here ({'; '.join(reasons)}); leave it out")


def _other(name: str, model: AnyModel) -> Target:
    if name == "torch":
        return CapturedTarget(model) if model.device.type == "cuda" else TorchTarget(model)
    from specdec.runtimes.transformers import TransformersTarget  # heavy

    densify(model)  # it computes with the model's modules
    return TransformersTarget(as_transformers(model))
