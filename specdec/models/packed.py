"""Name and find the packed weights of a model: copies in the layout of the kernels, in the model's cache folder.

Knows from which file of the user they were made, but not their content. Imports nothing heavy.
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
    """The GGUF or safetensors file that a model's matrices are mapped from, so that copies of them can be recognised.

    folder: the model's folder in specdec's cache, in which packed weights (copies that kernels read) are stored.
    paths: the part files of a split file in order, or the one file.
    stamp: sizes, times and inodes of ``paths``, which differ after any change of the file.
    maps: the bytes of each file in ``paths``, uint8, mapped into memory.
    adapter: fingerprint of the LoRA adapter that is merged into the model; "": none is merged.
    made: weights that are not in the file as they are: converted to another dtype, or changed by the adapter. Always in
        the same order.
    """

    folder: Path
    paths: tuple[Path, ...]
    stamp: tuple[int, ...]
    maps: tuple[Tensor, ...]
    adapter: str = ""
    made: tuple[Tensor, ...] = ()

    @property
    def size(self) -> int:
        """Return the number of bytes of ``maps`` and ``made`` together."""
        return sum(part.nbytes for part in (*self.maps, *self.made))

    def __deepcopy__(self, memo: Any) -> Origin:
        return self

    def place(self, matrix: Tensor) -> int | None:
        """Return where a matrix lies in ``maps`` and ``made``: the offset in bytes of its first element.

        The offset counts through all of ``maps`` in order, and then all of ``made``. Returns None if the matrix lies
        elsewhere in memory, or is not contiguous.
        """
        begin = 0
        for part in (*self.maps, *self.made):
            if matrix.untyped_storage().data_ptr() == part.data_ptr():
                return begin + matrix.data_ptr() - part.data_ptr() if matrix.is_contiguous() else None
            begin += part.nbytes
        return None


def stamp(files: Iterable[Path | int]) -> tuple[int, ...]:
    """Return four numbers for each file in order, all in one tuple: size, modification and change time (ns), inode.

    files: paths or file descriptors. Equal results mean unchanged files, because their owner cannot set the change
    time. Raises OSError for a missing file.
    """
    found = [os.stat(file) for file in files]
    return tuple(n for each in found for n in (each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino))


def packed_bytes(folder: Path) -> int:
    """Return the number of bytes of all packed weights (copies of weights in the layout of the kernels) in a folder.

    folder: a model's folder in specdec's cache.
    """
    return sum(file.stat().st_size for file in folder.glob(f"*{SUFFIX}"))


def open_file(path: Path) -> BinaryIO:
    """Open the file ``path`` to read its bytes, and return it for a ``with`` block.

    Raises OSError for a missing file, and for a FIFO or device, because opening one may wait for ever.
    """
    if path.exists() and not path.is_file():
        raise OSError("it is no file")
    return path.open("rb")
