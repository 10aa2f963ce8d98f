"""A key/value cache with one buffer per row: rows come and go without copying the others.

A row's committed slots are numbered by their positions, and its draft's slots follow them: no row has holes, and none
is padded. For runtimes that take a pointer to each row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.kvcache.cache import KVCache, Mask, dequantize_rows, quantize_rows, zeros

PAGE = 16  # the buffer of a copy has a multiple of so many slots


class RowMask(Mask):
    """The slots that the tokens of a pass over rows of a ``RowCache`` may attend to, row by row.

    committed: number of committed tokens of each row.
    counts: number of tokens of each row in the pass.
    trees: of each row, bool [its tokens, its uncommitted slots]; None: each token sees the slots up to its own.
    ahead: number of uncommitted slots before the tokens.
    places: positions of each row's uncommitted slots, if trees are given.
    """

    def __init__(
        self,
        positions: Tensor,
        committed: list[int],
        counts: Sequence[int],
        trees: Sequence[Tensor | None],
        ahead: int,
        places: Sequence[Tensor] | Tensor = (),
    ) -> None:
        causal = all(tree is None for tree in trees)
        super().__init__(positions, positions, None, causal)
        self.committed, self.counts, self.trees, self.ahead, self.places = committed, counts, trees, ahead, places

    def tree(self, row: int, window: int | None) -> Tensor | None:
        """The contiguous tree of a row within ``window``."""
        key = row, window
        if key not in self.memo:
            tree = self.trees[row]
            if tree is not None and window is not None and window < tree.shape[1]:
                place = self.places[row]  # (U,)
                tree = tree & (place[-tree.shape[0] :, None] - place < window)
            self.memo[key] = None if tree is None else tree.contiguous()
        return self.memo[key]

    def bool_mask(self, window: int | None = None) -> Tensor | None:
        """As in ``Mask``, for rows with equally many tokens: keys as ``RowCache.append`` returns them."""
        key = "all", window
        if key in self.memo:
            return self.memo[key]
        t, end = self.counts[0], max(self.committed) + self.ahead + self.counts[0]
        visible = torch.zeros(len(self.counts), t, end, dtype=torch.bool)
        for b, (committed, count) in enumerate(zip(self.committed, self.counts, strict=True)):
            tree, behind = self.tree(b, window), self.ahead + count
            if tree is None:
                tree = torch.ones(t, behind, dtype=torch.bool).tril(self.ahead)
                tree = tree if window is None else tree.triu(self.ahead + 1 - window)
            visible[b, :, :committed] = True
            if window is not None:
                first = self.query[b, :, None] + 1 - window  # (T, 1)
                visible[b, :, :committed] = torch.arange(committed) >= first
            visible[b, :, committed : committed + behind] = tree
        self.memo[key] = None if bool(visible.all()) else visible[:, None]
        return self.memo[key]


class RowCache(KVCache):
    """Keys and values of a batch on a CPU.

    data[b]: keys and values of row b, [2, N, H, capacity, d], allocated at first use.
    places[b]: its capacity, and pointers to its keys and values.
    draft_positions: positions of uncommitted slots [B, U].
    """

    padded = False

    def __init__(self, num_layers: int, batch: int = 1, block: int | None = None, int8: bool = False) -> None:
        super().__init__(num_layers, batch, block=block, int8=int8)
        self.data: list[Tensor | None] = [None] * batch
        self.places: list[tuple[int, int, int]] = [(0, 0, 0)] * batch
        self.draft_positions = torch.zeros(batch, 16, dtype=torch.long)

    def capacities(self, ends: Sequence[int]) -> list[int]:
        pairs = zip(ends, self.places, strict=True)
        return [have if end <= have else self._slots(end, have, row=b) for b, (end, (have, _, _)) in enumerate(pairs)]

    @property
    def nbytes(self) -> int:
        return sum(data.nbytes for data in self.data if data is not None)

    @property
    def token_bytes(self) -> int:
        held = [data for data in self.data if data is not None]
        return held[0].nbytes // held[0].shape[3] if held else 0

    def mask(  # type: ignore[override]
        self,
        layer: int,
        positions: Tensor,
        tree: Tensor | None = None,
        counts: Sequence[int] | None = None,
        trees: Sequence[Tensor | None] | None = None,
    ) -> RowMask:
        """As in ``KVCache``; with ``counts``, for so many tokens of each row, row behind row (positions [1, T]).

        trees: with ``counts``: bool [count, count] of each row, or None for a chain; nothing else may be uncommitted.
        """
        if counts is not None:
            places = positions[0].split(list(counts))
            return RowMask(positions, self.rows, counts, trees or [None] * self.batch, 0, places)
        (batch, t), ahead = positions.shape, self.lengths[layer] - self.committed
        end = ahead + t
        if end > self.draft_positions.shape[1]:
            self.draft_positions = torch.cat((self.draft_positions, self.draft_positions.new_zeros(batch, 2 * end)), 1)
        self.draft_positions[:, ahead:end] = positions
        each = [tree] * batch if tree is None or tree.dim() == 2 else list(tree)
        return RowMask(positions, self.rows, [t] * batch, each, ahead, self.draft_positions[:, :end])

    def provide(self, lo: int, hi: int, counts: Sequence[int], heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Count the next ``counts`` slots of the rows as filled in layers [lo, hi), for a runtime to write them."""
        ahead = self.lengths[lo] - self.committed
        for b, (n, count) in enumerate(zip(self.rows, counts, strict=True)):
            if n + ahead + count > self.places[b][0]:
                self._grow(b, n + ahead + count, heads, head_dim, dtype)
        self.lengths[lo:hi] = [self.committed + ahead + max(counts)] * (hi - lo)

    def _grow(self, row: int, end: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        if self.int8:
            head_dim, dtype = head_dim + 2 * head_dim // 32, torch.int8
        old, filled = self.data[row], max(self.lengths) - self.committed + self.rows[row]
        size = 2 * len(self.lengths) * heads * head_dim * dtype.itemsize
        slots = self._slots(end, 0 if old is None else old.shape[3], size, row)
        data = zeros((2, len(self.lengths), heads, slots, head_dim), dtype, self.device)
        if old is not None:
            data[:, :, :, :filled] = old[:, :, :, :filled]
        self._put(row, data)

    def _put(self, row: int, data: Tensor) -> None:
        begin = data.data_ptr()
        self.data[row], self.places[row] = data, (data.shape[3], begin, begin + data.nbytes // 2)

    def append(self, layer: int, k: Tensor, v: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
        ahead, t = self.lengths[layer] - self.committed, k.shape[2]
        self.provide(layer, layer + 1, [t] * self.batch, k.shape[1], k.shape[3], k.dtype)
        end, dtype = self.committed + ahead + t, k.dtype
        if self.int8:
            k, v = quantize_rows(k), quantize_rows(v)
        out = k.new_zeros(2, self.batch, k.shape[1], end, k.shape[3])
        for b, (n, data) in enumerate(zip(self.rows, self.data, strict=True)):
            assert data is not None
            start, stop = n + ahead, n + ahead + t
            data[0, layer, :, start:stop], data[1, layer, :, start:stop] = k[b], v[b]
            out[:, b, :, :stop] = data[:, layer, :, :stop]
        return (dequantize_rows(out[0], dtype), dequantize_rows(out[1], dtype)) if self.int8 else (out[0], out[1])

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        rows = self.rows
        for b, path in enumerate(paths):
            data, n, count = self.data[b], rows[b], len(path)
            if data is not None and count and path[-1] != count - 1:  # else the slots are in place
                data[:, :, :, n : n + count] = data[:, :, :, [n + slot for slot in path]]
        self._count([n + len(path) for n, path in zip(rows, paths, strict=True)])

    def _count(self, rows: list[int]) -> None:
        self.rows, self.committed = rows, max(rows, default=0)
        self.lengths = [self.committed] * len(self.lengths)

    def join(self, other: KVCache) -> None:
        assert isinstance(other, RowCache)
        self.expected = self.expected + other.expected
        self.data += other.data
        self.places += other.places
        self._place(self.rows + other.rows)

    def select(self, rows: Sequence[int]) -> None:
        self.data, self.places = [self.data[b] for b in rows], [self.places[b] for b in rows]
        self.expected = [self.expected[b] for b in rows]
        self._place([self.rows[b] for b in rows])

    def _place(self, rows: list[int]) -> None:
        self.draft_positions = self.draft_positions.new_zeros(len(rows), self.draft_positions.shape[1])
        self._count(rows)

    def copy(self, row: int, count: int, capacity: int = 0) -> RowCache:
        made, data = RowCache(len(self.lengths), 1, self.block, self.int8), self.data[row]
        if data is not None and count:
            slots = -(-max(count, capacity) // PAGE) * PAGE
            own = zeros((*data.shape[:3], slots, data.shape[4]), data.dtype, self.device)
            own[:, :, :, :count] = data[:, :, :, :count]
            made._put(0, own)
            made._count([count])
        return made

    def read(self, row: int, start: int, end: int) -> dict[str, Tensor]:
        data = self.data[row]
        assert data is not None
        return {"kv": data[:, :, :, start:end].clone()}  # (2, N, H, n, d)

    def entries(self, layer: int, row: int) -> dict[str, Tensor]:
        data, end = self.data[row], self.lengths[layer] - self.committed + self.rows[row]
        return {} if data is None else {name: self._plain(data[n, layer, :, :end]) for n, name in enumerate("kv")}

    def restore(self, parts: Sequence[dict[str, Tensor]], count: int, states: dict[str, Tensor], capacity: int) -> None:
        first, slots = parts[0]["kv"], -(-max(count, capacity) // PAGE) * PAGE
        data = zeros((*first.shape[:3], slots, first.shape[4]), first.dtype, self.device)
        for part, place in zip(parts, data[:, :, :, :count].split(first.shape[3], 3), strict=True):
            place.copy_(part["kv"])
        self._put(0, data)
        self._count([count])

    def take(self, row: int) -> RowCache:
        """The row as a cache of its own, which shares its buffer."""
        made = RowCache(len(self.lengths), 1, self.block, self.int8)
        made.data, made.places = [self.data[row]], [self.places[row]]
        made._count([self.rows[row]])
        return made

    def take_compact(self, row: int) -> RowCache:
        count = self.rows[row]
        return self.copy(row, count) if self.places[row][0] > count + count // 4 + PAGE else self.take(row)
