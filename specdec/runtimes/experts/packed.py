"""The packed expert file: one contiguous, aligned block per expert, and an index with checksums.

A folder holds ``experts.bin`` and ``experts.json``. A block is the expert's gate and up rows [2 F, D], then its down
projection [D, F], as in the model, padded to 4096 bytes: one aligned read fetches one expert. The index has the model's
fingerprint, which samples its weights, a hash of the files that the experts were read from, and every block's CRC-32.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pydantic.dataclasses
import torch
from pydantic import PositiveInt
from torch import Tensor

from specdec.base import files
from specdec.base.errors import SpecDecError, reported
from specdec.models.checkpoint import StoredExperts
from specdec.runtimes.experts.layers import MoELayer

BLOCKS, INDEX, FORMAT = "experts.bin", "experts.json", 1
ALIGNMENT = 4096
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pydantic.dataclasses.dataclass(frozen=True, config={"strict": True, "extra": "forbid"})
class Index:
    """The contents of a packed file. Block ``row * num_experts + expert`` is an expert of layer ``layers[row]``.

    hidden, width: D and F.
    checksums: CRC-32 of every block without its padding.
    source: ``Origin.state`` of the packed experts; "": not known.
    stride: bytes from block to block.
    """

    fingerprint: str
    dtype: str
    layers: list[int]
    num_experts: PositiveInt
    hidden: PositiveInt
    width: PositiveInt
    checksums: list[int]
    source: str = field(default="", compare=False)

    @property
    def block_bytes(self) -> int:
        return 3 * self.width * self.hidden * DTYPES[self.dtype].itemsize

    @property
    def stride(self) -> int:
        return -(-self.block_bytes // ALIGNMENT) * ALIGNMENT

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of layers, of experts of each, and ``stride``."""
        return len(self.layers), self.num_experts, self.stride

    @property
    def total_bytes(self) -> int:
        return math.prod(self.shape)

    def name(self, block: int) -> str:
        """The name of a block in messages."""
        return f"expert {block % self.num_experts} of layer {self.layers[block // self.num_experts]}"

    def views(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The gate-and-up [..., 2 F, D] and down [..., D, F] weights in ``memory`` (uint8 [..., stride]) of blocks."""
        values = memory[..., : self.block_bytes].view(DTYPES[self.dtype])
        gate_up, down = values.tensor_split([2 * self.width * self.hidden], -1)
        return gate_up.unflatten(-1, (-1, self.hidden)), down.unflatten(-1, (-1, self.width))

    def check(self, block: int, memory: Tensor) -> None:
        """Raise SpecDecError, naming the expert, unless ``memory`` (on the CPU) has the block's checksum."""
        if zlib.crc32(buffer(memory)[: self.block_bytes]) != self.checksums[block]:
            raise SpecDecError(
                f"the packed experts are damaged: {self.name(block)} does not have its checksum; pack the model again"
            )


@dataclass(frozen=True)
class Origin:
    """The source of experts. place: hash of its location; state: hash of location and contents.

    Experts in a checkpoint are identified by their files' resolved paths, sizes and times. Experts in memory are
    identified by all their bytes; place and state are then equal.
    """

    place: str
    state: str


def origin(layers: list[MoELayer]) -> Origin:
    """The origin of the experts of ``layers``. Raises SpecDecError if one of their files is gone."""
    dtype = str(layers[0].experts.gate_up_proj.dtype).encode()
    place, state = hashlib.sha256(dtype), hashlib.sha256(dtype)
    files = set[Path]()
    for experts in (layer.experts for layer in layers):
        if isinstance(experts, StoredExperts):
            files |= {span.path for fused in experts.fused for matrices in fused.experts for span in matrices}
            continue
        for weight in (matrix for fused in (experts.gate_up_proj, experts.down_proj) for matrix in fused):
            data = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
            place.update(data)
            state.update(data)
    for path in sorted(path.resolve() for path in files):
        with reported(f"cannot read weights in '{path}'"):
            found = path.stat()
        place.update(os.fsencode(path) + b"\0")
        state.update(os.fsencode(path) + f"\0{found.st_size} {found.st_mtime_ns}\0".encode())
    return Origin(place.hexdigest()[:32], state.hexdigest()[:32])


def plan(layers: list[MoELayer], fingerprint: str) -> Index:
    """The index of a packed file of ``layers`` before it is written. Raises SpecDecError if they cannot be packed."""
    first = layers[0].experts
    (count, double, hidden), dtype = first.gate_up_proj.shape, str(first.gate_up_proj.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise SpecDecError(f"experts of dtype {dtype} cannot be packed; load the model in {', '.join(DTYPES)}")
    for layer in layers:
        if layer.experts.gate_up_proj.shape != first.gate_up_proj.shape:
            raise SpecDecError(f"layer {layer.index} has experts of another shape; they cannot be packed together")
    return Index(fingerprint, dtype, [layer.index for layer in layers], count, hidden, double // 2, [])


def pack(
    layers: list[MoELayer], fingerprint: str, folder: Path, progress: Callable[[int, int], None] | None = None
) -> Index:
    """Write the experts of ``layers`` into ``folder``; the index is written last.

    Raises SpecDecError if there is too little space, or the disk refuses; older files then stay. progress: called with
    the number of blocks written and the number of all blocks.
    """
    source = origin(layers).state  # before they are read: a change meanwhile is noticed at the next use
    index = replace(plan(layers, fingerprint), source=source)
    if (folder / INDEX).exists() and not _is_index(folder / INDEX):
        raise SpecDecError(f"'{folder / INDEX}' was not made by specdec; move it away, or pack into another folder")
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder).free) < index.total_bytes:
            raise SpecDecError(
                f"not enough disk space in '{folder}': {index.total_bytes / 1e6:.0f} MB needed for the packed experts, "
                f"{free / 1e6:.0f} MB free; make room, or pack into a folder on another disk: specdec pack-experts"
            )
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{BLOCKS}.")
        with os.fdopen(handle, "wb") as file:
            for memory in _blocks(index, layers, progress):
                index.checksums.append(zlib.crc32(memory[: index.block_bytes]))
                file.write(memory)
            file.flush()
            os.fsync(file.fileno())
        (folder / INDEX).unlink(missing_ok=True)  # never an index beside blocks it does not describe
        os.chmod(temporary, 0o644)
        os.replace(temporary, folder / BLOCKS)
        _write_index(index, folder)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        need = f"; {index.total_bytes / 1e6:.0f} MB are needed" if full else ""
        raise SpecDecError(f"cannot write the packed experts to '{folder}': {error.strerror or error}{need}") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return index


def _blocks(index: Index, layers: list[MoELayer], progress: Callable[[int, int], None] | None) -> Iterator[memoryview]:
    """Each block as it is packed, one after another, in the same memory."""
    memory = torch.zeros(index.stride, dtype=torch.uint8)
    gate_up, down = index.views(memory)
    for row, layer in enumerate(layers):
        for expert in range(index.num_experts):
            layer.read(expert, gate_up, down)
            yield buffer(memory)
            if progress is not None:
                progress(row * index.num_experts + expert + 1, len(layers) * index.num_experts)


def _is_index(path: Path) -> bool:
    with suppress(OSError, ValueError, TypeError, RecursionError):
        return "format" in json.loads(path.read_text("utf-8"))
    return False


def _write_index(index: Index, folder: Path) -> None:
    files.write_atomically(folder / INDEX, json.dumps({"format": FORMAT, **asdict(index)}).encode())


def buffer(memory: Tensor) -> memoryview:
    """The bytes of a uint8 tensor on the CPU."""
    return memoryview(memory.numpy())  # type: ignore[arg-type]


def open_index(folder: Path) -> Index:
    """The index in ``folder``. Raises SpecDecError if a file is missing, broken or of the wrong size."""
    path = folder / INDEX
    hint = "write it with 'specdec pack-experts MODEL DIR'"
    try:
        data: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if data.pop("format") != FORMAT:
            raise ValueError("another format")
        index = Index(**data)
        if len(index.checksums) != len(index.layers) * index.num_experts or index.dtype not in DTYPES:
            raise ValueError("it contradicts itself")
        size = (folder / BLOCKS).stat().st_size
    except FileNotFoundError as error:
        raise SpecDecError(
            f"'{folder}' holds no packed experts: {Path(error.filename).name} is missing; {hint}"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise SpecDecError(f"'{path}' is not an index of packed experts ({reason}); {hint}") from None
    if size != index.total_bytes:
        raise SpecDecError(
            f"'{folder / BLOCKS}' has {size} bytes, its index says {index.total_bytes}: it is truncated or another's; "
            "pack the model again"
        )
    return index


def same_weights(
    index: Index, layers: list[MoELayer], folder: Path, progress: Callable[[int, int], None] | None = None
) -> None:
    """Compare every expert of ``layers`` with the checksums of the packed file in ``folder``, which has another origin.

    Then this origin is written to the index, so that it is compared once. Raises SpecDecError, naming the expert, if
    one differs.
    """
    state = origin(layers).state
    for block, memory in enumerate(_blocks(index, layers, progress)):
        if zlib.crc32(memory[: index.block_bytes]) != index.checksums[block]:
            raise SpecDecError(
                f"the experts in '{folder}' are not those of the loaded model: {index.name(block)} differs; pack this "
                "model again"
            )
    with suppress(OSError):
        _write_index(replace(index, source=state), folder)


def check_model(index: Index, planned: Index, folder: Path) -> None:
    """Raise SpecDecError unless the packed file in ``folder`` fits the index ``planned`` for the loaded model."""
    if index.fingerprint != planned.fingerprint:
        raise SpecDecError(
            f"the experts in '{folder}' are those of a model with fingerprint {index.fingerprint}, the loaded model's "
            f"is {planned.fingerprint}; pack this model, or load that one"
        )
    if index.dtype != planned.dtype:
        raise SpecDecError(
            f"the experts in '{folder}' are packed in {index.dtype}, the model is loaded in {planned.dtype}; "
            f"load it with --dtype {index.dtype}, or pack it again"
        )
    if replace(index, checksums=[]) != planned:
        raise SpecDecError(f"the experts in '{folder}' are of other shapes than the loaded model's; pack this model")
