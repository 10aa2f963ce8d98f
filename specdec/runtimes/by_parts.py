"""A runtime that runs parts of layers through the reference runtime, which is made when such a part runs."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from torch import Tensor, nn

from specdec.models.native_model import as_transformers
from specdec.runtimes.target import Part, Pass, Target

if TYPE_CHECKING:
    from specdec.runtimes.reference import ReferenceTarget


class ByParts(Target):
    """model: its decoder layers are in ``model.model.layers``."""

    @functools.cached_property
    def _reference(self) -> ReferenceTarget:
        from specdec.runtimes.reference import ReferenceTarget  # heavy

        return ReferenceTarget(as_transformers(self.model))

    def block(self, layer: int) -> nn.Module:
        found: nn.Module = self.model.model.layers[layer]  # type: ignore[union-attr, index]
        return found

    def sublayer(self, x: Tensor, layer: int, part: Part, ctx: Pass) -> Tensor:
        return self._reference.sublayer(x, layer, part, ctx)

    def fill(self, x: Tensor, lo: int, ctx: Pass) -> None:
        self._reference.fill(x, lo, ctx)
