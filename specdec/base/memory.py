"""Giving back memory of weights that are mapped from a file and not needed for a while.

safetensors files are mapped: pages of theirs that were not written to can be dropped and come again from the file
when they are next touched. So a runtime that holds its own form of a weight need not pay for the model's, and the model
stays whole. On other systems than Linux, nothing is given back.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from specdec.base import machine

_DONT_NEED = 4  # MADV_DONTNEED
_SWAPPED, _OF_FILE = 1 << 62, 1 << 61  # bits of an entry of /proc/self/pagemap; its sign says "present"


def release(*tensors: Tensor) -> int:
    """Give back the memory pages of ``tensors`` that lie in mapped files, unchanged; return the bytes of them."""
    freed = 0
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            continue
        size, begin = mmap.PAGESIZE, tensor.data_ptr()
        first, last = -(-begin // size), (begin + tensor.nbytes) // size  # whole pages only
        if last > first and _unchanged(first, last - first):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first * size), ctypes.c_size_t((last - first) * size), _DONT_NEED)
            freed += (last - first) * size
    return freed


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return machine.available_memory() or 4 << 30


def trim_heap() -> None:
    """Give back what the C library keeps of memory that was freed: making packed weights leaves much of it behind."""
    with suppress(AttributeError, OSError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def _unchanged(first: int, count: int) -> bool:
    """Whether every page there is absent or a file's own: a page that was written to is no longer the file's."""
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
    """Meanwhile the ``weights`` of each of ``modules`` are given back as soon as it has run."""

    def after(module: nn.Module, *_: object) -> None:
        release(*weights(module))

    handles = [module.register_forward_hook(after) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
