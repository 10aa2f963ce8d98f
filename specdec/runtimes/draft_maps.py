"""Linear maps of drafters, with constant weights: by the native kernels where they serve."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from specdec.runtimes.linear_maps import UNIT_EPS, Linear, dense, packable, packed, rms_unit
from specdec.runtimes.native import linear


def for_drafting(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """As ``dense``, for constant weights of a drafter: in the fastest format at one row, which may be quantised."""
    if linear.serves(weight):
        return linear.Packed([weight], bias, draft_only=True)
    return (packed if packable(weight.dtype, weight.device) else dense)(weight.detach(), bias)


class UnitMap:
    """``linear(cat(parts, each divided by its RMS))``, with a weight as in ``for_drafting``.

    packed: its form for the compiled kernels, if they run here.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, packed: linear.Packed | None = None) -> None:
        if packed is None and linear.serves(weight):
            packed = linear.Packed([weight], bias, draft_only=True)
        self.packed, self.linear = packed, None if packed else for_drafting(weight, bias)

    @classmethod
    def making(cls, weight: Tensor, bias: Tensor) -> Generator[None, None, UnitMap]:
        """Return the map after pieces of work."""
        return cls(weight, bias, (yield from linear.packing(weight, bias)) if linear.serves(weight) else None)

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        if self.linear is None:
            assert self.packed is not None
            return self.packed.of_normalised(parts, UNIT_EPS)
        return self.linear(torch.cat([rms_unit(part) for part in parts], -1))
