"""A file of packed weights: the first load of a model writes the tiles of its weights, and later loads read them.

The file has entries, each at a multiple of ``PART`` bytes, then an index in JSON, and a trailer of fixed size with the
size and checksum of the index. The index has the key (state of the model's file, digest of the kernels), notes, the
size and checksum of all entries, and kind, offset and size of each entry. The file is not trusted: each load compares
checksums, and compares sizes with those that the model needs. So the file needs no flush: a file that a crash has
damaged is made again.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import struct
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch
from torch import Tensor

from specdec.base import cores, terminal
from specdec.models import identity, packed
from specdec.models.config import CONFIG
from specdec.models.gguf.blocks import Blocks
from specdec.models.packed import SUFFIX, Origin
from specdec.models.prepare import locked
from specdec.runtimes.native import library, pages

T = TypeVar("T")
F = TypeVar("F", bound="PackedFile")
MAGIC, END = b"specdec packed 1", struct.Struct("<16sQQ")  # the trailer: magic, size and checksum of the index
MOST_INDEX = 64 << 20  # bytes; no model's index is larger
CHUNK, READERS = 16 << 20, 2  # bytes that a thread reads at a time; number of threads
PART = 4096  # bytes of a part of the checksum; the offsets of entries are multiples of it
OTHER = -1  # kind of an entry that is not tiles
MODULUS = 1 << 64  # checksums are below it
DRAFTS, MOST_DRAFTS = "drafts-", 4  # begin of the names, and maximum number, of a model's files for drafters
ADAPTED, MOST_ADAPTED = "weights-", 2  # the same for the model with adapters


class Damaged(Exception):
    """Raised if a file of packed weights cannot be used. The message says why, such as "it is truncated"."""


class Entry(NamedTuple):
    """The place of an entry in a file of packed weights.

    kind: number of the format of its tiles, such as ``library.BF16``, or ``OTHER`` (-1) for other data.
    offset: offset in the file, in bytes.
    size: size in bytes.
    """

    kind: int
    offset: int
    size: int


class PackedFile:
    """A file of packed weights, which are a model's weights in tiles, the format that the compiled kernels read.

    ``open`` reads the file, or begins to write it if it is missing or cannot be used. ``find`` then returns entries of
    a file that was read, and ``add``, ``write`` and ``finish`` write a new one. ``close`` follows in both cases.

    path: the file. part: its path while it is written.
    key: JSON values that the content depends on, by name; "file", the state of the model's file, is among them. A file
        with another key is made again.
    need: bytes that must be free on the disk before it is written.
    entries: the entries by name.
    notes: further JSON values of the index, by name. What is set before ``finish`` is read by later loads.
    writes: whether this process is writing the file.
    complete: whether the file was read, and every entry that ``find`` looked for was in it.
    memory: the content of a file that was read, uint8.
    used, sum: bytes of all entries, and their checksum.
    added: (data, offset) of each entry that is still to be written.
    writings: the writes that run in the background.
    """

    def __init__(self, path: Path, key: Mapping[str, Any], need: int) -> None:
        self.path = path
        self.part = path.with_suffix(".part")
        self.key = dict(key)
        self.need = need
        self._closing = contextlib.ExitStack()
        self._forget()

    def _forget(self) -> None:
        self.entries = dict[str, Entry]()
        self.notes = dict[str, Any]()
        self.writes = False
        self.complete = False
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.used = 0  # bytes of all entries
        self.sum = 0  # their checksum
        self.added = list[tuple[Tensor, int]]()  # entries to write, with their offsets
        self.writings = list[Future[None]]()

    def open(self) -> None:
        """Read the file, or begin to write it if it is missing or cannot be used.

        If it can neither be read nor written, a note is printed once; it then has no entries, and ``add`` has no
        effect.
        """
        self._forget()
        if self._read() is None:
            return
        try:
            self._closing.enter_context(locked(self.path.with_suffix(".lock")))
            if (defect := self._read()) is None:  # another process has written it meanwhile
                self._closing.close()
                return
            if defect:
                note(f"the packed weights in {self.path.parent} are made again: {defect}")
            if shutil.disk_usage(self.path.parent).free < self.need:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.part.unlink(missing_ok=True)  # of a process that was killed
            self.file: BinaryIO = self._closing.enter_context(self.part.open("xb"))
            self._closing.callback(self.part.unlink, missing_ok=True)
            self.writer = ThreadPoolExecutor(1, "specdec packed weights")
            self._closing.callback(self.writer.shutdown, cancel_futures=True)
            self.writes = True
        except (OSError, NotImplementedError) as error:  # the latter: the file system has no locks
            self._fail(error)

    def find(self, name: str, sizes: Mapping[int, int]) -> tuple[int, Tensor] | None:
        """Return (kind, data uint8 [size]) of an entry; None: the file does not have it, or is being written.

        The data is a view of ``memory``. If the result is None, the caller makes the data and calls ``add``.

        name: name of the entry.
        sizes: the expected size in bytes, by allowed kind. Raises Damaged if the entry has another kind or size.
        """
        if self.writes or (entry := self.entries.get(name)) is None:
            self.complete = False
            return None
        if sizes.get(entry.kind) != entry.size:
            raise Damaged(f"'{name}' has another size than the model needs")
        return entry.kind, self.memory[entry.offset : entry.offset + entry.size]

    def add(self, name: str, kind: int, data: Tensor) -> tuple[int, Tensor]:
        """Note an entry that the next ``write`` or ``finish`` writes; return (``kind``, ``data``) as they are.

        Without a file that this process writes, it has no other effect. Nothing is copied: the tensor must not change
        until ``finish`` has returned.

        name: name of the entry, by which ``find`` finds it. kind: number of the format of its tiles, such as
            ``library.BF16``, or ``OTHER``.
        data: its content, a contiguous tensor on the CPU, of any dtype and shape; only its bytes are stored.
        """
        if self.writes:
            raw = data.flatten().view(torch.uint8)
            offset = -(-self.used // PART) * PART
            self.entries[name], self.used = Entry(kind, offset, len(raw)), offset + len(raw)
            self.sum = (self.sum + _checksum(raw, offset)) % MODULUS
            self.added.append((raw, offset))
        return kind, data

    def write(self) -> None:
        """Begin to write the added entries in a background thread, and return at once.

        No effect if the file was read. It may be called several times before ``finish``; call it after packing, which
        uses all cores.
        """
        if self.writes:
            self.writings.append(self.writer.submit(_write, self.file, self.added))
            self.added = []

    def finish(self) -> None:
        """Write the index, wait for all writes, move the file to its final path, and ``close``.

        No effect if the file was read. If the disk fails, a note is printed, and the file is deleted.
        """
        if not self.writes:
            return
        found = {"key": self.key, "notes": self.notes, "data": [self.used, self.sum], "entries": self.entries}
        index = torch.frombuffer(bytearray(json.dumps(found).encode()), dtype=torch.uint8)
        end = torch.frombuffer(bytearray(END.pack(MAGIC, len(index), _checksum(index))), dtype=torch.uint8)
        self.added.append((torch.cat((index, end)), self.used))
        self.write()
        try:
            for writing in self.writings:
                writing.result()
            os.chmod(self.part, 0o644)
            os.replace(self.part, self.path)
        except OSError as error:
            self._fail(error)
        self.close()

    def close(self) -> None:
        """Delete a file that is not finished, and release the writers' lock. Entries that were read stay in memory."""
        if self.writes:
            self._forget()
        self._closing.close()

    def _fail(self, error: Exception | str) -> None:
        reason = getattr(error, "strerror", None) or str(error)
        note(f"packed weights cannot be kept in {self.path.parent} ({reason}); each start packs them again")
        self.writes = True  # ``close`` then deletes the part
        self.close()

    def _read(self) -> str | None:
        """Read and check the whole file at ``path``: its entries, notes and content go to the fields of this object.

        Returns None if the file can be used; else the reason why not, as text for a note, or "" if there is no file.
        The fields are then empty. Raises nothing for missing, unreadable, damaged or outdated files.
        """
        try:
            with packed.open_file(self.path) as file:
                self._read_from(file)
        except FileNotFoundError:
            return ""
        except (OSError, Damaged) as error:
            self._forget()
            return str(error)
        self.complete = True
        return None

    def _read_from(self, file: BinaryIO) -> None:
        size = os.fstat(file.fileno()).st_size
        if size < END.size:
            raise Damaged("it is truncated")
        file.seek(size - END.size)
        magic, length, checksum = END.unpack(file.read(END.size))
        begin = size - END.size - length
        if magic != MAGIC or length > MOST_INDEX or begin < 0:
            raise Damaged("it is truncated, or of another version of specdec")
        file.seek(begin)
        index = bytearray(file.read(length))
        if len(index) != length or _checksum(torch.frombuffer(index or bytearray(1), dtype=torch.uint8)) != checksum:
            raise Damaged("it is damaged")
        try:
            found = json.loads(index)
            key, self.notes, (used, data_sum) = found["key"], found["notes"], map(_whole, found["data"])
            self.entries = {name: Entry(*map(_whole, numbers)) for name, numbers in found["entries"].items()}
            each = self.entries.values()
            inside = all(e.offset % PART == 0 <= e.offset and 0 <= e.size <= used - e.offset for e in each)
            if not inside or used != begin or not isinstance(self.notes, dict):
                raise ValueError
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise Damaged("it is damaged") from None
        if key != json.loads(json.dumps(self.key)):
            same = isinstance(key, dict) and key.get("file") == list(self.key["file"])
            raise Damaged("other kernels made them" if same else "the model's file has changed")
        if used:  # else no matrix of the model has kernels
            self.memory = _bytes(file, used)
        if _checksum(self.memory) != data_sum:
            raise Damaged("it is damaged")


class ModelFile(PackedFile):
    """The file of packed weights of a model, whose matrices are mapped from a GGUF or safetensors file.

    It lies in the model's folder in specdec's cache, and its key has the state of the model's file, a hash of the
    model's config, and one of the kernels.

    origin: the file that the matrices are mapped from, and the folder of the packed weights.
    """

    def __init__(self, origin: Origin) -> None:
        config = hashlib.sha256((origin.folder / CONFIG).read_bytes()).hexdigest()[:32]
        key: dict[str, Any] = {"file": (*origin.stamp, config), "kernels": _kernels()}
        path = origin.folder / packed.WEIGHTS
        if origin.adapter:
            key["adapter"], path = origin.adapter, origin.folder / f"{ADAPTED}{origin.adapter[:16]}{SUFFIX}"
        super().__init__(path, key, origin.size * 5 // 4)  # tiles are a bit larger
        self.origin = origin

    def finish(self) -> None:
        if self.writes and packed.stamp(self.origin.paths) != self.origin.stamp:
            self._fail("the model's file has changed meanwhile")
        super().finish()
        drop_old(self.origin.folder, ADAPTED, MOST_ADAPTED)

    def name(self, weight: Tensor | Blocks) -> str | None:
        """Return the name of a matrix's entry, made of its offset in the model's file, format, shape and row order.

        weight: the matrix [out, in], a tensor or in GGUF blocks.
        Returns None if the matrix does not lie in the model's file.
        """
        kind, rows = (weight.kind, weight.rows) if isinstance(weight, Blocks) else (str(weight.dtype), None)
        if (offset := self.origin.place(weight.data)) is None:
            return None
        order = "" if rows is None else hashlib.sha256(rows.int().numpy().tobytes()).hexdigest()[:32]
        return " ".join(map(str, (offset, kind, *weight.shape, *weight.data.shape, order)))

    def sample(self, parameter: Tensor | Blocks) -> Tensor:
        """Return ``identity.sample(parameter)``, evenly spaced elements that a fingerprint is made of, in bf16 [n].

        Samples of matrices that lie in the model's file are entries of this file, too, so that they are found without
        reading the model's.
        """
        name = self.name(parameter) if len(parameter.shape) == 2 else None
        if name is None:
            return identity.sample(parameter).to(torch.bfloat16)
        size = 2 * len(identity.sample_positions(parameter.shape.numel()))
        if (found := self.find(f"sample {name}", {OTHER: size})) is not None:
            return found[1].view(torch.bfloat16)
        return self.add(f"sample {name}", OTHER, identity.sample(parameter).to(torch.bfloat16))[1]

    def of_drafts(self, digest: str, need: int) -> PackedFile:
        """Return a file in the same folder for weights that a drafter derives from this model's weights.

        digest: hash of everything that the derived weights depend on.
        need: bytes that must be free on the disk before it is written.
        """
        if self.origin.adapter:
            digest = hashlib.sha256(f"{digest} {self.origin.adapter}".encode()).hexdigest()
        return PackedFile(self.path.with_name(f"{DRAFTS}{digest[:32]}{SUFFIX}"), self.key | {"drafts": digest}, need)


def using(file: F | None, make: Callable[[F | None], T]) -> T:
    """Call ``make(file)`` between opening and finishing the file, and return its result. The file is closed afterwards.

    If ``make`` raises ``Damaged``, the file is deleted, and ``make`` is called again, which then writes it. Other
    exceptions pass through.

    file: a file of packed weights; None: ``make(None)`` is called.
    make: function that reads weights from the file or adds them to it. It gets None if a damaged file cannot be
        deleted.
    """
    while file is not None:
        try:
            file.open()
            made = make(file)
            file.finish()
            return made
        except Damaged as error:
            note(f"the packed weights in {file.path.parent} are made again: {error}")
            try:
                file.path.unlink(missing_ok=True)
            except OSError:
                break
        finally:
            file.close()
    return make(None)


def drop_old(folder: Path, begin: str, most: int) -> None:
    """Delete old files of packed weights, and their lock files. Errors of the file system are ignored.

    folder: the folder of the files. begin: begin of the names of the files that are considered.
    most: number of files to keep, the latest ones.
    """
    with contextlib.suppress(OSError):
        found = sorted(folder.glob(f"{begin}*{SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
        for path in found[:-most]:
            path.unlink(missing_ok=True)
            path.with_suffix(".lock").unlink(missing_ok=True)


@functools.cache
def note(text: str) -> None:
    """Print the note ``text`` to stderr, unless this process has printed the same note before."""
    terminal.say(f"note: {text}")


@functools.cache
def _kernels() -> str:
    return hashlib.sha256(library.LIBRARY.read_bytes()).hexdigest()[:32]


def _checksum(data: Tensor, offset: int = 0, threads: int = 0) -> int:
    """Return the checksum of a part of a file; checksums of parts add up modulo 2^64.

    data: the part, uint8 and contiguous.
    offset: its offset in the file in bytes, a multiple of ``PART``.
    threads: number of threads that compute; 0: all.
    """
    threads = threads or cores.threads()
    found: int = library.load().specdec_checksum(data.data_ptr(), data.numel(), offset // PART, threads)
    return found


def _bytes(file: BinaryIO, size: int) -> Tensor:
    """Read the first ``size`` bytes of a file into memory, and return them as uint8.

    Raises Damaged if the file is shorter.
    """
    found, large = pages.allocate(size), threading.Event()
    view = found.numpy().data
    large.set()

    def read(start: int) -> None:
        end = min(start + CHUNK, size)
        if large.is_set() and not pages.fill(found[start:end]):
            large.clear()
        while start < end:
            if not (count := os.preadv(file.fileno(), [view[start:end]], start)):
                raise Damaged("it is truncated")
            start += count

    readers = ThreadPoolExecutor(READERS, "specdec reading")
    try:
        list(readers.map(read, range(0, size, CHUNK)))
    finally:
        readers.shutdown(cancel_futures=True)
    return found


def _write(file: BinaryIO, entries: list[tuple[Tensor, int]]) -> None:
    """Write entries to a file and flush it, in the writing thread.

    entries: (data uint8, offset in the file in bytes) of each, in order of offsets.
    """
    for data, offset in entries:
        file.seek(offset)
        file.write(data.numpy().data)
    file.flush()


def _whole(value: Any) -> int:
    if type(value) is not int or not -1 <= value < MODULUS:
        raise ValueError
    return value
