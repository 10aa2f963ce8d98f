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
    """The queue of the memory that ``settle`` still has to move to large pages (2 MiB); the process has one.

    waiting: (weak reference to the ``mmap`` that holds the memory, address of the next large page to move, address of
        the memory's end) of each piece of memory that ``allocate`` made. Memory that is freed meanwhile is skipped.
    failures: number of pages that the system could not move; at ``MOST_FAILURES``, ``settle`` gives up.
    lock: held while ``settle`` runs.
    """

    def __init__(self) -> None:
        self.waiting = deque[tuple[weakref.ref[mmap.mmap], int, int]]()
        self.failures = 0
        self.lock = threading.Lock()


_moving = _Moving()


def allocate(size: int) -> Tensor:
    """Return new memory, uint8 [size], that begins at a large page, and note it for ``settle``.

    It takes no physical memory until it is written or ``fill`` is called. It is freed with the last tensor over it.
    """
    mapped = mmap.mmap(-1, size + PAGE, **PRIVATE)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)  # keeps ``mapped``
    memory = memory[-memory.data_ptr() % PAGE :][:size]
    begin = memory.data_ptr()
    _moving.waiting.append((weakref.ref(mapped), begin, begin + size))
    return memory


def fill(memory: Tensor) -> bool:
    """Put a part of memory from ``allocate`` on large pages before it is written; return whether that succeeded.

    If the system has too few large pages free, the part gets small pages from some page on, and is as usable.

    memory: the part, uint8 and contiguous. A part of a large page at its beginning or end is left as it is.
    """
    return bool(library.load().specdec_large_pages(memory.data_ptr(), memory.numel()))


def settle() -> bool:
    """Move memory that ``allocate`` made to large pages, for about 50 ms; return whether there is more to do.

    The addresses stay, and passes may read the memory meanwhile. Does nothing on systems that cannot move memory (Linux
    before 6.1).
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
