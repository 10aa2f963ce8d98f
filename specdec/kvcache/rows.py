"""A key/value cache with one buffer per row: rows come and go without copying the others. With recurrent states.

A row's committed slots are numbered by their positions, and its draft's slots follow them: no row has holes, and none
is padded. For runtimes that take a pointer to each row.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from specdec.kvcache.cache import KVCache, Mask, dequantize_rows, quantize_rows, zeros
from specdec.kvcache.row_states import RowStates, StateShape

PAGE = 16  # the buffer of a copy has a multiple of so many slots


class RowMask(Mask):
    """The slots that the tokens of a pass over rows of a ``RowCache`` may attend to, row by row.

    committed: number of committed tokens of each row.
    counts: number of tokens of each row in the pass.
    trees: of each row, bool [its tokens, its uncommitted slots]; None: each token sees the slots up to its own.
    ahead: number of uncommitted slots before the tokens.
    places: positions of each row's uncommitted slots, if trees are given.
    whole: whether all tokens are committed together.
    """

    def __init__(
        self,
        positions: Tensor,
        committed: list[int],
        counts: Sequence[int],
        trees: Sequence[Tensor | None],
        ahead: int,
        places: Sequence[Tensor] | Tensor = (),
        whole: bool = False,
    ) -> None:
        causal = all(tree is None for tree in trees)
        super().__init__(positions, positions, None, causal)
        self.committed, self.counts, self.trees, self.ahead, self.places = committed, counts, trees, ahead, places
        self.whole = whole

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

    attention: layers with keys and values, N'. shape: of the states of the others.
    data[b]: keys and values of row b, [2, N', H, capacity, d], allocated at first use.
    places[b]: its capacity, and pointers to its keys and values.
    states[b]: its recurrent states, if there are recurrent layers.
    draft_positions: positions of uncommitted slots [B, U].
    """

    padded = False

    def __init__(
        self,
        num_layers: int,
        batch: int = 1,
        block: int | None = None,
        int8: bool = False,
        attention: Sequence[int] | None = None,
        shape: StateShape | None = None,
    ) -> None:
        super().__init__(num_layers, batch, block=block, int8=int8)
        self.attention, self.shape = range(num_layers) if attention is None else attention, shape
        self.states = [] if shape is None else [RowStates(shape) for _ in range(batch)]
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

    def register(  # type: ignore[override]
        self,
        layer: int,
        positions: Tensor,
        tree: Tensor | None = None,
        counts: Sequence[int] | None = None,
        trees: Sequence[Tensor | None] | None = None,
    ) -> RowMask:
        """As in ``KVCache``; with ``counts``, for so many tokens of each row, row behind row (positions [1, T]).

        trees: with ``counts``: bool [count, count] of each row, or None for a chain; nothing else may be uncommitted.
            Without them, all the tokens are to be committed.
        """
        if counts is not None:
            places = positions[0].split(list(counts))
            return RowMask(positions, self.rows, counts, trees or [None] * self.batch, 0, places, trees is None)
        (batch, t), ahead = positions.shape, self.lengths[layer] - self.committed
        end = ahead + t
        if end > self.draft_positions.shape[1]:
            self.draft_positions = torch.cat((self.draft_positions, self.draft_positions.new_zeros(batch, 2 * end)), 1)
        self.draft_positions[:, ahead:end] = positions
        each = [tree] * batch if tree is None or tree.dim() == 2 else list(tree)
        return RowMask(positions, self.rows, [t] * batch, each, ahead, self.draft_positions[:, :end])

    def claim_each(
        self, lo: int, hi: int, counts: Sequence[int], heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
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
        size = 2 * len(self.attention) * heads * head_dim * dtype.itemsize
        slots = self._slots(end, 0 if old is None else old.shape[3], size, row)
        data = zeros((2, len(self.attention), heads, slots, head_dim), dtype, self.device)
        if old is not None:
            data[:, :, :, :filled] = old[:, :, :, :filled]
        self._put(row, data)

    def _put(self, row: int, data: Tensor) -> None:
        begin = data.data_ptr()
        self.data[row], self.places[row] = data, (data.shape[3], begin, begin + data.nbytes // 2)

    def append(self, layer: int, k: Tensor, v: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
        ahead, t = self.lengths[layer] - self.committed, k.shape[2]
        self.claim_each(layer, layer + 1, [t] * self.batch, k.shape[1], k.shape[3], k.dtype)
        end, dtype, place = self.committed + ahead + t, k.dtype, self.attention.index(layer)
        if self.int8:
            k, v = quantize_rows(k), quantize_rows(v)
        out = k.new_zeros(2, self.batch, k.shape[1], end, k.shape[3])
        for b, (n, data) in enumerate(zip(self.rows, self.data, strict=True)):
            assert data is not None
            start, stop = n + ahead, n + ahead + t
            data[0, place, :, start:stop], data[1, place, :, start:stop] = k[b], v[b]
            out[:, b, :, :stop] = data[:, place, :, :stop]
        return (dequantize_rows(out[0], dtype), dequantize_rows(out[1], dtype)) if self.int8 else (out[0], out[1])

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        rows = self.rows
        for b, path in enumerate(paths):
            data, n, count = self.data[b], rows[b], len(path)
            if data is not None and count and path[-1] != count - 1:  # else the slots are in place
                data[:, :, :, n : n + count] = data[:, :, :, [n + slot for slot in path]]
        for states, path in zip(self.states, paths, strict=bool(self.states)):
            states.commit(path)
        self._count([n + len(path) for n, path in zip(rows, paths, strict=True)])

    def _count(self, rows: list[int]) -> None:
        self.rows, self.committed = rows, max(rows, default=0)
        self.lengths = [self.committed] * len(self.lengths)

    def join(self, other: KVCache) -> None:
        assert isinstance(other, RowCache)
        self.expected = self.expected + other.expected
        self.data += other.data
        self.states += other.states
        self.places += other.places
        self._place(self.rows + other.rows)

    def select(self, rows: Sequence[int]) -> None:
        self.data, self.places = [self.data[b] for b in rows], [self.places[b] for b in rows]
        self.expected = [self.expected[b] for b in rows]
        self.states = [self.states[b] for b in rows] if self.states else []
        self._place([self.rows[b] for b in rows])

    def _place(self, rows: list[int]) -> None:
        self.draft_positions = self.draft_positions.new_zeros(len(rows), self.draft_positions.shape[1])
        self._count(rows)

    def roll_back(self) -> None:
        super().roll_back()
        for states in self.states:
            states.ahead = None

    def resumable(self, row: int, count: int) -> int:
        if not self.states or count == self.rows[row]:
            return count
        return max((n for n in self.checkpoints(row) if n <= count), default=0)

    def checkpoints(self, row: int) -> set[int]:
        return set(self.states[row].checkpoints) if self.states else set()

    def checkpoint(self, row: int) -> None:
        if self.states:
            self.states[row].checkpoint(self.rows[row])

    @property
    def num_states(self) -> int:
        return self.batch + sum(len(states.checkpoints) for states in self.states)

    @property
    def state_bytes(self) -> int:
        return 0 if self.shape is None else self.shape.layers * self.shape.state_bytes

    def _empty(self) -> RowCache:
        """A cache of one row, without states."""
        made = RowCache(len(self.lengths), 1, self.block, self.int8, self.attention)
        made.shape = self.shape
        return made

    def copy(self, row: int, count: int, capacity: int = 0) -> RowCache:
        if count and count != self.resumable(row, count):
            raise ValueError(f"cannot copy {count} of {self.rows[row]} tokens: there is no checkpoint after them")
        made, data = self._empty(), self.data[row]
        if self.states and self.shape is not None:
            own = self.states[row]
            whole = count == self.rows[row]
            made.states = [own.copy() if whole else own.restored(count) if count else RowStates(self.shape)]
        if data is not None and count:
            slots = -(-max(count, capacity) // PAGE) * PAGE
            held = zeros((*data.shape[:3], slots, data.shape[4]), data.dtype, self.device)
            held[:, :, :, :count] = data[:, :, :, :count]
            made._put(0, held)
            made._count([count])
        return made

    def reference(self) -> Self:
        made = copy.copy(self)
        made.data, made.states = list(self.data), list(self.states)
        return made

    def read(self, row: int, start: int, end: int) -> dict[str, Tensor]:
        data = self.data[row]
        assert data is not None
        return {"kv": data[:, :, :, start:end].clone()}  # (2, N, H, n, d)

    def entries(self, layer: int, row: int) -> dict[str, Tensor]:
        data, end = self.data[row], self.lengths[layer] - self.committed + self.rows[row]
        if data is None or layer not in self.attention:
            return {}
        place = self.attention.index(layer)
        return {name: self._plain(data[n, place, :, :end]) for n, name in enumerate("kv")}

    def read_states(self, row: int, count: int) -> dict[str, Tensor]:
        found = self.states[row].checkpoints.get(count) if self.states else None
        return {} if found is None else {"states": found}

    def restore(self, parts: Sequence[dict[str, Tensor]], count: int, states: dict[str, Tensor], capacity: int) -> None:
        first, slots = parts[0]["kv"], -(-max(count, capacity) // PAGE) * PAGE
        data = zeros((*first.shape[:3], slots, first.shape[4]), first.dtype, self.device)
        for part, place in zip(parts, data[:, :, :, :count].split(first.shape[3], 3), strict=True):
            place.copy_(part["kv"])
        if self.shape is not None:
            self.states = [RowStates(self.shape, states["states"])]
            self.states[0].checkpoints[count] = states["states"]
        self._put(0, data)
        self._count([count])

    def take(self, row: int) -> RowCache:
        """The row as a cache of its own, which shares its buffer."""
        made = self._empty()
        made.data, made.places, made.states = [self.data[row]], [self.places[row]], self.states[row : row + 1]
        made._count([self.rows[row]])
        return made

    def take_compact(self, row: int) -> RowCache:
        count = self.rows[row]
        return self.copy(row, count) if self.places[row][0] > count + count // 4 + PAGE else self.take(row)
