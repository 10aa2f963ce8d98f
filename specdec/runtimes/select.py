"""Choosing the runtime of a model: the fastest that supports it here, or the one named."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from specdec.base.errors import NotFiniteError, SettingError, SpecDecError, did_you_mean
from specdec.base.options import Activations, KVCacheFormat, Runtime, Weights
from specdec.models.gguf.blocks import densify
from specdec.runtimes.checks import refuse_unsupported
from specdec.runtimes.fused import FusedTarget
from specdec.runtimes.graphs import GraphedTarget
from specdec.runtimes.native.target import NativeTarget
from specdec.runtimes.reference import ReferenceTarget
from specdec.runtimes.target import Target, lock_of

CHOICES = {"runtime": Runtime, "weights": Weights, "kv_cache": KVCacheFormat, "activations": Activations}


def needs_cpu(runtime: str, weights: str, kv_cache: str = "auto", activations: str = "auto") -> bool:
    """Whether these settings run on the CPU alone."""
    return runtime == "native" or weights in ("int8", "int4") or "int8" in (kv_cache, activations)


def check_names(
    runtime: str = "auto", weights: str = "auto", kv_cache: str = "auto", activations: str = "auto"
) -> None:
    """Raise SpecDecError for a name that ``make_target`` does not know."""
    for (what, kind), value in zip(CHOICES.items(), (runtime, weights, kv_cache, activations), strict=True):
        if value not in (known := tuple(kind)):
            raise SpecDecError(f"unknown {what} '{value}'{did_you_mean(value, known)}; there are: {', '.join(known)}")


def make_target(
    model: PreTrainedModel,
    runtime: str = "auto",
    weights: str = "auto",
    kv_cache: str = "auto",
    activations: str = "auto",
    slow_experts: bool = False,
) -> tuple[Target, str]:
    """The target of ``model`` in the runtime named, and a one-line note ("" if there is nothing to say).

    Raises SpecDecError if the model is unsupported, or does not fit the settings.

    runtime: "auto" is native (CPUs) or graphs (CUDA) if it supports the model on this machine, else fused (not on mps),
        else the reference runtime; the note then says why.
    weights: "auto" (as loaded, GGUF blocks as they are), "dense" (as loaded, in 16 or 32 bits), "int8" or "int4"
        (layers are quantised, in the model too: the quantised model is the base).
    kv_cache: "auto" (in the model's dtype) or "int8" (in the native runtime).
    slow_experts: experts are to be loaded from slow memory: the native runtime has its own, so it does not serve.
    activations: "auto" (8 bits for quantised weights in the native runtime, else the model's dtype), "int8" or "bf16".
    """
    check_names(runtime, weights, kv_cache, activations)
    rounded = weights in ("int8", "int4")
    if runtime == "reference" and rounded:
        raise SpecDecError(f"{weights} weights need the native or the fused runtime; use weights 'auto'")
    if kv_cache == "int8" and runtime not in ("auto", "native"):
        raise SpecDecError(f"the {runtime} runtime has no 8-bit KV cache, the native one has; use kv_cache 'auto'")
    if activations == "int8" and runtime not in ("auto", "native"):
        raise SpecDecError(
            f"the {runtime} runtime has no 8-bit activations, the native one has; use activations 'auto'"
        )
    if slow_experts and runtime == "native":
        raise SpecDecError(
            "the native runtime keeps all experts in memory; use runtime 'auto' for those in slow memory"
        )
    refuse_unsupported(model)
    with lock_of(model):  # a runtime may put its own form of the weights into the model
        native = model.dtype == torch.bfloat16 and not slow_experts
        return _make(model, runtime, weights, kv_cache, activations, ["native"] if native else [])


def _make(
    model: PreTrainedModel, runtime: str, weights: str, kv_cache: str, activations: str, native: list[str]
) -> tuple[Target, str]:
    rounded, reasons = weights in ("int8", "int4"), list[str]()
    first = {"cpu": [*native, "fused"], "cuda": ["graphs", "fused"], "mps": []}.get(model.device.type, ["fused"])
    every = ["native"] if "int8" in (kv_cache, activations) else [*first, "reference"]
    for name in every if runtime == "auto" else [runtime]:
        try:
            if name == "reference":  # it computes with the model's modules
                densify(model)
            if name == "native":
                return NativeTarget(model, weights, kv_cache, activations), ""
            if name in ("fused", "graphs") and weights == "int8":
                raise SpecDecError("8-bit weights need the native runtime")
            if name in ("fused", "graphs"):
                kind = FusedTarget if name == "fused" else GraphedTarget
                return kind(model, "int4" if rounded else "dense"), "; ".join(reasons)
            if not rounded:
                return ReferenceTarget(model), "; ".join(reasons)
        except (NotFiniteError, SettingError):
            raise
        except SpecDecError as error:
            if runtime != "auto" or name == "reference":  # it is about the model: that runtime serves all supported
                raise
            reasons.append(f"no {name} runtime: {error}")
    why = "; ".join(reasons) or f"on {model.device.type} there is the reference runtime alone"
    if kv_cache == "int8":
        raise SpecDecError(f"an 8-bit KV cache is not possible here ({why}); use kv_cache 'auto'")
    if activations == "int8":
        raise SpecDecError(f"8-bit activations are not possible here ({why}); use activations 'auto'")
    raise SpecDecError(f"{weights} weights are not possible here ({why}); use weights 'auto'")
