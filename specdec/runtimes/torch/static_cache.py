"""The static cache: keys, values and recurrent states at fixed addresses, which CUDA graphs read and write.

Each row (sequence) of a batch has a *lane*, one index of the batch axis. The numbers of lanes and of slots (tokens per
lane) grow by doubling. Captured functions write into all of the first lanes. In those whose rows they do not run, they
write into the last ``SPARE`` slots, so no row has tokens there: it grows out of its lane before. A cache larger than
``KEPT`` bytes is released when the last of its rows ends. Inside a captured function, ``Lanes`` takes the place of the
ordinary ``KVCache``.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.base.devices import upload
from specdec.kvcache.cache import WHOLE, RowEntries
from specdec.kvcache.mask import Mask
from specdec.kvcache.recurrent import Advance, LayerStates, StatesByKey

TOKENS = 64  # passes over more tokens are not captured
SLOTS = 256  # fewest of a lane
SPARE = 128  # last slots of a lane, for padding and for functions that run other rows
KEPT = 512 << 20  # bytes that stay for the next request, with the passes that are captured over them


def bucket(count: int) -> int:
    """Return the smallest power of two that is at least ``count``."""
    return 1 << max(count - 1, 0).bit_length()


class InLanes(NamedTuple):
    """The lanes of a static cache that the B rows (sequences) of a batch have, among its first L lanes.

    static: the static cache, whose lanes are indices of its batch axis.
    numbers: what a captured function reads about the lanes, int64 [2 L + 1 + R L] for R recurrent layers: committed
        tokens of each lane, first uncommitted slot of each lane, number of uncommitted tokens, and for each recurrent
        layer and lane the number of pending tokens (accepted, but not in the layer's state yet).
    rows: the lane of each row, int64 [B]; None: row b has lane b.
    total: L.
    """

    static: StaticCache
    numbers: Tensor
    rows: Tensor | None
    total: int


class StaticCache:
    """Keys, values and recurrent states of all rows (sequences) at fixed addresses, so that CUDA graphs can use them.

    Each row has one of L lanes (indices of the batch axis). A lane has a number of slots, one for each token.

    layers: indices of the N attention layers that store keys and values.
    shape: (H, d), number of key heads and size of a head; the largest ones if layers differ.
    lock: the model's lock, which callers hold.
    forget: called with this cache when ``whole`` is replaced or released, which makes captured functions invalid.
    recurrent: indices of the R recurrent layers.
    kinds: shape (without layer and lane) and dtype of a recurrent layer's states, by a key (kind, index).
    width: D, the size of the inputs of recurrent layers.
    num_layers: number of all layers of the model; 0: up to the last one in ``layers`` and ``recurrent``.
    whole: keys and values, [2, N, L, H, slots, d]; None: nothing is allocated.
    every: the numbers of all slots, int64 [slots]. block: the numbers 0 to SPARE - 1, int64 [SPARE].
    states: recurrent states [R, L, ...] by key.
    inputs: inputs of recurrent layers for uncommitted tokens, and for accepted ones that are not in ``states`` yet, [R,
        L, SPARE (128), D].
    homes: for each lane, its views of ``states`` by (recurrent layer, *key), and its view of ``inputs``.
    placing: whether ``place`` is running, so that rows that end then release no memory.
    rows: for each lane, a weak reference to the row that had it last; None: none.
    """

    def __init__(
        self,
        layers: Sequence[int],
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        lock: Any,
        forget: Callable[[StaticCache], None],
        recurrent: Sequence[int] = (),
        kinds: Mapping[tuple[str, int], tuple[tuple[int, ...], torch.dtype]] | None = None,
        width: int = 0,
        num_layers: int = 0,
    ) -> None:
        self.layers = list(layers)
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.lock = lock
        self.forget = forget
        self.recurrent = list(recurrent)
        self.kinds = dict(kinds or {})
        self.width = width
        self.num_layers = max([num_layers, *(1 + layer for layer in (*layers, *recurrent))])
        self.whole: Tensor | None = None
        self.every = torch.empty(0)
        self.block = torch.arange(SPARE, device=device)
        self.states = dict[tuple[str, int], Tensor]()
        self.inputs = torch.empty(0)
        self.homes = list[tuple[StatesByKey, Tensor]]()
        self.placing = False
        self.rows = list[weakref.ref[RowEntries] | None]()

    @property
    def slots(self) -> int:
        """The number of tokens for which each row has space in this cache; 0: nothing is allocated."""
        return 0 if self.whole is None else int(self.whole.shape[4])

    @property
    def spare_bytes(self) -> int:
        """The bytes of keys and values that are allocated but not for a row: spare slots, and lanes that no row has."""
        if self.whole is None:
            return 0
        held = sum(row.held for row in self._users().values())
        return self.whole.nbytes - self.whole.nbytes // (self.whole.shape[2] * self.slots) * held

    def _users(self) -> dict[int, RowEntries]:
        """Return the rows (sequences) whose keys and values are in this cache, by lane (index on its batch axis)."""
        rows = ((lane, None if row is None else row()) for lane, row in enumerate(self.rows))
        return {
            lane: row
            for lane, row in rows
            if row is not None and row.pointers.get(WHOLE, (0, 0, 0))[1] == self._begin(lane)
        }

    def _begin(self, lane: int) -> int:
        return 0 if self.whole is None else self.whole[:, :, lane].data_ptr()

    def place(self, rows: Sequence[RowEntries], end: int) -> list[int]:
        """Give each of ``rows`` a lane with space for at least ``end`` tokens, and return the rows' lanes.

        A lane is one index of the cache's batch axis; result b is the lane of ``rows[b]``. Copies the keys, values and
        states of rows that get a new lane. If there are too few lanes or slots, it allocates larger tensors, moves all
        rows, and calls ``forget``. The caller holds the model's lock.

        end: number of slots that the longest row needs, also for uncommitted tokens, in any of its layers.
        """
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
        heads, size = self.shape
        shape = 2, len(self.layers), bucket(len(rows)), heads, slots, size
        self.forget(self)
        self.whole = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.every = torch.arange(slots, device=self.device)
        self.rows, count = [None] * shape[2], (len(self.recurrent), shape[2])
        make = functools.partial(torch.zeros, device=self.device)
        self.states = {key: make((*count, *own), dtype=dtype) for key, (own, dtype) in self.kinds.items()}
        self.inputs = make((*count, SPARE, self.width), dtype=self.dtype)
        self.homes = []
        for lane in range(shape[2]):
            home: StatesByKey = {}
            for key, whole in self.states.items():
                home |= {(layer, *key): whole[layer, lane : lane + 1] for layer in range(len(self.recurrent))}
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
        row.put(WHOLE, part, part.shape[-2] - SPARE, lent=True)
        if isinstance(row.states, LayerStates):
            row.states.move(*self.homes[lane])
        self.rows[lane] = weakref.ref(row, self._ended)

    def _ended(self, _row: object) -> None:
        """Release the memory, if it exceeds ``KEPT`` bytes (512 MiB), when the last row of the cache has ended.

        It does nothing while another thread holds the model's lock and so may use rows. It is the callback of the weak
        references in ``rows``; the argument is not used.
        """
        if KEPT is None:  # the interpreter ends, and has cleared this module
            return
        if not self.placing and self.lock.acquire(blocking=False):
            try:
                if self.whole is not None and self.whole.nbytes > KEPT and not self._users():
                    self.whole, self.rows, self.states, self.homes = None, [], {}, []
                    self.inputs = torch.empty(0)
                    self.forget(self)
            finally:
                self.lock.release()

    def lanes(
        self,
        count: int,
        places: Sequence[int] = (),
        committed: Sequence[int] = (),
        ahead: int = 0,
        pending: Sequence[Sequence[int]] = (),
    ) -> InLanes:
        """Return what a captured function (CUDA graph) over the first ``count`` lanes must know of the rows in them.

        A lane is one index of the static cache's batch axis, and holds one row (sequence).

        places: the lane of each row. committed: number of committed tokens of each row.
        ahead: number of uncommitted tokens of each row before those of the pass.
        pending: pending[b][r] is the number of accepted tokens of row b that the state of recurrent layer r does not
            include yet; (): there are none.

        Lanes without one of the rows count as empty, and the function writes into their spare slots. With only
        ``count``, so do all lanes, as for the recording of a function.
        """
        filled, starts = [0] * count, [self.slots - SPARE] * count  # of a lane without one of the rows
        waiting = [[0] * count for _ in self.recurrent]
        for row, (lane, n) in enumerate(zip(places, committed, strict=True)):
            filled[lane] = starts[lane] = n
            for layer, tokens in enumerate(pending[row] if pending else ()):
                waiting[layer][lane] = tokens
        in_order = [*places] == list(range(len(places)))
        whole = [*filled, *starts, ahead, *(tokens for own in waiting for tokens in own)]
        numbers = upload([*whole, *(() if in_order else places)], self.device)
        return InLanes(self, numbers[: len(whole)], None if in_order else numbers[len(whole) :], count)


class Lanes:
    """The first L lanes of a static cache inside a captured function (CUDA graph), used in place of a ``KVCache``.

    A lane holds one row (sequence). Committed tokens belong to the text; uncommitted ones are drafted or being run.

    static: the tensors at fixed addresses.
    numbers: int64 [2 L + 1 + R L]: for each lane the number of committed tokens, for each lane the slot of the first
        uncommitted token, the number of uncommitted tokens before the first pass of the function, and for each of R
        recurrent layers and each lane the number of pending tokens (accepted, but not in the layer's state yet).
    count: L.
    before: upper bound of the number of pending tokens.
    held: upper bound of the number of uncommitted tokens before the first pass, which recurrent layers run again.
    lengths: for each layer, the number of tokens that the function has run through it.
    complete: layers that have run all of the function's tokens before. A layer that reads another layer's keys sees no
        uncommitted tokens unless that layer is in ``complete`` or has run in the function.
    drafted: positions of the tokens that the function has run, int64 [L, U].
    """

    def __init__(
        self,
        static: StaticCache,
        numbers: Tensor,
        count: int,
        before: int = 0,
        held: int = 0,
        complete: Iterable[int] = (),
    ) -> None:
        self.static = static
        self.count = count
        self.before = before
        self.held = held
        sizes = count, count, 1, len(static.recurrent) * count
        self.committed, self.starts, self.ahead, self.pending = numbers.split(sizes)
        self.lengths = [0] * static.num_layers
        for layer in complete:
            self.lengths[layer] = SPARE
        self.drafted = numbers[:0]  # positions of the tokens that were run, [L, U]

    def register(self, layer: int, positions: Tensor, tree: Tensor | None = None) -> LanesMask:
        """Return the attention mask of the next T tokens of each lane, which run through the layers from ``layer`` on.

        It also adds the positions to ``drafted``.

        positions: positions of the tokens, int64 [L, T].
        tree: which of the U tokens that the function has run, the new ones included, each new token attends to, bool
            [T, U] or [L, T, U]; None: a chain, so all earlier ones and itself.
        """
        (count, t), ahead = positions.shape, self.lengths[layer]
        self.drafted = torch.cat((self.drafted[:, :ahead], positions), 1) if ahead else positions
        if tree is None:
            tree = torch.ones(t, ahead + t, dtype=torch.bool, device=positions.device).tril(ahead)
        return LanesMask(self, positions, self.drafted, tree.expand(count, -1, -1))

    def append(self, layer: int, k: Tensor, v: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
        """Store keys ``k`` and values ``v`` [L, H, T, d] of the next T tokens; return all of them, [L, H, slots, d].

        Slots that are not filled have old entries or zeros, which the caller must mask. The results are views of the
        static cache.

        multiple: the number of slots must be a multiple of it, which is checked (assertion).
        """
        heads, t, size = k.shape[1:]
        both = self.all_keys(layer, self.static.slots, heads, (size, v.shape[3]), multiple)
        place = (self.starts + self.ahead + self.lengths[layer])[:, None] + self.static.block[:t]  # (L, T)
        for part, new in zip(both, (k, v), strict=True):
            part.scatter_(2, place[:, None, :, None].expand_as(new), new)
        self.lengths[layer] += t
        return both

    def all_keys(
        self, layer: int, length: int, heads: int, sizes: tuple[int, int], multiple: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Return views of the keys and values of ``layer``, [L, H, slots, d] each, those of unfilled slots included.

        length: the number of slots, which must equal the static cache's. multiple: a divisor of it.
        heads: H, number of key heads. sizes: size d of a key head, and of a value head.
        """
        whole, index = self.static.whole, self.static.layers.index(layer)
        assert whole is not None and length == self.static.slots and length % multiple == 0
        keys, values = (part[index, : self.count, :heads, :, :own] for part, own in zip(whole, sizes, strict=True))
        return keys, values

    def uncommitted(self, layer: int) -> int:
        """Return the number of tokens that the captured function has run through ``layer``."""
        return self.lengths[layer]

    def run_recurrent(self, layer: int, x: Tensor, tree: Tensor, advance: Advance) -> Tensor:
        """Run recurrent ``layer`` on the next T tokens of each lane; return its outputs [L, T, D].

        Pending tokens (accepted, but not in the layer's state yet) run before them in the same call, and only these
        enter the state. The inputs of the T tokens are stored: they enter the state later, if the tokens are accepted.

        x: inputs of the layer, [L, T, D].
        tree: which of the U uncommitted tokens, those of this call last, each new token sees, bool [L, T, U].
        advance: runs the layer's mixer (``Layer.advance``) on inputs and states, and returns outputs and new states.
        """
        static, index, (count, t, _), run = (
            self.static,
            self.static.recurrent.index(layer),
            x.shape,
            self.lengths[layer],
        )
        plain, held = 0 if run else self.before, self.held + run
        block, first = static.block, plain + held
        states = {key: each[index, :count] for key, each in static.states.items()}
        inputs = static.inputs[index, :count]
        ahead = self.ahead + run
        kept = block[:plain] < self.pending.view(-1, count)[index, :, None]  # (L, P)
        own = (ahead + block[:t]).expand(count, t, -1)  # slots of the tokens among the uncommitted ones
        earlier = tree[:, :, :held] & (block[:held] < ahead)
        seen = torch.cat((kept[:, None].expand(-1, t, -1), earlier, tree.gather(2, own)), 2)  # (L, T, P + held + T)
        # Earlier tokens on a token's path are on each other's
        together = (seen.mT.float() @ seen.float() > 0).tril() | torch.eye(first + t, dtype=torch.bool, device=x.device)
        out, after = advance(
            torch.cat((inputs[:, :first], x), 1), states, True, plain, together, F.pad(kept, (0, held + t))
        )
        for key, state in states.items():
            state.copy_(after[key])
        there = (self.committed == self.starts)[:, None, None]  # other batches may have rows in the other lanes
        slots = ahead + block[:t]
        inputs.index_copy_(1, slots, torch.where(there, x, inputs.index_select(1, slots)))
        return out[:, first:]

    def keep(self, counts: Tensor) -> None:
        """Commit the first tokens that this captured function has run in each lane, in all layers.

        The others are dropped: the next tokens take their slots.

        counts: number of tokens to commit in each lane, int64 [L].
        """
        self.committed, self.starts = self.committed + counts, self.starts + counts
        self.lengths = [0] * len(self.lengths)


class LanesMask(Mask):
    """The attention mask of a pass inside a captured function: which slots of its lane each token attends to.

    A lane is one row's (sequence's) part of a static cache; it has one slot for each token. L is the number of lanes. A
    token attends to all committed tokens of its lane, and to those uncommitted ones that ``tree`` marks. Its methods
    are those of ``Mask``, with B = L rows and S = ``lanes.static.slots`` keys.

    lanes: the lanes of the function; their tensor ``committed`` says how many tokens of each are committed.
    query: positions of the T tokens of each lane that run in the pass, int64 [L, T].
    drafted: positions of the U uncommitted tokens of each lane, int64 [L, U].
    tree: which of the uncommitted tokens each token attends to, bool [L, T, U]; as an attribute, ``ancestors``.
    """

    def __init__(self, lanes: Lanes, query: Tensor, drafted: Tensor, tree: Tensor) -> None:
        self.lanes = lanes
        self.query = query
        self.drafted = drafted
        self.ancestors = tree
        self.length = lanes.static.slots
        self.memo = {}

    def filled(self, count: int) -> Tensor:
        return self.lanes.static.every < (self.lanes.committed + count)[:, None, None, None]

    def _keys_and_visible(self) -> tuple[Tensor, Tensor | None]:
        lanes, (count, t), every, tree = self.lanes, self.query.shape, self.lanes.static.every, self.ancestors
        assert tree is not None
        slots = lanes.starts[:, None] + lanes.static.block[: self.drafted.shape[1]]  # (L, U)
        keys = every.repeat(count, 1).scatter_(1, slots, self.drafted)  # (L, slots)
        visible = (every < lanes.committed[:, None])[:, None].repeat(1, t, 1)  # (L, T, slots)
        return keys, visible.scatter_(2, slots[:, None].expand(-1, t, -1), tree)
