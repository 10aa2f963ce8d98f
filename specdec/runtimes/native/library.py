"""The compiled kernels: finding and loading them, and the structures that they read (``native.h``)."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.base import machine
from specdec.base.errors import SpecDecError

LIBRARY = Path(__file__).with_name("_native.so")  # setup.py builds it
log = logging.getLogger(__name__)
BF16, Q8, Q4, Q5, K4, K5, K6, I8, I4 = range(9)  # as in native.h
POINTER, INT = ctypes.c_void_p, ctypes.c_int32


class Part(ctypes.Structure):
    _fields_ = (("kind", INT), ("end", INT), ("tiles", POINTER))


class Map(ctypes.Structure):
    _fields_ = (
        *((name, INT) for name in ("kind", "out", "inp", "count")),
        *((name, POINTER) for name in ("parts", "bias", "scale")),
    )


class Table(ctypes.Structure):
    _fields_ = (("type", INT), ("columns", INT), ("stride", ctypes.c_int64), ("data", POINTER), ("order", POINTER))


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


class Stage(ctypes.Structure):
    _fields_ = tuple((name, POINTER) for name in ("projection", "carried", "model", "call"))


class TreeDraft(ctypes.Structure):
    _fields_ = (
        *((name, INT) for name in ("stages", "levels", "width", "root")),
        *((name, POINTER) for name in ("stage", "embedding", "final")),
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
def load() -> Any:
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
        found.specdec_tiles_bytes.argtypes, found.specdec_tiles_bytes.restype = (INT, ctypes.c_int64), ctypes.c_int64
        found.specdec_block_tiles.argtypes = (INT, INT, INT, POINTER)
        found.specdec_block_tiles.restype = ctypes.c_int64
        found.specdec_pack_blocks.argtypes = (POINTER, INT, POINTER, INT)
        found.specdec_read_rows.argtypes = (POINTER, POINTER, ctypes.c_int64, POINTER, INT)
        found.specdec_pack.argtypes, found.specdec_pack.restype = (INT, POINTER, INT, INT, POINTER, INT), None
        found.specdec_pack_i8.argtypes = (POINTER, INT, INT, POINTER, POINTER, INT)
        found.specdec_pack_i4.argtypes = found.specdec_pack_i8.argtypes
        linear = (POINTER, POINTER, ctypes.c_float, POINTER, INT, INT, POINTER, POINTER, INT, INT)
        found.specdec_linear.argtypes = linear
        found.specdec_argmax.argtypes = (POINTER, INT, INT, POINTER, INT)
        found.specdec_layers.argtypes = (POINTER, POINTER)
        found.specdec_draft_tree.argtypes = (POINTER,)
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


@functools.cache
def runs() -> bool:
    """Whether the kernels are there, and this CPU runs them."""
    try:
        load()
    except SpecDecError:
        return False
    return True


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def done(code: int) -> None:
    """Raise MemoryError for what a kernel returns when it had no memory."""
    if code < 0:
        raise MemoryError("can't allocate memory for a pass of the native runtime")
