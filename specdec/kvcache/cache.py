"""A cache of keys, values and recurrent states with roll-back: append, trim, commit a path, select rows.

Slot ``s`` holds the same token in all layers, but layers may be filled to different lengths while a draft is under way.
Slots below ``committed`` are final; those above belong to the draft, and ``commit`` drops or compacts them. A row that
is shorter than others has holes (position -1) that no query sees. Knows nothing about models, tokens or acceptance.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from specdec.base.devices import upload
from specdec.kvcache.recurrent import Advance, Recurrent

GROUP = 32  # numbers of an 8-bit row that share a scale
BLOCK = 256  # slots that a buffer grows by
MAX_EXPECTED = 1 << 30  # maximum bytes that buffers allocate for expected slots


class Chunk(int):
    """Used as a window: positions are divided into chunks of this size, and queries see the keys of their own."""


class Mask:
    """Which cached keys each query may attend to.

    query, keys: positions [B, T] and [B, S] (-1: hole).
    visible: bool [B, T, S], or None (every key is visible to every query), or a function that makes it when it is read.
    causal: whether each query sees just the slots up to its own, the last T of S, and slots are positions (no holes).
    ancestors: the ``tree`` of ``KVCache.register``, [T, U] or [B, T, U].
    memo: what runtimes derive from the mask; one mask serves many layers.
    """

    def __init__(
        self, query: Tensor, keys: Tensor, visible: Tensor | Callable[[], Tensor] | None, causal: bool = False
    ) -> None:
        self.query, self.keys, self.causal = query, keys, causal
        self._visible = visible
        self.ancestors: Tensor | None = None
        self.memo: dict[object, Tensor | None] = {}

    @property
    def visible(self) -> Tensor | None:
        if callable(self._visible):
            self._visible = self._visible()
        return self._visible

    def bool_mask(self, window: int | None = None) -> Tensor | None:
        """The mask as bool [B, 1, T, S] (True: attend), or None if nothing is hidden.

        window: a query sees only the last ``window`` positions, itself included, or those of its own ``Chunk``.
        """
        if window not in self.memo:
            visible = self.visible
            if window is not None:
                query, keys = self.query[:, :, None], self.keys[:, None, :]
                chunked = isinstance(window, Chunk)
                near = keys // window == query // window if chunked else query - keys < window  # (B, T, S)
                if visible is not None:
                    visible = visible & near
                elif near.device.type != "cpu" or not bool(near.all()):  # elsewhere, reading costs more than a mask
                    visible = near
            self.memo[window] = None if visible is None else visible[:, None]  # (B, 1, T, S)
        return self.memo[window]


class KVCache:
    """Keys and values of all layers for a batch of ragged rows.

    A layer's buffers are allocated at its first use, or are parts of ``buffer``, which graphs need in one place. They
    grow in multiples of ``block`` slots. When gradients are needed (training), entries are concatenated instead.

    keys, values: of each layer, [B, H, capacity, d]; rows of ``quantize_rows`` if ``int8``.
    buffer: all keys and values in one tensor, [2, N, rows, H, capacity, d], or None; rows beyond B are unused.
    lengths: number of filled slots of each layer.
    rows: number of committed tokens of each row; ``committed``: the largest of them.
    positions: of all slots, [B, capacity].
    expected: number of slots that each row will need; on a CPU, buffers begin with them.
    padded: whether each row's buffers have the size of the longest row's.
    """

    padded = True

    def __init__(
        self,
        num_layers: int,
        batch: int,
        device: torch.device | str = "cpu",
        block: int | None = None,
        buffer: Tensor | None = None,
        int8: bool = False,
    ) -> None:
        self.block, self.device, self.int8 = block or BLOCK, torch.device(device), int8
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.buffer: Tensor | None = None
        self.lengths, self.rows, self.committed = [0] * num_layers, [0] * batch, 0
        self.positions = torch.full((batch, self.block), -1, dtype=torch.long, device=self.device)
        self.expected = [0] * batch
        self.recurrent: dict[int, Recurrent] = {}
        if buffer is not None:
            self._divide(buffer)

    @property
    def batch(self) -> int:
        return len(self.rows)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in all layers; 0 before any are stored."""
        held = [t for t in (*self.keys, *self.values) if t is not None]
        return sum(t.shape[1] * t.shape[3] * t.itemsize for t in held)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers of keys and values."""
        return sum(t.nbytes for t in (*self.keys, *self.values) if t is not None)

    def capacities(self, ends: Sequence[int]) -> list[int]:
        """The number of slots of each row's buffers once they have room for so many tokens of each row."""
        end, slots = max(ends, default=0), max((t.shape[2] for t in self.keys if t is not None), default=0)
        return [slots if end <= slots else self._slots(end, self.committed)] * self.batch

    @property
    def ragged(self) -> bool:
        """Whether some row has holes."""
        return any(n != self.committed for n in self.rows)

    def append(self, layer: int, k: Tensor, v: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
        """Add ``k``, ``v`` [B, H, T, d] to ``layer``; return views of all its keys and values [B, H, S, d].

        multiple: a divisor of ``block``; S is rounded up to it with slots of old or zero entries, which the caller
            masks (no gradients then).
        """
        start, end, dtype = self.lengths[layer], self.lengths[layer] + k.shape[2], k.dtype
        old_k, old_v = self.keys[layer], self.values[layer]
        if self.int8:
            k, v = quantize_rows(k), quantize_rows(v)
        if torch.is_grad_enabled() and (k.requires_grad or (old_k is not None and old_k.requires_grad)):
            new_k = k if old_k is None else torch.cat((old_k[:, :, :start], k), 2)
            new_v = v if old_v is None else torch.cat((old_v[:, :, :start], v), 2)
        else:
            if self.buffer is not None:  # stays one tensor
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
        return (dequantize_rows(seen_k, dtype), dequantize_rows(seen_v, dtype)) if self.int8 else (seen_k, seen_v)

    def claim(self, lo: int, hi: int, count: int, heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Count the next ``count`` slots of layers [lo, hi) as filled, for a runtime to write them itself.

        Returns the first of them. All layers' keys and values are then parts of ``buffer``.
        """
        start = self.lengths[lo]
        if self.int8:
            head_dim, dtype = head_dim + 2 * head_dim // GROUP, torch.int8
        self._enlarge(start + count, heads, head_dim, dtype)
        self.lengths[lo:hi] = [start + count] * (hi - lo)
        return start

    def _enlarge(self, end: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Make ``buffer`` hold at least ``end`` slots."""
        if self.buffer is None and self.committed:  # separate tensors so far
            parts = [torch.stack([t for t in part if t is not None]) for part in (self.keys, self.values)]
            self._divide(torch.stack(parts))
        if self.buffer is None or self.buffer.shape[4] < end:
            shape = 2, len(self.lengths), self.batch, heads, head_dim
            self._divide(self._grown(self.buffer, shape, max(self.lengths), end, dtype, self.device))

    def _divide(self, buffer: Tensor) -> None:
        self.buffer, (keys, values) = buffer, buffer[:, :, : self.batch]
        self.keys, self.values = list(keys), list(values)

    def _grown(
        self, old: Tensor | None, shape: Sequence[int], filled: int, end: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A buffer with at least ``end`` slots, the first ``filled`` ones those of ``old``. shape: [..., B, H, d]."""
        *outer, heads, head_dim = shape
        slots = self._slots(end, filled, 2 * len(self.lengths) * heads * head_dim * dtype.itemsize)
        grown = zeros((*outer, heads, slots, head_dim), dtype, device)
        if old is not None:
            grown[..., :filled, :] = old[..., : self.batch, :, :filled, :]
        return grown

    def _slots(self, end: int, filled: int, size: int | None = None, row: int | None = None) -> int:
        """The capacity of a buffer, of all rows or one, for ``end`` slots, of which there were ``filled`` before.

        size: bytes of a token in all layers; None: as those that are stored.
        """
        size = self.token_bytes if size is None else size
        expected = max(self.expected, default=0) if row is None else self.expected[row]
        # A text may end early, so the memory of expected slots is bounded.
        expected = min(expected, MAX_EXPECTED // max(self.batch * size, 1))
        # Grow by at least a quarter, so that long generations copy each entry a bounded number of times.
        most = max(end, filled + filled // 4, expected if self.device.type == "cpu" else 0)
        return -(-most // self.block) * self.block

    def register(self, layer: int, positions: Tensor, tree: Tensor | None = None) -> Mask:
        """Register the next T slots of ``layer`` at ``positions`` [B, T] and return their mask.

        They see every committed token of their row, and of the U uncommitted slots (theirs included) those that
        ``tree`` (bool [T, U] or [B, T, U]) marks; None: all earlier ones and themselves (a chain).
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
        """Run a recurrent layer on the next T tokens ``x`` [B, T, D], and store what roll-back needs."""
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

        All layers must have run the whole block. Committed slots are compacted to follow the row's earlier ones.
        """
        for state in self.recurrent.values():
            state.commit(paths)
        pairs = list(zip(self.rows, paths, strict=True))
        if any(n != self.committed or list(path) != list(range(len(path))) for n, path in pairs):
            moves = [(b, self.committed + j, n + i) for b, (n, path) in enumerate(pairs) for i, j in enumerate(path)]
            row, src, dst = upload(moves, self.device).view(len(moves), 3).unbind(1)
            for buffer in [self.buffer] if self.buffer is not None else [*self.keys, *self.values]:
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
        self.expected = self.expected + other.expected
        slots = (max(mine, theirs) // self.block + 1) * self.block
        positions = self.positions.new_full((first + other.batch, slots), -1)
        positions[:first, :mine] = self.positions[:, :mine]
        positions[first:, :theirs] = other.positions[:, :theirs]
        self.positions, self.rows, self.committed = positions, self.rows + other.rows, max(mine, theirs)
        self.lengths = [self.committed] * len(self.lengths)
        own, added = self.buffer, other.buffer
        if own is None or added is None:
            self.buffer = None
            for part, more in ((self.keys, other.keys), (self.values, other.values)):
                for layer, (a, b) in enumerate(zip(part, more, strict=True)):
                    part[layer] = _stack(_held(a, b, first), _held(b, a, other.batch), mine, theirs, slots)
        elif own.shape[2] >= self.batch and own.shape[4] >= slots:
            own[:, :, first : self.batch, :, :theirs] = added[:, :, : other.batch, :, :theirs]
            self._divide(own)
        else:
            stacked = _stack(own[:, :, :first], added[:, :, : other.batch], mine, theirs, slots)
            assert stacked is not None
            self._divide(stacked)
        for layer in self.recurrent.keys() | other.recurrent.keys():
            ours = self.recurrent.get(layer, Recurrent(first))
            self.recurrent[layer] = ours.joined(other.recurrent.get(layer, Recurrent(other.batch)))

    def resumable(self, row: int, count: int) -> int:
        """The number of the first ``count`` committed tokens of ``row`` that another text can begin with."""
        if not self.recurrent or count == self.rows[row]:
            return count
        return max((n for n in self.checkpoints(row) if n <= count), default=0)

    def checkpoints(self, row: int) -> set[int]:
        """The numbers of tokens after which recurrent states of ``row`` are stored."""
        each = [set(state.checkpoints[row]) for state in self.recurrent.values()]
        return set.intersection(*each) if each else set()

    def checkpoint(self, row: int) -> None:
        """Store a checkpoint of the recurrent states of ``row``; keys and values need none."""
        for state in self.recurrent.values():
            if self.rows[row] not in state.checkpoints[row]:
                state.due[row] = self.rows[row]

    @property
    def num_states(self) -> int:
        """Number of recurrent states of a layer, if there are any: those of the rows, and checkpoints."""
        state = next(iter(self.recurrent.values()), None)
        return self.batch + (0 if state is None else sum(map(len, state.checkpoints)))

    @property
    def state_bytes(self) -> int:
        """Bytes of a row's recurrent states in all layers; 0 before any are stored."""
        return sum(state.nbytes for state in self.recurrent.values()) // max(self.batch, 1)

    def copy(self, row: int, count: int, capacity: int = 0) -> KVCache:
        """A cache of one row: the first ``count`` committed tokens of ``row``.

        count: as ``resumable`` returns it. capacity: number of slots that it will need.
        """
        if count and count != self.resumable(row, count):
            raise ValueError(f"cannot copy {count} of {self.rows[row]} tokens: there is no checkpoint after them")
        made = KVCache(len(self.lengths), 1, self.device, self.block, int8=self.int8)
        slots = (self.positions[row, : self.committed] >= 0).nonzero()[:count, 0]
        if self.buffer is not None:
            made._divide(self.buffer[:, :, row : row + 1].index_select(4, slots))
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

    def reference(self) -> Self:
        """This cache as it is now, for another thread to read: it shares the committed entries, which never change."""
        made = copy.copy(self)
        made.keys, made.values, made.recurrent = list(self.keys), list(self.values), dict(self.recurrent)
        return made

    def read(self, row: int, start: int, end: int) -> dict[str, Tensor]:
        """A copy, on the CPU, of the keys and values of the committed tokens [start, end) of ``row``."""
        slots = (self.positions[row, : self.committed] >= 0).nonzero()[start:end, 0]
        parts = (("k", self.keys), ("v", self.values))
        return {
            f"{key}{layer}": t[row].index_select(1, slots).cpu()  # (H, n, d)
            for key, part in parts
            for layer, t in enumerate(part)
            if t is not None
        }

    def read_states(self, row: int, count: int) -> dict[str, Tensor]:
        """A copy, on the CPU, of the recurrent states of ``row`` after ``count`` tokens; {} without a checkpoint."""
        if any(count not in state.checkpoints[row] for state in self.recurrent.values()):
            return {}
        return {
            f"{layer} {kind} {number}": held.cpu().contiguous()
            for layer, state in self.recurrent.items()
            for (kind, number), held in state.checkpoints[row][count].items()
        }

    def entries(self, layer: int, row: int) -> dict[str, Tensor]:
        """Keys "k" and values "v" of the filled slots of a row without holes [S, H, d], views perhaps; may be empty."""
        both = zip("kv", (self.keys[layer], self.values[layer]), strict=True)
        return {name: self._plain(x[row, :, : self.lengths[layer]]) for name, x in both if x is not None}

    def _plain(self, entries: Tensor) -> Tensor:
        return (dequantize_rows(entries, torch.bfloat16) if self.int8 else entries).transpose(0, 1)

    def restore(self, parts: Sequence[dict[str, Tensor]], count: int, states: dict[str, Tensor], capacity: int) -> None:
        """Fill this cache, which is empty and has one row, with ``parts`` of a text of ``count`` tokens.

        states: its recurrent states, as ``read_states`` returns them.
        """
        for key, held in (("k", self.keys), ("v", self.values)):
            for layer in range(len(held)):
                if f"{key}{layer}" in parts[0]:
                    whole = torch.cat([part[f"{key}{layer}"] for part in parts], 1)
                    held[layer] = whole[None].to(self.device)
        for name, state in states.items():
            layer_, kind, number = name.split(" ")
            made = self.recurrent.setdefault(int(layer_), Recurrent(1))
            made.states[kind, int(number)] = state.to(self.device)
            made.checkpoints[0][count] = made.states
        self.positions = torch.arange(count, device=self.device)[None]
        self.rows, self.committed, self.lengths = [count], count, [count] * len(self.lengths)

    def take(self, row: int) -> KVCache:
        """The row as a cache of its own."""
        return self.copy(row, self.rows[row])

    def take_compact(self, row: int) -> KVCache:
        """``take`` for a cached prefix: the buffers have little more capacity than the tokens need."""
        return self.take(row)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only ``rows`` of the batch, in that order. Nothing may be uncommitted.

        Cheapest where few rows change their place, and none moves to where another comes from.
        """
        index = torch.tensor(list(rows), dtype=torch.long, device=self.device)
        buffer, filled, batch = self.buffer, self.committed, self.batch
        self.positions = self.positions.index_select(0, index)
        self.recurrent = {layer: state.select(rows) for layer, state in self.recurrent.items()}
        self.rows, self.expected = [self.rows[i] for i in rows], [self.expected[i] for i in rows]
        self.committed = max(self.rows, default=0)
        self.lengths = [self.committed] * len(self.lengths)
        moves = {to: row for to, row in enumerate(rows) if to != row}
        if buffer is None:
            slots = self._slots(self.committed + 1, 0)  # the longest row may be gone
            for part in (self.keys, self.values):
                part[:] = [None if t is None else t[:, :, :slots].index_select(0, index) for t in part]
        elif moves.keys() & moves.values():
            self._divide(buffer.index_select(2, index))
        else:
            end = filled + self.block  # includes entries of a draft
            for to, row in moves.items():
                buffer[:, :, to, :, :end] = buffer[:, :, row, :, :end]
            buffer[:, :, len(rows) : batch, :, :end] = 0  # a mask does not hide NaN from the next row there
            self._divide(buffer)


def quantize_rows(x: Tensor) -> Tensor:
    """``x`` [..., d] in 8 bits: int8 [..., d + d / 16], the codes and then their scales, a bf16 for 32 codes."""
    parts = x.float().unflatten(-1, (-1, GROUP))  # (..., d / 32, 32)
    scales = (parts.abs().amax(-1, keepdim=True) / 127).bfloat16()
    codes = (parts / scales.float().clamp_min(1e-30)).round().to(torch.int8)
    return torch.cat((codes.flatten(-2), scales.flatten(-2).view(torch.int8)), -1)


def dequantize_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of ``quantize_rows``: [..., d]."""
    d = rows.shape[-1] * 16 // 17
    parts, scales = rows[..., :d].unflatten(-1, (-1, GROUP)), rows[..., d:].contiguous().view(torch.bfloat16)
    return (parts * scales[..., None].float()).flatten(-2).to(dtype)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.zeros``; on a CPU from untouched pages, which take memory only when they are written."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = torch.from_numpy(np.zeros(size + 64, np.uint8))
    return memory[-memory.data_ptr() % 64 :][:size].view(dtype).view(shape)


def _held(own: Tensor | None, other: Tensor | None, rows: int) -> Tensor | None:
    """``own`` [B, H, S, d]; if it is None, zeros for ``rows`` rows like ``other``."""
    return own if own is not None or other is None else other.new_zeros(rows, *other.shape[1:])


def _stack(a: Tensor | None, b: Tensor | None, filled_a: int, filled_b: int, slots: int) -> Tensor | None:
    """Entries [..., B, H, S, d] of two caches, stacked, with ``slots`` slots; None if neither has any."""
    if a is None or b is None:
        return None
    rows, (heads, _, head_dim) = a.shape[-4], a.shape[-3:]
    out = a.new_zeros(*a.shape[:-4], rows + b.shape[-4], heads, slots, head_dim)
    out[..., :rows, :, :filled_a, :] = a[..., :filled_a, :]
    out[..., rows:, :, :filled_b, :] = b[..., :filled_b, :]
    return out
