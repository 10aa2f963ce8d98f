"""Cached prefixes on disk: keys and values of texts in chunks, with which later requests and processes begin.

The file of a chunk is named by a hash of what its numbers depend on (``identity``), the scope of its text, and all
tokens up to its end. So a chunk is found by the text alone, and only after those before it. Recurrent states after a
chunk are a file of their own.
"""

from __future__ import annotations

import hashlib
import os
import queue
import re
import threading
import time
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

import filelock
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from specdec.base.errors import SpecDecError, SpecDecWarning
from specdec.base.files import write_atomically
from specdec.kvcache.cache import KVCache

CHUNK = 64  # tokens; a prompt computes up to so many that were known
READERS = 4  # threads
MAX_PENDING = 1 << 30  # bytes that wait to be written; what comes beyond them is not kept
SUFFIX = ".safetensors"
_NAME, _LEFT = re.compile(rf"([0-9a-f]{{64}}){SUFFIX}"), re.compile(rf"\.[0-9a-f]{{64}}{SUFFIX}\..*")
Cache = TypeVar("Cache", bound=KVCache)
Tensors = dict[str, Tensor]


class PrefixDisk:
    """Chunks in a folder, of at most ``limit`` bytes; those that were not used for longest go first.

    Chunks are written in a thread. After an error of the disk nothing is read or written any more, with one warning. A
    file that is damaged is removed, with a warning.

    recurrent: the model has recurrent states: a text can be begun with only up to a chunk that has them.
    sizes: bytes of each file by its name, the least recently used first.
    queries, hits: tokens that were looked for, and found.
    """

    def __init__(self, folder: Path, limit: int, identity: str, recurrent: bool = False) -> None:
        self.folder, self.limit, self.identity, self.recurrent = folder, limit, identity, recurrent
        self.chunk = CHUNK
        self.sizes, self.queries, self.hits = OrderedDict[str, int](), 0, 0
        self.pending, self.off, self.lock = 0, False, threading.Lock()
        self.jobs = queue.SimpleQueue[tuple[list[str], dict[str, Tensors]] | None]()
        self.owner = filelock.FileLock(folder / ".lock", thread_local=False)
        try:
            folder.mkdir(0o700, parents=True, exist_ok=True)
            self.owner.acquire(timeout=0)
            self._scan()
        except filelock.Timeout:
            raise SpecDecError(f"the prefix cache '{folder}' is in use by another process; give each its own") from None
        except OSError as error:
            self._stop(error)
        self.thread = threading.Thread(target=self._write_all, name="specdec prefix cache", daemon=True)
        self.thread.start()

    def _scan(self) -> None:
        """Read what there is, and make it fit."""
        found = list[tuple[int, str, int]]()
        for entry in os.scandir(self.folder):
            if match := _NAME.fullmatch(entry.name):
                state = entry.stat()
                found.append((state.st_mtime_ns, match[1], state.st_size))
            elif _LEFT.fullmatch(entry.name):  # of a process that was killed
                os.unlink(entry.path)
        self.sizes.update((name, size) for _, name, size in sorted(found))
        self._make_room(0)

    def figures(self) -> dict[str, int]:
        """Its part of ``EngineStats``."""
        with self.lock:
            return {
                "disk_queries": self.queries,
                "disk_hits": self.hits,
                "disk_bytes": sum(self.sizes.values()),
            }

    def longest(self, ids: Sequence[int], scope: str | None) -> int:
        """The number of the first ``ids`` that are there."""
        return CHUNK * len(self._there(ids, scope))

    def load(self, cache: Cache, ids: Sequence[int], scope: str | None, capacity: int) -> Cache:
        """Fill ``cache``, which is empty and has one row, with what is there of ``ids``, and return it.

        capacity: as in ``KVCache.copy``. A damaged chunk ends the text.
        """
        while names := self._there(ids, scope):
            files = [*names, _states(names[-1])] if self.recurrent else names
            with ThreadPoolExecutor(READERS) as pool:
                parts = [part for part in pool.map(self._read, files) if part is not None]
            if len(parts) == len(files):  # none is damaged, which would be removed
                states = parts.pop() if self.recurrent else {}
                cache.restore(parts, CHUNK * len(names), states, capacity)
                self.hits += CHUNK * len(names)
                self.jobs.put((files, {}))
                break
        return cache

    def keep(self, ids: Sequence[int], cache: KVCache, row: int, scope: str | None) -> None:
        """Write the chunks of a row of ``cache``, whose text is the beginning of ``ids``, that are not there yet."""
        if self.off:
            return
        names, new = list[str](), dict[str, Tensors]()
        for n, chunk in enumerate(self._names(ids[: cache.rows[row]], scope)):
            for name in [chunk, _states(chunk)] if self.recurrent else [chunk]:
                if name not in self.sizes:
                    end = (n + 1) * CHUNK
                    part = cache.read(row, end - CHUNK, end) if name is chunk else cache.read_states(row, end)
                    size = sum(tensor.nbytes for tensor in part.values())
                    if self.pending + size > MAX_PENDING:
                        return self.jobs.put((names, new))
                    if name is not chunk and not part:
                        continue
                    new[name] = part
                    with self.lock:
                        self.pending += size
                names.append(name)
        self.jobs.put((names, new))

    def close(self) -> None:
        """Write what is pending, and end."""
        self.jobs.put(None)
        self.thread.join()
        self.owner.release()

    def _names(self, ids: Sequence[int], scope: str | None) -> Iterator[str]:
        """The names of the whole chunks of a text."""
        digest = hashlib.sha256(f"{self.identity}\n{CHUNK}\n{scope or ''}\n".encode())
        for end in range(CHUNK, len(ids) + 1, CHUNK):
            digest.update(np.asarray(ids[end - CHUNK : end], np.int64).tobytes())
            yield digest.hexdigest()

    def _there(self, ids: Sequence[int], scope: str | None) -> list[str]:
        """The names of the chunks with which ``ids`` can begin."""
        names = list(takewhile(self.sizes.__contains__, self._names(ids, scope)))
        while self.recurrent and names and _states(names[-1]) not in self.sizes:
            names.pop()
        return [] if self.off else names

    def _path(self, name: str) -> Path:
        return self.folder / (name + SUFFIX)

    def _read(self, name: str) -> Tensors | None:
        """A chunk; None if it is damaged, or has made room since it was found."""
        try:
            with safe_open(self._path(name), "pt") as file:
                part, stored = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
            if stored == {"name": name, "crc": str(_crc(part))}:
                return part
            why = "its check sum is wrong"
        except (OSError, SafetensorError, ValueError) as error:
            with self.lock:
                if name not in self.sizes:
                    return None
            why = str(error)
        warnings.warn(f"'{self._path(name)}' is damaged and is removed: {why}", SpecDecWarning, stacklevel=2)
        try:
            with self.lock:
                self._remove(name)
        except OSError as error:
            self._stop(error)
        return None

    def _write_all(self) -> None:
        while (job := self.jobs.get()) is not None:
            try:
                self._write(*job)
            except OSError as error:
                self._stop(error)
            with self.lock:
                self.pending -= sum(tensor.nbytes for part in job[1].values() for tensor in part.values())

    def _write(self, names: list[str], new: dict[str, Tensors]) -> None:
        """Write the chunks ``new`` of a text, and note that all its ``names`` are used, the last one first."""
        self._note(names)
        for name, part in new.items():
            if self.off or name in self.sizes:
                continue
            data = save(part, {"name": name, "crc": str(_crc(part))})
            if len(data) > self.limit:
                break
            with self.lock:
                self._make_room(len(data))
            write_atomically(self._path(name), data)
            with self.lock:
                self.sizes[name] = len(data)
        self._note(names)

    def _note(self, names: list[str]) -> None:
        with self.lock:
            for name in reversed(names):
                if name in self.sizes and not self.off:
                    self.sizes.move_to_end(name)
                    now = time.time_ns()
                    os.utime(self._path(name), ns=(now, now))

    def _make_room(self, size: int) -> None:
        held = sum(self.sizes.values())
        while held + size > self.limit:
            held -= self._remove(next(iter(self.sizes)))

    def _remove(self, name: str) -> int:
        """Remove a chunk; return its bytes."""
        self._path(name).unlink(missing_ok=True)
        return self.sizes.pop(name, 0)

    def _stop(self, error: OSError) -> None:
        if not self.off:
            self.off = True
            what = f"the prefix cache '{self.folder}' is not used any more: {error.strerror or error}"
            warnings.warn(what, SpecDecWarning, stacklevel=2)


def _states(chunk: str) -> str:
    """The name of the recurrent states after a chunk."""
    return hashlib.sha256(f"{chunk} states".encode()).hexdigest()


def _crc(part: Tensors) -> int:
    crc = 0
    for key in sorted(part):
        crc = zlib.crc32(part[key].contiguous().view(torch.uint8).numpy().data, crc)
    return crc
