"""What training runs on: the fused runtime, or the reference for families it does not know."""

from __future__ import annotations

import ctypes
import sys

from transformers import PreTrainedModel

from specdec.base.errors import SpecDecError
from specdec.runtimes.fused import FusedTarget
from specdec.runtimes.reference import ReferenceTarget
from specdec.runtimes.target import Target


def training_target(model: PreTrainedModel) -> Target:
    """The runtime for blocks of many tokens, with gradients. Raises SpecDecError for unsupported models."""
    try:
        return FusedTarget(model, packs=False)
    except SpecDecError:
        return ReferenceTarget(model)


def keep_freed_memory() -> None:
    """Have glibc reuse large blocks instead of returning them: fresh pages cost more than the arithmetic on them.

    An elementwise operation on 20 MB was seen to take 42 ms with the defaults and 5 ms so. Elsewhere: no effect.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its highest
            mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
            mallopt(-2, 256 << 20)  # M_TOP_PAD
