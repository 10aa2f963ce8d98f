"""The prefix cache on disk: keys and values of texts in chunks, which later requests and processes load.

A chunk is the keys and values of ``CHUNK`` consecutive tokens, in a file. Its name is a hash of the model's identity,
the owner of the text (scope), and all tokens up to the chunk's end, so a chunk is found only by its text. Recurrent
states after a chunk have a file of their own, and so have the keys and values of sliding-window layers, if the cache
still holds them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import queue
import re
import threading
import time
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain, takewhile
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from specdec.base.errors import SpecDecError, SpecDecWarning, one_line
from specdec.base.files import write_atomically
from specdec.kvcache import window as windows
from specdec.kvcache.cache import KVCache

CHUNK = 64  # tokens of a chunk; a prompt computes fewer than that many again
LAYOUT = 2  # of the tensors in a file; files of another layout are not found
READERS = 4  # threads
AHEAD = 16  # chunks that are read together: bounds the memory of those that are not in their place yet
MAX_PENDING = 1 << 30  # bytes of caches that wait to be written; one text may be larger
BUSY = errno.EMFILE, errno.ENFILE, errno.ENOMEM  # temporary errors
SUFFIX = ".safetensors"
_NAME, _LEFT = re.compile(rf"([0-9a-f]{{64}}){SUFFIX}"), re.compile(rf"\.[0-9a-f]{{64}}{SUFFIX}\..*")
Cache = TypeVar("Cache", bound=KVCache)
Tensors = dict[str, Tensor]


class PrefixDisk:
    """The prefix cache on disk: files of keys and values in one folder, which only one process uses. ``close`` ends it.

    A text is a sequence of token ids. A file has one chunk: the keys and values of 64 consecutive tokens of a text. The
    first chunk begins at the first token, and tokens after the last full chunk are not stored. A file's name is a hash
    of all tokens up to the chunk's end, so chunks are found by their text. A thread writes the files. After an
    error in writing, it warns once and writes nothing more. A damaged file is removed with a warning. A file that
    cannot be opened stays.

    folder: the folder; it is made if it is missing.
    limit: maximum bytes of all files; the least recently used ones are deleted above it.
    identity: text that identifies the model and the runtime; files with another identity are not found.
    recurrent: whether the model has recurrent layers, so that a text can go on only after a chunk with stored states.
    window: number of tokens before a token that sliding-window layers see, if the runtime drops their older keys; a
        text can then go on only after chunks with these layers' keys and values. 0: the runtime keeps those of all
        layers.
    sizes: bytes of each file by its name, the least recently used first.
    held: bytes of all files.
    queries, hits: number of tokens that were looked up, and of those that were loaded.
    pending: bytes of the KV caches that wait to be written.
    writable: whether files may still be written.

    Raises SpecDecError if another process uses the folder.
    """

    def __init__(self, folder: Path, limit: int, identity: str, recurrent: bool = False, window: int = 0) -> None:
        from filelock import FileLock, Timeout  # imports asyncio, which is slow

        self.folder = folder
        self.limit = limit
        self.identity = identity
        self.recurrent = recurrent
        self.window = window
        self.chunk = CHUNK
        self.sizes = OrderedDict[str, int]()
        self.held = self.queries = self.hits = self.pending = 0
        self.writable = True
        self.lock = threading.Lock()
        self.jobs = queue.SimpleQueue[Callable[[], None] | None]()
        self.owner = FileLock(folder / ".lock", thread_local=False)
        try:
            folder.mkdir(0o700, parents=True, exist_ok=True)
            self.owner.acquire(timeout=0)
        except Timeout:
            raise SpecDecError(f"the prefix cache '{folder}' is in use by another process; give each its own") from None
        except OSError as error:
            self._stop_writing(error)
        try:
            self._scan()
        except OSError as error:
            self._stop_writing(error)
        self.thread = threading.Thread(target=self._write_all, name="specdec prefix cache", daemon=True)
        self.thread.start()

    def _scan(self) -> None:
        """Read the folder's files into ``sizes`` and ``held``, and delete the least recently used ones above the limit.

        Also deletes unfinished files of a process that was killed.
        """
        found = list[tuple[int, str, int]]()
        for entry in os.scandir(self.folder):
            if match := _NAME.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    state = entry.stat()
                    found.append((state.st_mtime_ns, match[1], state.st_size))
            elif _LEFT.fullmatch(entry.name) and self.writable:  # of a process that was killed
                os.unlink(entry.path)
        self.sizes.update((name, size) for _, name, size in sorted(found))
        self.held = sum(self.sizes.values())
        if self.writable:
            self._make_room(0)

    def figures(self) -> dict[str, int]:
        """Return three statistics of this cache, by name.

        "disk_queries": number of tokens that were looked up. "disk_hits": number of those that were loaded.
        "disk_bytes": bytes of all files.
        """
        return {"disk_queries": self.queries, "disk_hits": self.hits, "disk_bytes": self.held}

    def longest(self, ids: Sequence[int], scope: str | None) -> int:
        """Return how many of the first tokens of ``ids`` have their keys and values on disk, a multiple of 64.

        It looks up file names only. ``load`` may load fewer, if a file is damaged.

        scope: name of the owner of the text, whose texts alone are found; None: the default owner.
        """
        return CHUNK * len(self._there(ids, scope))

    def load(self, cache: Cache, ids: Sequence[int], scope: str | None, capacity: int) -> Cache:
        """Fill ``cache`` with the longest stored beginning of the text ``ids``, commit its tokens, and return it.

        The beginning ends before a chunk that cannot be read, about which it warns; if nothing is found, the cache
        stays empty. Blocks until the files are read.

        cache: an empty cache of one row (sequence).
        scope: name of the owner of the text, whose texts alone are found; None: the default owner.
        capacity: minimum number of tokens for which the row gets memory.
        """
        names, states = self._there(ids, scope), dict[str, Tensor]()
        with ThreadPoolExecutor(READERS) as pool:
            groups = (pool.map(self._read, names[n : n + AHEAD]) for n in range(0, len(names), AHEAD))
            parts = (part or {} for part in takewhile(bool, chain.from_iterable(groups)))
            count = cache.restore(parts, max(capacity, CHUNK * len(names)))
        del names[count // CHUNK :]
        seen = self._load_windows(cache, names)
        while self.recurrent and names and not states:
            name = _states(names[-1])
            if not (states := (self._read(name) if name in self.sizes else None) or {}):
                names.pop()
                seen = self._load_windows(cache, names)
        if names:
            count = CHUNK * len(names)
            gone = windows.held([(CHUNK * n, CHUNK * n + CHUNK) for n in seen], count) if self.window else ()
            cache.resume(count, states, gone)
            self.hits += count
            files = [*names, *(_window(names[n]) for n in seen)]
            files += [_states(names[-1])] if self.recurrent else []
            self.jobs.put(partial(self._note, files))
        return cache

    def _load_windows(self, cache: KVCache, names: list[str]) -> list[int]:
        """Read into ``cache`` the sliding-window layers' keys and values that a token after these chunks will see.

        If such a part cannot be read, chunks are removed from the end of ``names`` until a text can go on after them.
        Returns the indices of the chunks whose part was read, in ascending order; [] if there are no sliding-window
        layers.

        cache: a cache of one row into which the chunks' other keys and values have been written.
        names: file names of the consecutive chunks of a text.
        """
        self._shorten(names)
        while self.window and names:
            missing = None
            seen = sorted({0, *self._before(len(names))})
            for n in reversed(seen):
                part = self._read(_window(names[n]))
                if part:
                    cache.restore_window(CHUNK * n, part)
                elif n in self._before(len(names)):
                    missing = n
                    break
                else:  # the first slots, which only drafts see
                    seen.remove(n)
            if missing is None:
                return seen
            del names[missing:]
            self._shorten(names)
        return []

    def _before(self, count: int) -> range:
        """Return the indices of the chunks that the token after ``count`` chunks sees through the attention window."""
        return range(max(count - -(-self.window // CHUNK), 0), count)

    def _shorten(self, names: list[str]) -> None:
        """Remove chunks from the end of ``names`` until a text can go on after the last one in sliding-window layers.

        These layers need the keys and values of all tokens in the window before the next token, which must be on disk.

        names: file names of the consecutive chunks of a text. All stay if there are no sliding-window layers.
        """
        there = [not self.window or _window(name) in self.sizes for name in names]
        while names and not all(there[n] for n in self._before(len(names))):
            names.pop()

    def keep(self, ids: Sequence[int], cache: KVCache, scope: str | None) -> None:
        """Let the writing thread store the chunks of the text ``ids`` that are not on disk yet. Returns at once.

        Does nothing if caches wait to be written and would then have more than ``MAX_PENDING`` bytes (1 GiB), or after
        an error in writing.

        ids: the token ids, all of which are committed in ``cache``.
        cache: cache of one row with the text. Its buffers are shared, and stay in memory, until they are written.
        scope: name of the owner of the text, for whom alone it is found later; None: the default owner.
        """
        size = cache.nbytes + cache.num_states * cache.state_bytes
        if self.writable and len(ids) >= CHUNK and (not self.pending or self.pending + size <= MAX_PENDING):
            with self.lock:
                self.pending += size
            self.jobs.put(partial(self._keep, ids, cache.reference(), scope, size))

    def close(self) -> None:
        """Write the texts that wait, end the writing thread, and let other processes use the folder.

        Blocks until that is done. ``keep`` has no effect afterwards.
        """
        self.jobs.put(None)
        if self.thread is not threading.current_thread():
            self.thread.join()

    def _names(self, ids: Sequence[int], scope: str | None) -> Iterator[str]:
        parts = f"{LAYOUT} {CHUNK} {self.window}" if self.window else f"{LAYOUT} {CHUNK}"
        owner = b"" if scope is None else scope.encode() or b"\xff"  # which no other scope is
        digest = hashlib.sha256(f"{self.identity}\n{parts}\n".encode() + owner + b"\n")
        for end in range(CHUNK, len(ids) + 1, CHUNK):
            digest.update(np.asarray(ids[end - CHUNK : end], np.int64).tobytes())
            yield digest.hexdigest()

    def _there(self, ids: Sequence[int], scope: str | None) -> list[str]:
        names = list(takewhile(self.sizes.__contains__, self._names(ids, scope)))
        self._shorten(names)
        while self.recurrent and names and _states(names[-1]) not in self.sizes:
            names.pop()
            self._shorten(names)
        return names

    def _path(self, name: str) -> Path:
        return self.folder / (name + SUFFIX)

    def _read(self, name: str) -> Tensors | None:
        """Return the tensors of the file ``name`` by their names; None if it is damaged, unreadable, or was deleted.

        Warns about a damaged file and removes it. Warns about a file that cannot be read.
        """
        size, path = self.sizes.get(name), self._path(name)
        if size is None:
            return None
        try:
            with path.open("rb") as file:
                data = file.read(size + 1)
            part, length = load(data), int.from_bytes(data[:8], "little")
            if json.loads(data[8 : 8 + length]).get("__metadata__") == {"name": name, "crc": str(_crc(part))}:
                return part
            why = "its check sum is wrong"
        except (FileNotFoundError, SafetensorError, ValueError) as error:
            why = str(error)
        except OSError as error:  # such as too many open files
            what = f"'{path}' cannot be read, and its text is run again: {error.strerror or error}"
            warnings.warn(what, SpecDecWarning, stacklevel=2)
            return None
        with self.lock:
            if name not in self.sizes:
                return None
            self.held -= self.sizes.pop(name)
        what = f"'{path}' is damaged and is {'removed' if self.writable else 'not used'}: {why}"
        warnings.warn(what, SpecDecWarning, stacklevel=2)
        try:
            if self.writable:
                path.unlink(missing_ok=True)
        except OSError as error:
            self._stop_writing(error)
        return None

    def _write_all(self) -> None:
        try:
            while (job := self.jobs.get()) is not None:
                try:
                    job()
                except Exception as error:  # requests must not fail
                    if getattr(error, "errno", None) not in BUSY:
                        self._stop_writing(error)
                del job  # the job shares buffers
        finally:
            self.owner.release()

    def _keep(self, ids: Sequence[int], cache: KVCache, scope: str | None, size: int) -> None:
        try:
            self._write(ids, cache, scope)
        finally:
            with self.lock:
                self.pending -= size

    def _write(self, ids: Sequence[int], cache: KVCache, scope: str | None) -> None:
        """Write the chunks of the text ``ids`` that are not on disk, and mark all of its chunks as recently used.

        It runs in the writing thread. Stops before a chunk for which earlier chunks of the same text would have to be
        deleted. Raises OSError if writing fails.

        cache: cache of one row with the text. scope: name of the owner of the text; None: the default owner.
        """
        chunks, used = [*self._names(ids, scope)], dict[str, None]()
        self._note(chunks)
        for n, chunk in enumerate(chunks):
            end = (n + 1) * CHUNK
            reads = {chunk: partial(cache.read, 0, end - CHUNK, end)}
            if self.window:
                reads[_window(chunk)] = partial(cache.read_window, 0, end - CHUNK, end)
            if self.recurrent:
                reads[_states(chunk)] = partial(cache.read_states, 0, end)
            for name, read in reads.items():
                if name not in self.sizes and self.writable:
                    if not (part := read()):
                        continue
                    data = save(part, {"name": name, "crc": str(_crc(part))})
                    if not self._make_room(len(data), used):
                        return self._note([*used])
                    write_atomically(self._path(name), data)
                    with self.lock:
                        self.sizes[name] = len(data)
                        self.held += len(data)
                used[name] = None
        self._note([*used])

    def _note(self, names: list[str]) -> None:
        for name in reversed(names):
            with self.lock:
                if name not in self.sizes:
                    continue
                self.sizes.move_to_end(name)
                if self.writable:
                    now = time.time_ns()
                    with suppress(FileNotFoundError):
                        os.utime(self._path(name), ns=(now, now))

    def _make_room(self, size: int, used: Container[str] = ()) -> bool:
        """Delete the least recently used files until ``size`` more bytes fit; return whether they fit.

        Deletes nothing if they cannot fit. used: names of files that must stay.
        """
        with self.lock:
            more, old = self.held + size - self.limit, list[str]()
            for name, each in self.sizes.items():
                if more <= 0:
                    break
                if name not in used:
                    old.append(name)
                    more -= each
            for name in old if more <= 0 else ():
                self._path(name).unlink(missing_ok=True)
                self.held -= self.sizes.pop(name)
            return more <= 0

    def _stop_writing(self, error: Exception) -> None:
        if self.writable:
            self.writable = False
            why = getattr(error, "strerror", None) or one_line(error)
            what = f"nothing more is written to the prefix cache '{self.folder}': {why}"
            warnings.warn(what, SpecDecWarning, stacklevel=2)


def _states(chunk: str) -> str:
    return hashlib.sha256(f"{chunk} states".encode()).hexdigest()


def _window(chunk: str) -> str:
    return hashlib.sha256(f"{chunk} window".encode()).hexdigest()


def _crc(part: Tensors) -> int:
    crc = 0
    for key in sorted(part):
        crc = zlib.crc32(part[key].contiguous().view(torch.uint8).numpy().data, crc)
    return crc
