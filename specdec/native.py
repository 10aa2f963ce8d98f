"""The compiled kernels of ``native.c``: finding them, their structures, and packed linear maps.

For bfloat16 on x86 CPUs with AVX-512 BF16. Knows nothing about models and targets.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec import cores, machine
from specdec.errors import SpecDecError

LIBRARY = Path(__file__).with_name("_native.so")  # setup.py builds it
log = logging.getLogger(__name__)
BF16, Q8, Q4, I8, I4 = range(5)  # as in native.c
POINTER, INT = ctypes.c_void_p, ctypes.c_int32


class Map(ctypes.Structure):
    _fields_ = (
        *((name, INT) for name in ("kind", "out", "inp", "unused")),
        *((name, POINTER) for name in ("tiles", "bias", "scale")),
    )


class LowRank(ctypes.Structure):
    _fields_ = (("down", Map), ("ks", INT), ("unused", INT), ("first", POINTER), ("up", POINTER))


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, Map) for name in ("qkv", "out", "gate_up", "down")),
        *((name, POINTER) for name in ("norm_in", "norm_mlp", "norm_q", "norm_k")),
    )


class Model(ctypes.Structure):
    _fields_ = (
        *((n, INT) for n in ("hidden", "heads", "kv_heads", "head_dim", "inner", "rotated")),
        *((n, ctypes.c_float) for n in ("eps", "scale")),
        ("layers", POINTER),
    )


class Call(ctypes.Structure):
    _fields_ = (
        *((n, INT) for n in ("batch", "tokens", "lo", "hi", "start", "threads", "adapted", "windows")),
        *((n, INT) for n in ("causal", "unused")),
        *((n, POINTER) for n in ("spans", "x", "positions", "rotary", "keys", "values", "capacity", "masks", "window")),
        *((n, POINTER) for n in ("taps", "low")),
    )


class Leg(ctypes.Structure):
    _fields_ = tuple((name, POINTER) for name in ("leap", "carried", "model", "call"))


class Growth(ctypes.Structure):
    _fields_ = (
        *((name, INT) for name in ("legs", "levels", "width", "root")),
        *((name, POINTER) for name in ("leg", "embedding", "final")),
        *(("head", POINTER * 2), ("outputs", INT * 2), ("tokens", POINTER), ("norm", POINTER)),
        *((name, ctypes.c_float) for name in ("eps", "unit_eps", "confidence")),
        *((name, POINTER) for name in ("scores", "ids", "parents")),
    )


def could_run(cpuinfo: Path = machine.CPUINFO) -> bool:
    """Whether this CPU has what the kernels need, as far as Linux tells; they may not be built."""
    flags = machine.processor(cpuinfo).get("flags", "").split()
    return {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"} <= set(flags)


@functools.cache
def _notice() -> None:
    if could_run():
        log.warning(
            "The native kernels are not built, so bfloat16 models run several times slower than this CPU can. "
            "Install a C compiler, then install specdec again."
        )


@functools.cache
def library() -> Any:
    """The compiled kernels. Raises SpecDecError if they are missing, or this CPU cannot run them."""
    if not LIBRARY.exists():
        _notice()
        raise SpecDecError("the native kernels are not built; install specdec where there is a C compiler")
    try:
        ctypes.CDLL(openmp(), mode=ctypes.RTLD_GLOBAL)
        found = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise SpecDecError(f"the native kernels cannot be loaded ({error})") from None
    try:
        if not found.specdec_open(2):
            raise SpecDecError("the native runtime needs an x86 CPU with AVX-512 BF16")
        found.specdec_large_pages.argtypes = (POINTER, ctypes.c_int64)
        found.specdec_pack.argtypes = (INT, INT, POINTER, INT, INT, POINTER, INT)
        found.specdec_pack_i8.argtypes = (POINTER, INT, INT, POINTER, POINTER, INT)
        found.specdec_pack_i4.argtypes = found.specdec_pack_i8.argtypes
        linear = (POINTER, POINTER, ctypes.c_float, POINTER, INT, INT, POINTER, POINTER, INT, INT)
        found.specdec_linear.argtypes = linear
        found.specdec_argmax.argtypes = (POINTER, INT, INT, POINTER, INT)
        found.specdec_layers.argtypes = (POINTER, POINTER)
        found.specdec_grow.argtypes = (POINTER,)
    except AttributeError:  # an editable install whose sources went on without it
        raise SpecDecError("the native kernels were built from older sources; install specdec again") from None
    return found


def openmp() -> str:
    """The OpenMP library that PyTorch runs in: a second one would fight it for the cores."""
    torch_itself, process = ctypes.CDLL(torch._C.__file__), ctypes.CDLL(None)
    try:
        entry, found = ctypes.cast(torch_itself.GOMP_parallel, POINTER), _Symbol()
        if process.dladdr(entry, ctypes.byref(found)) and found.file:
            return os.fsdecode(found.file)
    except AttributeError:  # PyTorch was built without it, or the system has no dladdr
        pass
    return "libgomp.so.1"


class _Symbol(ctypes.Structure):  # Dl_info
    _fields_ = (("file", ctypes.c_char_p), ("base", POINTER), ("name", ctypes.c_char_p), ("address", POINTER))


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
                library().specdec_large_pages(whole.data_ptr(), room)
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
    """A linear map ``x W.T + bias`` in tiles. weight: bf16 [out, in]; kinds: storage to try, in order, before bf16.

    rounding: the first of ``kinds`` is used even if it is not exact; ``weight`` is then rounded in place.
    coarse: for drafts, which need not be exact: ``(I8,)`` or ``(I4, I8)``, tried in order before all else. Weights
        are rounded to 8 or 4 bits, and what they are multiplied with to 8, where this CPU gains by such products.
    Raises SpecDecError if ``in`` is not a multiple of 32.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        kinds: Sequence[int] = (),
        rounding: bool = False,
        coarse: Sequence[int] = (),
    ) -> None:
        lib, (out, inp) = library(), weight.shape
        if inp % 32:
            raise SpecDecError(f"the native runtime takes linear maps of multiples of 32 inputs; one has {inp}")
        weight = weight.detach()
        source = weight.contiguous()
        columns, self.width, self.inp = inp // 32, out, inp
        workers, scale = cores.threads(), None
        served = [kind for kind in coarse if lib.specdec_tile_bytes(kind) and not inp % 64]
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
        done(library().specdec_linear(struct, weight, eps, sources, *sizes, out, best, self.width, cores.threads()))


def serves(weight: Tensor) -> bool:
    """Whether a linear map with this weight [out, in] can be ``Packed`` here."""
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not weight.shape[1] % 32 and runs()


@functools.cache
def runs() -> bool:
    """Whether the kernels are there, and this CPU runs them."""
    try:
        library()
    except SpecDecError:
        return False
    return True


def argmax(x: Tensor) -> Tensor:
    """``x.argmax(-1)`` of bf16 [..., V] on a CPU that ``library`` is for; NaN is nowhere the largest."""
    x = x.contiguous()
    out = torch.empty(x.shape[:-1], dtype=torch.long)
    library().specdec_argmax(x.data_ptr(), out.numel(), x.shape[-1], out.data_ptr(), cores.threads())
    return out


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def done(code: int) -> None:
    """Raise MemoryError for what a kernel returns when it had no memory."""
    if code < 0:
        raise MemoryError("can't allocate memory for a pass of the native runtime")
