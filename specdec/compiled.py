"""``torch.compile`` for parts of a layer: one definition, compiled once, called for all layers.

A part is a function of a layer (callables, whose weights become inputs of what is compiled) and of tensors. Sizes that
change from call to call stay open, but for 1, which is a case of its own. Knows nothing about what a part computes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch

from specdec.errors import SpecDecError

# Times that a part may be compiled, for all models of a process: one or several rows and tokens make four, beside
# adapters, dtypes and numbers of threads. PyTorch's 8 are few, and beyond its limit nothing runs.
CASES = 64


def can_compile(device: torch.device) -> bool:
    """Whether ``torch.compile`` finds what it needs: a C++ compiler for the CPU, triton elsewhere."""
    if device.type == "cpu":
        return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))
    return importlib.util.find_spec("triton") is not None


def check(device: torch.device) -> None:
    """Raise SpecDecError where ``can_compile`` is false."""
    if not can_compile(device):
        needed = "a C++ compiler (g++, or the one that $CXX names)" if device.type == "cpu" else "triton"
        raise SpecDecError(
            f"compiling for '{device.type}' needs {needed}, which is not there; install it, or go on without"
        )


def part(function: Callable[..., Any], varying: Sequence[Sequence[int]]) -> Callable[..., Any]:
    """``function``, whose last arguments are tensors, compiled when it is called.

    varying: which axes of each of these tensors change in size. What is called raises SpecDecError if compiling fails.
    """
    import torch._dynamo as dynamo  # heavy

    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, CASES)
    quick, count = torch.compile(function, fullgraph=True), len(varying)

    def run(*args: Any) -> Any:
        for tensor, axes in zip(args[-count:], varying, strict=True):
            dynamo.maybe_mark_dynamic(tensor, axes)
        try:
            return quick(*args)
        except (dynamo.exc.TorchDynamoException, dynamo.exc.FailOnRecompileLimitHit, OSError) as error:
            reason = textwrap.shorten(str(error).partition("\n")[0], 200, placeholder=" ...")
            raise SpecDecError(
                f"torch.compile failed ({reason}); mend its C++ compiler or triton, or its folder "
                "($TORCHINDUCTOR_CACHE_DIR), or go on without compile"
            ) from error

    return run
