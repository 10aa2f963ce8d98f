"""An expert cache: the experts of a native model lie in a file mapped to memory, and some of each layer's are resident.

The file has the experts' weights in the kernels' tile format. When a layer's router has chosen experts, those that are
not in memory are read. When the next layer's router chooses, the least recently used experts above the limit are
evicted. So a pass that needs more experts than the limit, such as a prompt's, keeps them until then. The file has no
name and disappears with the process. With forecasts, likely experts of the next layers are read ahead; those that are
then not chosen are evicted.
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
    """Statistics of an expert cache since it was made. An expert counts once for each layer and pass that uses it.

    demanded: number of experts that passes used.
    misses: number of demanded experts that were neither in memory nor being read ahead.
    ahead: number of experts that were read ahead.
    used: number of experts that were read ahead and then demanded.
    evictions: number of experts that were evicted to keep the limit.
    bytes_read: bytes read from the file, including those read ahead.
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
        """Return the increase of each counter since ``earlier``, an earlier copy of these counters."""
        old = asdict(earlier)
        return Counters(**{name: value - old[name] for name, value in asdict(self).items()})


class _Layer:
    """The experts of one decoder layer in the file of an expert cache, and which of them are in memory.

    file: the file, which has one part for each layer.
    begin: offset of this layer's part in the file, in bytes.
    most: size of the part in bytes, which the constructor reserves without using disk space.
    used: bytes of the part that are allocated so far.
    mapping, memory: the mapped part, as ``mmap`` and as uint8 tensor.
    places: for each expert, (offset in the part, size), in bytes.
    there: numbers of the experts in memory, the least recently used first; the values of the dict are None.
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
        """Reserve disk space for weights of the expert being written; return its mapped memory, uint8 [size].

        size: number of bytes. The memory is aligned to 64 bytes, a line of the CPU's cache.
        Raises SpecDecError if the disk is full.
        """
        start, self.used = self.used, self.used + -(-size // 64) * 64
        if hasattr(os, "posix_fallocate"):
            with errors_as(f"cannot write experts to '{files.cache_dir()}'"):
                os.posix_fallocate(self.file.fileno(), self.begin + start, self.used - start)
        return self.memory[start : start + size]

    def written(self) -> None:
        """Complete an expert: write the memory allocated since the last call to disk, and evict it from memory.

        The expert gets the next number, which is its index in ``places``.
        """
        start = sum(self.places[-1]) if self.places else 0
        self.used = -(-self.used // mmap.PAGESIZE) * mmap.PAGESIZE
        self.places.append((start, self.used - start))
        self.mapping.flush(*self.places[-1])
        self.drop(len(self.places) - 1)

    def advise(self, expert: int, advice: int, step: int = 1 << 62) -> int:
        """Call the system's ``madvise`` for the mapped memory of an expert; return the system's ``errno``, or 0.

        expert: number of the expert in this layer.
        advice: the number that Linux gives the advice, such as ``_WILL_NEED`` (read in the background).
        step: maximum bytes of one system call; by default, one call covers the whole expert.
        """
        (start, size), madvise = self.places[expert], ctypes.CDLL(None, use_errno=True).madvise
        for at in range(start, start + size, step):
            address = ctypes.c_void_p(self.memory.data_ptr() + at)
            if madvise(address, ctypes.c_size_t(min(step, start + size - at)), advice):
                return ctypes.get_errno()
        return 0

    def drop(self, expert: int) -> None:
        """Evict an expert from the process's memory and from the system's file cache; its weights stay on disk.

        expert: number of the expert in this layer.
        """
        self.advise(expert, _DONT_NEED)
        start, size = self.places[expert]
        with suppress(AttributeError, OSError):  # a system without it keeps what it has room for
            os.posix_fadvise(self.file.fileno(), self.begin + start, size, os.POSIX_FADV_DONTNEED)


class MappedExperts:
    """The expert cache of a native model: call ``add`` for each layer with experts, and then ``begin``.

    Raises SpecDecError for a ``budget`` out of range, or if the file cannot be made.

    budget: how many experts stay in memory: a share in (0, 1] (float), or bytes for all layers (int).
    layers: the experts of each layer that has some (``_Layer``), by layer number.
    slots: maximum number of experts of each layer that stay in memory between passes.
    shape: (number of layers with experts, number of experts of each, bytes of the largest expert).
    counters: statistics since the cache was made.
    last: the layer whose experts were used last, in a list; []: none was.
    lock: lock that is held while experts are loaded.
    call: ``_demand`` as a C callback, which the kernels call before they read a layer's experts.
    unread: whether reading experts has failed in the present pass.
    forecasts: forecasts of the experts to read ahead; None: nothing is read ahead.
    file: the file that has the experts.
    """

    def __init__(self, budget: float) -> None:
        if not (0 < budget <= 1 or (budget > 1 and float(budget).is_integer())):
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
        """Write all experts of one layer to the file. Raises SpecDecError if the disk is full.

        layer: number of the layer.
        count: number of its experts.
        weights: number of weights of all these experts, from which the size on disk is estimated.
        pack: function ``pack(expert, allocate)`` that packs an expert (by number) into memory that it gets from
            ``allocate(size in bytes)``, uint8 [size].
        """
        begin = sum(each.begin + len(each.memory) for each in [*self.layers.values()][-1:])
        most = 4 * weights + count * (mmap.PAGESIZE + 4096)  # of tiles in any format
        self.layers[layer] = made = _Layer(self.file, begin, -(-most // mmap.PAGESIZE) * mmap.PAGESIZE)
        for expert in range(count):
            pack(expert, made.allocate)
            made.written()

    def begin(self, top_k: int) -> None:
        """Set ``slots``, how many experts of each layer stay in memory, and ``shape``, the sizes (see the class).

        It is called after ``add`` for all layers.

        top_k: number of experts that a token uses in a layer.
        Raises SpecDecError if the budget is too small for the experts of one token.
        """
        sizes = [size for layer in self.layers.values() for _, size in layer.places]
        self.shape = len(self.layers), len(sizes) // len(self.layers), max(sizes)
        rows, experts, each = self.shape
        size = self.budget if self.budget > 1 else self.budget * math.prod(self.shape)
        self.slots = min(int(size + 0.5) // (rows * each), experts)
        if self.slots < top_k:
            least = rows * top_k * each
            raise SpecDecError(
                f"an expert cache of {size / 1e6:.4g} MB holds {self.slots} experts per layer, but one token "
                f"needs {top_k}; give at least {least / math.prod(self.shape):.3g} ({least / 1e6:.4g} MB)"
            )

    @property
    def resident_bytes(self) -> int:
        """Return the maximum bytes of memory that experts take between two passes."""
        return self.slots * self.shape[0] * self.shape[2]

    def describe(self) -> str:
        """Return one line of text for reports, such as "3 of 6 experts per layer in memory (40 MB)"."""
        return f"{self.slots} of {self.shape[1]} experts per layer in memory ({self.resident_bytes / 1e6:.0f} MB)"

    def figures(self, start: Counters, new_tokens: int) -> dict[str, float]:
        """Return statistics for reports, by name.

        "demanded": experts that passes used. "hit_rate": share of these that were in memory or being read ahead, 0 to
        1. "read_ahead": experts that were read ahead. "read_ahead_used": those of them that were then used.
        "bytes_read", "bytes_per_token": bytes read from the file, and per new token. "stall_ms_per_token": milliseconds
        in which passes waited for experts, per new token. "resident_bytes": maximum bytes of experts between passes.

        start: counters at the beginning of the report's time.
        new_tokens: number of tokens generated since then, which figures per token are divided by.
        """
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
        """Finish a pass of the model: let the forecasts learn, and check that all experts could be read.

        A native target calls this after each pass. Raises SpecDecError if reading experts has failed since the last
        call.
        """
        if self.forecasts is not None:
            with self.lock:
                self.forecasts.work()
        if self.unread:
            self.unread = False
            raise SpecDecError(
                f"cannot read experts from their file in '{files.cache_dir()}': the disk failed; load the model again"
            )

    def _demand(self, number: int, count: int, groups: Any, rows: int, x: Any, logits: Any) -> int:
        """Load the experts that a pass uses in a layer. The compiled kernels call it before they read these experts.

        number: number of the layer.
        count: number of different experts that the pass uses.
        groups: C array of ``count`` entries of three integers, of which the first is the number of an expert.
        rows: number of tokens of the pass.
        x, logits: C arrays, float [rows / 16][values][16], of the residual before the router's norm (D values of each
            token) and of the router's logits (one of each expert), for forecasts.

        Returns 0, or 1 if the experts cannot be read; ``end_pass`` then raises.
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
        layer.advise(expert, _WILL_NEED, ADVISE_BYTES)
        self.counters.bytes_read += layer.places[expert][1]

    def _read_ahead(self, forecasts: Forecasts, number: int, rows: int, x: Any, logits: Any) -> None:
        """Begin to read from disk the experts that later layers will probably use, at most ``slots`` of each layer.

        forecasts: predicts the experts from the states at a router.
        number: number of the layer whose router has just run.
        rows: number of tokens of the pass.
        x, logits: C arrays of that layer, as ``_demand`` gets them.
        """
        of = forecasts.width, self.shape[1]
        for later, experts in forecasts.seen(number, *map(partial(_by_token, rows), (x, logits), of)):
            layer = self.layers[later]
            for expert in experts[: self.slots]:
                if expert not in layer.there and expert not in layer.ahead:
                    layer.ahead.add(expert)
                    self.counters.ahead += 1
                    self._read(layer, expert)


def _by_token(rows: int, values: Any, width: int) -> Tensor:
    """Copy a C array of the compiled kernels, float [rows / 16][width][16], to a tensor float32 [rows, width].

    The array has the values of 16 tokens side by side. Both numbers are rounded up to multiples of 16 in it.

    rows: number of tokens.
    values: pointer to the first float of the array.
    width: number of values of a token.
    """
    shape = -(-rows // 16), -(-width // 16) * 16, 16
    return torch.from_numpy(np.ctypeslib.as_array(values, shape)).transpose(1, 2).flatten(0, 1)[:rows, :width].clone()
