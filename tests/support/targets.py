"""Targets of tiny models in the runtimes, and the mark of tests that need the native kernels."""

from typing import Any

import pytest
from tiny import model_of, tiny_model

from specdec.runtimes.native import library
from specdec.runtimes.native.target import NativeTarget
from specdec.runtimes.target import Target
from specdec.runtimes.torch.target import TorchTarget
from specdec.runtimes.transformers import TransformersTarget

REASON = "there are no native kernels here"
needs_native = pytest.mark.skipif(not library.runs(), reason=REASON)
QUICK = "native" if library.runs() else "transformers"  # the latter takes ten times as long


def reference_of(model: Any) -> Target:
    """Return ``model`` as its own modules compute it, or through PyTorch if these do not run one by one."""
    tangled = getattr(model.config, "hidden_size_per_layer_input", 0) or getattr(
        model.config, "num_kv_shared_layers", 0
    )
    return (TorchTarget if tangled else TransformersTarget)(model)


def target_of(runtime: str, family: str = "llama") -> Target:
    """Return a tiny model of ``family`` in ``runtime``; skip the test if it needs native kernels that are not there."""
    if runtime == "native":
        return NativeTarget(model_of(family)) if library.runs() else pytest.skip(REASON)
    return (TorchTarget if runtime == "torch" else TransformersTarget)(tiny_model(family))
