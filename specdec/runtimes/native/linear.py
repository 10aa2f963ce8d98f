"""Linear maps in tiles, for the compiled kernels, and the largest of logits."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.base import cores
from specdec.base.errors import SpecDecError
from specdec.runtimes.native import library
from specdec.runtimes.native.library import BF16, I4, POINTER, Map, done, pointer, runs


class _Arena:
    """Memory in large pieces on large pages: most maps alone are smaller than such a page."""

    PIECE, PAGE = 32 << 20, 2 << 20

    def __init__(self) -> None:
        self.piece, self.used, self.lock = torch.empty(0, dtype=torch.uint8), 0, threading.Lock()

    def take(self, size: int) -> Tensor:
        """The next ``size`` bytes, aligned to a cache line. They are the caller's."""
        with self.lock:
            if self.used + size > self.piece.numel():
                room = max(size, self.PIECE) + self.PAGE
                whole = torch.empty(room, dtype=torch.uint8)
                library.load().specdec_large_pages(whole.data_ptr(), room)
                self.piece, self.used = whole[-whole.data_ptr() % self.PAGE :], 0
            begin, self.used = self.used, self.used + _lines(size)
            return self.piece[begin : begin + size]

    def give_back(self, region: Tensor) -> None:
        """Free what was taken, unless another thread has taken more since: it is then lost."""
        with self.lock:
            if region.data_ptr() + _lines(region.numel()) == self.piece.data_ptr() + self.used:
                self.used -= _lines(region.numel())


def _lines(size: int) -> int:
    """``size`` bytes in whole cache lines."""
    return -(-size // 64) * 64


_arena = _Arena()


class Packed:
    """A linear map ``x W.T + bias`` in tiles. weight: bf16 [out, in]; kinds: formats to try, in order, before bf16.

    rounding: the first of ``kinds`` is used even if it is not exact; ``weight`` is then rounded in place.
    draft_only: for drafts, which need not be exact: ``(I8,)`` or ``(I4, I8)``, tried in order before all else. Weights
        are rounded to 8 or 4 bits, and what they are multiplied with to 8, where this CPU gains by such products.
    Raises SpecDecError if ``in`` is not a multiple of 32.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        kinds: Sequence[int] = (),
        rounding: bool = False,
        draft_only: Sequence[int] = (),
    ) -> None:
        lib, (out, inp) = library.load(), weight.shape
        if inp % 32:
            raise SpecDecError(f"the native runtime takes linear maps of multiples of 32 inputs; one has {inp}")
        weight = weight.detach()
        source = weight.contiguous()
        columns, self.width, self.inp = inp // 32, out, inp
        workers, scale = cores.threads(), None
        served = [kind for kind in draft_only if lib.specdec_tile_bytes(kind) and not inp % 64]
        if served:
            kind, scale = served[0], torch.empty(-(-out // 16) * 16)
            tiles = _arena.take(-(-out // 16) * (columns // 2) * lib.specdec_tile_bytes(kind))
            pack = lib.specdec_pack_i4 if kind == I4 else lib.specdec_pack_i8
            pack(source.data_ptr(), out, inp, tiles.data_ptr(), scale.data_ptr(), workers)
        else:
            for kind in (*kinds, BF16):
                tiles = _arena.take(-(-out // 16) * columns * lib.specdec_tile_bytes(kind))
                if lib.specdec_pack(kind, rounding, source.data_ptr(), out, inp, tiles.data_ptr(), workers):
                    break
                _arena.give_back(tiles)
        if rounding and source is not weight:
            weight.copy_(source)
        self.kind, self.tiles = kind, tiles
        self.bias = None if bias is None else F.pad(bias.detach().float(), (0, -out % 16)).contiguous()
        self.scale = scale
        self.struct = Map(kind, -(-out // 16) * 16, inp, 0, tiles.data_ptr(), pointer(self.bias), pointer(scale))

    def __call__(self, x: Tensor, norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
        """bf16 [..., in] -> [..., out]; with ``eps`` after an RMS norm with weight ``norm`` [in] (float32)."""
        return self._run((x,), norm, eps)

    def of_units(self, parts: Sequence[Tensor], eps: float) -> Tensor:
        """bf16 parts [..., in / n] -> [..., out]: each divided by its RMS, then one beside the other."""
        return self._run(parts, None, eps)

    def largest(self, x: Tensor, norm: Tensor | None, eps: float) -> list[int]:
        """The first of the largest of ``self(x, norm, eps)``, without making that, flat. NaN is nowhere it."""
        found = (ctypes.c_int64 * (x.numel() // self.inp))()
        self._call((x,), norm, eps, len(found), None, ctypes.addressof(found))
        return found[:]

    def _run(self, parts: Sequence[Tensor], norm: Tensor | None, eps: float) -> Tensor:
        made = torch.empty(*parts[0].shape[:-1], self.width, dtype=torch.bfloat16)
        self._call(parts, norm, eps, made.numel() // self.width, made.data_ptr(), None)
        return made

    def _call(
        self, parts: Sequence[Tensor], norm: Tensor | None, eps: float, rows: int, out: int | None, best: int | None
    ) -> None:
        parts = [part.contiguous() for part in parts]
        sources = (POINTER * len(parts))(*(part.data_ptr() for part in parts))
        struct, weight, sizes = ctypes.byref(self.struct), pointer(norm), (len(parts), rows)
        done(
            library.load().specdec_linear(struct, weight, eps, sources, *sizes, out, best, self.width, cores.threads())
        )


def serves(weight: Tensor) -> bool:
    """Whether a linear map with this weight [out, in] can be ``Packed`` here."""
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not weight.shape[1] % 32 and runs()


def argmax(x: Tensor) -> Tensor:
    """``x.argmax(-1)`` of bf16 [..., V] on a CPU that the kernels are for; NaN is nowhere the largest."""
    x = x.contiguous()
    out = torch.empty(x.shape[:-1], dtype=torch.long)
    library.load().specdec_argmax(x.data_ptr(), out.numel(), x.shape[-1], out.data_ptr(), cores.threads())
    return out
