"""The files of a model's packed weights in the folder of its cache entry.

Knows the user's file that they are made from, but not their content. Imports nothing heavy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".packed"
WEIGHTS = f"weights{SUFFIX}"


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
