"""The packed expert file: one contiguous, aligned block per expert, and an index with checksums.

A folder holds ``experts.bin`` and ``experts.json``. A block is the expert's gate and up rows [2 F, D], then its down
projection [D, F], as stored in the model, padded to 4096 bytes: one aligned read fetches one expert. The index names
the model by its fingerprint and has every block's CRC-32. Files are data: whatever does not fit is refused by name.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec import artifacts
from specdec.errors import SpecDecError
from specdec.experts.layers import MoELayer

BLOCKS, INDEX, FORMAT = "experts.bin", "experts.json", 1
ALIGNMENT = 4096
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Index:
    """What a packed file holds. Blocks are numbered layer by layer: ``row * num_experts + expert``.

    fingerprint: of the model. layers: the layer behind each row of blocks. hidden: D. width: F. checksums: CRC-32 of
    every block without its padding. stride: bytes from block to block.
    """

    fingerprint: str
    dtype: str
    layers: list[int]
    num_experts: int
    hidden: int
    width: int
    checksums: list[int]

    @property
    def block_bytes(self) -> int:
        return 3 * self.width * self.hidden * DTYPES[self.dtype].itemsize

    @property
    def stride(self) -> int:
        return -(-self.block_bytes // ALIGNMENT) * ALIGNMENT

    @property
    def total_bytes(self) -> int:
        return len(self.layers) * self.num_experts * self.stride

    def name(self, block: int) -> str:
        """What messages call a block."""
        return f"expert {block % self.num_experts} of layer {self.layers[block // self.num_experts]}"

    def views(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The gate-and-up [..., 2 F, D] and down [..., D, F] weights in ``memory`` (uint8 [..., stride]) of blocks."""
        values = memory[..., : self.block_bytes].view(DTYPES[self.dtype])
        gate_up, down = values.tensor_split([2 * self.width * self.hidden], -1)
        return gate_up.unflatten(-1, (-1, self.hidden)), down.unflatten(-1, (-1, self.width))

    def check(self, block: int, memory: Tensor) -> None:
        """Raise SpecDecError, naming the expert, unless ``memory`` (on the CPU) holds what was packed."""
        if zlib.crc32(buffer(memory)[: self.block_bytes]) != self.checksums[block]:
            raise SpecDecError(
                f"the packed experts are damaged: {self.name(block)} does not have its checksum; pack the model again"
            )


def pack(
    layers: list[MoELayer], fingerprint: str, folder: Path, progress: Callable[[int, int], None] | None = None
) -> Index:
    """Write the experts of ``layers`` into ``folder``; the index, written last, appears only when all is on the disk.

    progress: told the blocks written and their number. Raises SpecDecError if the disk refuses; what was there stays.
    """
    first = layers[0].experts
    (count, double, hidden), dtype = first.gate_up_proj.shape, str(first.gate_up_proj.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise SpecDecError(f"experts of dtype {dtype} cannot be packed; load the model in {', '.join(DTYPES)}")
    index = Index(fingerprint, dtype, [layer.index for layer in layers], count, hidden, double // 2, [])
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{BLOCKS}.")
        memory = torch.zeros(index.stride, dtype=torch.uint8)
        gate_up, down = index.views(memory)
        with os.fdopen(handle, "wb") as file:
            for layer in layers:
                if layer.experts.gate_up_proj.shape != first.gate_up_proj.shape:
                    raise SpecDecError(
                        f"layer {layer.index} has experts of another shape; they cannot be packed together"
                    )
                for expert in range(count):
                    layer.read(expert, gate_up, down)
                    index.checksums.append(zlib.crc32(buffer(memory)[: index.block_bytes]))
                    file.write(buffer(memory))
                    if progress is not None:
                        progress(len(index.checksums), len(layers) * count)
            file.flush()
            os.fsync(file.fileno())
        (folder / INDEX).unlink(missing_ok=True)  # never an index beside blocks it does not describe
        os.chmod(temporary, 0o644)
        os.replace(temporary, folder / BLOCKS)
        artifacts.replace(folder / INDEX, json.dumps({"format": FORMAT, **asdict(index)}).encode())
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        need = f"; {index.total_bytes / 1e6:.0f} MB are needed" if full else ""
        raise SpecDecError(f"cannot write the packed experts to '{folder}': {error.strerror or error}{need}") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return index


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
        whole = all(type(n) is int and n > 0 for n in (index.num_experts, index.hidden, index.width))
        sums = len(index.checksums) == len(index.layers) * index.num_experts
        if not (whole and sums and index.dtype in DTYPES and all(type(c) is int for c in index.checksums)):
            raise ValueError("it contradicts itself")
        size = (folder / BLOCKS).stat().st_size
    except FileNotFoundError as error:
        raise SpecDecError(
            f"'{folder}' holds no packed experts: {Path(error.filename).name} is missing; {hint}"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SpecDecError(f"'{path}' is no index of packed experts ({error}); {hint}") from None
    if size != index.total_bytes:
        raise SpecDecError(
            f"'{folder / BLOCKS}' has {size} bytes, its index says {index.total_bytes}: it is truncated or not its "
            "own; pack the model again"
        )
    return index


def check_model(index: Index, layers: list[MoELayer], fingerprint: str, folder: Path) -> None:
    """Raise SpecDecError unless the packed file in ``folder`` is that of the model with ``layers``."""
    dtype = str(layers[0].experts.gate_up_proj.dtype).removeprefix("torch.")
    if index.fingerprint != fingerprint:
        raise SpecDecError(
            f"the experts in '{folder}' are those of a model with fingerprint {index.fingerprint}, the loaded model's "
            f"is {fingerprint}; pack this model, or load that one"
        )
    if index.dtype != dtype:
        raise SpecDecError(
            f"the experts in '{folder}' are packed in {index.dtype}, the model is loaded in {dtype}; "
            f"load it with --dtype {index.dtype}, or pack it again"
        )
