"""Where a model's packed weights are kept: files in the folder of its cache entry, written once and read ever after.

Knows which file of the user they are made from, not what is in them. Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".packed"


@dataclass(frozen=True, eq=False)
class Origin:
    """The GGUF file that a model's matrices are mapped from.

    folder: of the model's cache entry.
    stamp: differs after any change of the file, and in another file that takes its place.
    data: its mapped bytes.
    """

    folder: Path
    path: Path
    stamp: tuple[int, ...]
    data: Tensor

    def __deepcopy__(self, memo: Any) -> Origin:
        return self

    def place(self, matrix: Tensor) -> int | None:
        """The first byte of a matrix in the file; None: the matrix is not, or not as a whole, in the mapping."""
        if matrix.untyped_storage().data_ptr() != self.data.data_ptr() or not matrix.is_contiguous():
            return None
        return matrix.data_ptr() - self.data.data_ptr()


def stamp(path: Path) -> tuple[int, ...]:
    """Size, times of change and number of a file. Its owner cannot set the last time, that of any change."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def packed_bytes(folder: Path) -> int:
    """Bytes of the packed weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob(f"*{SUFFIX}"))
