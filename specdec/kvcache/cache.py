"""The KV cache: keys, values and recurrent states of a batch of rows, with roll-back.

Each row has its own buffers, so that rows join and leave the batch without a copy of the others. The slot of a
committed token is its position, and the draft's slots follow: a row has no holes. Layers may be filled to different
lengths during a draft; ``commit`` drops or compacts the draft's slots. The cache knows no models, tokens or acceptance.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.base.devices import upload
from specdec.kvcache.mask import RowMask
from specdec.kvcache.recurrent import Advance, KernelStates, LayerStates, RowStates, StateShape, run_rows

GROUP = 32  # 8-bit codes that share a scale
BLOCK = 256  # slots that a buffer grows by
PAGE = 16  # the buffer of a copy has a multiple of this many slots
MAX_EXPECTED = 1 << 30  # maximum bytes that buffers allocate for expected slots
WHOLE = "kv"  # the name of the buffer that holds all layers


class RowEntries:
    """One row of a ``KVCache``: keys and values of its tokens, and its recurrent states.

    count: number of committed tokens.
    expected: number of slots that the row will need; 0: unknown. On a CPU, new buffers have this capacity.
    buffers: tensors [2 (keys, values), N', H, slots, d] by name: "kv" of all attention layers, or one for each layer,
        such as "3", with N' = 1. If keys and values differ in size, d is the larger one.
    pointers: capacity in slots of "kv", and the addresses of its keys and of its values.
    states: the states of the recurrent layers; None: the model has no recurrent layers.
    lent: whether "kv" is a graph buffer of the runtime, which other caches must copy and not share.
    """

    def __init__(self, states: RowStates | None = None) -> None:
        self.count = 0
        self.expected = 0
        self.buffers = dict[str, Tensor]()
        self.pointers = (0, 0, 0)
        self.states = states
        self.lent = False

    @property
    def slots(self) -> int:
        """Return the capacity of the largest buffer in slots."""
        return max((buffer.shape[-2] for buffer in self.buffers.values()), default=0)

    def shared(self) -> RowEntries:
        """Return this row as it is now, with the same buffers: committed entries never change."""
        made = copy.copy(self)
        made.buffers = dict(self.buffers)
        return made

    def put(self, name: str, buffer: Tensor, lent: bool = False) -> None:
        """Set the buffer ``name``. lent: whether it is a graph buffer of the runtime, which caches must copy."""
        self.buffers[name] = buffer
        self.lent = lent
        if name == WHOLE:
            begin = buffer.data_ptr()
            self.pointers = buffer.shape[-2], begin, begin + buffer.nbytes // 2


class KVCache:
    """Keys and values of all layers, and recurrent states, for a batch of B rows.

    A runtime appends keys and values by ``append``, which returns those of all rows in one tensor, or it counts slots
    as filled by ``claim`` and writes them itself.

    layers: numbers of the N' attention layers, which have one buffer "kv" per row; None: each layer has its own.
    recurrent: numbers of the recurrent layers.
    shape: size of the recurrent states, if native kernels change them in place; None: PyTorch runs these layers.
    int8: whether keys and values are stored in 8 bits (``quantize_rows``). Only ``claim`` is then available.
    entries: the rows.
    lengths: number of filled slots of each layer, in the row with most committed tokens.
    draft_positions: positions of the uncommitted slots, int64 [B, U].
    """

    def __init__(
        self,
        num_layers: int,
        batch: int = 1,
        device: torch.device | str = "cpu",
        int8: bool = False,
        layers: Sequence[int] | None = None,
        recurrent: Sequence[int] = (),
        shape: StateShape | None = None,
    ) -> None:
        self.block = BLOCK
        self.device = torch.device(device)
        self.int8 = int8
        self.layers = layers
        self.recurrent = list(recurrent)
        self.shape = shape
        self.lengths = [0] * num_layers
        self.entries = [RowEntries(self._no_states()) for _ in range(batch)]
        self.draft_positions = torch.zeros(batch, 0, dtype=torch.long, device=self.device)

    def _no_states(self) -> RowStates | None:
        if not self.recurrent:
            return None
        return LayerStates(len(self.recurrent)) if self.shape is None else KernelStates(self.shape)

    # -- sizes --------------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return len(self.entries)

    @property
    def rows(self) -> list[int]:
        """Return the number of committed tokens of each row."""
        return [row.count for row in self.entries]

    @property
    def committed(self) -> int:
        """Return the number of committed tokens of the row that has most; 0 without rows."""
        return max((row.count for row in self.entries), default=0)

    @property
    def data(self) -> list[Tensor]:
        """Return the buffer "kv" of each row."""
        return [row.buffers[WHOLE] for row in self.entries]

    @property
    def states(self) -> list[RowStates]:
        """Return the recurrent states of each row; [] without recurrent layers."""
        return [row.states for row in self.entries if row.states is not None]

    @property
    def token_bytes(self) -> int:
        """Return the bytes of one token's keys and values in all layers; 0 before any are stored."""
        return max((sum(x.nbytes // x.shape[-2] for x in row.buffers.values()) for row in self.entries), default=0)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all buffers of keys and values, without recurrent states."""
        return sum(buffer.nbytes for row in self.entries for buffer in row.buffers.values())

    @property
    def num_states(self) -> int:
        """Return the number of row states that are stored: one for each row, and one for each checkpoint."""
        return self.batch + sum(len(states.checkpoints) for states in self.states)

    @property
    def state_bytes(self) -> int:
        """Return the bytes of one row's recurrent states in all layers; 0 before any are stored."""
        return max((states.nbytes for states in self.states), default=0)

    def expect(self, slots: Sequence[int]) -> None:
        """Tell the cache the number of slots that each row will need, so that buffers need not grow."""
        for row, count in zip(self.entries, slots, strict=True):
            row.expected = count

    def capacities(self, ends: Sequence[int]) -> list[int]:
        """Return the capacity in slots that each row's buffers would have after growing to ``ends`` tokens."""
        pairs = list(zip(self.entries, ends, strict=True))
        return [
            row.slots if end <= row.slots else self._slots(row, end, row.slots, self.token_bytes) for row, end in pairs
        ]

    def _slots(self, row: RowEntries, end: int, have: int, size: int) -> int:
        """Return the capacity that a row's buffers grow to.
        end, have: slots that are needed, and those that there are. size: bytes of one token in all layers."""
        # A text may end early, so the memory of expected slots is bounded.
        expected = min(row.expected, MAX_EXPECTED // max(self.batch * size, 1)) if self.device.type == "cpu" else 0
        # Grow by at least a quarter, so that long generations copy each entry a bounded number of times.
        return -(-max(end, have + have // 4, expected) // self.block) * self.block

    # -- a pass -------------------------------------------------------------------------------------------------------

    def register(
        self,
        layer: int,
        positions: Tensor,
        tree: Tensor | None = None,
        counts: Sequence[int] | None = None,
        trees: Sequence[Tensor | None] | None = None,
    ) -> RowMask:
        """Return the mask of the next T tokens of each row, whose pass begins in ``layer``.

        A token attends to all committed tokens of its row, and to the uncommitted tokens that its tree marks.
        positions: int64 [B, T].
        tree: bool [T, U] for all rows or [B, T, U], where U counts the uncommitted slots, the T new ones included;
            None: a chain, in which each token attends to all earlier ones and to itself.
        counts: number of tokens of each row, for a pass over rows of different lengths. Then ``positions`` is [1, T]
            with the rows one after the other, no other token may be uncommitted, and ``trees`` replaces ``tree``.
        trees: for each row bool [count, count], or None for a chain. Without ``trees``, the caller commits all tokens.
        """
        if counts is not None:
            drafted = positions[0].split(list(counts))
            return RowMask(positions, self.rows, counts, trees or [None] * self.batch, 0, drafted, trees is None)
        (batch, t), ahead = positions.shape, self.lengths[layer] - self.committed
        self.draft_positions = torch.cat((self.draft_positions[:, :ahead], positions), 1) if ahead else positions
        each = [tree] * batch if tree is None or tree.dim() == 2 else list(tree)
        mask = RowMask(positions, self.rows, [t] * batch, each, ahead, self.draft_positions)
        mask.ancestors = tree
        return mask

    def claim(self, lo: int, hi: int, counts: Sequence[int], heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Count the next slots as filled in layers [lo, hi); the runtime then writes their keys and values itself.

        counts: number of slots of each row. heads, head_dim, dtype: number of key heads, size of a head, and dtype.
        """
        ahead = self.lengths[lo] - self.committed
        for row, count in zip(self.entries, counts, strict=True):
            if (end := max(row.count + ahead + count, 1)) > row.pointers[0]:  # a row without tokens also has a buffer
                self._grow(row, WHOLE, heads, end, head_dim, dtype)
        self.lengths[lo:hi] = [self.committed + ahead + max(counts)] * (hi - lo)

    def append(self, layer: int, k: Tensor, v: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
        """Append keys ``k`` and values ``v`` [B, H, T, d] to ``layer``; return all keys and values [B, H, S, d].

        S is the length of the longest row, rounded up to ``multiple``. Slots after a row's own have old or zero
        entries, which the caller must mask. With one row, the results are views of the buffers. The sizes d of keys and
        values may differ.
        """
        name, index = self._place_of(layer)
        ahead, (_, heads, t, size) = self.lengths[layer] - self.committed, k.shape
        for row, *parts in zip(self.entries, k, v, strict=True):
            start = row.count + ahead
            if name not in row.buffers or row.buffers[name].shape[3] < start + t:
                self._grow(row, name, heads, start + t, max(size, v.shape[3]), k.dtype)
            for part, own in enumerate(parts):  # (H, T, d)
                row.buffers[name][part, index, :, start : start + t, : own.shape[2]] = own
        self.lengths[layer] = self.committed + ahead + t
        end = -(-self.lengths[layer] // multiple) * multiple
        made = list[Tensor]()
        for part, new in enumerate((k, v)):
            views = [row.buffers[name][part, index, :, :end, : new.shape[3]] for row in self.entries]
            views = [F.pad(view, (0, 0, 0, end - view.shape[1])) if view.shape[1] < end else view for view in views]
            made.append(views[0][None] if len(views) == 1 else torch.stack(views))
        return made[0], made[1]

    def _place_of(self, layer: int) -> tuple[str, int]:
        """Return the name of the buffer of ``layer``, and the layer's index in it."""
        return (str(layer), 0) if self.layers is None else (WHOLE, self.layers.index(layer))

    def _grow(self, row: RowEntries, name: str, heads: int, end: int, head_dim: int, dtype: torch.dtype) -> None:
        """Grow the buffer ``name`` of a row to at least ``end`` slots."""
        if self.int8:
            head_dim, dtype = head_dim + 2 * head_dim // GROUP, torch.int8
        old = row.buffers.get(name)
        have = 0 if old is None else old.shape[3]
        layers = len(self.lengths if self.layers is None else self.layers)
        slots = self._slots(row, end, have, 2 * layers * heads * head_dim * dtype.itemsize)
        grown = zeros((2, 1 if self.layers is None else layers, heads, slots, head_dim), dtype, self.device)
        if old is not None:
            grown[:, :, :, :have] = old
        row.put(name, grown)

    def run_recurrent(self, layer: int, x: Tensor, tree: Tensor | None, advance: Advance) -> Tensor:
        """Run recurrent ``layer`` on the next T tokens ``x`` [B, T, D]; return its outputs [B, T, D].

        Stores what roll-back needs. tree: the mask [T, U] (``register``). advance: runs the mixer on inputs [B, T, D]
        and states, and returns its outputs and the new states.
        """
        held = self.lengths[layer] - self.committed
        rows = [states for states in self.states if isinstance(states, LayerStates)]
        return run_rows(rows, self.recurrent.index(layer), x, held, tree, advance)

    def trim(self, count: int, lo: int = 0, hi: int | None = None) -> None:
        """Drop the last ``count`` slots of layers [lo, hi). hi: None: all layers from ``lo`` on.

        Raises ValueError for committed slots, which cannot be dropped.
        """
        for layer in range(lo, len(self.lengths) if hi is None else hi):
            if self.lengths[layer] - count < self.committed:
                raise ValueError(f"cannot trim {count} slots of layer {layer}: only uncommitted ones can be dropped")
            self.lengths[layer] -= count

    def roll_back(self) -> None:
        """Drop all uncommitted slots and states, in all layers and rows."""
        self._settle()
        for states in self.states:
            states.ahead = {}

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Commit the accepted tokens of each row, and drop its other uncommitted ones.

        paths: for each row, ascending indices of the accepted tokens among the uncommitted ones; [] accepts none.
        All layers must have run all uncommitted tokens.
        """
        for row, path in zip(self.entries, paths, strict=True):
            n, count = row.count, len(path)
            if count and path[-1] != count - 1:  # else the slots are in place
                index = upload([n + slot for slot in path], self.device)
                for buffer in row.buffers.values():
                    buffer[..., n : n + count, :] = buffer[..., index, :]
            if row.states is not None:
                row.states.commit(path)
            row.count += count
        self._settle()

    def _settle(self) -> None:
        self.lengths = [self.committed] * len(self.lengths)

    # -- rows come and go ---------------------------------------------------------------------------------------------

    def join(self, other: KVCache) -> None:
        """Add the rows of ``other`` after those of this cache. Nothing may be uncommitted in either."""
        self._place(self.entries + other.entries)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only ``rows`` of the batch, in that order. Nothing may be uncommitted."""
        self._place([self.entries[b] for b in rows])

    def _place(self, entries: list[RowEntries]) -> None:
        self.entries = entries
        self.draft_positions = self.draft_positions.new_zeros(len(entries), 0)
        self.roll_back()

    def resumable(self, row: int, count: int) -> int:
        """Return how many of the first ``count`` committed tokens of ``row`` another text can begin with.

        That is ``count``, or with recurrent layers the largest number with a checkpoint; 0: none.
        """
        if not self.recurrent or count == self.entries[row].count:
            return count
        return max((n for n in self.checkpoints(row) if n <= count), default=0)

    def checkpoints(self, row: int) -> set[int]:
        """Return the numbers of tokens after which recurrent states of ``row`` are stored."""
        states = self.entries[row].states
        return set() if states is None else set(states.checkpoints)

    def checkpoint(self, row: int) -> None:
        """Store a checkpoint of the recurrent states of ``row`` after its committed tokens; no effect without any."""
        if (states := self.entries[row].states) is not None:
            states.checkpoint(self.entries[row].count)

    def of(self, entries: list[RowEntries]) -> Self:
        """Return a cache of the same kind with the rows ``entries``, of which nothing may be uncommitted."""
        made = copy.copy(self)
        made._place(entries)
        return made

    def copy(self, row: int, count: int, capacity: int = 0) -> Self:
        """Return a cache of one row with a copy of the first ``count`` committed tokens of ``row``.

        count: as ``resumable`` returns it; ValueError for another one. capacity: minimum number of slots of the copy.
        """
        own = self.entries[row]
        if count and count != self.resumable(row, count):
            raise ValueError(f"cannot copy {count} of {own.count} tokens: there is no checkpoint after them")
        made, whole = RowEntries(self._no_states()), count == own.count
        if own.states is not None and count:
            made.states = own.states.copy() if whole else own.states.restored(count)
        for name, buffer in own.buffers.items() if count else ():
            self._fill(made, name, [buffer[..., :count, :]], capacity)
        made.count = count
        return self.of([made])

    def _fill(self, row: RowEntries, name: str, parts: Sequence[Tensor], capacity: int) -> None:
        """Set the buffer ``name`` of a row to ``parts`` [..., slots, d], joined, with room for ``capacity`` slots."""
        counts, first = [part.shape[-2] for part in parts], parts[0]
        slots = -(-max(sum(counts), capacity) // PAGE) * PAGE
        made = zeros((*first.shape[:-2], slots, first.shape[-1]), first.dtype, self.device)
        for part, view in zip(parts, made[..., : sum(counts), :].split(counts, -2), strict=True):
            view.copy_(part)
        row.put(name, made)

    def take(self, row: int) -> Self:
        """Return a cache of one row that shares the buffers of ``row``, or has a copy of a graph buffer."""
        own = self.entries[row]
        return self.copy(row, own.count) if own.lent else self.of([own.shared()])

    def take_compact(self, row: int) -> Self:
        """Return a cache of one row like ``take``; a copy if over a fifth of the buffers' capacity is unused."""
        count = self.entries[row].count
        spare = self.entries[row].slots > count + count // 4 + PAGE
        return self.copy(row, count) if spare else self.take(row)

    def reference(self) -> Self:
        """Return this cache as it is now, for another thread to read. It shares the committed entries."""
        made = copy.copy(self)
        made.entries = [row.shared() for row in self.entries]
        return made

    # -- reading and writing entries ----------------------------------------------------------------------------------

    def read(self, row: int, start: int, end: int) -> dict[str, Tensor]:
        """Return a copy on the CPU of the buffers of ``row`` for the committed tokens [start, end), by name."""
        found = self.entries[row].buffers.items()
        return {name: buffer[..., start:end, :].to("cpu", copy=True).contiguous() for name, buffer in found}

    def read_states(self, row: int, count: int) -> dict[str, Tensor]:
        """Return the recurrent states of ``row`` after ``count`` tokens on the CPU, by key as text.

        {} if there is no checkpoint after ``count`` tokens.
        """
        states = self.entries[row].states
        found = {} if states is None else states.checkpoints.get(count, {})
        return {" ".join(map(str, key)): state.cpu().contiguous() for key, state in found.items()}

    def restore(self, parts: Sequence[dict[str, Tensor]], count: int, states: dict[str, Tensor], capacity: int) -> None:
        """Fill this empty cache of one row with a text of ``count`` tokens.

        parts: the text's consecutive parts, each as ``read`` returns it. states: the recurrent states after the text,
        as ``read_states`` returns them. capacity: minimum number of slots of the buffers.
        """
        [row] = self.entries
        for name in parts[0]:
            self._fill(row, name, [part[name] for part in parts], capacity)
        if row.states is not None:
            keys = {name: tuple(int(x) if x.isdigit() else x for x in name.split(" ")) for name in states}
            row.states.begin(count, {keys[name]: state.to(self.device) for name, state in states.items()})
        row.count = count
        self._settle()

    def of_layer(self, layer: int, row: int) -> dict[str, Tensor]:
        """Return the keys "k" and values "v" of a row's filled slots in ``layer``, each [S, H, d].

        The tensors may be views. {} if the layer stores no keys.
        """
        own = self.entries[row]
        name, index = self._place_of(layer) if self.layers is None or layer in self.layers else ("", 0)
        if name not in own.buffers:
            return {}
        filled = own.buffers[name][:, index, :, : self.lengths[layer] - self.committed + own.count]
        parts = dequantize_rows(filled, torch.bfloat16) if self.int8 else filled
        return {part: values.transpose(0, 1) for part, values in zip("kv", parts, strict=True)}


def quantize_rows(x: Tensor) -> Tensor:
    """Quantize ``x`` [..., d] to int8 [..., d + d / 16]: d codes, then the bytes of a bf16 scale for each 32 codes."""
    parts = x.float().unflatten(-1, (-1, GROUP))  # (..., d / 32, 32)
    scales = (parts.abs().amax(-1, keepdim=True) / 127).bfloat16()
    codes = (parts / scales.float().clamp_min(1e-30)).round().to(torch.int8)
    return torch.cat((codes.flatten(-2), scales.flatten(-2).view(torch.int8)), -1)


def dequantize_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values [..., d] of ``rows``, which ``quantize_rows`` made, in ``dtype``."""
    d = rows.shape[-1] * 16 // 17
    parts, scales = rows[..., :d].unflatten(-1, (-1, GROUP)), rows[..., d:].contiguous().view(torch.bfloat16)
    return (parts * scales[..., None].float()).flatten(-2).to(dtype)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``torch.zeros``; on a CPU, its pages take memory only when they are written."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = torch.from_numpy(np.zeros(size + 64, np.uint8))
    return memory[-memory.data_ptr() % 64 :][:size].view(dtype).view(shape)
