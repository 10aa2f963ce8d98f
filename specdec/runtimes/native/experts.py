"""The experts of a native model in a file that is mapped into memory, of which each layer keeps a share there.

They lie there in tiles, as the kernels read them. What a layer's router chose and is not there is read at once, and the
least recently used experts are dropped when the next layer has chosen. A pass that takes more than the share, such as
that over a prompt, keeps them meanwhile. The file has no name: it is gone with the process. With forecasts, the system
is told to read what the next layers are likely to take; what a layer then does not take is dropped.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from specdec.base import files
from specdec.base.errors import SpecDecError, errors_as
from specdec.runtimes.native.forecasts import Forecasts
from specdec.runtimes.native.library import FLOAT, INT

_WILL_NEED, _DONT_NEED, _POPULATE_READ = 3, 4, 22  # of madvise
CHUNK = 128 << 10  # bytes that the system is told of at a time; it ignores the end of long ranges
NUMBERS = ctypes.POINTER(FLOAT)
Demand = ctypes.CFUNCTYPE(INT, INT, INT, ctypes.POINTER(INT), INT, NUMBERS, NUMBERS)  # as in native.h


@dataclass
class Counters:
    """Statistics of experts, counted per layer and pass.

    demanded: experts that passes took. misses: those of them that were read then.
    ahead, used: experts that were read ahead, and those of them that the layer then took.
    evictions: experts that were dropped. bytes_read, stall_seconds: what reading took.
    """

    demanded: int = 0
    misses: int = 0
    ahead: int = 0
    used: int = 0
    evictions: int = 0
    bytes_read: int = 0
    stall_seconds: float = 0.0

    def since(self, earlier: Counters) -> Counters:
        old = asdict(earlier)
        return Counters(**{name: value - old[name] for name, value in asdict(self).items()})


class _Layer:
    """The experts of a layer: a part of the file from ``begin`` on, and its mapping.

    places: offset and bytes of each expert there. there: the experts in memory, the least recently used first.
    ahead: those that are read ahead.
    """

    def __init__(self, file: BinaryIO, begin: int, most: int) -> None:
        os.ftruncate(file.fileno(), begin + most)  # takes no space yet
        self.file, self.begin, self.used = file, begin, 0
        self.mapping = mmap.mmap(file.fileno(), most, offset=begin)
        self.memory = torch.frombuffer(self.mapping, dtype=torch.uint8)
        self.places, self.there, self.ahead = list[tuple[int, int]](), dict[int, None](), set[int]()

    def allocate(self, size: int) -> Tensor:
        """``size`` bytes of the expert that is written, aligned to a cache line. Raises SpecDecError without space."""
        start, self.used = self.used, self.used + -(-size // 64) * 64
        if hasattr(os, "posix_fallocate"):
            with errors_as(f"cannot write experts to '{files.cache_dir()}'"):
                os.posix_fallocate(self.file.fileno(), self.begin + start, self.used - start)
        return self.memory[start : start + size]

    def written(self) -> None:
        """End of an expert: it is on the disk from now on."""
        start = sum(self.places[-1]) if self.places else 0
        self.used = -(-self.used // mmap.PAGESIZE) * mmap.PAGESIZE
        self.places.append((start, self.used - start))
        self.mapping.flush(*self.places[-1])
        self.drop(len(self.places) - 1)

    def advise(self, expert: int, advice: int, step: int = 1 << 62) -> int:
        """Returns the system's error number, or 0."""
        (start, size), madvise = self.places[expert], ctypes.CDLL(None, use_errno=True).madvise
        for at in range(start, start + size, step):
            address = ctypes.c_void_p(self.memory.data_ptr() + at)
            if madvise(address, ctypes.c_size_t(min(step, start + size - at)), advice):
                return ctypes.get_errno()
        return 0

    def drop(self, expert: int) -> None:
        self.advise(expert, _DONT_NEED)
        start, size = self.places[expert]
        with suppress(AttributeError, OSError):  # a system without it keeps what it has room for
            os.posix_fadvise(self.file.fileno(), self.begin + start, size, os.POSIX_FADV_DONTNEED)


class MappedExperts:
    """A share of the experts of each layer in memory, the rest in a file. Raises SpecDecError if there is no place.

    budget: the share (float), or bytes (int) of all layers.
    layers: by number, the layers with experts.
    call: for the kernels. unread: whether experts of the last pass could not be read.
    forecasts: None: nothing is read ahead.
    """

    def __init__(self, budget: float) -> None:
        if not (0 < budget <= 1 or (isinstance(budget, int) and budget > 1)):
            raise SpecDecError(f"an expert cache is a share in (0, 1] or a number of bytes; got {budget}")
        self.budget, self.layers, self.counters = budget, dict[int, _Layer](), Counters()
        self.slots, self.shape = 0, (0, 0, 0)
        self.last, self.lock = list[_Layer](), threading.Lock()  # the layer that was taken last
        self.call: Any = Demand(self._demand)
        self.forecasts: Forecasts | None = None
        self.unread = False
        folder = files.cache_dir()
        with errors_as(f"cannot write experts to '{folder}'"):
            folder.mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (as long as this)

    def add(self, layer: int, count: int, weights: int, pack: Callable[[int, _Layer], None]) -> None:
        """Write the experts of a layer, of so many weights in all: ``pack`` allocates the memory of an expert."""
        begin = sum(each.begin + len(each.memory) for each in [*self.layers.values()][-1:])
        most = 4 * weights + count * (mmap.PAGESIZE + 4096)  # of tiles in any format
        self.layers[layer] = made = _Layer(self.file, begin, -(-most // mmap.PAGESIZE) * mmap.PAGESIZE)
        for expert in range(count):
            pack(expert, made)
            made.written()

    def begin(self, top_k: int) -> None:
        """All layers are written. Raises SpecDecError if the budget does not hold what one token takes."""
        sizes = [size for layer in self.layers.values() for _, size in layer.places]
        self.shape = len(self.layers), len(sizes) // len(self.layers), max(sizes)
        rows, experts, each = self.shape
        size = self.budget if isinstance(self.budget, int) and self.budget > 1 else self.budget * math.prod(self.shape)
        self.slots = min(int(size + 0.5) // (rows * each), experts)
        if self.slots < top_k:
            least = rows * top_k * each
            raise SpecDecError(
                f"an expert cache of {size / 1e6:.4g} MB holds {self.slots} experts per layer, but one token "
                f"needs {top_k}; give at least {least / math.prod(self.shape):.3g} ({least / 1e6:.4g} MB)"
            )

    @property
    def resident_bytes(self) -> int:
        return self.slots * self.shape[0] * self.shape[2]

    def describe(self) -> str:
        """One line for reports."""
        return f"{self.slots} of {self.shape[1]} experts per layer in memory ({self.resident_bytes / 1e6:.0f} MB)"

    def figures(self, start: Counters, new_tokens: int) -> dict[str, float]:
        """What reading experts cost since ``start``, and per new token."""
        c, tokens = self.counters.since(start), max(new_tokens, 1)
        return {
            "demanded": c.demanded,
            "hit_rate": 1 - c.misses / max(c.demanded, 1),
            "read_ahead": c.ahead,
            "read_ahead_used": c.used,
            "bytes_read": c.bytes_read,
            "bytes_per_token": c.bytes_read / tokens,
            "stall_ms_per_token": 1e3 * c.stall_seconds / tokens,
            "resident_bytes": self.resident_bytes,
        }

    def end_pass(self) -> None:
        """Raise SpecDecError if experts of the last pass could not be read."""
        if self.forecasts is not None:
            with self.lock:
                self.forecasts.work()
        if self.unread:
            self.unread = False
            raise SpecDecError(
                f"cannot read experts from their file in '{files.cache_dir()}': the disk failed; load the model again"
            )

    def _demand(self, number: int, count: int, groups: Any, rows: int, x: Any, logits: Any) -> int:
        """A pass takes the experts of ``groups`` (Grouped, in mixture.c) in a layer: they are in memory afterwards.

        Returns 1 if the disk fails. The kernels would end the process if they read them then.
        """
        layer, counters, wanted = self.layers[number], self.counters, groups[: 3 * count : 3]
        with self.lock:
            for before in self.last:
                while len(before.there) > self.slots:
                    before.drop(oldest := next(iter(before.there)))
                    del before.there[oldest]
                    counters.evictions += 1
            missing = [expert for expert in wanted if expert not in layer.there]
            counters.demanded += count
            counters.used += len(layer.ahead.intersection(missing))
            start = time.perf_counter()
            for expert in missing:
                if expert not in layer.ahead:
                    counters.misses += 1
                    self._read(layer, expert)
            for expert in layer.ahead.difference(wanted):
                layer.drop(expert)
            layer.ahead.clear()
            for expert in missing:
                if layer.advise(expert, _POPULATE_READ) == errno.EFAULT:
                    self.unread = True
                    return 1
            counters.stall_seconds += time.perf_counter() - start if missing else 0
            for expert in wanted:
                layer.there.pop(expert, None)
                layer.there[expert] = None
            self.last = [layer]
            if self.forecasts is not None:
                self._read_ahead(self.forecasts, number, rows, x, logits)
        return 0

    def _read(self, layer: _Layer, expert: int) -> None:
        """Let the system begin to read an expert."""
        layer.advise(expert, _WILL_NEED, CHUNK)
        self.counters.bytes_read += layer.places[expert][1]

    def _read_ahead(self, forecasts: Forecasts, number: int, rows: int, x: Any, logits: Any) -> None:
        """Begin to read what later layers are likely to take, at most as many experts as they keep."""
        of = forecasts.width, self.shape[1]
        for later, experts in forecasts.seen(number, *map(partial(_by_token, rows), (x, logits), of)):
            layer = self.layers[later]
            for expert in experts[: self.slots]:
                if expert not in layer.there and expert not in layer.ahead:
                    layer.ahead.add(expert)
                    self.counters.ahead += 1
                    self._read(layer, expert)


def _by_token(rows: int, numbers: Any, width: int) -> Tensor:
    """A copy of what the kernels hold feature by feature, [blocks][width in whole tiles][16]: [rows, width]."""
    shape = -(-rows // 16), -(-width // 16) * 16, 16
    return torch.from_numpy(np.ctypeslib.as_array(numbers, shape)).transpose(1, 2).flatten(0, 1)[:rows, :width].clone()
