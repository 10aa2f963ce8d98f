"""Linear maps in tiles for the compiled kernels, and tables of rows."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Protocol

import gguf
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.base import cores
from specdec.base.errors import SpecDecError
from specdec.models.gguf.blocks import BlockEmbedding, BlockExperts, BlockLinear, Blocks, dequantize
from specdec.runtimes.native import library
from specdec.runtimes.native.library import BF16, INT, POINTER, Q4, Q8, Linear, LinearPart, Table, done, pointer, runs
from specdec.runtimes.native.packed_file import OTHER, ModelFile, PackedFile

LARGE = 800_000  # a matrix for drafts with more weights is limited by reading them: 4 bits are faster
PACKED = 1 << 20  # weights that are quantised in a piece of work: some 20 ms on one core


class Memory(Protocol):
    """Allocates the memory of tiles, aligned to a cache line."""

    def allocate(self, size: int) -> Tensor: ...


class _Arena:
    """Allocates memory in large pieces, on large pages: most maps are smaller than such a page."""

    PIECE, PAGE = 32 << 20, 2 << 20

    def __init__(self) -> None:
        self.piece, self.used, self.lock = torch.empty(0, dtype=torch.uint8), 0, threading.Lock()

    def allocate(self, size: int) -> Tensor:
        """Allocate ``size`` bytes, aligned to a cache line."""
        with self.lock:
            if self.used + size > self.piece.numel():
                memory = torch.empty(max(size, self.PIECE) + self.PAGE, dtype=torch.uint8)
                library.load().specdec_large_pages(memory.data_ptr(), memory.numel())
                self.piece, self.used = memory[-memory.data_ptr() % self.PAGE :], 0
            begin, self.used = self.used, self.used + -(-size // 64) * 64
            return self.piece[begin : begin + size]


_arena = _Arena()


class Packed:
    """A linear map ``cap tanh(scale (x W.T + bias) / cap)`` in tiles; cap 0: ``scale (x W.T + bias)``.

    Raises SpecDecError if ``in`` is not a multiple of 32, or the outputs of any weight but the last one of 16.

    weights: stacked: bf16 [out_i, in], or GGUF blocks, which keep codes, scales and the order of columns.
    rounded: whether products take activations in 8 bits, as those of blocks do. Beside a bf16 weight, blocks are
        unpacked to bf16.
    draft_only: whether bf16 weights are quantised to 8 bits, large ones to 4: drafts need not be exact.
    memory: where the tiles lie, if not with all others.
    made: the tiles of such a weight and their format, where they are there (``packing``, ``GrowingTiles``).
    kept: the file that has the tiles of the model's matrices, or gets them.
    """

    def __init__(
        self,
        weights: Sequence[Tensor | Blocks],
        bias: Tensor | None = None,
        draft_only: bool = False,
        scale: float = 1.0,
        cap: float = 0.0,
        memory: Memory | None = None,
        made: tuple[int, Tensor] | None = None,
        kept: ModelFile | None = None,
    ) -> None:
        self.inp, self.width = weights[0].shape[1], sum(weight.shape[0] for weight in weights)
        if self.inp % 32 or any(weight.shape[0] % 16 for weight in weights[:-1]):
            raise SpecDecError(
                "the native runtime takes linear maps of multiples of 16 outputs and 32 inputs; one has "
                f"{weights[0].shape[0]} and {self.inp}"
            )
        end, memory = 0, memory or _arena
        if made is not None:
            packed = [made]
        elif draft_only:
            packed = [(kind := _draft_kind(*weight.shape), _tiles(weight, kind, memory)) for weight in weights]
        elif len({isinstance(weight, Blocks) for weight in weights}) > 1:
            packed = [_dense_tiles(weight, memory) for weight in weights]
        else:
            packed = [_kept(weight, kept, memory) for weight in weights]
            if len({kind == BF16 for kind, _ in packed}) > 1:  # some blocks have too large numbers
                packed = [_dense_tiles(weight, memory) for weight in weights]
        self.tiles = [tiles for _, tiles in packed]
        self.parts = (LinearPart * len(weights))()
        for part, weight, (kind, tiles) in zip(self.parts, weights, packed, strict=True):
            end += -(-weight.shape[0] // 16)
            part.kind, part.end, part.tiles = kind, end, tiles.data_ptr()
        self.bias = None if bias is None else F.pad(bias.detach().float(), (0, -self.width % 16)).contiguous()
        self.rounded = BF16 not in self.kinds
        self.rough: Tensor | None = None  # tiles, for ``largest``
        pointers = ctypes.addressof(self.parts), pointer(self.bias), None, None
        self.struct = Linear(self.rounded, 16 * end, self.inp, len(weights), scale, cap, *pointers)

    @property
    def kinds(self) -> set[int]:
        """The formats of its tiles."""
        return {part.kind for part in self.parts}

    @property
    def nbytes(self) -> int:
        """Bytes of all tiles; those that ``largest`` always reads, where it is screened."""
        return sum(tiles.numel() for tiles in self.tiles) if self.rough is None else self.rough.numel()

    def screen(self, weight: Blocks, kept: ModelFile | None = None) -> None:
        """Let ``largest`` read ``weight``, the only one, in 4 bits, and in full only what may then be the largest.

        It finds the same. Maps whose weights have other than 8 bits, or whose outputs are changed, stay as they are.
        """
        if self.rounded and self.kinds == {Q8} and self.bias is None and not self.struct.cap and self.struct.scale > 0:
            self.rough, self.gaps = _rough(weight, kept)
            self.struct.rough, self.struct.gaps = self.rough.data_ptr(), self.gaps.data_ptr()

    def __call__(self, x: Tensor, norm: Tensor | None = None, eps: float = 0.0, once: bool = False) -> Tensor:
        """bf16 [..., in] -> [..., out]; with ``eps`` after an RMS norm with weight ``norm`` [in] (float32).

        once: as in ``Family``.
        """
        return self._run((x,), norm, eps, once)

    def of_normalised(self, parts: Sequence[Tensor], eps: float) -> Tensor:
        """bf16 parts [..., in / n], each divided by its RMS, side by side -> [..., out]."""
        return self._run(parts, None, eps, False)

    def largest(self, x: Tensor, norm: Tensor | None, eps: float, once: bool = False) -> list[int]:
        """The flat argmax of ``self(x, norm, eps, once)`` (the first of equals, never NaN; -1 if an input is not
        finite), without storing the outputs."""
        found = (ctypes.c_int64 * (x.numel() // self.inp))()
        self._call((x,), (norm, eps, once), len(found), None, ctypes.addressof(found))
        return found[:]

    def _run(self, parts: Sequence[Tensor], norm: Tensor | None, eps: float, once: bool) -> Tensor:
        made = torch.empty(*parts[0].shape[:-1], self.width, dtype=torch.bfloat16)
        self._call(parts, (norm, eps, once), made.numel() // self.width, made.data_ptr(), None)
        return made

    def _call(
        self,
        parts: Sequence[Tensor],
        norm: tuple[Tensor | None, float, bool],
        rows: int,
        out: int | None,
        best: int | None,
    ) -> None:
        weight, *norms = norm
        parts = [part.contiguous() for part in parts]
        sources = (POINTER * len(parts))(*(part.data_ptr() for part in parts))
        given = ctypes.byref(self.struct), pointer(weight), *norms, sources, len(parts), rows
        done(library.load().specdec_linear(*given, out, best, self.width, cores.threads()))


def packing(
    weight: Tensor, bias: Tensor | None = None, scale: float = 1.0, cap: float = 0.0
) -> Generator[None, None, Packed]:
    """Return ``Packed`` of a bf16 weight for drafts, after pieces of work."""
    (out, inp), tiles = weight.shape, GrowingTiles(*weight.shape)
    step = max(PACKED // inp // 16, 1) * 16  # rows
    for end in range(step, out + step, step):
        made = tiles.extend(weight[:end])
        yield
    return Packed([weight], bias, draft_only=True, scale=scale, cap=cap, made=made)


class GrowingTiles:
    """Tiles of a bf16 matrix for drafts, whose rows come one after the other; of ``capacity`` rows at most.

    rows: number of rows that are there.
    """

    def __init__(self, capacity: int, inp: int) -> None:
        self.kind, self.rows = _draft_kind(capacity, inp), 0
        self.size = library.load().specdec_tiles_bytes(self.kind, 1, inp // 32)  # of 16 rows
        self.tiles = _arena.allocate(-(-capacity // 16) * self.size)

    def extend(self, weight: Tensor) -> tuple[int, Tensor]:
        """Pack the rows of ``weight`` that are not there, with those of the tile that the first one joins."""
        if len(weight) > self.rows:
            first = self.rows // 16
            rows, place = weight.detach()[16 * first :], self.tiles.data_ptr() + first * self.size
            table = RowTable(rows)
            given = ctypes.byref(table.struct), len(rows), self.kind, place, None, cores.threads()
            done(library.load().specdec_pack_rounded(*given))
            self.rows = len(weight)
        return self.kind, self.tiles


class RowTable:
    """A matrix [rows, columns], in bf16 or GGUF blocks, whose rows are read as bf16, times ``scale``."""

    def __init__(self, weight: Tensor | Blocks, scale: float = 1.0) -> None:
        self.columns = weight.shape[1]
        if isinstance(weight, Blocks):
            self.alive = weight.data, weight.rows
            kind = gguf.GGMLQuantizationType[weight.kind]
            self.struct = Table(kind, self.columns, weight.data.stride(0), *map(pointer, self.alive), scale)
        else:
            self.alive = weight.detach().contiguous(), None
            self.struct = Table(-1, self.columns, 2 * self.columns, *map(pointer, self.alive), scale)

    def __call__(self, index: Tensor) -> Tensor:
        """Integers [...] -> bf16 [..., columns]. Indices must be in range."""
        index = index.long().contiguous()
        rows = torch.empty(*index.shape, self.columns, dtype=torch.bfloat16)
        read = library.load().specdec_read_rows
        read(ctypes.byref(self.struct), index.data_ptr(), index.numel(), rows.data_ptr(), cores.threads())
        return rows


def unpack(blocks: Blocks, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``blocks.dequantize``, faster in bf16."""
    if dtype != torch.bfloat16:
        return dequantize(blocks, index, dtype)
    return blocks.in_order(RowTable(blocks)(torch.arange(blocks.shape[0]) if index is None else index))


def unpack_here(model: nn.Module) -> None:
    """Let the kernels unpack the model's blocks, if they run here."""
    for module in model.modules() if runs() else ():
        if isinstance(module, BlockLinear | BlockEmbedding | BlockExperts):
            module.unpack = unpack


def _kept(weight: Tensor | Blocks, kept: ModelFile | None, memory: Memory) -> tuple[int, Tensor]:
    """The format and the tiles of a matrix that is not only for drafts, from the file ``kept`` or for it."""
    make = _block_tiles if isinstance(weight, Blocks) else _dense_tiles
    if kept is None or (name := kept.name(weight)) is None:
        return make(weight, memory)  # type: ignore[arg-type]
    kind, sizes = INT(BF16), {BF16: _bytes(weight.shape, BF16)}
    if isinstance(weight, Blocks):
        size = library.load().specdec_block_tiles(RowTable(weight).struct.type, *weight.shape, ctypes.byref(kind))
        sizes[kind.value] = size
    if (found := kept.find(name, sizes)) is not None:
        return found
    return kept.add(name, *make(weight, memory))  # type: ignore[arg-type]


def _rough(weight: Blocks, kept: ModelFile | None) -> tuple[Tensor, Tensor]:
    """The tiles of ``Packed.screen``, and by how much they may change an output, float32."""
    name = None if kept is None else kept.name(weight)
    tiles, gaps = (f"{part} {name}" for part in ("rough", "gaps"))
    gap_bytes = 4 * (weight.shape[0] + -weight.shape[0] % 16)
    if kept is not None and name is not None:
        found = kept.find(tiles, {Q4: _bytes(weight.shape, Q4)}), kept.find(gaps, {OTHER: gap_bytes})
        if found[0] is not None and found[1] is not None:
            return found[0][1], found[1][1].view(torch.float32)
    made = torch.empty(gap_bytes // 4)
    rough = _tiles(weight, Q4, _arena, made)
    if kept is not None and name is not None:
        kept.add(tiles, Q4, rough)
        kept.add(gaps, OTHER, made)
    return rough, made


def draft_tiles(
    shape: Sequence[int], weight: Callable[[], Tensor | Blocks], name: str, kept: PackedFile
) -> tuple[int, Tensor]:
    """Format and tiles of a weight [out, in] for drafts, from the file ``kept`` or for it."""
    kind = _draft_kind(*shape)
    found = kept.find(name, {kind: _bytes(shape, kind)})
    return found or kept.add(name, kind, _tiles(weight(), kind, _arena))


def _bytes(shape: Sequence[int], kind: int) -> int:
    """Bytes of the tiles of a weight [out, in]."""
    out, inp = shape
    size: int = library.load().specdec_tiles_bytes(kind, -(-out // 16), inp // 32)
    return size


def _dense_tiles(weight: Tensor | Blocks, memory: Memory) -> tuple[int, Tensor]:
    if isinstance(weight, Blocks):
        weight = dequantize(replace(weight, columns=None), None, torch.bfloat16)
    return BF16, _tiles(weight, BF16, memory)


def _block_tiles(blocks: Blocks, memory: Memory) -> tuple[int, Tensor]:
    """The format and the tiles of a matrix in GGUF blocks; bf16 if its numbers are too large for the blocks' own
    format.

    Raises SpecDecError if the kernels read other values than ``gguf`` in the first and the last row.
    """
    lib, kind, table = library.load(), INT(), RowTable(blocks)
    ends = torch.tensor([0, blocks.shape[0] - 1])
    if not torch.equal(blocks.in_order(table(ends)), dequantize(blocks, ends, torch.bfloat16)):
        raise SpecDecError(f"the native kernels misread {blocks.kind} blocks, or they hold NaN; use the torch runtime")
    size = lib.specdec_block_tiles(table.struct.type, *blocks.shape, ctypes.byref(kind))
    tiles = memory.allocate(size)
    if lib.specdec_pack_blocks(ctypes.byref(table.struct), blocks.shape[0], tiles.data_ptr(), cores.threads()):
        return kind.value, tiles
    return _dense_tiles(blocks, memory)


def _tiles(weight: Tensor | Blocks, kind: int, memory: Memory, gaps: Tensor | None = None) -> Tensor:
    """``weight`` [out, in] in tiles of ``kind``: BF16 (a tensor), or quantised to Q8 or Q4.

    gaps: float32 [out in whole tiles], filled as ``Linear.gaps`` of native.h.
    """
    lib, (out, inp), table = library.load(), weight.shape, RowTable(weight)
    tiles = memory.allocate(_bytes(weight.shape, kind))
    if kind == BF16:
        lib.specdec_pack(table.struct.data, out, inp, tiles.data_ptr(), cores.threads())
    else:
        given = ctypes.byref(table.struct), out, kind, tiles.data_ptr(), pointer(gaps), cores.threads()
        done(lib.specdec_pack_rounded(*given))
    return tiles


def _draft_kind(out: int, inp: int) -> int:
    return Q4 if out * inp > LARGE else Q8


def serves(weight: Tensor) -> bool:
    """Whether a linear map with this weight [out, in] can be ``Packed`` here."""
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not weight.shape[1] % 32 and runs()
