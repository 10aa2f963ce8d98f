"""Choosing the runtime of a model: the fastest that supports it here, or the one named."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from specdec.base.errors import NotFiniteError, SettingError, SpecDecError, did_you_mean
from specdec.base.options import Activations, KVCacheFormat, Runtime, Weights
from specdec.models.gguf.blocks import BlockExperts, densify
from specdec.runtimes.checks import refuse_unsupported
from specdec.runtimes.experts.offload import ExpertOptions
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
    experts: ExpertOptions | None = None,
) -> tuple[Target, str]:
    """The target of ``model`` in the runtime named, and a one-line note ("" if there is nothing to say).

    Raises SpecDecError if the model is unsupported, or does not fit the settings.

    runtime: "auto" is native (CPUs) or graphs (CUDA) if it supports the model on this machine, else fused (not on mps),
        else the reference runtime; the note then says why.
    weights: "auto" (as loaded, GGUF blocks as they are), "dense" (as loaded, in 16 or 32 bits), "int8" or "int4"
        (layers are quantised, in the model too: the quantised model is the base).
    kv_cache: "auto" (in the model's dtype) or "int8" (in the native runtime).
    experts: how experts are to be loaded from slow memory. The native runtime does so by itself for those in blocks,
        without prefetching (``Target.experts``); else the caller does, and the target runs the model's own modules.
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
    kept = experts is None or (experts.plain and any(isinstance(each, BlockExperts) for each in model.modules()))
    if not kept and runtime == "native":
        raise SpecDecError(
            "the native runtime loads the experts of GGUF files alone on demand, and none ahead; use runtime 'auto'"
        )
    refuse_unsupported(model)
    with lock_of(model):  # a runtime may put its own form of the weights into the model
        native = ["native"] if model.dtype == torch.bfloat16 and kept else []
        return _make(model, (runtime, weights, kv_cache, activations), native, experts)


def _make(
    model: PreTrainedModel, names: tuple[str, str, str, str], native: list[str], experts: ExpertOptions | None
) -> tuple[Target, str]:
    runtime, weights, kv_cache, activations = names
    rounded, reasons = weights in ("int8", "int4"), list[str]()
    first = {"cpu": [*native, "fused"], "cuda": ["graphs", "fused"], "mps": []}.get(model.device.type, ["fused"])
    every = ["native"] if "int8" in (kv_cache, activations) else [*first, "reference"]
    for name in every if runtime == "auto" else [runtime]:
        try:
            if name == "reference":  # it computes with the model's modules
                densify(model)
            if name == "native":
                return NativeTarget(model, weights, kv_cache, activations, experts.cache if experts else None), ""
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
