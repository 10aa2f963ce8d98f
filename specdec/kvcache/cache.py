"""A cache of keys, values and recurrent states with roll-back: append, trim, commit a path, select rows.

Each row has buffers of its own, so that rows come and go without copying the others. A row's committed slots are
numbered by their positions, and its draft's slots follow them: no row has holes. Layers may be filled to different
lengths while a draft is under way; ``commit`` drops or compacts the draft's slots. Knows nothing about models, tokens
or acceptance.
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
from specdec.kvcache.recurrent import Advance, RowStates, StateShape, run_rows

GROUP = 32  # numbers of an 8-bit row that share a scale
BLOCK = 256  # slots that a buffer grows by
PAGE = 16  # the buffer of a copy has a multiple of so many slots
MAX_EXPECTED = 1 << 30  # maximum bytes that buffers allocate for expected slots
WHOLE = "kv"  # the name of a buffer of all layers


class RowEntries:
    """Keys and values of a row's tokens, and its recurrent states.

    count: number of committed tokens.
    expected: number of slots that it will need; on a CPU, buffers begin with them.
    buffers: by name, [..., slots, d]: "kv" of all layers, [2, N', H, slots, d], or "k3" and "v3" of a layer.
    place: slots of "kv", and pointers to its keys and values.
    states: the states of recurrent layers; None: there are none.
    lent: whether "kv" is memory of the runtime, which others do not share.
    """

    def __init__(self, states: RowStates | None = None) -> None:
        self.count = self.expected = 0
        self.buffers = dict[str, Tensor]()
        self.place, self.states, self.lent = (0, 0, 0), states, False

    @property
    def slots(self) -> int:
        """Capacity of the buffers."""
        return max((buffer.shape[-2] for buffer in self.buffers.values()), default=0)

    def shared(self) -> RowEntries:
        """The row as it is now, with the same buffers: committed entries never change."""
        made = copy.copy(self)
        made.buffers = dict(self.buffers)
        return made

    def put(self, name: str, buffer: Tensor, lent: bool = False) -> None:
        self.buffers[name], self.lent = buffer, lent
        if name == WHOLE:
            begin = buffer.data_ptr()
            self.place = buffer.shape[-2], begin, begin + buffer.nbytes // 2


class KVCache:
    """Keys and values of all layers, and recurrent states, for a batch of rows.

    Runtimes append entries, or claim slots and write them themselves. The former get those of all rows in one tensor.

    layers: those with keys and values, N', if a row has one buffer for all of them; None: one for each.
    recurrent: the recurrent layers. shape: the shape of their states, where a runtime takes pointers to them.
    int8: whether entries are rows of ``quantize_rows``.
    entries: of each row.
    lengths: number of filled slots of each layer, in the row with most committed tokens.
    draft_positions: positions of uncommitted slots [B, U].
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
        self.block, self.device, self.int8 = BLOCK, torch.device(device), int8
        self.layers, self.recurrent, self.shape = layers, list(recurrent), shape
        self.lengths = [0] * num_layers
        self.entries = [RowEntries(self._no_states()) for _ in range(batch)]
        self.draft_positions = torch.zeros(batch, 0, dtype=torch.long, device=self.device)

    def _no_states(self) -> RowStates | None:
        return RowStates(len(self.recurrent), self.shape) if self.recurrent else None

    # -- sizes --------------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return len(self.entries)

    @property
    def rows(self) -> list[int]:
        """Number of committed tokens of each row."""
        return [row.count for row in self.entries]

    @property
    def committed(self) -> int:
        """The largest of them."""
        return max((row.count for row in self.entries), default=0)

    @property
    def data(self) -> list[Tensor]:
        """The rows' buffers of all layers."""
        return [row.buffers[WHOLE] for row in self.entries]

    @property
    def states(self) -> list[RowStates]:
        """The rows' recurrent states."""
        return [row.states for row in self.entries if row.states is not None]

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in all layers; 0 before any are stored."""
        return max((sum(x.nbytes // x.shape[-2] for x in row.buffers.values()) for row in self.entries), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers of keys and values."""
        return sum(buffer.nbytes for row in self.entries for buffer in row.buffers.values())

    @property
    def num_states(self) -> int:
        """Number of recurrent states of a layer, if there are any: those of the rows, and checkpoints."""
        return self.batch + sum(len(states.checkpoints) for states in self.states)

    @property
    def state_bytes(self) -> int:
        """Bytes of a row's recurrent states in all layers; 0 before any are stored."""
        return max((states.nbytes for states in self.states), default=0)

    def expect(self, slots: Sequence[int]) -> None:
        """So many slots will be needed for each row."""
        for row, count in zip(self.entries, slots, strict=True):
            row.expected = count

    def capacities(self, ends: Sequence[int]) -> list[int]:
        """The number of slots of each row's buffers once they have room for so many tokens of each row."""
        pairs = list(zip(self.entries, ends, strict=True))
        return [
            row.slots if end <= row.slots else self._slots(row, end, row.slots, self.token_bytes) for row, end in pairs
        ]

    def _slots(self, row: RowEntries, end: int, have: int, size: int) -> int:
        """The capacity of larger buffers of a row than for ``have`` slots, for ``end``. size: bytes of a token in all
        layers."""
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
        """Register the next T slots of ``layer`` at ``positions`` [B, T] and return their mask.

        They see every committed token of their row, and of the U uncommitted slots (theirs included) those that
        ``tree`` (bool [T, U] or [B, T, U]) marks; None: all earlier ones and themselves (a chain).

        counts: so many tokens of each row instead, row behind row (positions [1, T]). trees: of each of these rows,
            bool [count, count], or None for a chain; nothing else may be uncommitted. Without ``trees``, all the tokens
            are to be committed.
        """
        if counts is not None:
            places = positions[0].split(list(counts))
            return RowMask(positions, self.rows, counts, trees or [None] * self.batch, 0, places, trees is None)
        (batch, t), ahead = positions.shape, self.lengths[layer] - self.committed
        self.draft_positions = torch.cat((self.draft_positions[:, :ahead], positions), 1) if ahead else positions
        each = [tree] * batch if tree is None or tree.dim() == 2 else list(tree)
        mask = RowMask(positions, self.rows, [t] * batch, each, ahead, self.draft_positions)
        mask.ancestors = tree
        return mask

    def claim(self, lo: int, hi: int, counts: Sequence[int], heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Count the next ``counts`` slots of the rows as filled in layers [lo, hi), for a runtime to write them."""
        ahead, layers = self.lengths[lo] - self.committed, self.layers or ()
        for row, count in zip(self.entries, counts, strict=True):
            if (end := max(row.count + ahead + count, 1)) > row.place[0]:  # a row without tokens has a buffer, too
                self._grow(row, WHOLE, (2, len(layers), heads), end, head_dim, dtype)
        self.lengths[lo:hi] = [self.committed + ahead + max(counts)] * (hi - lo)

    def append(self, layer: int, k: Tensor, v: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
        """Add ``k``, ``v`` [B, H, T, d] to ``layer``; return all its keys and values [B, H, S, d].

        S is that of the longest row, rounded up to ``multiple``; slots behind a row's own have old or zero entries,
        which the caller masks. Of a single row they are views.
        """
        ahead, t, made = self.lengths[layer] - self.committed, k.shape[2], list[Tensor]()
        if self.layers is not None:
            self.claim(layer, layer + 1, [t] * self.batch, k.shape[1], k.shape[3], k.dtype)
        self.lengths[layer] = self.committed + ahead + t
        end = -(-self.lengths[layer] // multiple) * multiple
        for place, (name, new) in enumerate((("k", k), ("v", v))):
            stored, views = quantize_rows(new) if self.int8 else new, list[Tensor]()
            for row, own in zip(self.entries, stored, strict=True):
                start = row.count + ahead
                if self.layers is not None:
                    view = row.buffers[WHOLE][place, self.layers.index(layer)]  # (H, slots, d)
                else:
                    held = row.buffers.get(f"{name}{layer}")
                    if held is None or held.shape[1] < start + t:
                        self._grow(row, f"{name}{layer}", new.shape[1:2], start + t, new.shape[3], new.dtype)
                    view = row.buffers[f"{name}{layer}"]
                view[:, start : start + t] = own
                views.append(view[:, :end] if view.shape[1] >= end else F.pad(view, (0, 0, 0, end - view.shape[1])))
            whole = views[0][None] if len(views) == 1 else torch.stack(views)
            made.append(dequantize_rows(whole, new.dtype) if self.int8 else whole)
        return made[0], made[1]

    def _grow(
        self, row: RowEntries, name: str, outer: Sequence[int], end: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        """Let a buffer [*outer, slots, head_dim] of a row have at least ``end`` slots."""
        if self.int8:
            head_dim, dtype = head_dim + 2 * head_dim // GROUP, torch.int8
        old, size = row.buffers.get(name), math.prod(outer) * head_dim * dtype.itemsize
        have = 0 if old is None else old.shape[-2]
        slots = self._slots(row, end, have, size if name == WHOLE else 2 * len(self.lengths) * size)
        grown = zeros((*outer, slots, head_dim), dtype, self.device)
        if old is not None:
            grown[..., :have, :] = old
        row.put(name, grown)

    def run_recurrent(self, layer: int, x: Tensor, tree: Tensor | None, advance: Advance) -> Tensor:
        """Run a recurrent layer on the next T tokens ``x`` [B, T, D], and store what roll-back needs."""
        held = self.lengths[layer] - self.committed
        return run_rows(self.states, self.recurrent.index(layer), x, held, tree, advance)

    def trim(self, count: int, lo: int = 0, hi: int | None = None) -> None:
        """Drop the last ``count`` slots of layers [lo, hi). Committed slots cannot be dropped (ValueError)."""
        for layer in range(lo, len(self.lengths) if hi is None else hi):
            if self.lengths[layer] - count < self.committed:
                raise ValueError(f"cannot trim {count} slots of layer {layer}: only uncommitted ones can be dropped")
            self.lengths[layer] -= count

    def roll_back(self) -> None:
        """Drop everything that is not committed, in all layers."""
        self._settle()
        for states in self.states:
            states.ahead = {}

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Commit, for each row, the uncommitted slots listed in ``paths`` (ascending indices), and drop the others.

        All layers must have run the whole block.
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
        """Nothing is uncommitted."""
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
        """The number of the first ``count`` committed tokens of ``row`` that another text can begin with."""
        if not self.recurrent or count == self.entries[row].count:
            return count
        return max((n for n in self.checkpoints(row) if n <= count), default=0)

    def checkpoints(self, row: int) -> set[int]:
        """The numbers of tokens after which recurrent states of ``row`` are stored."""
        states = self.entries[row].states
        return set() if states is None else set(states.checkpoints)

    def checkpoint(self, row: int) -> None:
        """Store a checkpoint of the recurrent states of ``row``; keys and values need none."""
        if (states := self.entries[row].states) is not None:
            states.checkpoint(self.entries[row].count)

    def of(self, entries: list[RowEntries]) -> Self:
        """A cache like this one, with these rows, of which nothing is uncommitted."""
        made = copy.copy(self)
        made._place(entries)
        return made

    def copy(self, row: int, count: int, capacity: int = 0) -> Self:
        """A cache of one row: the first ``count`` committed tokens of ``row``.

        count: as ``resumable`` returns it. capacity: number of slots that it will need.
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
        """Make a buffer with ``parts`` one behind the other, and room for ``capacity`` slots."""
        counts, first = [part.shape[-2] for part in parts], parts[0]
        slots = -(-max(sum(counts), capacity) // PAGE) * PAGE
        made = zeros((*first.shape[:-2], slots, first.shape[-1]), first.dtype, self.device)
        for part, place in zip(parts, made[..., : sum(counts), :].split(counts, -2), strict=True):
            place.copy_(part)
        row.put(name, made)

    def take(self, row: int) -> Self:
        """The row as a cache of its own, which shares its buffers."""
        own = self.entries[row]
        return self.copy(row, own.count) if own.lent else self.of([own.shared()])

    def take_compact(self, row: int) -> Self:
        """``take`` for a cached prefix: the buffers have little more capacity than the tokens need."""
        count = self.entries[row].count
        spare = self.entries[row].slots > count + count // 4 + PAGE
        return self.copy(row, count) if spare else self.take(row)

    def reference(self) -> Self:
        """This cache as it is now, for another thread to read: it shares the committed entries, which never change."""
        made = copy.copy(self)
        made.entries = [row.shared() for row in self.entries]
        return made

    # -- entries as numbers -------------------------------------------------------------------------------------------

    def read(self, row: int, start: int, end: int) -> dict[str, Tensor]:
        """A copy, on the CPU, of the keys and values of the committed tokens [start, end) of ``row``."""
        found = self.entries[row].buffers.items()
        return {name: buffer[..., start:end, :].to("cpu", copy=True).contiguous() for name, buffer in found}

    def read_states(self, row: int, count: int) -> dict[str, Tensor]:
        """A copy, on the CPU, of the recurrent states of ``row`` after ``count`` tokens; {} without a checkpoint."""
        states = self.entries[row].states
        found = {} if states is None else states.checkpoints.get(count, {})
        return {" ".join(map(str, key)): state.cpu().contiguous() for key, state in found.items()}

    def restore(self, parts: Sequence[dict[str, Tensor]], count: int, states: dict[str, Tensor], capacity: int) -> None:
        """Fill this cache, which is empty and has one row, with ``parts`` of a text of ``count`` tokens.

        states: its recurrent states, as ``read_states`` returns them.
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
        """Keys "k" and values "v" of the filled slots of a row [S, H, d], views perhaps; may be empty."""
        own, found = self.entries[row], dict[str, Tensor]()
        for place, name in enumerate("kv"):
            held = own.buffers.get(f"{name}{layer}")
            if self.layers is not None and layer in self.layers and WHOLE in own.buffers:
                held = own.buffers[WHOLE][place, self.layers.index(layer)]
            if held is not None:
                filled = held[:, : self.lengths[layer] - self.committed + own.count]
                found[name] = (dequantize_rows(filled, torch.bfloat16) if self.int8 else filled).transpose(0, 1)
        return found


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
