"""Cache of keys, values and recurrent states with rollback: append, trim, commit a path, select rows.

Slots are shared by all layers: slot ``s`` holds the same token everywhere, but layers may be filled to different
lengths while a draft is under way (early layers run ahead of late ones). Slots below ``committed`` are final; those
above belong to the draft and are dropped or compacted by ``commit``. Rows may have different lengths: a shorter row has
holes (position -1) that no query sees. Knows nothing about models, tokens or acceptance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.base.devices import upload
from specdec.kvcache.recurrent import Advance, Recurrent

TOGETHER = 32  # numbers of an 8-bit row that share a scale
AHEAD = 1 << 30  # bytes of slots that buffers begin with at most because they are expected


class Chunk(int):
    """In the place of a window: positions are divided into chunks of this size, within which queries see keys."""


class Mask:
    """Which cached keys each query may attend to.

    ``query`` [B, T] and ``keys`` [B, S] hold positions (-1: hole); ``visible`` [B, T, S] is a bool tensor, or None
    when every key is visible to every query, or a function that makes such a tensor when it is read. Runtimes read
    ``bool_mask`` and may keep what they derive from it in ``memo`` (one mask serves many layers).
    causal: each query sees just the slots up to its own, the last T of S, and slots are positions (no holes).
    """

    def __init__(
        self, query: Tensor, keys: Tensor, visible: Tensor | Callable[[], Tensor] | None, causal: bool = False
    ) -> None:
        self.query, self.keys, self.causal = query, keys, causal
        self._visible = visible
        self.ancestors: Tensor | None = None  # ``tree``, [T, U] or [B, T, U], as in ``KVCache.mask``
        self.memo: dict[object, Tensor | None] = {}

    @property
    def visible(self) -> Tensor | None:
        if callable(self._visible):
            self._visible = self._visible()
        return self._visible

    def bool_mask(self, window: int | None = None) -> Tensor | None:
        """Return the mask as bool [B, 1, T, S] (True = attend), or None where nothing is hidden.

        ``window``: a query sees only the last ``window`` positions, itself included, or those of its own ``Chunk``.
        """
        if window not in self.memo:
            visible = self.visible
            if window is not None:
                query, keys = self.query[:, :, None], self.keys[:, None, :]
                near = (
                    keys // window == query // window if isinstance(window, Chunk) else query - keys < window
                )  # (B, T, S)
                if visible is not None:
                    visible = visible & near
                elif near.device.type != "cpu" or not bool(near.all()):  # elsewhere, looking costs more than a mask
                    visible = near
            self.memo[window] = None if visible is None else visible[:, None]  # (B, 1, T, S)
        return self.memo[window]


class KVCache:
    """Keys and values of all layers for a batch of ragged rows.

    Buffers are allocated on first use of a layer (``whole``, whatever is in it, is used first) and grow in blocks of
    ``block`` slots; on a CPU, where memory is taken as it is written, they begin with room for the slots that are
    ``expected``. When gradients are needed (training), entries are concatenated instead, so that autograd sees them.
    rounded: a slot of a head is held in 8 bits, as ``rows8`` makes it (no gradients then).
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        device: torch.device | str = "cpu",
        block: int = 256,
        whole: Tensor | None = None,
        rounded: bool = False,
    ) -> None:
        self.block, self.device, self.rounded = block, torch.device(device), rounded
        self.keys: list[Tensor | None] = [None] * num_layers  # each (B, H, capacity, d); rounded: rows8
        self.values: list[Tensor | None] = [None] * num_layers
        # (2, N, rows, H, capacity, d), which all keys and values are parts of, or not; rows beyond B are room
        self.whole: Tensor | None = None
        self.lengths = [0] * num_layers  # filled slots per layer
        self.rows = [0] * batch  # committed tokens per row
        self.committed = 0  # committed slots: the longest row
        self.positions = torch.full((batch, block), -1, dtype=torch.long, device=self.device)  # (B, capacity)
        self.expected = 0
        self.recurrent: dict[int, Recurrent] = {}  # the states of recurrent layers
        self.memo: dict[object, Any] = {}  # what runtimes derive from ``whole``, for as long as it is the same
        if whole is not None:
            self._divide(whole)

    @property
    def batch(self) -> int:
        return len(self.rows)

    @property
    def slots(self) -> int:
        """Slots that there is room for in the longest row."""
        return max((t.shape[2] for t in self.keys if t is not None), default=0)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in all layers; 0 before any are held."""
        held = [t for t in (*self.keys, *self.values) if t is not None]
        return sum(t.shape[1] * t.shape[3] * t.itemsize for t in held)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers of keys and values."""
        return sum(t.nbytes for t in (*self.keys, *self.values) if t is not None)

    @property
    def ragged(self) -> bool:
        """True if some row has holes."""
        return any(n != self.committed for n in self.rows)

    def append(self, layer: int, k: Tensor, v: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
        """Add ``k``, ``v`` [B, H, T, d] to ``layer``; return views of all its keys and values [B, H, S, d].

        multiple: a divisor of ``block``; S is rounded up to it by slots with old or zero entries, which the caller has
        to hide (no gradients then).
        """
        start, end, dtype = self.lengths[layer], self.lengths[layer] + k.shape[2], k.dtype
        old_k, old_v = self.keys[layer], self.values[layer]
        if self.rounded:
            k, v = rows8(k), rows8(v)
        if torch.is_grad_enabled() and (k.requires_grad or (old_k is not None and old_k.requires_grad)):
            new_k = k if old_k is None else torch.cat((old_k[:, :, :start], k), 2)
            new_v = v if old_v is None else torch.cat((old_v[:, :, :start], v), 2)
        else:
            if self.whole is not None:  # stays one piece
                self._enlarge(end, k.shape[1], k.shape[3], k.dtype)
                old_k, old_v = self.keys[layer], self.values[layer]
            if old_k is None or old_v is None or old_k.shape[2] < end:
                old_k = self._grown(old_k, (*k.shape[:2], k.shape[3]), start, end, k.dtype, k.device)
                old_v = self._grown(old_v, (*v.shape[:2], v.shape[3]), start, end, v.dtype, v.device)
            new_k, new_v = old_k, old_v
            new_k[:, :, start:end], new_v[:, :, start:end] = k, v
        self.keys[layer], self.values[layer], self.lengths[layer] = new_k, new_v, end
        end += -end % multiple
        seen_k, seen_v = new_k[:, :, :end], new_v[:, :, :end]
        return (widened(seen_k, dtype), widened(seen_v, dtype)) if self.rounded else (seen_k, seen_v)

    def reserve(self, lo: int, hi: int, count: int, heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Count the next ``count`` slots of layers [lo, hi) as filled, with room for a runtime to write them itself.

        Returns the first of them. ``keys`` and ``values`` of each layer are then [B, heads, capacity, head_dim],
        contiguous, with a capacity that is a multiple of ``block``: parts of one buffer, which is moved in one piece.
        (Rounded: rows of ``rows8`` instead.)
        """
        start = self.lengths[lo]
        if self.rounded:
            head_dim, dtype = head_dim + 2 * head_dim // TOGETHER, torch.int8
        self._enlarge(start + count, heads, head_dim, dtype)
        self.lengths[lo:hi] = [start + count] * (hi - lo)
        return start

    def _enlarge(self, end: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Make ``whole`` hold at least ``end`` slots."""
        if self.whole is None and self.committed:  # in pieces so far
            parts = [torch.stack([t for t in part if t is not None]) for part in (self.keys, self.values)]
            self._divide(torch.stack(parts))
        if self.whole is None or self.whole.shape[4] < end:
            shape = 2, len(self.lengths), self.batch, heads, head_dim
            self._divide(self._grown(self.whole, shape, max(self.lengths), end, dtype, self.device))

    def _divide(self, whole: Tensor) -> None:
        self.memo, self.whole, (keys, values) = {}, whole, whole[:, :, : self.batch]
        self.keys, self.values = list(keys), list(values)

    def _grown(
        self, old: Tensor | None, shape: Sequence[int], filled: int, end: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A buffer with at least ``end`` slots that begins with the ``filled`` slots of ``old``.

        shape: [..., B, H, d], without slots.
        """
        *outer, heads, head_dim = shape
        slots = self._slots(end, filled, heads * head_dim * dtype.itemsize)
        grown = zeros((*outer, heads, slots, head_dim), dtype, device)
        if old is not None:
            grown[..., :filled, :] = old[..., : self.batch, :, :filled, :]
        return grown

    def _slots(self, end: int, filled: int, size: int) -> int:
        """The capacity of a buffer for ``end`` slots, of which there were ``filled`` before.

        size: bytes of a row's keys in one slot of a layer.
        """
        # An answer may end early, so what is asked of the system beforehand is bounded.
        ahead = min(self.expected, AHEAD // max(2 * len(self.lengths) * self.batch * size, 1))
        # Grow by at least a quarter, so that long generations copy each entry a bounded number of times.
        most = max(end, filled + filled // 4, ahead if self.device.type == "cpu" else 0)
        return -(-most // self.block) * self.block

    def mask(self, layer: int, positions: Tensor, tree: Tensor | None = None) -> Mask:
        """Register the next T slots of ``layer`` at ``positions`` [B, T] and return what they may attend to.

        They see every committed token of their row and, among the U uncommitted slots (theirs included), those that
        ``tree`` [T, U] or [B, T, U] (bool) marks; without it, all earlier ones and themselves (a chain).
        """
        start, end = self.lengths[layer], self.lengths[layer] + positions.shape[1]
        if end > self.positions.shape[1]:
            grown = self.positions.new_full((self.batch, self._slots(end, start, size=0)), -1)
            grown[:, :start] = self.positions[:, :start]
            self.positions = grown
        self.positions[:, start:end] = positions
        keys = self.positions[:, :end]
        (batch, t), committed, device = positions.shape, self.committed, self.device
        causal, u = tree is None and not self.ragged, end - committed
        if causal and t == 1:
            return Mask(positions, keys, None, causal)

        def visible() -> Tensor:
            seen = torch.ones(t, u, dtype=torch.bool, device=device).tril(u - t) if tree is None else tree.to(device)
            old = (keys[:, None, :committed] >= 0).expand(-1, t, -1)  # (B, T, committed)
            return torch.cat((old, seen.expand(batch, -1, -1)), 2)

        mask = Mask(positions, keys, visible, causal)
        mask.ancestors = tree
        return mask

    def run_recurrent(self, layer: int, x: Tensor, tree: Tensor | None, advance: Advance) -> Tensor:
        """Run a recurrent layer on the next T tokens ``x`` [B, T, D], and keep what it takes to go back."""
        state = self.recurrent.setdefault(layer, Recurrent(self.batch))
        return state.run(x, self.lengths[layer] - self.committed, tree, advance)

    def trim(self, count: int, lo: int = 0, hi: int | None = None) -> None:
        """Drop the last ``count`` slots of layers [lo, hi). Committed slots cannot be dropped (ValueError)."""
        for layer in range(lo, len(self.lengths) if hi is None else hi):
            if self.lengths[layer] - count < self.committed:
                raise ValueError(f"cannot trim {count} slots of layer {layer}: only uncommitted ones can be dropped")
            self.lengths[layer] -= count

    def roll_back(self) -> None:
        """Drop everything that is not committed, in all layers."""
        self.lengths = [self.committed] * len(self.lengths)
        for state in self.recurrent.values():
            state.roll_back()

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Commit, for each row, the uncommitted slots listed in ``paths`` (ascending indices), and drop the others.

        All layers must have run the whole block. Kept slots are compacted to follow the row's committed ones.
        """
        for state in self.recurrent.values():
            state.commit(paths)
        pairs = list(zip(self.rows, paths, strict=True))
        if any(n != self.committed or list(path) != list(range(len(path))) for n, path in pairs):
            moves = [(b, self.committed + j, n + i) for b, (n, path) in enumerate(pairs) for i, j in enumerate(path)]
            row, src, dst = upload(moves, self.device).view(len(moves), 3).unbind(1)
            for buffer in [self.whole] if self.whole is not None else [*self.keys, *self.values]:
                if buffer is not None:
                    buffer[..., row, :, dst, :] = buffer[..., row, :, src, :]
            self.positions[row, dst] = self.positions[row, src]
        self.rows = [n + len(path) for n, path in pairs]
        self.committed = max(self.rows)
        self.lengths = [self.committed] * len(self.lengths)
        if self.ragged:
            for b, n in enumerate(self.rows):
                self.positions[b, n : self.committed] = -1

    def join(self, other: KVCache) -> None:
        """Add the rows of ``other`` after those of this cache. Nothing may be uncommitted in either."""
        mine, theirs, first = self.committed, other.committed, self.batch
        self.expected = max(self.expected, other.expected)
        slots = (max(mine, theirs) // self.block + 1) * self.block
        positions = self.positions.new_full((first + other.batch, slots), -1)
        positions[:first, :mine] = self.positions[:, :mine]
        positions[first:, :theirs] = other.positions[:, :theirs]
        self.positions, self.rows, self.committed = positions, self.rows + other.rows, max(mine, theirs)
        self.lengths = [self.committed] * len(self.lengths)
        whole, added = self.whole, other.whole
        if whole is None or added is None:
            self.whole = None
            for part, more in ((self.keys, other.keys), (self.values, other.values)):
                for layer, (a, b) in enumerate(zip(part, more, strict=True)):
                    part[layer] = _stack(_held(a, b, first), _held(b, a, other.batch), mine, theirs, slots)
        elif whole.shape[2] >= self.batch and whole.shape[4] >= slots:
            whole[:, :, first : self.batch, :, :theirs] = added[:, :, : other.batch, :, :theirs]
            self._divide(whole)
        else:
            stacked = _stack(whole[:, :, :first], added[:, :, : other.batch], mine, theirs, slots)
            assert stacked is not None
            self._divide(stacked)
        for layer in self.recurrent.keys() | other.recurrent.keys():
            ours = self.recurrent.get(layer, Recurrent(first))
            self.recurrent[layer] = ours.joined(other.recurrent.get(layer, Recurrent(other.batch)))

    def restorable(self, row: int, count: int) -> int:
        """With how many of the first ``count`` committed tokens of ``row`` a text can go on."""
        if not self.recurrent or count == self.rows[row]:
            return count
        kept = set.intersection(*(set(state.kept[row]) for state in self.recurrent.values()))
        return max((n for n in kept if n <= count), default=0)

    def keep_state(self, row: int) -> None:
        """Keep a checkpoint of the recurrent states of ``row`` as they are now; keys and values need none."""
        for state in self.recurrent.values():
            if self.rows[row] not in state.kept[row]:
                state.due[row] = self.rows[row]

    @property
    def num_states(self) -> int:
        """Recurrent states that a layer holds: of each row, and its checkpoints."""
        state = next(iter(self.recurrent.values()), None)
        return 0 if state is None else self.batch + sum(map(len, state.kept))

    @property
    def state_bytes(self) -> int:
        """Bytes of a row's recurrent states in all layers; 0 before any are held."""
        return sum(state.nbytes for state in self.recurrent.values()) // max(self.batch, 1)

    def copy(self, row: int, count: int, room: int = 0) -> KVCache:
        """A cache of one row: the first ``count`` committed tokens of ``row``. room: slots that it will need.

        count: as ``restorable`` returns it.
        """
        if count and count != self.restorable(row, count):
            raise ValueError(f"cannot copy {count} of {self.rows[row]} tokens: no recurrent states are kept after them")
        made = KVCache(len(self.lengths), 1, self.device, self.block, rounded=self.rounded)
        slots = (self.positions[row, : self.committed] >= 0).nonzero()[:count, 0]
        if self.whole is not None:
            made._divide(self.whole[:, :, row : row + 1].index_select(4, slots))
        else:
            for own, part in ((made.keys, self.keys), (made.values, self.values)):
                own[:] = [None if t is None else t[row : row + 1].index_select(2, slots) for t in part]
        made.positions = torch.arange(count, device=self.device)[None]
        made.rows, made.committed, made.lengths = [count], count, [count] * len(self.lengths)
        if count:
            whole = count == self.rows[row]
            for layer, state in self.recurrent.items():
                made.recurrent[layer] = state.select([row]) if whole else state.restored(row, count)
        return made

    def take(self, row: int) -> KVCache:
        """The row as a cache of its own."""
        return self.copy(row, self.rows[row])

    def kept(self, row: int) -> KVCache:
        """The same for a text that may be kept for long: its buffers have little more room than its tokens take."""
        return self.take(row)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only ``rows`` of the batch, in that order. Nothing may be uncommitted.

        Cheapest where few rows change their place, and none moves to where another comes from.
        """
        index = torch.tensor(list(rows), dtype=torch.long, device=self.device)
        whole, filled, batch = self.whole, self.committed, self.batch
        self.positions = self.positions.index_select(0, index)
        self.recurrent = {layer: state.select(rows) for layer, state in self.recurrent.items()}
        self.rows = [self.rows[i] for i in rows]
        self.committed = max(self.rows, default=0)
        self.lengths = [self.committed] * len(self.lengths)
        moves = {to: row for to, row in enumerate(rows) if to != row}
        if whole is None:
            for part in (self.keys, self.values):
                part[:] = [None if t is None else t.index_select(0, index) for t in part]
        elif moves.keys() & moves.values():
            self._divide(whole.index_select(2, index))
        else:
            held = filled + self.block  # with what is left of a draft
            for to, row in moves.items():
                whole[:, :, to, :, :held] = whole[:, :, row, :, :held]
            whole[:, :, len(rows) : batch, :, :held] = 0  # a mask does not hide what is not finite from the next there
            self._divide(whole)


def rows8(x: Tensor) -> Tensor:
    """``x`` [..., d] rounded to 8 bits: int8 [..., d + d / 16], codes and then their scales, a bf16 for 32 codes."""
    parts = x.float().unflatten(-1, (-1, TOGETHER))  # (..., d / 32, 32)
    scales = (parts.abs().amax(-1, keepdim=True) / 127).bfloat16()
    codes = (parts / scales.float().clamp_min(1e-30)).round().to(torch.int8)
    return torch.cat((codes.flatten(-2), scales.flatten(-2).view(torch.int8)), -1)


def widened(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``rows8`` rounded, [..., d]."""
    d = rows.shape[-1] * 16 // 17
    parts, scales = rows[..., :d].unflatten(-1, (-1, TOGETHER)), rows[..., d:].contiguous().view(torch.bfloat16)
    return (parts * scales[..., None].float()).flatten(-2).to(dtype)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As ``torch.zeros``, on a CPU from untouched pages: they take memory as they are written."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    room = torch.from_numpy(np.zeros(size + 64, np.uint8))
    return room[-room.data_ptr() % 64 :][:size].view(dtype).view(shape)


def _held(own: Tensor | None, other: Tensor | None, rows: int) -> Tensor | None:
    """``own`` [B, H, S, d], or that of ``rows`` without entries beside ``other``."""
    return own if own is not None or other is None else other.new_zeros(rows, *other.shape[1:])


def _stack(a: Tensor | None, b: Tensor | None, filled_a: int, filled_b: int, slots: int) -> Tensor | None:
    """Entries [..., B, H, S, d] of two caches below one another, with room for ``slots``; None if neither has any."""
    if a is None or b is None:
        return None
    rows, (heads, _, head_dim) = a.shape[-4], a.shape[-3:]
    out = a.new_zeros(*a.shape[:-4], rows + b.shape[-4], heads, slots, head_dim)
    out[..., :rows, :, :filled_a, :] = a[..., :filled_a, :]
    out[..., rows:, :, :filled_b, :] = b[..., :filled_b, :]
    return out
