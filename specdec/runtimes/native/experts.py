"""An expert cache: the experts of a native model lie in a mapped file, and each layer keeps some of them in memory.

The file holds tiles as the kernels read them. When a layer's router has chosen experts, those not in memory are read;
when the next layer chooses, the least recently used experts above the limit are evicted. So a pass that needs more than
the limit, such as a prompt's, keeps them until then. The file has no name and is deleted with the process. With
forecasts, the system reads likely experts of the next layers ahead; those that are then not chosen are evicted.
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
from specdec.runtimes.native.linear import Allocate

_WILL_NEED, _DONT_NEED, _POPULATE_READ = 3, 4, 22  # of madvise
ADVISE_BYTES = 128 << 10  # range of one call of madvise; the system ignores the end of longer ranges
FLOATS = ctypes.POINTER(FLOAT)
Demand = ctypes.CFUNCTYPE(INT, INT, INT, ctypes.POINTER(INT), INT, FLOATS, FLOATS)  # as in native.h


@dataclass
class Counters:
    """Statistics of the expert cache since it was made. An expert counts once for each layer and pass that uses it.

    demanded: experts that passes used.
    misses: demanded experts that were neither in memory nor read ahead.
    ahead: experts that were read ahead.
    used: experts that were read ahead and then demanded.
    evictions: experts that were evicted.
    bytes_read: bytes read from the file, also ahead.
    stall_seconds: time in which passes waited for experts.
    """

    demanded: int = 0
    misses: int = 0
    ahead: int = 0
    used: int = 0
    evictions: int = 0
    bytes_read: int = 0
    stall_seconds: float = 0.0

    def since(self, earlier: Counters) -> Counters:
        """Return the differences from ``earlier`` counters."""
        old = asdict(earlier)
        return Counters(**{name: value - old[name] for name, value in asdict(self).items()})


class _Layer:
    """The experts of one layer in the file.

    file: the file of all layers.
    begin: offset of the layer's part in the file, in bytes.
    used: bytes of the part that are allocated.
    mapping, memory: the mapped part, as a map and as uint8.
    places: offset in the part and bytes of each expert.
    there: numbers of the experts in memory, the least recently used first.
    ahead: numbers of the experts that are being read ahead.
    """

    def __init__(self, file: BinaryIO, begin: int, most: int) -> None:
        os.ftruncate(file.fileno(), begin + most)  # takes no space yet
        self.file = file
        self.begin = begin
        self.used = 0
        self.mapping = mmap.mmap(file.fileno(), most, offset=begin)
        self.memory = torch.frombuffer(self.mapping, dtype=torch.uint8)
        self.places = list[tuple[int, int]]()
        self.there = dict[int, None]()
        self.ahead = set[int]()

    def allocate(self, size: int) -> Tensor:
        """Return ``size`` bytes for the expert that is being written, aligned to a cache line.

        Raises SpecDecError if the disk is full.
        """
        start, self.used = self.used, self.used + -(-size // 64) * 64
        if hasattr(os, "posix_fallocate"):
            with errors_as(f"cannot write experts to '{files.cache_dir()}'"):
                os.posix_fallocate(self.file.fileno(), self.begin + start, self.used - start)
        return self.memory[start : start + size]

    def written(self) -> None:
        """Write the expert whose memory was allocated to the disk, and evict it from memory."""
        start = sum(self.places[-1]) if self.places else 0
        self.used = -(-self.used // mmap.PAGESIZE) * mmap.PAGESIZE
        self.places.append((start, self.used - start))
        self.mapping.flush(*self.places[-1])
        self.drop(len(self.places) - 1)

    def advise(self, expert: int, advice: int, step: int = 1 << 62) -> int:
        """Call madvise for an expert's memory, ``step`` bytes at a time; return the system's error number, or 0."""
        (start, size), madvise = self.places[expert], ctypes.CDLL(None, use_errno=True).madvise
        for at in range(start, start + size, step):
            address = ctypes.c_void_p(self.memory.data_ptr() + at)
            if madvise(address, ctypes.c_size_t(min(step, start + size - at)), advice):
                return ctypes.get_errno()
        return 0

    def drop(self, expert: int) -> None:
        """Evict an expert from memory and from the system's file cache."""
        self.advise(expert, _DONT_NEED)
        start, size = self.places[expert]
        with suppress(AttributeError, OSError):  # a system without it keeps what it has room for
            os.posix_fadvise(self.file.fileno(), self.begin + start, size, os.POSIX_FADV_DONTNEED)


class MappedExperts:
    """The expert cache of a native model: ``add`` all layers, then ``begin``. Raises SpecDecError if the disk is full.

    budget: the share of the experts in (0, 1] (float), or bytes of all layers (int), that stays in memory.
    layers: the layers with experts, by layer number.
    slots: number of experts of a layer that stay in memory.
    shape: number of layers with experts, experts of a layer, and bytes of the largest expert.
    counters: statistics since the start.
    last: the layer whose experts were demanded last; empty: none were.
    call: C callback (``_demand``) that the kernels call before they read a layer's experts.
    unread: whether experts of the last pass could not be read.
    forecasts: forecasts of the experts to read ahead; None: nothing is read ahead.
    """

    def __init__(self, budget: float) -> None:
        if not (0 < budget <= 1 or (isinstance(budget, int) and budget > 1)):
            raise SpecDecError(f"an expert cache is a share in (0, 1] or a number of bytes; got {budget}")
        self.budget = budget
        self.layers = dict[int, _Layer]()
        self.counters = Counters()
        self.slots = 0
        self.shape = (0, 0, 0)
        self.last = list[_Layer]()
        self.lock = threading.Lock()
        self.call: Any = Demand(self._demand)
        self.forecasts: Forecasts | None = None
        self.unread = False
        folder = files.cache_dir()
        with errors_as(f"cannot write experts to '{folder}'"):
            folder.mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (as long as this)

    def add(self, layer: int, count: int, weights: int, pack: Callable[[int, Allocate], None]) -> None:
        """Write the experts of a layer to the file.

        count: number of experts. weights: number of weights of all of them.
        pack: writes the expert with this number into memory that its second argument allocates.
        """
        begin = sum(each.begin + len(each.memory) for each in [*self.layers.values()][-1:])
        most = 4 * weights + count * (mmap.PAGESIZE + 4096)  # of tiles in any format
        self.layers[layer] = made = _Layer(self.file, begin, -(-most // mmap.PAGESIZE) * mmap.PAGESIZE)
        for expert in range(count):
            pack(expert, made.allocate)
            made.written()

    def begin(self, top_k: int) -> None:
        """Set the number of experts in memory after all layers are added. top_k: experts of a token in a layer.

        Raises SpecDecError if the budget is too small for the experts of one token.
        """
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
        """Return the maximum bytes of the experts in memory between passes."""
        return self.slots * self.shape[0] * self.shape[2]

    def describe(self) -> str:
        """Return one line for reports, such as "3 of 6 experts per layer in memory (40 MB)"."""
        return f"{self.slots} of {self.shape[1]} experts per layer in memory ({self.resident_bytes / 1e6:.0f} MB)"

    def figures(self, start: Counters, new_tokens: int) -> dict[str, float]:
        """Return statistics since ``start`` for reports, by name; those per token are divided by ``new_tokens``."""
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
        """End a pass: refine forecasts. Raises SpecDecError if experts of the pass could not be read."""
        if self.forecasts is not None:
            with self.lock:
                self.forecasts.work()
        if self.unread:
            self.unread = False
            raise SpecDecError(
                f"cannot read experts from their file in '{files.cache_dir()}': the disk failed; load the model again"
            )

    def _demand(self, number: int, count: int, groups: Any, rows: int, x: Any, logits: Any) -> int:
        """Load the experts that a pass uses in layer ``number``. The kernels call it. Returns 0, or 1 if reading fails.
        groups: ``count`` structures Grouped of mixture.c. rows: number of tokens. x, logits: as in ``Model.demand`` of
        native.h."""
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
        layer.advise(expert, _WILL_NEED, ADVISE_BYTES)
        self.counters.bytes_read += layer.places[expert][1]

    def _read_ahead(self, forecasts: Forecasts, number: int, rows: int, x: Any, logits: Any) -> None:
        """Begin to read the experts that later layers will likely use, at most ``slots`` for each layer."""
        of = forecasts.width, self.shape[1]
        for later, experts in forecasts.seen(number, *map(partial(_by_token, rows), (x, logits), of)):
            layer = self.layers[later]
            for expert in experts[: self.slots]:
                if expert not in layer.there and expert not in layer.ahead:
                    layer.ahead.add(expert)
                    self.counters.ahead += 1
                    self._read(layer, expert)


def _by_token(rows: int, values: Any, width: int) -> Tensor:
    """Copy ``values``, a pointer to float [rows / 16][width in whole tiles][16], to a tensor [rows, width]."""
    shape = -(-rows // 16), -(-width // 16) * 16, 16
    return torch.from_numpy(np.ctypeslib.as_array(values, shape)).transpose(1, 2).flatten(0, 1)[:rows, :width].clone()
