"""Loads the compiled library of n-gram search (``ngram.c``) and of sampling (``sampling.c``)."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).with_name("_speculation.so")  # setup.py builds it
POINTER, INT = ctypes.c_void_p, ctypes.c_int64


@functools.cache
def load() -> Any | None:
    """Load the compiled C library of n-gram search and sampling, as a ``ctypes.CDLL`` with typed functions.

    None: it is not installed, or cannot be loaded. The result is cached.
    """
    try:
        found: Any = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    found.specdec_texts_open.restype, found.specdec_texts_open.argtypes = POINTER, (INT, INT)
    found.specdec_texts_view.restype, found.specdec_texts_view.argtypes = POINTER, (POINTER, POINTER, INT)
    found.specdec_texts_sort.argtypes, found.specdec_texts_sort.restype = (POINTER, POINTER, INT), None
    found.specdec_texts_add.argtypes = (POINTER, POINTER, INT)
    found.specdec_texts_close.argtypes, found.specdec_texts_close.restype = (POINTER,), None
    found.specdec_ngram_grow.argtypes = (POINTER,)
    found.specdec_top_p.argtypes = (POINTER, INT, ctypes.c_double, POINTER)
    found.specdec_draw.argtypes = (
        *(POINTER, ctypes.c_int, INT, ctypes.c_float, INT, ctypes.c_double),
        *((ctypes.c_uint64,) * 2),
        INT,
    )
    found.specdec_draw.restype = INT
    return found
