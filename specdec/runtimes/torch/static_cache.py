"""Keys and values at fixed addresses, which captured passes read and write: each row of a batch has a lane.

The lanes and their slots grow by doubling. What is larger than ``KEPT`` is released when the last of its rows ends.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.kvcache.cache import WHOLE, RowEntries
from specdec.kvcache.recurrent import LayerStates, StatesByKey

SLOTS = 256  # fewest of a lane
SPARE = 128  # slots behind those of a row, for drafted tokens and padding
KEPT = 512 << 20  # bytes that stay for the next request, with the passes that are captured over them


def bucket(count: int) -> int:
    """Return the smallest power of two that is at least ``count``."""
    return 1 << max(count - 1, 0).bit_length()


class StaticCache:
    """One tensor for the keys and values of all rows, at a fixed address, so that passes over it can be captured.

    Each row has one of L lanes.

    shape: N, H and d: numbers of attention layers and heads, and the size of a head.
    recurrent: number of recurrent layers, R. kinds: shape and dtype of a layer's states, by kind and number.
    width: D, the size of the inputs of recurrent layers.
    whole: the tensor [2, N, L, H, slots, d]; None: nothing is allocated.
    states: recurrent states [R, L, ...] by kind and number.
    inputs: inputs of uncommitted or pending tokens, [R, L, SPARE, D].
    homes: for each lane, its part of ``states`` by layer, kind and number, and its part of ``inputs``.
    lock: the lock of the target.
    forget: called when ``whole`` is replaced, so that captured functions are invalid.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        lock: Any,
        forget: Callable[[], None],
        recurrent: int = 0,
        kinds: Mapping[tuple[str, int], tuple[tuple[int, ...], torch.dtype]] | None = None,
        width: int = 0,
    ) -> None:
        self.shape, self.dtype, self.device, self.lock, self.forget = shape, dtype, device, lock, forget
        self.recurrent, self.kinds, self.width = recurrent, dict(kinds or {}), width
        self.whole: Tensor | None = None
        self.states = dict[tuple[str, int], Tensor]()
        self.inputs, self.homes = torch.empty(0), list[tuple[StatesByKey, Tensor]]()
        self.placing = False
        self.rows = list[weakref.ref[RowEntries] | None]()  # of each lane

    @property
    def slots(self) -> int:
        """Slots of a lane; 0: nothing is allocated."""
        return 0 if self.whole is None else int(self.whole.shape[4])

    @property
    def spare_bytes(self) -> int:
        """Bytes of the lanes that no row uses."""
        whole = self.whole
        return 0 if whole is None else whole.nbytes // whole.shape[2] * (whole.shape[2] - len(self._users()))

    def _users(self) -> dict[int, RowEntries]:
        """Return the rows that have a lane, by lane."""
        rows = ((lane, None if row is None else row()) for lane, row in enumerate(self.rows))
        return {
            lane: row
            for lane, row in rows
            if row is not None and row.pointers.get(WHOLE, (0, 0, 0))[1] == self._begin(lane)
        }

    def _begin(self, lane: int) -> int:
        return 0 if self.whole is None else self.whole[:, :, lane].data_ptr()

    def place(self, rows: Sequence[RowEntries], end: int) -> list[int]:
        """Give each of ``rows`` a lane with at least ``end`` slots; return the lanes. May replace ``whole``."""
        self.placing = True
        try:
            return self._place(rows, end)
        finally:
            self.placing = False

    def _place(self, rows: Sequence[RowEntries], end: int) -> list[int]:
        users, slots = self._users(), bucket(max(end + SPARE, SLOTS))
        lane_of = {id(row): lane for lane, row in users.items()}
        others = [row for row in users.values() if all(row is not own for own in rows)]
        if self.whole is None or self.whole.shape[4] < slots or self.whole.shape[2] < len(rows) + len(others):
            slots = max([slots, *(row.slots for row in others)])
            self._allocate([*rows, *others], slots)
            return list(range(len(rows)))
        limit, free = bucket(len(rows)), [lane for lane in range(self.whole.shape[2]) if lane not in users]
        for row in rows:
            lane = lane_of.get(id(row))
            if lane is None or (lane >= limit and free and free[0] < limit):
                lane_of[id(row)] = free.pop(0)
                self._move(row, lane_of[id(row)])
                free = free if lane is None else sorted([*free, lane])
            elif isinstance(row.states, LayerStates):  # passes that are not captured put states elsewhere
                row.states.move(*self.homes[lane])
        return [lane_of[id(row)] for row in rows]

    def _allocate(self, rows: Sequence[RowEntries], slots: int) -> None:
        layers, heads, size = self.shape
        shape = 2, layers, bucket(len(rows)), heads, slots, size
        self.forget()
        self.whole = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.rows, count = [None] * shape[2], (self.recurrent, shape[2])
        make = functools.partial(torch.zeros, device=self.device)
        self.states = {key: make((*count, *own), dtype=dtype) for key, (own, dtype) in self.kinds.items()}
        self.inputs = make((*count, SPARE, self.width), dtype=self.dtype)
        self.homes = []
        for lane in range(shape[2]):
            home: StatesByKey = {}
            for key, whole in self.states.items():
                home |= {(layer, *key): whole[layer, lane : lane + 1] for layer in range(self.recurrent)}
            self.homes.append((home, self.inputs[:, lane]))
        for lane, row in enumerate(rows):
            self._move(row, lane)

    def _move(self, row: RowEntries, lane: int) -> None:
        assert self.whole is not None
        own, part = row.buffers.get(WHOLE), self.whole[:, :, lane]
        count = 0 if own is None else min(own.shape[-2], part.shape[-2])
        if own is not None:
            part[..., :count, :] = own[..., :count, :]
        part[..., count:, :] = 0  # a mask does not hide NaN
        row.put(WHOLE, part, lent=True)
        if isinstance(row.states, LayerStates):
            row.states.move(*self.homes[lane])
        self.rows[lane] = weakref.ref(row, self._ended)

    def _ended(self, _row: object) -> None:
        """Release the memory when the last row has ended, unless another thread holds the lock and so uses rows."""
        if not self.placing and self.lock.acquire(blocking=False):
            try:
                if self.whole is not None and self.whole.nbytes > KEPT and not self._users():
                    self.whole, self.rows, self.states, self.homes = None, [], {}, []
                    self.inputs = torch.empty(0)
                    self.forget()
            finally:
                self.lock.release()
