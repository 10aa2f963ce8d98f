"""What training runs on: the fused runtime, or the reference for families it does not know, and a compiled loss.

The fused runtime is as fast on a training batch as layers that are compiled and have the adapters multiplied into their
weights (955 against 954 tokens a CPU second of one AVX-512 core, 755 without compiling anything); compiling the loss
over the draft vocabulary is what still pays.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config as functorch_config
from transformers import PreTrainedModel

from specdec.compiled import can_compile
from specdec.errors import SpecDecError
from specdec.fused import FusedTarget
from specdec.target import ReferenceTarget, Target


def training_target(model: PreTrainedModel) -> Target:
    """The runtime for blocks of many tokens, with gradients. Raises SpecDecError for unsupported models."""
    try:
        return FusedTarget(model, packs=False)
    except SpecDecError:
        return ReferenceTarget(model)


class Compiler:
    """``torch.compile`` for functions of tensors without side effects, as long as it works.

    Compilers fail for reasons that are none of the training's (a broken toolchain, a full disk for their files): from
    the first failure on, everything runs as it is written, and ``say`` is told once.
    """

    def __init__(self, device: torch.device, say: Callable[[str], None]) -> None:
        self.works, self.say = can_compile(device), say

    def __call__(self, part: Callable[..., Any]) -> Callable[..., Any]:
        if not self.works:
            return part
        logging.getLogger("torch._inductor").setLevel(logging.ERROR)
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
        # By default the backward pass is compiled when it is needed, far from the call that could do without.
        functorch_config.force_non_lazy_backward_lowering = True
        quick = torch.compile(part, dynamic=False)

        def run(*args: Any) -> Any:
            if self.works:
                try:
                    return quick(*args)
                except Exception as error:
                    values = part(*args)  # raises what is not the compiler's fault
                    self.works = False
                    reason = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")
                    self.say(f"torch.compile failed, training goes on without it, but slower ({reason})")
                    return values
            return part(*args)

        return run


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
