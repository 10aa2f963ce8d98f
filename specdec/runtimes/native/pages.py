"""Memory for packed weights on large pages (2 MiB), from which a pass reads up to a fifth faster than from small ones.

Where the system has large pages free, they cost less than small ones. Where its memory is fragmented, it must make each
one first, which takes some 15 ms: then the memory begins on small pages, and moves in the time between requests.
"""

from __future__ import annotations

import mmap
import threading
import time
import weakref
from collections import deque

import torch
from torch import Tensor

from specdec.base.memory import PRIVATE
from specdec.runtimes.native import library

PAGE = 2 << 20  # bytes of a large page
SLICE = 0.05  # seconds that ``settle`` takes, about
MOST_FAILURES = 8  # pages that the system could not make, after which ``settle`` makes no more


class _Moving:
    """The memory that may still have small pages.

    waiting: references to mapped memory, each with the addresses of the next page to move and of the memory's end.
    failures: number of pages that could not be moved.
    """

    def __init__(self) -> None:
        self.waiting = deque[tuple[weakref.ref[mmap.mmap], int, int]]()
        self.failures = 0
        self.lock = threading.Lock()


_moving = _Moving()


def allocate(size: int) -> Tensor:
    """Return new memory of ``size`` bytes, uint8, that begins at a large page. Nothing is written to it yet."""
    mapped = mmap.mmap(-1, size + PAGE, **PRIVATE)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)  # keeps ``mapped``
    memory = memory[-memory.data_ptr() % PAGE :][:size]
    begin = memory.data_ptr()
    _moving.waiting.append((weakref.ref(mapped), begin, begin + size))
    return memory


def fill(memory: Tensor) -> bool:
    """Put the part ``memory`` of new memory on large pages; return False if the system has none free.

    The part then has small pages from some page on.
    """
    return bool(library.load().specdec_large_pages(memory.data_ptr(), memory.numel()))


def settle() -> bool:
    """Move memory that ``allocate`` made to large pages, for about 50 ms; return False if nothing is left to do.

    Passes may read the memory meanwhile. Does nothing on systems that cannot move memory (Linux before 6.1).
    """
    end = time.perf_counter() + SLICE
    with _moving.lock:
        while _moving.waiting and time.perf_counter() < end:
            reference, page, last = _moving.waiting[0]
            mapped = reference()  # keeps the memory while it moves
            if mapped is None or page + PAGE > last or _moving.failures >= MOST_FAILURES:
                _moving.waiting.popleft()
            else:
                _moving.failures += not library.load().specdec_collapse(page)
                _moving.waiting[0] = reference, page + PAGE, last
        return bool(_moving.waiting)
