"""Linear layers in tiles, the weight format of the compiled kernels, and tables of rows such as token embeddings.

A tile has the weights of 16 outputs and 32 inputs, in bf16 or quantized.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import gguf
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.base import cores
from specdec.base.errors import SpecDecError
from specdec.models.gguf.blocks import BlockEmbedding, BlockExperts, BlockLinear, Blocks, dequantize
from specdec.runtimes.native import library, pages
from specdec.runtimes.native.library import BF16, INT, POINTER, Q4, Q8, Linear, LinearPart, Table, done, pointer, runs
from specdec.runtimes.native.packed_file import OTHER, ModelFile, PackedFile

LARGE = 800_000  # reading limits the speed of a draft matrix with more weights: 4 bits are then faster than 8
Allocate = Callable[[int], Tensor]  # size -> that many bytes for tiles, uint8, aligned to a cache line
CHUNK_WEIGHTS = 1 << 20  # weights that ``packing`` quantizes between two yields: some 20 ms on one core


class _Arena:
    """Allocates memory for tiles from large chunks on large pages, because most weights are smaller than a large page.

    CHUNK: bytes of a chunk.
    chunk: the chunk that memory is taken from, uint8.
    used: bytes of it that are taken.
    filled: bytes of it for which large pages were requested (``pages.fill``); all of them after a request that failed.
    lock: held while memory is taken.
    """

    CHUNK = 32 << 20

    def __init__(self) -> None:
        self.chunk = torch.empty(0, dtype=torch.uint8)
        self.used = 0
        self.filled = 0
        self.lock = threading.Lock()

    def allocate(self, size: int) -> Tensor:
        with self.lock:
            if self.used + size > self.chunk.numel():
                self.chunk = pages.allocate(max(size, self.CHUNK))
                self.used = self.filled = 0
            begin, self.used = self.used, self.used + -(-size // 64) * 64
            if self.used > self.filled:
                end = -(-self.used // pages.PAGE) * pages.PAGE
                self.filled = end if pages.fill(self.chunk[self.filled : end]) else self.chunk.numel()
            return self.chunk[begin : begin + size]


_arena = _Arena()


class Packed:
    """A linear layer in tiles for the kernels: y = ``scale (x W.T + bias)``, and then ``cap tanh(y / cap)`` if capped.

    A tile has the weights of 16 outputs and 32 inputs, in the order in which the kernels read them.

    inp, width: number of inputs and of outputs.
    tiles: the memory of each weight's tiles, uint8.
    parts: array of ctypes structures ``library.LinearPart``, one for each weight; their outputs are concatenated.
    bias: the bias, float32, padded with zeros to a multiple of 16; None: there is none.
    rounded: whether activations are quantized to 8 bits, which they are if no weight is bf16.
    proxy: the weights in 4 bits, which ``bound_argmax`` makes; None: it has made none.
    struct: the ctypes structure ``library.Linear`` of the layer, which points to the memory of this object.
    """

    def __init__(
        self,
        weights: Sequence[Tensor | Blocks],
        bias: Tensor | None = None,
        draft_only: bool = False,
        scale: float = 1.0,
        cap: float = 0.0,
        allocate: Allocate | None = None,
        made: tuple[int, Tensor] | None = None,
        kept: ModelFile | None = None,
    ) -> None:
        """Pack ``weights``, whose outputs are joined.

        weights: matrices [out_i, in] in bf16 or in GGUF blocks, which keep their codes and scales. If only some are in
            blocks, these are dequantized to bf16.
        bias: bias of all outputs, [sum of out_i]; None: there is none.
        draft_only: whether only drafts use the layer, whose results then need not be those of ``weights``: bf16 weights
            and blocks are quantized to 8 bits, matrices of more than ``LARGE`` weights to 4. False: values stay.
        scale: factor of the outputs.
        cap: bound of the outputs, by tanh; 0: none.
        allocate: function that returns memory of a size in bytes for the tiles; None: memory is taken from the common
            arena.
        made: (format number such as ``library.Q8``, tiles uint8) of the only weight if it is packed already, whose
            values in ``weights`` are then not read; None: it is not.
        kept: the file of packed weights to read the tiles from, or to add them to; None: there is none.

        Raises SpecDecError unless ``in`` is a multiple of 32, and each out_i but the last one is a multiple of 16.
        """
        self.inp = weights[0].shape[1]
        self.width = sum(weight.shape[0] for weight in weights)
        if self.inp % 32 or any(weight.shape[0] % 16 for weight in weights[:-1]):
            raise SpecDecError(
                "the native runtime takes linear maps of multiples of 16 outputs and 32 inputs; one has "
                f"{weights[0].shape[0]} and {self.inp}"
            )
        end, allocate = 0, allocate or _arena.allocate
        if made is not None:
            packed = [made]
        elif draft_only:
            packed = [(kind := _draft_kind(*weight.shape), _tiles(weight, kind, allocate)) for weight in weights]
        elif len({isinstance(weight, Blocks) for weight in weights}) > 1:
            packed = [_dense_tiles(weight, allocate) for weight in weights]
        else:
            packed = [_kept(weight, kept, allocate) for weight in weights]
            if len({kind == BF16 for kind, _ in packed}) > 1:  # some blocks have too large numbers
                packed = [_dense_tiles(weight, allocate) for weight in weights]
        self.tiles = [tiles for _, tiles in packed]
        self.parts = (LinearPart * len(weights))()
        for part, weight, (kind, tiles) in zip(self.parts, weights, packed, strict=True):
            end += -(-weight.shape[0] // 16)
            part.kind = kind
            part.end = end
            part.tiles = tiles.data_ptr()
        self.bias = None if bias is None else F.pad(bias.detach().float(), (0, -self.width % 16)).contiguous()
        self.rounded = BF16 not in self.kinds
        self.proxy: Tensor | None = None
        self.struct = Linear(
            rounded=self.rounded,
            out=16 * end,
            inp=self.inp,
            count=len(weights),
            scale=scale,
            cap=cap,
            parts=ctypes.addressof(self.parts),
            bias=pointer(self.bias),
        )

    @property
    def kinds(self) -> set[int]:
        """Return the formats of the layer's tiles, numbers such as ``library.BF16`` and ``library.Q8``."""
        return {part.kind for part in self.parts}

    @property
    def nbytes(self) -> int:
        """Return the bytes of weights that one product reads: all tiles or, with a proxy, only the proxy."""
        return sum(tiles.numel() for tiles in self.tiles) if self.proxy is None else self.proxy.numel()

    def bound_argmax(self, weight: Blocks, kept: ModelFile | None = None) -> None:
        """Make ``largest`` faster, with the same result: it then reads a 4-bit copy of the weight, and few full rows.

        The copy has an error bound for each output, so only outputs that may be the maximum are computed in full. No
        effect unless the weight has 8 bits, and the layer has no bias and no cap.

        weight: the only weight of the layer.
        kept: the file of packed weights to read the copy from, or to add it to; None: there is none.
        """
        if self.rounded and self.kinds == {Q8} and self.bias is None and not self.struct.cap and self.struct.scale > 0:
            self.proxy, self.error_bounds = _proxy(weight, kept)
            self.struct.proxy, self.struct.error_bounds = self.proxy.data_ptr(), self.error_bounds.data_ptr()

    def __call__(
        self, x: Tensor | Sequence[Tensor], norm: Tensor | None = None, eps: float = 0.0, after_weight: bool = False
    ) -> Tensor:
        """Return the outputs of the layer, bf16 [..., out].

        x: inputs, bf16 [..., in]; or several parts [..., in / n], which are joined, and each normed by itself.
        norm: weight of an RMS norm of the inputs, float32 [in]; None: ones.
        eps: epsilon of this norm; 0: there is no norm.
        after_weight: whether normed inputs are rounded to bf16 only after the multiplication by ``norm``, not also
            before.
        """
        parts = [x] if isinstance(x, Tensor) else x
        made = torch.empty(*parts[0].shape[:-1], self.width, dtype=torch.bfloat16)
        self._call(parts, norm, eps, after_weight, made.numel() // self.width, made.data_ptr(), None)
        return made

    def largest(self, x: Tensor, norm: Tensor | None, eps: float, after_weight: bool = False) -> list[int]:
        """Return the index of the largest output for each input vector, as a flat list; outputs are not stored.

        Of equal outputs, the first one counts. The index is -1 if an input of the vector is not finite.

        x: inputs, bf16 [..., in].
        norm: weight of an RMS norm of the inputs, float32 [in]; None: ones.
        eps: epsilon of this norm; 0: there is no norm.
        after_weight: whether normed inputs are rounded to bf16 only after the multiplication by ``norm``, not also
            before.
        """
        found = (ctypes.c_int64 * (x.numel() // self.inp))()
        self._call([x], norm, eps, after_weight, len(found), None, ctypes.addressof(found))
        return found[:]

    def _call(
        self,
        parts: Sequence[Tensor],
        norm: Tensor | None,
        eps: float,
        after_weight: bool,
        rows: int,
        out: int | None,
        best: int | None,
    ) -> None:
        parts = [part.contiguous() for part in parts]
        sources = (POINTER * len(parts))(*(part.data_ptr() for part in parts))
        given = ctypes.byref(self.struct), pointer(norm), eps, after_weight, sources, len(parts), rows
        done(library.load().specdec_linear(*given, out, best, self.width, cores.threads()))


def packing(
    weight: Tensor, bias: Tensor | None = None, scale: float = 1.0, cap: float = 0.0
) -> Generator[None, None, Packed]:
    """Pack a weight for drafts, quantized to 8 or 4 bits: a generator that yields after every 20 ms or so of work.

    The generator's return value (of ``yield from``) is the packed layer y = ``scale (x W.T + bias)``, and then ``cap
    tanh(y / cap)`` if ``cap`` is above 0.

    weight: W, bf16 [out, in].
    bias: [out]; None: there is none.
    scale, cap: factor of the outputs, and their bound; a cap of 0 is none.
    """
    (out, inp), tiles = weight.shape, GrowingTiles(*weight.shape)
    step = max(CHUNK_WEIGHTS // inp // 16, 1) * 16  # rows
    for end in range(step, out + step, step):
        made = tiles.extend(weight[:end])
        yield
    return Packed([weight], bias, draft_only=True, scale=scale, cap=cap, made=made)


class GrowingTiles:
    """A bf16 matrix [rows, inp] for drafts, quantized in tiles for the compiled kernels, whose number of rows grows.

    capacity: maximum number of rows. inp: number of columns.
    kind: format of the tiles, ``library.Q8`` or ``library.Q4``.
    rows: number of rows that are packed so far.
    size: bytes of the tiles of 16 rows.
    tiles: memory of the tiles of all ``capacity`` rows, uint8.
    """

    def __init__(self, capacity: int, inp: int) -> None:
        self.kind = _draft_kind(capacity, inp)
        self.rows = 0
        self.size = library.load().specdec_tiles_bytes(self.kind, 1, inp // 32)  # of 16 rows
        self.tiles = _arena.allocate(-(-capacity // 16) * self.size)

    def extend(self, weight: Tensor) -> tuple[int, Tensor]:
        """Pack the rows of ``weight`` that are not packed yet.

        weight: all rows of the matrix so far, bf16 [rows, inp]; earlier rows must be unchanged, and ``rows`` is at most
            ``capacity``.
        Returns (``kind``, ``tiles``).
        """
        if len(weight) > self.rows:
            first = self.rows // 16  # a tile that is not full is packed again
            rows, address = weight.detach()[16 * first :], self.tiles.data_ptr() + first * self.size
            table, threads = RowTable(rows), min(cores.threads(), -(-len(rows) // 16))  # at most one for each tile
            given = ctypes.byref(table.struct), len(rows), self.kind, address, None, threads
            done(library.load().specdec_pack_rounded(*given))
            self.rows = len(weight)
        return self.kind, self.tiles


class RowTable:
    """A table for the kernels whose rows are read by index, such as token embeddings; rows are returned in bf16.

    weight: the table [rows, columns], bf16 or in GGUF blocks.
    scale: factor of the values that are read.
    columns: number of columns.
    alive: the tensors that ``struct`` points to.
    struct: the ctypes structure ``library.Table`` of the table.
    """

    def __init__(self, weight: Tensor | Blocks, scale: float = 1.0) -> None:
        self.columns = weight.shape[1]
        rows = weight.rows if isinstance(weight, Blocks) else None
        kind = gguf.GGMLQuantizationType[weight.kind] if isinstance(weight, Blocks) else -1
        self.alive = weight.data.contiguous(), rows
        data, order = self.alive
        self.struct = Table(
            type=kind,
            columns=self.columns,
            stride=data.stride(0) * data.itemsize,
            data=pointer(data),
            order=pointer(order),
            scale=scale,
        )

    def __call__(self, index: Tensor) -> Tensor:
        """Return rows of the table, bf16 [..., columns]. index: row indices, int [...], which must be in range."""
        index = index.long().contiguous()
        rows = torch.empty(*index.shape, self.columns, dtype=torch.bfloat16)
        read = library.load().specdec_read_rows
        read(ctypes.byref(self.struct), index.data_ptr(), index.numel(), rows.data_ptr(), cores.threads())
        return rows


def unpack(blocks: Blocks, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Dequantize rows of a matrix in GGUF blocks: the result of ``blocks.dequantize``, but faster in bf16.

    blocks: the matrix [out, in].
    index: indices of the rows, int [n]; None: all rows.
    dtype: dtype of the result [n, in].
    """
    if dtype != torch.bfloat16:
        return dequantize(blocks, index, dtype)
    return blocks.in_order(RowTable(blocks)(torch.arange(blocks.shape[0]) if index is None else index))


def unpack_here(model: nn.Module) -> None:
    """Let modules of ``model`` dequantize their GGUF blocks by the kernels, if these run on this machine.

    It sets the attribute ``unpack`` of the modules with GGUF blocks, and changes no weights.
    """
    for module in model.modules() if runs() else ():
        if isinstance(module, BlockLinear | BlockEmbedding | BlockExperts):
            module.unpack = unpack


def _kept(weight: Tensor | Blocks, kept: ModelFile | None, allocate: Allocate) -> tuple[int, Tensor]:
    """Pack a matrix in tiles for the compiled kernels without quantizing it further, or read the tiles from a file.

    weight: the matrix [out, in], bf16 or in GGUF blocks, which keep their codes and scales.
    kept: the file of packed weights to read the tiles from, or to add them to; None: they are made in memory.
    allocate: function that returns memory of a size in bytes.

    Returns (format number such as ``library.BF16``, tiles uint8).
    """
    make = _block_tiles if isinstance(weight, Blocks) else _dense_tiles
    if kept is None or (name := kept.name(weight)) is None:
        return make(weight, allocate)  # type: ignore[arg-type]
    kind, sizes = INT(BF16), {BF16: _bytes(weight.shape, BF16)}
    if isinstance(weight, Blocks):
        size = library.load().specdec_block_tiles(RowTable(weight).struct.type, *weight.shape, ctypes.byref(kind))
        sizes[kind.value] = size
    return kept.find(name, sizes) or kept.add(name, *make(weight, allocate))  # type: ignore[arg-type]


def _proxy(weight: Blocks, kept: ModelFile | None) -> tuple[Tensor, Tensor]:
    """Return a 4-bit copy of a matrix as tiles, and a bound of each output's error for an input vector of length 1.

    weight: the matrix [out, in] in GGUF blocks.
    kept: the file of packed weights to read both from, or to add them to; None: they are made in memory.

    Returns (tiles uint8, bounds float32 [out, rounded up to a multiple of 16]).
    """
    name = None if kept is None else kept.name(weight)
    tiles, bounds = (f"{part} {name}" for part in ("rough", "gaps"))  # names in the file
    bound_bytes = 4 * (weight.shape[0] + -weight.shape[0] % 16)
    if kept is not None and name is not None:
        found = kept.find(tiles, {Q4: _bytes(weight.shape, Q4)}), kept.find(bounds, {OTHER: bound_bytes})
        if found[0] is not None and found[1] is not None:
            return found[0][1], found[1][1].view(torch.float32)
    made = torch.empty(bound_bytes // 4)
    proxy = _tiles(weight, Q4, _arena.allocate, made)
    if kept is not None and name is not None:
        kept.add(tiles, Q4, proxy)
        kept.add(bounds, OTHER, made)
    return proxy, made


def draft_tiles(
    shape: Sequence[int], weight: Callable[[], Tensor | Blocks], name: str, kept: PackedFile
) -> tuple[int, Tensor]:
    """Return the tiles of a weight that only drafts use, read from a file, or quantized, packed and added to the file.

    shape: [out, in] of the weight.
    weight: function that returns the weight, bf16 or in GGUF blocks; called only if the file does not have the tiles.
    name: name of the entry in the file.
    kept: the file of packed weights.

    Returns (format number ``library.Q8`` or ``library.Q4``, tiles uint8).
    """
    kind = _draft_kind(*shape)
    return kept.find(name, {kind: _bytes(shape, kind)}) or kept.add(name, kind, _tiles(weight(), kind, _arena.allocate))


def _bytes(shape: Sequence[int], kind: int) -> int:
    out, inp = shape
    size: int = library.load().specdec_tiles_bytes(kind, -(-out // 16), inp // 32)
    return size


def _dense_tiles(weight: Tensor | Blocks, allocate: Allocate) -> tuple[int, Tensor]:
    if isinstance(weight, Blocks):
        weight = dequantize(replace(weight, columns=None), None, torch.bfloat16)
    return BF16, _tiles(weight, BF16, allocate)


def _block_tiles(blocks: Blocks, allocate: Allocate) -> tuple[int, Tensor]:
    """Pack a matrix in GGUF blocks in tiles for the compiled kernels, with the codes and scales of the blocks.

    If the scales are too large for that, the tiles are bf16.

    blocks: the matrix [out, in].
    allocate: function that returns memory of a size in bytes.

    Returns (format number such as ``library.K4``, tiles uint8). Raises SpecDecError if the kernels read other values
    than the ``gguf`` package in the first or the last row.
    """
    lib, kind, table = library.load(), INT(), RowTable(blocks)
    ends = torch.tensor([0, blocks.shape[0] - 1])
    if not torch.equal(blocks.in_order(table(ends)), dequantize(blocks, ends, torch.bfloat16)):
        raise SpecDecError(f"the native kernels misread {blocks.kind} blocks, or they hold NaN; use the torch runtime")
    size = lib.specdec_block_tiles(table.struct.type, *blocks.shape, ctypes.byref(kind))
    tiles = allocate(size)
    if lib.specdec_pack_blocks(ctypes.byref(table.struct), blocks.shape[0], tiles.data_ptr(), cores.threads()):
        return kind.value, tiles
    return _dense_tiles(blocks, allocate)


def _tiles(weight: Tensor | Blocks, kind: int, allocate: Allocate, bounds: Tensor | None = None) -> Tensor:
    """Pack a matrix in tiles for the compiled kernels, quantized or in bf16, and return the tiles as uint8.

    weight: the matrix [out, in], bf16 or in GGUF blocks.
    kind: format of the tiles: ``BF16`` (only from a bf16 tensor), or ``Q8`` or ``Q4``, to which weights are quantized.
    allocate: function that returns memory of a size in bytes.
    bounds: float32 [out, rounded up to a multiple of 16], filled with a bound of each output's error; None: not wanted.
    """
    lib, (out, inp), table = library.load(), weight.shape, RowTable(weight)
    tiles = allocate(_bytes(weight.shape, kind))
    if kind == BF16:
        lib.specdec_pack(table.struct.data, out, inp, tiles.data_ptr(), cores.threads())
    else:
        given = ctypes.byref(table.struct), out, kind, tiles.data_ptr(), pointer(bounds), cores.threads()
        done(lib.specdec_pack_rounded(*given))
    return tiles


def _draft_kind(out: int, inp: int) -> int:
    return Q4 if out * inp > LARGE else Q8


def rounded_for_drafts(weight: Tensor) -> Tensor:
    """Return the values that the kernels read of a weight which is packed for drafts (``Packed``), bf16 [out, in].

    weight: bf16 [out, in]. The result is ``weight`` itself if the kernels do not take it (``serves``).
    """
    if not serves(weight):
        return weight
    return Packed([weight], draft_only=True)(torch.eye(weight.shape[1], dtype=torch.bfloat16)).T


def serves(weight: Tensor) -> bool:
    """Return whether the compiled kernels run on this machine and take a linear layer with this weight.

    weight: a matrix [out, in]. They take it if it is in bf16 on the CPU and ``in`` is a multiple of 32.
    """
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not weight.shape[1] % 32 and runs()
