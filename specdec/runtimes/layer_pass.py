"""What a pass through layers needs besides its input, as one object."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specdec.kvcache.cache import KVCache, Mask
from specdec.runtimes.adapters import Adapters


@dataclass
class Pass:
    """A pass over tokens of each row.

    positions: int64 [B, T]. mask: from ``cache.mask(lo, positions, ...)``. cache: where keys and values are appended.
    taps: for each key l with lo <= l <= hi, filled with the input of layer l (l = hi: the result).
    adapters: applied to the last ``adapted`` tokens of the block (None: to all of them).
    """

    positions: Tensor
    mask: Mask
    cache: KVCache
    taps: dict[int, Tensor] | None = None
    adapters: Adapters | None = None
    adapted: int | None = None
