"""Read the header of a GGUF file: its metadata, and the type, shape and offset of each tensor. Reads no tensor data.

A split GGUF file consists of several part files: the first has the metadata, and each has some of the tensors. Files
are untrusted: every count and offset is compared with the size of the file before it is used.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf

from specdec.base.errors import SpecDecError, errors_as
from specdec.models import packed
from specdec.models.names import part_paths
from specdec.models.tensor_file import TensorFile, TensorInfo

HEADER_BYTES = 1 << 28  # more than any header has
MAX_ELEMENTS = 1 << 22  # largest number of elements of all arrays of a header together
VERSIONS = 2, 3
STRING, ARRAY = 8, 9  # types of metadata values; the other types are numbers
NUMBERS = {kind: struct.Struct(f"<{code}") for kind, code in enumerate("BbHhIif?__Qqd") if code != "_"}
U32, U64 = NUMBERS[4], NUMBERS[10]
NUMBER, COUNT = "split.no", "split.count"  # metadata of a part: its number from 0, the number of parts
TENSORS = "split.tensors.count"  # the number of tensors in all parts
ENDS, NOT_TEXT = "it ends within its header", "a string in it is not UTF-8 text"


class _Broken(Exception):
    """Raised within this module for a broken header of a GGUF file; ``_read`` turns it into a SpecDecError.

    Its message says what is wrong.
    """


class Strings(Sequence[str]):
    """An array of strings in a GGUF header: a read-only sequence, decoded when it is first read, as it may be large.

    data: the encoded strings, each as its length (uint64, little-endian) and its UTF-8 bytes.
    count: number of strings.
    name: the model's name in messages.
    Reading any string raises SpecDecError if one of them is not UTF-8 text.
    """

    def __init__(self, data: bytes, count: int, name: str) -> None:
        self.data = data
        self.size = count
        self.name = name

    @functools.cached_property
    def texts(self) -> list[str]:
        """Return all strings as one list, decoded at the first access. Raises SpecDecError if one is not UTF-8 text."""
        found, at, data, length_at = list[str](), 0, self.data, U64.unpack_from
        try:
            for _ in range(self.size):
                end = at + 8 + length_at(data, at)[0]
                found.append(data[at + 8 : end].decode())
                at = end
        except UnicodeDecodeError:
            raise _error(self.name, NOT_TEXT) from None
        return found

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def __getitem__(self, index: Any) -> Any:
        return self.texts[index]


@dataclass(frozen=True)
class GGUFFile(TensorFile):
    """The header of a GGUF file, or the joined headers of all part files of a split one.

    paths: the part files in order, or the one file.
    state: sizes, times and inodes of ``paths`` (``packed.stamp``) before they were read, by which a change is noticed.
    tensors: descriptions of the tensors by name.
    metadata: key -> a number, a text, an array of texts (``Strings``) or a list of numbers; those of the first part.
    """

    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """Return llama.cpp's name of the model's architecture, such as "qwen2"; "": the file names none."""
        return str(self.metadata.get("general.architecture", ""))

    def without_tokenizer(self) -> GGUFFile:
        """Return a copy of the header without the tokenizer's metadata, which take most of its memory."""
        kept = {key: value for key, value in self.metadata.items() if not key.startswith("tokenizer.")}
        return replace(self, metadata=kept)


def read_header(path: Path, name: str = "") -> GGUFFile:
    """Read and return the header of a GGUF file, or the joined headers of all parts of a split file.

    path: the file, or any part of a split one. name: the model's name in messages; "": the path.
    Raises SpecDecError if the file is broken or a part is missing.
    """
    name, paths = name or str(path), part_paths(path)
    if len(paths) == 1:
        state = _state(name, paths)
        metadata, tensors = _read(path, name)
        if (count := metadata.get(COUNT, 1)) not in (0, 1):  # 0: parts that llama.cpp has merged
            raise SpecDecError(
                f"cannot load model '{name}': it is one of the {_short(count)} parts of a split GGUF file, and its "
                "name does not say which; give all parts their names back, such as NAME-00001-of-00003.gguf"
            )
        return GGUFFile((path,), state, tensors, metadata)
    for number, part in enumerate(paths, 1):
        if not part.is_file():
            raise SpecDecError(
                f"cannot load model '{name}': part {number} of {len(paths)} is missing ('{part}'); get it, too"
            )
    state, metadata, tensors = _state(name, paths), {}, {}
    for number, part in enumerate(paths):
        own, found = _read(part, str(part))
        if (numbering := (own.get(NUMBER), own.get(COUNT))) != (number, len(paths)):
            says = "part {} of {}, counted from 0".format(*map(_short, numbering))
            raise _error(name, f"'{part.name}' says that it is {says}")
        if double := tensors.keys() & found.keys():  # tensors with the same name
            raise _error(name, f"tensor '{_short(min(double))}' is in two parts")
        metadata = metadata or own
        tensors |= {key: replace(info, part=number) for key, info in found.items()}
    if (wanted := metadata.get(TENSORS)) != len(tensors):
        raise _error(name, f"its parts have {len(tensors)} tensors, and it says {_short(wanted)}")
    return GGUFFile(tuple(paths), state, tensors, metadata)


def _state(name: str, paths: Sequence[Path]) -> tuple[int, ...]:
    with errors_as(f"cannot read '{name}'"):
        return packed.stamp(paths)


def _read(path: Path, name: str) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Read the header of one GGUF file; return (metadata by key, descriptions of the tensors by name).

    name: the model's name in messages. Raises SpecDecError if the file is unreadable or broken.
    """
    with errors_as(f"cannot read '{name}'"), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) != b"GGUF":
            raise SpecDecError(f"'{name}' is not a GGUF file")
        with mmap.mmap(file.fileno(), min(size, HEADER_BYTES), access=mmap.ACCESS_READ) as data:
            try:
                return _HeaderReader(data, name).header(size)
            except _Broken as error:
                raise _error(name, str(error)) from None


def _error(name: str, why: str) -> SpecDecError:
    return SpecDecError(f"cannot load model '{name}': the GGUF file is truncated or broken ({why}); get it again")


class _HeaderReader:
    """A reader of the header at the start of a GGUF file: ``header`` reads all of it, once.

    The other methods read one item at ``at``, return its value and move ``at`` behind it. For a broken file, they raise
    ``_Broken``.

    data: the first bytes of the file, mapped into memory; they must stay mapped until ``header`` returns.
    size: number of these bytes.
    at: position of the next byte to read.
    elements: number of elements of all arrays that were read so far.
    name: the model's name in messages.
    """

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self.data = data
        self.size = len(data)
        self.at = 4  # after the magic bytes
        self.elements = 0  # of all arrays so far
        self.name = name

    def header(self, file_size: int) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        """Read the whole header after the magic bytes; return (metadata by key, descriptions of the tensors by name).

        file_size: size of the file in bytes. Raises _Broken, also for a tensor that would end behind the file.
        """
        version = self.number(U32)
        if version not in VERSIONS:
            raise _Broken(f"it is of version {version}; known: {', '.join(map(str, VERSIONS))}")
        tensors, entries = self.count(24), self.count(13)
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self.string()
            if key in metadata:
                raise _Broken(f"'{_short(key)}' is there twice")
            metadata[key] = self.value(self.number(U32))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise _Broken(f"its alignment is {_short(alignment)}")
        found = [self.tensor() for _ in range(tensors)]
        begin = -(-self.at // alignment) * alignment
        infos: dict[str, TensorInfo] = {}
        for key, kind, shape, offset in found:
            if key in infos:
                raise _Broken(f"tensor '{_short(key)}' is there twice")
            if offset % alignment:
                raise _Broken(f"tensor '{_short(key)}' is not aligned")
            info = TensorInfo(kind, shape, begin + offset, _bytes(key, kind, shape))
            if info.offset + info.nbytes > file_size:
                raise _Broken(
                    f"tensor '{_short(key)}' ends at byte {info.offset + info.nbytes}, and the file has {file_size}"
                )
            infos[key] = info
        return metadata, infos

    def number(self, kind: struct.Struct) -> Any:
        at = self.at
        self.at = at + kind.size
        if self.at > self.size:
            raise _Broken(ENDS)
        return kind.unpack_from(self.data, at)[0]

    def count(self, least: int) -> int:
        """Read and return a count (uint64): how many items of some list follow in the header.

        least: smallest number of bytes that an item can take. Raises _Broken if the rest of ``data`` is too small for
        so many items.
        """
        count: int = self.number(U64)
        if count * least > self.size - self.at:
            raise _Broken(ENDS)
        return count

    def string(self) -> str:
        length = self.count(1)
        text = self.data[self.at : self.at + length]
        self.at += length
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise _Broken(NOT_TEXT) from None

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(self.number(U32))
        if kind not in NUMBERS:
            raise _Broken(f"a value in it is of the unknown type {kind}")
        return self.number(NUMBERS[kind])

    def array(self, kind: int) -> Sequence[Any]:
        if kind != STRING and kind not in NUMBERS:
            raise _Broken(f"an array in it is of the unknown type {kind}")
        width = 8 if kind == STRING else NUMBERS[kind].size
        count = self.count(width)
        self.elements += count
        if self.elements > MAX_ELEMENTS:
            raise _Broken(f"arrays in it have {self.elements} elements together")
        if kind == STRING:
            return self.strings(count)
        values = struct.unpack_from(f"<{count}{NUMBERS[kind].format[1:]}", self.data, self.at)
        self.at += count * width
        return list(values)

    def strings(self, count: int) -> Strings:
        begin = at = self.at
        data, last, length_at = self.data, self.size - 8, U64.unpack_from
        for _ in range(count):  # a loop of few operations: there may be millions of strings
            if at > last:
                raise _Broken(ENDS)
            at += 8 + length_at(data, at)[0]
        if at > self.size:
            raise _Broken(ENDS)
        self.at = at
        return Strings(data[begin:at], count, self.name)

    def tensor(self) -> tuple[str, str, tuple[int, ...], int]:
        """Read the description of a tensor; return (name, name of its GGUF type, shape in PyTorch's order, offset).

        The offset counts in bytes from where the tensor data begin: the end of the header, rounded up to the file's
        alignment. Raises _Broken.
        """
        name, dimensions = self.string(), self.number(U32)
        if not 1 <= dimensions <= 4:
            raise _Broken(f"tensor '{_short(name)}' has {dimensions} dimensions")
        shape = tuple(self.number(U64) for _ in range(dimensions))[::-1]  # the file begins with the fastest dimension
        kind = self.number(U32)
        try:
            return name, gguf.GGMLQuantizationType(kind).name, shape, self.number(U64)
        except ValueError:
            raise _Broken(f"tensor '{_short(name)}' is of the unknown type {kind}") from None


def _bytes(name: str, kind: str, shape: tuple[int, ...]) -> int:
    """Return the size in bytes of a tensor.

    name: its name in messages. kind: the name of its GGUF type, such as "Q4_K". shape: in PyTorch's order.
    Raises _Broken for an impossible shape, such as rows that are not whole quantization blocks.
    """
    elements, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if 0 in shape or shape[-1] % elements:
        raise _Broken(f"tensor '{_short(name)}' of type {kind} has the impossible shape {shape}")
    return math.prod(shape) // elements * width


def _short(value: object) -> str:
    """Return an untrusted value as one line of at most 60 characters, for a message."""
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
