"""Release memory that is not used for a while, above all of weights that are mapped from a file. Works on Linux.

safetensors files are mapped into memory. Unchanged pages can be dropped, and the system reads them again from the file
when they are used. So a runtime with its own copy of a weight does not need memory for the model's copy.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from specdec.base import machine

# How memory is mapped that belongs to no file, and that the system has not promised to have.
PRIVATE: dict[str, Any] = {}
if hasattr(mmap, "MAP_PRIVATE"):
    PRIVATE["flags"] = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
_DONT_NEED = 4  # MADV_DONTNEED
_SWAPPED, _OF_FILE = 1 << 62, 1 << 61  # bits of an entry of /proc/self/pagemap; its sign bit means "present"


def release(*tensors: Tensor) -> int:
    """Free the memory of ``tensors`` that are mapped from files and unchanged; return the number of freed bytes.

    The values stay: the system reads them again from the file when they are used. Only whole pages (units in which the
    system maps memory, often 4 KiB) are freed. No effect on other tensors, such as those on a GPU.
    """
    freed = 0
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            continue
        size, begin = mmap.PAGESIZE, tensor.data_ptr()
        first, last = -(-begin // size), (begin + tensor.nbytes) // size  # whole pages only
        if last > first and _unchanged(first, last - first):
            _libc().madvise(ctypes.c_void_p(first * size), ctypes.c_size_t((last - first) * size), _DONT_NEED)
            freed += (last - first) * size
    return freed


def discard(tensor: Tensor) -> None:
    """Give the memory of ``tensor`` back to the system; its values are lost.

    tensor: contiguous, on the CPU, in anonymous memory (of no file). What lies in whole memory pages then reads as
    zeros; up to a page at either end stays as it is.
    """
    size, begin = mmap.PAGESIZE, tensor.data_ptr()
    first, last = -(-begin // size) * size, (begin + tensor.nbytes) // size * size
    if last > first:
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONT_NEED)


def free_memory(device: torch.device) -> int:
    """Return the bytes of free memory on a device; 4 GiB if the system does not report them."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return machine.available_memory() or 4 << 30


def trim_heap() -> None:
    """Make glibc return freed memory to the system, for use after large allocations. No effect without glibc."""
    with suppress(AttributeError, OSError, TypeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _unchanged(first: int, count: int) -> bool:
    """Return whether none of ``count`` memory pages from page number ``first`` on was written to; False if unknown."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(8 * first)
            entries = torch.frombuffer(bytearray(file.read(8 * count)), dtype=torch.int64)
    except OSError:
        return False
    if entries.numel() != count:
        return False
    swapped, changed = (entries & _SWAPPED) != 0, (entries < 0) & ((entries & _OF_FILE) == 0)
    return not bool((swapped | changed).any())


@contextmanager
def releasing(modules: Iterable[nn.Module], weights: Callable[[nn.Module], Iterable[Tensor]]) -> Iterator[None]:
    """After each forward call of one of ``modules`` in the ``with`` block, free its weights' memory by ``release``.

    weights: returns the tensors of a module that are to be freed, such as those mapped from a file.
    """

    def after(module: nn.Module, *_: object) -> None:
        release(*weights(module))

    handles = [module.register_forward_hook(after) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
