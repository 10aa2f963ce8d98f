"""The files of a model's packed weights in the folder of its cache entry: which there are, and reading them in threads.

Knows the user's file that they are made from, but not their content. Imports nothing heavy, because reading begins
before PyTorch is imported.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from specdec.base.background import Stop, Work

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".packed"
WEIGHTS = f"weights{SUFFIX}"
CHUNK, PAGE, READERS = 16 << 20, 2 << 20, 2  # bytes that a thread reads at a time; bytes of a large page; threads


@dataclass(frozen=True, eq=False)
class Origin:
    """The GGUF or safetensors file that a model's matrices are mapped from.

    folder: the model's cache entry.
    paths: the parts of a split file, or the one file.
    stamp: ``packed.stamp`` of ``paths``, which differs after any change of the file.
    maps: the mapped bytes of each part, uint8.
    adapter: fingerprint of the adapter that is merged into the model; "": none.
    made: weights that were converted from the file's, to another dtype or by the adapter, always in the same order.
    """

    folder: Path
    paths: tuple[Path, ...]
    stamp: tuple[int, ...]
    maps: tuple[Tensor, ...]
    adapter: str = ""
    made: tuple[Tensor, ...] = ()

    @property
    def size(self) -> int:
        """Return the bytes of the file and of the converted weights."""
        return sum(part.nbytes for part in (*self.maps, *self.made))

    def __deepcopy__(self, memo: Any) -> Origin:
        return self

    def place(self, matrix: Tensor) -> int | None:
        """Return the offset of a matrix in bytes, counted through all parts of the file and then through ``made``.

        None: the matrix lies elsewhere, or is not contiguous.
        """
        begin = 0
        for part in (*self.maps, *self.made):
            if matrix.untyped_storage().data_ptr() == part.data_ptr():
                return begin + matrix.data_ptr() - part.data_ptr() if matrix.is_contiguous() else None
            begin += part.nbytes
        return None


def stamp(files: Iterable[Path | int]) -> tuple[int, ...]:
    """Return size, modification time, change time and inode of each file, given by path or descriptor.

    A file's owner cannot set the change time, so equal stamps mean an unchanged file.
    """
    found = [os.stat(file) for file in files]
    return tuple(n for each in found for n in (each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino))


def packed_bytes(folder: Path) -> int:
    """Return the bytes of the packed weights in ``folder``."""
    return sum(file.stat().st_size for file in folder.glob(f"*{SUFFIX}"))


def open_file(path: Path) -> BinaryIO:
    """Open a file to read it. Raises OSError for a FIFO or device, because opening one may wait for ever."""
    if path.exists() and not path.is_file():
        raise OSError("it is no file")
    return path.open("rb")


class Reading:
    """A file that threads read into memory of large pages, from which a pass is some per cent faster than from a map.

    state: ``stamp`` of the file when reading began.
    pages: the memory.
    offset: index of the file's first byte in ``pages``, at the start of a large page.
    """

    def __init__(self, path: Path) -> None:
        self.file = open_file(path)
        self.state, self.truncated = stamp([self.file.fileno()]), False
        self.size = self.state[0]
        self.pages = mmap.mmap(-1, self.size + PAGE)
        with suppress(AttributeError, OSError):  # a system without large pages
            self.pages.madvise(mmap.MADV_HUGEPAGE)
        self.offset = -ctypes.addressof(ctypes.c_char.from_buffer(self.pages)) % PAGE
        self.starts = iter(range(0, self.size, CHUNK))
        self.threads = [Work(self._read, "specdec reading") for _ in range(READERS)]

    def _read(self, stop: Stop) -> None:
        view = memoryview(self.pages)[self.offset : self.offset + self.size]
        for start in self.starts:
            end = min(start + CHUNK, self.size)
            while start < end:
                stop.check()
                if not (count := os.preadv(self.file.fileno(), [view[start:end]], start)):
                    self.truncated = True
                    return
                start += count

    def wait(self) -> None:
        """Wait until the whole file is read. Raises OSError if reading fails or the file is truncated."""
        try:
            for thread in self.threads:
                thread.result()
        finally:
            self.stop()
        if self.truncated:
            raise OSError("it is truncated")

    def stop(self) -> None:
        """Stop reading, and close the file."""
        for thread in self.threads:
            thread.stop()
        self.file.close()


_begun: dict[Path, Reading] = {}


def begin(folder: Path) -> None:
    """Begin to read the packed weights in ``folder``, if there are any, for a later ``take``."""
    path = folder / WEIGHTS
    with suppress(OSError):
        if path not in _begun:
            _begun[path] = Reading(path)


def take(path: Path, file: BinaryIO) -> Reading:
    """Return the ``Reading`` of the file at ``path`` that ``begin`` has started, or start one.

    file: the same file, open; a reading of an older version of it is stopped.
    """
    reading = _begun.pop(path, None)
    if reading is not None and reading.state != stamp([file.fileno()]):
        reading.stop()
        reading = None
    return reading or Reading(path)


def forget(path: Path) -> None:
    """Stop the reading of the file at ``path`` that ``begin`` has started, if any."""
    if (reading := _begun.pop(path, None)) is not None:
        reading.stop()


@contextmanager
def reading() -> Iterator[None]:
    """At the end of the ``with`` block, stop all readings that were begun and not taken."""
    try:
        yield
    finally:
        while _begun:
            with suppress(KeyError):
                _begun.popitem()[1].stop()
