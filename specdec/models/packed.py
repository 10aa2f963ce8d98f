"""Where a model's packed weights are kept: files in the folder of its cache entry, written once and read ever after.

Knows which file of the user they are made from, not what is in them. Imports nothing heavy: reading begins before
PyTorch is imported.
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
PIECE, PAGE, READERS = 16 << 20, 2 << 20, 2  # bytes that a thread reads at a time; of a large page; threads


@dataclass(frozen=True, eq=False)
class Origin:
    """The GGUF or safetensors file that a model's matrices are mapped from.

    folder: of the model's cache entry.
    paths: the parts of a split file, or the file itself.
    stamp: differs after any change of the file, and in another file that takes its place.
    maps: the mapped bytes of each part.
    adapter: fingerprint of an adapter that is merged into the model.
    made: weights that were made of the file's, in another dtype or by the adapter, always in the same order.
    """

    folder: Path
    paths: tuple[Path, ...]
    stamp: tuple[int, ...]
    maps: tuple[Tensor, ...]
    adapter: str = ""
    made: tuple[Tensor, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the file, and of what was made of it."""
        return sum(part.nbytes for part in (*self.maps, *self.made))

    def __deepcopy__(self, memo: Any) -> Origin:
        return self

    def place(self, matrix: Tensor) -> int | None:
        """The first byte of a matrix in the file, whose parts lie one behind the other, and behind them what was made;
        None: the matrix is not, or not as a whole, there."""
        begin = 0
        for part in (*self.maps, *self.made):
            if matrix.untyped_storage().data_ptr() == part.data_ptr():
                return begin + matrix.data_ptr() - part.data_ptr() if matrix.is_contiguous() else None
            begin += part.nbytes
        return None


def stamp(files: Iterable[Path | int]) -> tuple[int, ...]:
    """Size, times of change and number of files, by path or open. Their owner cannot set the last time, that of any
    change."""
    found = [os.stat(file) for file in files]
    return tuple(n for each in found for n in (each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino))


def packed_bytes(folder: Path) -> int:
    """Bytes of the packed weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob(f"*{SUFFIX}"))


def open_file(path: Path) -> BinaryIO:
    """Open a file to read it. Raises OSError for what is no file: opening a FIFO would wait for a writer."""
    if path.exists() and not path.is_file():
        raise OSError("it is no file")
    return path.open("rb")


class Reading:
    """A file that threads read into large pages.

    A mapped file has small pages, from which a pass takes some per cent longer; reading a gigabyte takes a quarter of a
    second.

    state: of the file as it is read.
    offset: of its first byte in ``pages``, at the beginning of a large page.
    """

    def __init__(self, path: Path) -> None:
        self.file = open_file(path)
        self.state, self.truncated = stamp([self.file.fileno()]), False
        self.size = self.state[0]
        self.pages = mmap.mmap(-1, self.size + PAGE)
        with suppress(AttributeError, OSError):  # a system without large pages
            self.pages.madvise(mmap.MADV_HUGEPAGE)
        self.offset = -ctypes.addressof(ctypes.c_char.from_buffer(self.pages)) % PAGE
        self.pieces = iter(range(0, self.size, PIECE))
        self.threads = [Work(self._read, "specdec reading") for _ in range(READERS)]

    def _read(self, stop: Stop) -> None:
        view = memoryview(self.pages)[self.offset : self.offset + self.size]
        for start in self.pieces:
            end = min(start + PIECE, self.size)
            while start < end:
                stop.check()
                if not (count := os.preadv(self.file.fileno(), [view[start:end]], start)):
                    self.truncated = True
                    return
                start += count

    def wait(self) -> None:
        """Return when all is read. Raises OSError."""
        try:
            for thread in self.threads:
                thread.result()
        finally:
            self.stop()
        if self.truncated:
            raise OSError("it is truncated")

    def stop(self) -> None:
        """Read no more."""
        for thread in self.threads:
            thread.stop()
        self.file.close()


_begun: dict[Path, Reading] = {}


def begin(folder: Path) -> None:
    """Begin to read the packed weights in a folder, if there are any."""
    path = folder / WEIGHTS
    with suppress(OSError):
        if path not in _begun:
            _begun[path] = Reading(path)


def take(path: Path, file: BinaryIO) -> Reading:
    """What reads the file at ``path``, which is open: begun earlier, or now."""
    reading = _begun.pop(path, None)
    if reading is not None and reading.state != stamp([file.fileno()]):
        reading.stop()
        reading = None
    return reading or Reading(path)


def forget(path: Path) -> None:
    """Stop reading the file at ``path``, if that has begun: nobody takes it."""
    if (reading := _begun.pop(path, None)) is not None:
        reading.stop()


@contextmanager
def reading() -> Iterator[None]:
    """Forget, at the end, what was begun and not taken."""
    try:
        yield
    finally:
        while _begun:
            with suppress(KeyError):
                _begun.popitem()[1].stop()
