"""Slow memory that experts are loaded from, behind one interface: the disk, or pinned host memory to a GPU.

A tier allocates the fast memory (slots) and fills parts of a slot when called, from one thread.
"""

from __future__ import annotations

import errno
import io
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.base.errors import SpecDecError
from specdec.runtimes.experts.packed import ALIGNMENT, BLOCKS, Index, buffer

CHUNK = 1 << 20  # maximum bytes of one request, which a demand may have to wait for


class Tier(ABC):
    """note: one line about timings, or ""."""

    note = ""

    @abstractmethod
    def slots(self, count: int) -> Tensor:
        """Fast memory for ``count`` experts: uint8 [count, stride]."""

    @abstractmethod
    def read(self, block: int, slot: Tensor, start: int, stop: int) -> int:
        """Fill bytes [start, stop) of ``slot`` from ``block``, or the first of them; return the end.

        The block is checked with its last byte. Raises SpecDecError (naming the expert) or OSError.
        """

    def acquire(self, slot: Tensor) -> None:  # noqa: B027 (optional)
        """Called before the model uses a filled slot."""

    def release(self, slot: Tensor) -> None:  # noqa: B027 (optional)
        """Called after the model has used it; the slot may be filled again."""

    @abstractmethod
    def close(self) -> None: ...


def aligned(count: int, stride: int) -> Tensor:
    """Page-aligned bytes [count, stride] on the CPU; ``stride`` is a number of pages."""
    buffer = torch.zeros(count * stride + ALIGNMENT, dtype=torch.uint8)
    start = -buffer.data_ptr() % ALIGNMENT
    return buffer[start : start + count * stride].view(count, stride)


def _direct(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_DIRECT", 0))


def _read(file: io.FileIO, memory: memoryview, at: int) -> int:
    """Fill the first bytes of ``memory`` with those of the file ``at``; return how many."""
    if hasattr(os, "preadv"):  # a forked child shares the file's position
        return os.preadv(file.fileno(), [memory], at)
    file.seek(at)
    return file.readinto(memory)


class DiskTier(Tier):
    """The packed file, read without the page cache (O_DIRECT) if the file system supports it, into slots in RAM.

    Each block is checked when it is first read.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.path, self.index = folder / BLOCKS, index
        self.checked = [False] * len(index.checksums)
        try:
            self.file, self.direct = io.FileIO(self.path, opener=_direct), hasattr(os, "O_DIRECT")
            if self.direct:
                _read(self.file, buffer(aligned(1, ALIGNMENT)[0]), 0)  # some refuse only here
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise SpecDecError(f"cannot read '{self.path}': {error.strerror}") from None
            self.file, self.direct = io.FileIO(self.path), False
        if not self.direct:
            self.note = "this file system has no O_DIRECT: expert loads, and their timings, may be the page cache's"

    def slots(self, count: int) -> Tensor:
        return aligned(count, self.index.stride)

    def read(self, block: int, slot: Tensor, start: int, stop: int) -> int:
        memory, base = buffer(slot), block * self.index.stride
        while start < stop:
            count = _read(self.file, memory[start:stop], base + start)
            if count <= 0 or (self.direct and count % ALIGNMENT and (count := count // ALIGNMENT * ALIGNMENT) == 0):
                raise SpecDecError(
                    f"'{self.path}' ends within {self.index.name(block)}: it was truncated; pack it again"
                )
            start += count
        if stop == self.index.stride and not self.checked[block]:
            self.index.check(block, slot)
            self.checked[block] = True
        return stop

    def close(self) -> None:
        self.file.close()


class PinnedTier(Tier):
    """Pinned host memory to a CUDA device, on a stream of its own beside the model's.

    The whole packed file is read (and checked) once. A copy into a slot waits for the last kernels that used it; the
    model's stream waits for the copy.

    cuda: ``torch.cuda``, or a replacement in tests.
    copy_events, use_events: by address of the slot, the event after its copy and after its last use.
    """

    def __init__(self, folder: Path, index: Index, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.index, self.device, self.cuda = index, device, cuda
        source = torch.from_file(str(folder / BLOCKS), size=index.total_bytes, dtype=torch.uint8)
        self.blocks = torch.empty(index.total_bytes, dtype=torch.uint8, pin_memory=cuda.is_available())
        for block, part in enumerate(self.blocks.split(index.stride)):
            part.copy_(source[block * index.stride : (block + 1) * index.stride])
            index.check(block, part)
        self.stream = cuda.Stream(device)
        self.copy_events: dict[int, Any] = {}
        self.use_events: dict[int, Any] = {}

    def slots(self, count: int) -> Tensor:
        return torch.empty(count, self.index.stride, dtype=torch.uint8, device=self.device)

    def read(self, block: int, slot: Tensor, start: int, stop: int) -> int:
        base, key = block * self.index.stride, slot.data_ptr()
        with self.cuda.stream(self.stream):
            if start == 0 and key in self.use_events:
                self.stream.wait_event(self.use_events.pop(key))
            slot[start:stop].copy_(self.blocks[base + start : base + stop], non_blocking=True)
            event = self.cuda.Event()
            event.record(self.stream)
        event.synchronize()  # the loading thread reports the slot as filled
        self.copy_events[key] = event
        return stop

    def acquire(self, slot: Tensor) -> None:
        self.cuda.current_stream(self.device).wait_event(self.copy_events[slot.data_ptr()])

    def release(self, slot: Tensor) -> None:
        event = self.cuda.Event()
        event.record(self.cuda.current_stream(self.device))
        self.use_events[slot.data_ptr()] = event

    def close(self) -> None:
        self.blocks = torch.empty(0, dtype=torch.uint8)
