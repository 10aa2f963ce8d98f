"""Linear layers in tiles for the compiled kernels, and tables of rows."""

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
from specdec.runtimes.native import library
from specdec.runtimes.native.library import BF16, INT, POINTER, Q4, Q8, Linear, LinearPart, Table, done, pointer, runs
from specdec.runtimes.native.packed_file import OTHER, ModelFile, PackedFile

LARGE = 800_000  # reading limits the speed of a draft matrix with more weights: 4 bits are then faster than 8
Allocate = Callable[[int], Tensor]  # size -> that many bytes for tiles, uint8, aligned to a cache line
CHUNK_WEIGHTS = 1 << 20  # weights that ``packing`` quantizes between two yields: some 20 ms on one core


class _Arena:
    """Allocates from large chunks on large pages, because most weights are smaller than a large page."""

    CHUNK, PAGE = 32 << 20, 2 << 20

    def __init__(self) -> None:
        self.chunk = torch.empty(0, dtype=torch.uint8)
        self.used = 0  # bytes of the chunk
        self.lock = threading.Lock()

    def allocate(self, size: int) -> Tensor:
        with self.lock:
            if self.used + size > self.chunk.numel():
                memory = torch.empty(max(size, self.CHUNK) + self.PAGE, dtype=torch.uint8)
                library.load().specdec_large_pages(memory.data_ptr(), memory.numel())
                self.chunk = memory[-memory.data_ptr() % self.PAGE :]
                self.used = 0
            begin, self.used = self.used, self.used + -(-size // 64) * 64
            return self.chunk[begin : begin + size]


_arena = _Arena()


class Packed:
    """A linear layer in tiles for the kernels: y = ``scale (x W.T + bias)``, or with a cap ``cap tanh(y / cap)``.

    inp, width: number of inputs and outputs.
    tiles: the memory of each weight's tiles, uint8.
    rounded: whether activations are quantized to 8 bits, as they are for weights in blocks.
    proxy: the weights in 4 bits, for ``bound_argmax``; None: there is no proxy.
    struct: the layer for the kernels.
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

        weights: each bf16 [out_i, in] or GGUF blocks, which keep codes, scales and the order of columns. If some are
            bf16, blocks are unpacked to bf16.
        bias: [sum of out_i]; None: there is none.
        draft_only: whether bf16 weights are quantized to 8 bits, large ones to 4, because drafts need not be exact.
        allocate: allocates the tiles; None: from the common memory.
        made: kind and tiles of the only weight, if it is packed already (``packing``, ``GrowingTiles``).
        kept: the file to read the tiles from, or to add them to.
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
        """Return the formats of the layer's tiles: ``library.BF16``, ``Q8``, ..."""
        return {part.kind for part in self.parts}

    @property
    def nbytes(self) -> int:
        """Return the bytes that a product reads: all tiles, or with a proxy the tiles of the proxy."""
        return sum(tiles.numel() for tiles in self.tiles) if self.proxy is None else self.proxy.numel()

    def bound_argmax(self, weight: Blocks, kept: ModelFile | None = None) -> None:
        """Make ``largest`` faster: it will read a 4-bit copy of the weight, and full rows only for possible maxima.

        An error bound of each output makes the result exact. No effect unless the weight has 8 bits and the layer has
        no bias and no cap. weight: the layer's only weight. kept: file to read the copy from, or to add it to.
        """
        if self.rounded and self.kinds == {Q8} and self.bias is None and not self.struct.cap and self.struct.scale > 0:
            self.proxy, self.error_bounds = _proxy(weight, kept)
            self.struct.proxy, self.struct.error_bounds = self.proxy.data_ptr(), self.error_bounds.data_ptr()

    def __call__(
        self, x: Tensor | Sequence[Tensor], norm: Tensor | None = None, eps: float = 0.0, after_weight: bool = False
    ) -> Tensor:
        """Return the outputs bf16 [..., out] of ``x`` bf16 [..., in].

        x: also n parts [..., in / n], which are joined; each has an RMS norm of its own.
        eps: if above 0, an RMS norm with this epsilon comes before the product.
        norm: weight of the RMS norm, float32 [in]; None: ones.
        after_weight: whether the norm rounds only after its weight (``Family.round_after_weight``).
        """
        parts = [x] if isinstance(x, Tensor) else x
        made = torch.empty(*parts[0].shape[:-1], self.width, dtype=torch.bfloat16)
        self._call(parts, norm, eps, after_weight, made.numel() // self.width, made.data_ptr(), None)
        return made

    def largest(self, x: Tensor, norm: Tensor | None, eps: float, after_weight: bool = False) -> list[int]:
        """Return the index of the largest output of each row of ``x`` [..., in], as a flat list of all rows.

        The first of equal outputs; -1 if an input of the row is not finite. Outputs are not stored. norm, eps,
        after_weight: as in ``__call__``.
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
    """Pack a bf16 ``weight`` [out, in] for drafts; yield after each chunk of some 20 ms, and return the layer.

    bias, scale, cap: of the layer y = ``scale (x W.T + bias)``, with a cap above 0 ``cap tanh(y / cap)``.
    """
    (out, inp), tiles = weight.shape, GrowingTiles(*weight.shape)
    step = max(CHUNK_WEIGHTS // inp // 16, 1) * 16  # rows
    for end in range(step, out + step, step):
        made = tiles.extend(weight[:end])
        yield
    return Packed([weight], bias, draft_only=True, scale=scale, cap=cap, made=made)


class GrowingTiles:
    """Tiles of a bf16 matrix [rows, inp] for drafts that gets more rows; at most ``capacity`` rows.

    kind: format of the tiles. rows: number of rows that are packed. tiles: their memory, uint8.
    """

    def __init__(self, capacity: int, inp: int) -> None:
        self.kind = _draft_kind(capacity, inp)
        self.rows = 0
        self.size = library.load().specdec_tiles_bytes(self.kind, 1, inp // 32)  # of 16 rows
        self.tiles = _arena.allocate(-(-capacity // 16) * self.size)

    def extend(self, weight: Tensor) -> tuple[int, Tensor]:
        """Pack the rows of ``weight`` [rows, inp] that are not packed yet; return kind and tiles of all rows."""
        if len(weight) > self.rows:
            first = self.rows // 16  # a tile that is not full is packed again
            rows, address = weight.detach()[16 * first :], self.tiles.data_ptr() + first * self.size
            table, threads = RowTable(rows), min(cores.threads(), -(-len(rows) // 16))  # at most one for each tile
            given = ctypes.byref(table.struct), len(rows), self.kind, address, None, threads
            done(library.load().specdec_pack_rounded(*given))
            self.rows = len(weight)
        return self.kind, self.tiles


class RowTable:
    """A table of rows, such as token embeddings: ``weight`` [rows, columns], bf16 or GGUF blocks.

    Rows are read as bf16 and multiplied by ``scale``. struct: the table for the kernels.
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
        """Return the rows bf16 [..., columns] with the indices ``index``, int [...]. Indices must be in range."""
        index = index.long().contiguous()
        rows = torch.empty(*index.shape, self.columns, dtype=torch.bfloat16)
        read = library.load().specdec_read_rows
        read(ctypes.byref(self.struct), index.data_ptr(), index.numel(), rows.data_ptr(), cores.threads())
        return rows


def unpack(blocks: Blocks, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the rows ``index`` (None: all) of ``blocks`` in ``dtype``: ``dequantize``, but faster in bf16."""
    if dtype != torch.bfloat16:
        return dequantize(blocks, index, dtype)
    return blocks.in_order(RowTable(blocks)(torch.arange(blocks.shape[0]) if index is None else index))


def unpack_here(model: nn.Module) -> None:
    """Set the kernels' ``unpack`` in all modules of ``model`` with weights in blocks, if the kernels run here."""
    for module in model.modules() if runs() else ():
        if isinstance(module, BlockLinear | BlockEmbedding | BlockExperts):
            module.unpack = unpack


def _kept(weight: Tensor | Blocks, kept: ModelFile | None, allocate: Allocate) -> tuple[int, Tensor]:
    """Return format and tiles of a matrix at full precision, read from the file ``kept``, or made and added to it."""
    make = _block_tiles if isinstance(weight, Blocks) else _dense_tiles
    if kept is None or (name := kept.name(weight)) is None:
        return make(weight, allocate)  # type: ignore[arg-type]
    kind, sizes = INT(BF16), {BF16: _bytes(weight.shape, BF16)}
    if isinstance(weight, Blocks):
        size = library.load().specdec_block_tiles(RowTable(weight).struct.type, *weight.shape, ctypes.byref(kind))
        sizes[kind.value] = size
    return kept.find(name, sizes) or kept.add(name, *make(weight, allocate))  # type: ignore[arg-type]


def _proxy(weight: Blocks, kept: ModelFile | None) -> tuple[Tensor, Tensor]:
    """Return ``weight`` in 4-bit tiles, and bounds of each output's error for an input vector of length 1.
    The bounds are float32 [out, rounded up to whole tiles]. kept: the file to read both from, or to add them to."""
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
    """Return kind and tiles of a draft weight, read from the file ``kept`` or made and added to it.

    shape: [out, in]. weight: returns the weight; called only if the file lacks the tiles. name: name of the entry.
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
    """Return kind and tiles of a matrix in GGUF blocks; bf16 tiles if its scales are too large for the blocks' kind.
    Raises SpecDecError if the kernels read other values than ``gguf`` in the first and the last row."""
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
    """Pack ``weight`` [out, in] in tiles of ``kind``: BF16 (only of a tensor), or quantized to Q8 or Q4.
    bounds: float32 [out, rounded up to whole tiles], filled with bounds of each output's error; None: not wanted."""
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


def serves(weight: Tensor) -> bool:
    """Return whether the kernels run here and a linear layer with ``weight`` [out, in] can be ``Packed``."""
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not weight.shape[1] % 32 and runs()
