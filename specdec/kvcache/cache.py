"""The KV cache: keys, values and recurrent states of a batch of rows (sequences), with roll-back.

Each row has its own buffers, so that rows join and leave the batch without a copy of the others. A slot holds one
token's keys and values. The slot of a committed token is its position in the text; uncommitted (drafted) tokens follow,
so a row has no holes. During a draft, layers may be filled to different lengths; ``commit`` keeps the accepted
uncommitted tokens and drops the others. The cache knows no models, token ids or rules of acceptance.
"""

from __future__ import annotations

import copy
import math
import mmap
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.base.memory import PRIVATE
from specdec.kvcache import window as windows
from specdec.kvcache.mask import RowMask
from specdec.kvcache.recurrent import Advance, KernelStates, LayerStates, RowStates, StateShape, run_rows

GROUP = 32  # 8-bit codes that share a scale
BLOCK = 256  # slots that a row grows by
PAGE = 16  # a copy has a multiple of this many slots
MAX_RESERVED = 1 << 36  # maximum bytes of addresses that a row reserves: a process has 47 bits of them
WHOLE = "kv"  # the name of the buffer that holds all layers, and the first one of several


class RowEntries:
    """One row (sequence) of a ``KVCache``: the keys and values of its tokens, and its recurrent states.

    A slot is the place of one token's keys and values in a buffer. Committed tokens belong to the text; uncommitted
    ones, which follow them, are drafted or are being run.

    count: number of committed tokens.
    expected: number of slots that the row will need in all; 0: unknown. On a CPU, the next growth reserves that many.
    held: number of slots that count as used memory. On a CPU, buffers have more slots, which take no memory until they
        are written; elsewhere, this is the buffers' capacity.
    buffers: tensors [2 (keys, values), N', H, slots, d] by name: "kv" of all attention layers, "kv1" of those with
        other head sizes, or one for each layer, such as "3", with N' = 1. If keys and values differ in size, d is the
        larger size.
    pointers: for each buffer name, (capacity in slots, address of the keys, address of the values).
    states: the states of the recurrent layers; None: the model has no recurrent layers.
    lent: whether the buffer "kv" is memory of a runtime's CUDA graphs, which other caches must copy and not share. The
        runtime may write into slots from ``held`` on.
    dropped: ranges [begin, end) of committed slots, in order, that ``KVCache.evict`` has dropped in sliding-window
        layers.
    window_checkpoints: numbers of tokens after which the row can be resumed, because the slots of a window before them
        are not dropped.
    sharers: for each buffer name, all rows that share the buffer, this one included: a slot stays in memory while any
        of them holds it.
    """

    def __init__(self, states: RowStates | None = None) -> None:
        self.count = 0
        self.expected = 0
        self.held = 0
        self.buffers = dict[str, Tensor]()
        self.pointers = dict[str, tuple[int, int, int]]()
        self.states = states
        self.lent = False
        self.dropped: tuple[windows.Range, ...] = ()
        self.window_checkpoints = frozenset[int]()
        self.sharers = dict[str, weakref.WeakSet[RowEntries]]()

    @property
    def slots(self) -> int:
        """Return the capacity of the row's largest buffer, in tokens."""
        return max((buffer.shape[-2] for buffer in self.buffers.values()), default=0)

    def shared(self) -> RowEntries:
        """Return a copy of this row object that uses the same buffers and the same ``states`` object.

        Tokens that one of the two appends do not change the other's committed tokens, which are never overwritten. But
        both would write the same next slots, so only one of them may append.
        """
        made = copy.copy(self)
        made.buffers, made.pointers, made.sharers = dict(self.buffers), dict(self.pointers), dict(self.sharers)
        for rows in made.sharers.values():
            rows.add(made)
        return made

    def put(self, name: str, buffer: Tensor, held: int | None = None, lent: bool = False) -> None:
        """Set ``buffer`` [2, N', H, slots, d] as the row's buffer ``name``, and record its addresses in ``pointers``.

        From then on, no other row shares the buffer of this name.

        held: number of the row's slots that count as used memory; None: all slots of the buffer.
        lent: whether it is memory of a runtime's CUDA graphs, which other caches must copy and not share. The runtime
            may write into slots from ``held`` on.
        """
        self.buffers[name] = buffer
        self.held = buffer.shape[-2] if held is None else held
        self.lent = lent
        begin = buffer.data_ptr()
        self.pointers[name] = buffer.shape[-2], begin, begin + buffer.nbytes // 2
        self.sharers[name] = weakref.WeakSet([self])

    def window_slots(self, slots: int, window: int) -> int:
        """Return for how many of the row's first ``slots`` tokens sliding-window layers keep keys and values, at most.

        It is an upper bound until the next ``KVCache.evict``, with a margin for tokens that are appended before.

        window: number of tokens before a token that these layers see.
        """
        begin = self.dropped[-1][1] if self.dropped else 0
        before = sum(end - start for start, end in windows.held(self.dropped, begin))
        most = window + windows.MARGIN + 2 * BLOCK + max(windows.FIRST - before, 0)  # until the next ``evict``
        return before + min(slots - begin, max(most, self.count - begin))


class KVCache:
    """Stores keys and values of all layers, and recurrent states, for a batch of B rows (sequences).

    A slot holds one token's keys and values. A runtime appends them by ``append``, which returns those of all rows in
    one tensor, or it counts slots as filled by ``claim`` and writes keys and values itself. New tokens are uncommitted
    until ``commit`` keeps some of them; ``trim`` and ``roll_back`` drop them.

    num_layers: number of the model's layers. batch: B. device: where buffers are.
    int8: whether keys and values are stored in 8 bits (``quantize_rows``). Only ``claim`` is then available.
    layers: for each buffer of a row, the indices of the N' attention layers in it; None: each layer has its own buffer.
        names: names of these buffers.
    recurrent: indices of the recurrent layers.
    shape: size of the recurrent states, if native kernels change them in place; None: PyTorch runs these layers.
    limit: maximum number of tokens of a row; 0: unknown. On a CPU, a row reserves addresses for so many, so that it
        grows without a copy.
    window: number of tokens before a token that sliding-window layers see; 0: nothing is ever dropped (``evict``).
    windowed: indices of the sliding-window layers. As an attribute, by buffer name: their indices within the buffer.
        ``unlimited`` has those of all other layers, which see all tokens.
    widths: for each buffer, total size of a layer's key heads; (): all buffers are alike.
    least: minimum (number, size) of the key heads of a buffer, for layers that have fewer or smaller ones.
    entries: the rows (``RowEntries``), in batch order.
    lengths: for each layer, number of filled slots of the row with most committed tokens, uncommitted ones included.
    draft_positions: positions of the U uncommitted tokens, int64 [B, U].
    """

    def __init__(
        self,
        num_layers: int,
        batch: int = 1,
        device: torch.device | str = "cpu",
        int8: bool = False,
        layers: Sequence[Sequence[int]] | None = None,
        recurrent: Sequence[int] = (),
        shape: StateShape | None = None,
        limit: int = 0,
        window: int = 0,
        windowed: Sequence[int] = (),
        widths: Sequence[int] = (),
        least: tuple[int, int] = (0, 0),
    ) -> None:
        self.block = BLOCK
        self.device = torch.device(device)
        self.int8 = int8
        self.layers = layers
        self.names = [WHOLE, *(f"{WHOLE}{n}" for n in range(1, len(layers or ())))]
        self._places = {layer: (n, place) for n, own in enumerate(layers or ()) for place, layer in enumerate(own)}
        self.recurrent = list(recurrent)
        self.shape = shape
        self.limit = limit
        self.least = least
        self.window = window
        each = dict(zip(self.names, layers or (), strict=False))
        gone = {*windowed} if window else set()
        self.windowed = {name: [n for n, layer in enumerate(own) if layer in gone] for name, own in each.items()}
        self.unlimited = {name: [n for n, layer in enumerate(own) if layer not in gone] for name, own in each.items()}
        sizes = dict(zip(self.names, widths or [1] * len(each), strict=False))
        total = sum(sizes[name] * len(own) for name, own in each.items())
        self._share = sum(sizes[name] * len(own) for name, own in self.windowed.items()) / max(total, 1)
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
        """Return the number of committed tokens of each row (sequence) of the batch."""
        return [row.count for row in self.entries]

    @property
    def committed(self) -> int:
        """Return the number of committed tokens of the row (sequence) that has most of them; 0 if there are no rows."""
        return max((row.count for row in self.entries), default=0)

    @property
    def data(self) -> list[Tensor]:
        """Return the buffers of all rows, row after row, [2 (keys, values), N' layers, H, slots, d] each."""
        return [row.buffers[name] for row in self.entries for name in self.names]

    @property
    def states(self) -> list[RowStates]:
        """Return the recurrent states of each row (sequence), in batch order; [] without recurrent layers."""
        return [row.states for row in self.entries if row.states is not None]

    @property
    def token_bytes(self) -> int:
        """Return the bytes of one token's keys and values in all layers; 0 before any are stored."""
        return max((sum(x.nbytes // x.shape[-2] for x in row.buffers.values()) for row in self.entries), default=0)

    @property
    def nbytes(self) -> int:
        """Return the bytes of keys and values for which all rows hold memory.

        Recurrent states, and slots that sliding-window layers have dropped, are not counted.
        """
        total = 0.0
        for row in self.entries:
            for name, x in row.buffers.items():
                share = len(self.windowed.get(name, ())) / x.shape[1]
                total += x.nbytes // x.shape[-2] * self._whole_slots(row, min(row.held, x.shape[-2]), share)
        return int(total)

    def _whole_slots(self, row: RowEntries, slots: int, share: float | None = None) -> float:
        """Return the memory of a row's first ``slots`` tokens, in units of one token's keys and values in all layers.

        The result is below ``slots`` if sliding-window layers drop some of them.

        row: the row. share: part of a token's memory, from 0 to 1, that belongs to sliding-window layers; None: as in
            all buffers together.
        """
        share = self._share if share is None else share
        return slots - share * (slots - row.window_slots(slots, self.window)) if share else slots

    @property
    def num_states(self) -> int:
        """Return the number of sets of recurrent states that are stored: one per row, and one per checkpoint."""
        return self.batch + sum(len(states.checkpoints) for states in self.states)

    @property
    def state_bytes(self) -> int:
        """Return the bytes of one row's recurrent states in all layers; 0 before any are stored."""
        return max((states.nbytes for states in self.states), default=0)

    def expect(self, slots: Sequence[int]) -> None:
        """Set how many tokens each row will need space for in all (prompt and output).

        From a row's next growth on, this space counts as used, so that memory does not run out later.

        slots: number of tokens of each row, in batch order.
        """
        for row, count in zip(self.entries, slots, strict=True):
            row.expected = count

    def capacities(self, ends: Sequence[int]) -> list[float]:
        """Return, for each row, the memory that it would hold after growing to ``ends[b]`` tokens.

        The unit is the memory of one token's keys and values in all layers. Tokens whose keys sliding-window layers
        drop count less than 1.
        """
        pairs = zip(self.entries, ends, strict=True)
        held = [(row, row.held if end <= row.held else self._slots(row, end, row.slots)) for row, end in pairs]
        return [self._whole_slots(row, slots) for row, slots in held]

    def new_capacity(self, slots: int) -> float:
        """Return the memory that a new row would hold which will have ``slots`` tokens.

        The unit is the memory of one token's keys and values in all layers. Tokens whose keys sliding-window layers
        drop count less than 1.
        """
        return self._whole_slots(RowEntries(), -(-slots // self.block) * self.block)

    def _slots(self, row: RowEntries, end: int, have: int) -> int:
        """Return the number of tokens for which a row has space after it has grown to ``end`` tokens.

        It is a multiple of the block size (256 by default). have: number of tokens for which it has space before.
        """
        more = row.expected if self.device.type == "cpu" else grown(have)
        return -(-max(end, more) // self.block) * self.block

    # -- a pass -------------------------------------------------------------------------------------------------------

    def register(
        self,
        layer: int,
        positions: Tensor,
        tree: Tensor | None = None,
        counts: Sequence[int] | None = None,
        trees: Sequence[Tensor | None] | None = None,
    ) -> RowMask:
        """Return the attention mask of the next T tokens of each row, which run through the layers from ``layer`` on.

        A token attends to all committed tokens of its row, and to the uncommitted ones that its tree marks. Call it
        before the layers run. It stores no keys; without ``counts``, it sets ``draft_positions``.

        layer: index of the first layer that will run. What it has run since the last ``commit`` are the uncommitted
            tokens before the new ones.
        positions: positions of the tokens, int64 [B, T].
        tree: which uncommitted tokens each new token attends to, bool [T, U] for all rows or [B, T, U], where U counts
            the row's uncommitted tokens, the T new ones included; None: a chain, in which each token attends to all
            earlier ones and to itself.
        counts: number of tokens of each row, for a pass over rows of different lengths. Then ``positions`` is [1, sum
            of counts], one row after the other, no other token may be uncommitted, and ``trees`` replaces ``tree``.
            None: all rows have T tokens.
        trees: with ``counts``, for each row bool [count, count], or None for a chain. If ``trees`` is None, all are
            chains, and the caller commits all tokens.
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

    def claim(
        self, lo: int, hi: int, counts: Sequence[int], heads: Sequence[tuple[int, int]], dtype: torch.dtype
    ) -> None:
        """Reserve slots for the next tokens in layers [lo, hi), and count them as filled; the caller fills them.

        A slot holds one token's keys and values. The caller finds the buffers' addresses in ``RowEntries.pointers``.

        counts: number of tokens of each row. heads: for each buffer, the number and the size of its key heads.
        dtype: dtype of keys and values before any 8-bit quantisation.
        """
        ahead = self.lengths[lo] - self.committed
        for row, count in zip(self.entries, counts, strict=True):
            if (end := max(row.count + ahead + count, 1)) > row.held:  # a row without tokens also has a buffer
                for name, (count, size) in zip(self.names, heads, strict=True):
                    self._grow(row, name, count, end, size, dtype)
        self.lengths[lo:hi] = [self.committed + ahead + max(counts)] * (hi - lo)

    def append(self, layer: int, k: Tensor, v: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
        """Append keys ``k`` and values ``v`` [B, H, T, d] to ``layer``; return all keys and values, [B, H, S, d] each.

        The T new tokens of each row follow its tokens so far, and are uncommitted. S is the length of the longest row,
        rounded up to ``multiple``. Slots after a row's last token have old entries or zeros, which the caller must
        mask. With one row, the results are views of the buffers. The sizes d of keys and of values may differ.
        Raises ValueError for a cache in 8 bits, which kernels alone fill (``claim``).
        """
        if self.int8:
            raise ValueError("tensors cannot be appended to a KV cache in 8 bits")
        name, index = self._place_of(layer)
        ahead, (_, heads, t, size) = self.lengths[layer] - self.committed, k.shape
        for row, *parts in zip(self.entries, k, v, strict=True):
            start = row.count + ahead
            if start + t > (min(row.held, row.buffers[name].shape[3]) if name in row.buffers else 0):
                self._grow(row, name, heads, start + t, max(size, v.shape[3]), k.dtype)
            for part, own in enumerate(parts):  # (H, T, d)
                row.buffers[name][part, index, : len(own), start : start + t, : own.shape[2]] = own
        self.lengths[layer] = self.committed + ahead + t
        return self.all_keys(layer, self.lengths[layer], heads, (size, v.shape[3]), multiple)

    def all_keys(
        self, layer: int, length: int, heads: int, sizes: tuple[int, int], multiple: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all rows in ``layer``, [B, H, S, d] each, for the first ``length`` tokens.

        S is ``length`` rounded up to ``multiple``. Slots after a row's last token have old entries or zeros, which the
        caller must mask. With one row, the results are views of the buffers if these have S slots.

        heads: H, number of key heads. sizes: size d of a key head, and of a value head.
        """
        name, index = self._place_of(layer)
        end, made = -(-length // multiple) * multiple, list[Tensor]()
        for part, own in enumerate(sizes):
            views = [row.buffers[name][part, index, :heads, :end, :own] for row in self.entries]
            views = [F.pad(view, (0, 0, 0, end - view.shape[1])) if view.shape[1] < end else view for view in views]
            made.append(views[0][None] if len(views) == 1 else torch.stack(views))
        return made[0], made[1]

    def uncommitted(self, layer: int) -> int:
        """Return the number of tokens of each row that ``layer`` has run since the last ``commit``."""
        return self.lengths[layer] - self.committed

    def _place_of(self, layer: int) -> tuple[str, int]:
        """Return (name, index): the name of the buffer with the keys of ``layer``, and the layer's index in it."""
        if self.layers is None:
            return str(layer), 0
        buffer, place = self._places[layer]
        return self.names[buffer], place

    def _grow(self, row: RowEntries, name: str, heads: int, end: int, head_dim: int, dtype: torch.dtype) -> None:
        """Enlarge the buffer ``name`` of a row so that it has at least ``end`` slots (tokens), and raise ``row.held``.

        A new buffer replaces ``row.buffers[name]`` if that is missing, too small or lent; the stored tokens are copied.

        heads: number of key heads. head_dim: size of a head. dtype: dtype of keys and values before 8-bit quantisation.
        """
        if self.int8:
            head_dim, dtype = head_dim + 2 * head_dim // GROUP, torch.int8
        heads, head_dim = max(heads, self.least[0]), max(head_dim, self.least[1])
        old = row.buffers.get(name)
        have = 0 if old is None else old.shape[3]
        held = max(row.held, self._slots(row, end, have))
        if old is None or have < held or row.lent:
            layers = 1 if self.layers is None else len(self.layers[self.names.index(name)])
            # Grow by at least a quarter: without a known limit, each entry is copied a bounded number of times.
            made = self._buffer((2, layers, heads, max(held, grown(have)), head_dim), dtype)
            if old is not None:
                self._copy(row, name, made, min(have, row.held))
            row.put(name, made, held if self.device.type == "cpu" else None)
        row.held = max(row.held, held)

    def _copy(self, row: RowEntries, name: str, to: Tensor, count: int) -> None:
        """Copy the first ``count`` tokens' keys and values from a row's buffer ``name`` to the buffer ``to``.

        Each keeps its slot. Slots that sliding-window layers have dropped stay in ``to`` as they are.

        name: key in ``row.buffers``, such as "kv".
        to: a buffer of one row with the same N' layers, heads and sizes, [2, N', H, slots, d], and at least ``count``
            slots.
        """
        source = row.buffers[name]
        if not row.dropped:
            to[..., :count, :] = source[..., :count, :]
            return
        for layer in self.unlimited[name]:
            to[:, layer, :, :count] = source[:, layer, :, :count]
        for layer in self.windowed[name]:
            for begin, end in windows.held(row.dropped, count):
                to[:, layer, :, begin:end] = source[:, layer, :, begin:end]

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a new buffer of zeros of ``shape`` (..., slots, d).

        On a CPU, it has more slots if possible, up to the maximum length of a row; they take no memory until written.
        """
        *outer, slots, size = shape
        if self.device.type == "cpu":
            most = MAX_RESERVED // max(math.prod(outer) * size * dtype.itemsize, 1)
            with suppress(OSError):  # such as a limit of addresses (ulimit -v)
                return zeros((*outer, max(slots, min(self.limit + self.block, most)), size), dtype, self.device)
        return zeros(shape, dtype, self.device)

    def run_recurrent(self, layer: int, x: Tensor, tree: Tensor | None, advance: Advance) -> Tensor:
        """Run recurrent ``layer`` on the next T tokens ``x`` [B, T, D] of each row; return its outputs [B, T, D].

        Stores the inputs: the states of accepted tokens are computed from them later.

        layer: index of the layer in the model.
        tree: which of the U uncommitted tokens each new token sees, bool [T, U]; None: a chain.
        advance: function (inputs [B, T, D], states before them, whether adapters act) that runs the layer and returns
            outputs [B, T, D] and new states; states are tensors [B, ...] by (kind, index).
        """
        held = self.lengths[layer] - self.committed
        rows = [states for states in self.states if isinstance(states, LayerStates)]
        return run_rows(rows, self.recurrent.index(layer), x, held, tree, advance)

    def trim(self, count: int, lo: int = 0, hi: int | None = None) -> None:
        """Drop the last ``count`` uncommitted tokens of each row in layers [lo, hi).

        Uncommitted tokens are those that have run since the last ``commit``.

        hi: None: all layers from ``lo`` on. Raises ValueError if fewer tokens are uncommitted in one of these layers.
        """
        left = [length - count for length in self.lengths[lo:hi]]
        if min(left, default=self.committed) < self.committed:
            raise ValueError(f"cannot trim {count} slots of layers from {lo} on: only uncommitted ones can be dropped")
        self.lengths[lo:hi] = left

    def roll_back(self) -> None:
        """Drop all uncommitted tokens, with their keys, values and recurrent states, in all layers and rows.

        The committed tokens stay, and so does the memory of the dropped slots, which the next tokens reuse.
        """
        self._settle()
        for states in self.states:
            states.ahead = {}

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Commit the accepted tokens of each row, and drop its other uncommitted tokens, in all layers.

        Uncommitted tokens are those that have run since the last ``commit``, such as drafts. Committed ones stay.
        The keys and values of accepted tokens move so that they follow the committed ones without holes. All layers
        must have run all uncommitted tokens.

        paths: paths[b] has the ascending indices of row b's accepted tokens among its uncommitted ones; [] accepts
            none.
        """
        for row, path in zip(self.entries, paths, strict=True):
            n, count = row.count, len(path)
            for to, slot in enumerate(path):
                if slot == to:
                    continue
                for buffer in row.buffers.values():
                    buffer[..., n + to, :] = buffer[..., n + slot, :]
            if row.states is not None:
                row.states.commit(path)
            row.count += count
        self._settle()

    def evict(self) -> None:
        """Free the memory of keys and values that no sliding-window layer will read again.

        Each row keeps, in its sliding-window layers, its first tokens (which drafters read), the last ``window`` tokens
        with a margin, and as many before each of its checkpoints. Memory that another row shares and still holds is not
        freed. Does nothing in layers without a window, and if ``window`` is 0.
        """
        for row in self.entries if self.window else ():
            if not row.dropped and row.count <= self.window + windows.MARGIN:
                continue
            gone = windows.outside(row.count, self.window, row.window_checkpoints, row.dropped)
            if gone != row.dropped:
                row.dropped = gone
                for name, layers in self.windowed.items():
                    unused = gone
                    for other in row.sharers[name]:
                        unused = windows.intersection(unused, other.dropped)
                    windows.release(row.buffers[name], layers, unused)

    def _settle(self) -> None:
        self.lengths = [self.committed] * len(self.lengths)

    # -- rows come and go ---------------------------------------------------------------------------------------------

    def join(self, other: KVCache) -> None:
        """Add the rows of the cache ``other`` after those of this cache. Uncommitted tokens of both are dropped.

        The row objects are not copied, so only one of the two caches may append to them afterwards.

        other: a cache with the same settings, such as one that the same target made.
        """
        self._place(self.entries + other.entries)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the rows with the indices ``rows``, in that order. Uncommitted tokens are dropped.

        The memory of the other rows is freed unless another cache holds them.
        """
        self._place([self.entries[b] for b in rows])

    def _place(self, entries: list[RowEntries]) -> None:
        self.entries = entries
        self.draft_positions = self.draft_positions.new_zeros(len(entries), 0)
        self.roll_back()

    def resumable(self, row: int, count: int) -> int:
        """Return how many of the first ``count`` committed tokens of row ``row`` another text can begin with.

        That is ``count`` if the cache still has all that a next token needs. Otherwise it is the largest smaller number
        with a checkpoint of the recurrent states and with all keys and values of a window before it; 0: there is none.
        """
        own, before = self.entries[row], -1
        while count not in (before, own.count):
            before = count
            if own.states is not None:
                count = max((n for n in own.states.checkpoints if n <= count), default=0)
            count = windows.resumable(count, self.window, own.dropped)
        return count

    def checkpoints(self, row: int) -> set[int]:
        """Return the checkpoints of row ``row``: the counts n such that another text can begin with its first n tokens.

        The result is empty for a model without recurrent and sliding-window layers, which needs no checkpoints.
        """
        own = self.entries[row]
        stored = own.window_checkpoints if own.states is None else own.states.checkpoints
        return {count for count in stored if self.resumable(row, count) == count}

    @property
    def has_checkpoints(self) -> bool:
        """Return whether another text can reuse a row's tokens only up to its end or a checkpoint, not up to any token.

        That is so if the model has recurrent layers, whose states exist only after the last token and at checkpoints,
        or if the cache drops keys and values of sliding-window layers.
        """
        return bool(self.recurrent or self.window)

    def checkpoint(self, row: int) -> None:
        """Store a checkpoint after the committed tokens of row ``row``, up to which other texts can reuse them.

        With recurrent layers, it is a copy of their states, made at the next ``commit`` for which they are known. With
        sliding-window layers, the keys and values of a window before it are kept; of such checkpoints, a row keeps
        three. Does nothing for a model without such layers.
        """
        own = self.entries[row]
        if own.states is not None:
            own.states.checkpoint(own.count)
        if self.window:
            own.window_checkpoints = windows.thinned((*own.window_checkpoints, own.count))

    def of(self, entries: list[RowEntries]) -> Self:
        """Return a new cache with the settings of this one and with ``entries`` as its rows.

        The row objects are not copied. Their uncommitted tokens are dropped.
        """
        made = copy.copy(self)
        made._place(entries)
        return made

    def copy(self, row: int, count: int, capacity: int = 0) -> Self:
        """Return a cache of one row with a copy of the first ``count`` committed tokens of row ``row``.

        count: a number that ``resumable`` returns. Raises ValueError for another one.
        capacity: minimum number of tokens for which the copy has memory.
        """
        own = self.entries[row]
        if count and count != self.resumable(row, count):
            raise ValueError(f"cannot copy {count} of {own.count} tokens: there is no checkpoint after them")
        made, whole = RowEntries(self._no_states()), count == own.count
        if own.states is not None and count:
            made.states = own.states.copy() if whole else own.states.restored(count)
        for name, buffer in own.buffers.items() if count else ():
            held = -(-max(count, capacity) // PAGE) * PAGE
            made.put(name, self._buffer((*buffer.shape[:-2], held, buffer.shape[-1]), buffer.dtype), held)
            self._copy(own, name, made.buffers[name], count)
        made.count = count
        made.dropped = windows.intersection(own.dropped, [(0, count)])
        made.window_checkpoints = frozenset(n for n in own.window_checkpoints if n <= count)
        return self.of([made])

    def take(self, row: int) -> Self:
        """Return a new cache of one row (sequence) with all committed tokens of one row of this cache.

        The two share the memory of keys and values, so the row must leave this cache, or only one of them may append.
        They are copied instead if the row's buffer is memory of a runtime's CUDA graphs. Uncommitted tokens are not in
        the new cache.

        row: index of the row in this cache, from 0.
        """
        own = self.entries[row]
        return self.copy(row, own.count) if own.lent else self.of([own.shared()])

    def take_compact(self, row: int) -> Self:
        """Return a cache of one row with all committed tokens of row ``row``, with little unused memory.

        It shares the row's buffers, or copies them if otherwise over a fifth of their memory would be unused.
        """
        own = self.entries[row]
        if self.device.type == "cpu" and not own.lent:
            made = own.shared()
            made.held = min(own.held, -(-own.count // PAGE) * PAGE)
            return self.of([made])
        spare = own.slots > own.count + own.count // 4 + PAGE
        return self.copy(row, own.count) if spare else self.take(row)

    def reference(self) -> Self:
        """Return this cache as it is now, for another thread to read while this one grows.

        It shares the buffers and keeps their memory alive. Nothing may be appended to it.
        """
        made = copy.copy(self)
        made.entries = [row.shared() for row in self.entries]
        return made

    # -- reading and writing entries ----------------------------------------------------------------------------------

    def read(self, row: int, start: int, end: int) -> dict[str, Tensor]:
        """Return a CPU copy of the keys and values of row ``row`` for the committed tokens [start, end).

        They are by buffer name, [2 (keys, values), N', H, end - start, d] each, for the N' layers of the buffer in
        order, without sliding-window layers, whose part ``read_window`` returns. In 8 bits, they stay as stored.
        """
        parts = {name: buffer[..., start:end, :] for name, buffer in self.entries[row].buffers.items()}
        if self.window:
            return {name: part[:, self.unlimited[name]].contiguous() for name, part in parts.items()}
        return {name: part.to("cpu", copy=True).contiguous() for name, part in parts.items()}

    def read_window(self, row: int, start: int, end: int) -> dict[str, Tensor]:
        """Return the sliding-window layers' keys and values of row ``row`` for the committed tokens [start, end).

        They are copies by buffer name, [2 (keys, values), N', H, end - start, d] each, for the N' sliding-window layers
        of the buffer in order; ``restore_window`` writes them back. The result is {} if ``evict`` has dropped any of
        the tokens, and if the model has no sliding-window layers.
        """
        own = self.entries[row]
        if windows.intersection(own.dropped, [(start, end)]):
            return {}
        return {name: own.buffers[name][..., start:end, :][:, each] for name, each in self.windowed.items() if each}

    def read_states(self, row: int, count: int) -> dict[str, Tensor]:
        """Return the recurrent states of row ``row`` after its first ``count`` tokens, as CPU tensors by name.

        A name is the state's key as text, its parts joined by spaces, such as "0 conv 0". {} if there is no checkpoint
        after ``count`` tokens.
        """
        states = self.entries[row].states
        found = {} if states is None else states.checkpoints.get(count, {})
        return {" ".join(map(str, key)): state.cpu().contiguous() for key, state in found.items()}

    def restore(self, parts: Iterable[dict[str, Tensor]], capacity: int) -> int:
        """Write keys and values of a text's consecutive parts into this empty cache of one row.

        Returns the number of tokens of all parts together. They are not committed: call ``resume`` next.

        parts: CPU tensors by buffer name, as ``read`` returns them. Each part is written before the next one is
            requested.
        capacity: number of tokens for which the row then has memory, at least those of all parts.
        """
        [row], count = self.entries, 0
        for part in parts:
            for name, values in part.items():
                parts_of, layers, heads, slots, size = values.shape
                if name not in row.buffers:
                    held = -(-capacity // PAGE) * PAGE
                    shape = parts_of, layers + len(self.windowed.get(name, ())), heads, held, size
                    row.put(name, self._buffer(shape, values.dtype), held)
                view = row.buffers[name][..., count : count + slots, :]
                if self.window:
                    _write(view, self.unlimited[name], values)
                elif self.device.type == "cpu":
                    _write(view, None, values)
                else:
                    view.copy_(values)
            count += slots
        return count

    def restore_window(self, start: int, part: dict[str, Tensor]) -> None:
        """Write the sliding-window layers' keys and values of the tokens from ``start`` on into this cache of one row.

        part: CPU tensors by buffer name, as ``read_window`` returns them. Call it after ``restore``.
        """
        [row] = self.entries
        for name, values in part.items():
            _write(row.buffers[name][..., start : start + values.shape[-2], :], self.windowed[name], values)

    def resume(self, count: int, states: dict[str, Tensor], dropped: Sequence[windows.Range] = ()) -> None:
        """Commit the first ``count`` tokens whose keys and values ``restore`` has written into this cache of one row.

        states: the recurrent states after them, as ``read_states`` returns them; {} without recurrent layers.
        dropped: the ranges [begin, end) of tokens, in order, whose keys and values sliding-window layers lack; ()
            without such layers.
        """
        [row] = self.entries
        if row.states is not None:
            keys = {name: tuple(int(x) if x.isdigit() else x for x in name.split(" ")) for name in states}
            row.states.begin(count, {keys[name]: state.to(self.device) for name, state in states.items()})
        row.count, row.dropped = count, tuple(dropped)
        self._settle()

    def of_layer(self, layer: int, row: int) -> dict[str, Tensor]:
        """Return the keys "k" and values "v" of row ``row`` in layer ``layer``, [S, H, d] each, for its S filled slots.

        The tensors may be views; 8-bit entries are converted to bfloat16. Entries that ``evict`` has dropped are
        undefined. {} if the layer stores no keys.
        """
        own = self.entries[row]
        name, index = self._place_of(layer) if self.layers is None or layer in self._places else ("", 0)
        if name not in own.buffers:
            return {}
        filled = own.buffers[name][:, index, :, : self.lengths[layer] - self.committed + own.count]
        parts = dequantize_rows(filled, torch.bfloat16) if self.int8 else filled
        return {part: values.transpose(0, 1) for part, values in zip("kv", parts, strict=True)}


def _write(view: Tensor, layers: Sequence[int] | None, values: Tensor) -> None:
    """Write ``values`` [2, n, H, T, d] into n layers of ``view`` [2, N', H, T, d], both on the CPU.

    NumPy copies them, because PyTorch's threads would wait for each other at the end of each copy.

    layers: indices of the n layers in ``view``; None: all.
    """
    to, written = view.view(torch.uint8).numpy(), values.view(torch.uint8).numpy()
    if layers is None:
        to[...] = written
    for at, layer in enumerate(layers or ()):
        to[:, layer] = written[:, at]


def quantize_rows(x: Tensor) -> Tensor:
    """Quantize ``x`` [..., d] to int8 [..., d + d / 16]: d codes, then a bfloat16 scale (2 bytes) for each 32 codes.

    d must be a multiple of 32.
    """
    parts = x.float().unflatten(-1, (-1, GROUP))  # (..., d / 32, 32)
    scales = (parts.abs().amax(-1, keepdim=True) / 127).bfloat16()
    codes = (parts / scales.float().clamp_min(1e-30)).round().to(torch.int8)
    return torch.cat((codes.flatten(-2), scales.flatten(-2).view(torch.int8)), -1)


def dequantize_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values [..., d], in ``dtype``, of int8 ``rows`` [..., d + d / 16] that ``quantize_rows`` has made."""
    d = rows.shape[-1] * 16 // 17
    parts, scales = rows[..., :d].unflatten(-1, (-1, GROUP)), rows[..., d:].contiguous().view(torch.bfloat16)
    return (parts * scales[..., None].float()).flatten(-2).to(dtype)


def grown(slots: int) -> int:
    """Return the capacity of a buffer after growing, a quarter more than ``slots``, its capacity before."""
    return slots + slots // 4


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of zeros. On a CPU, its memory pages are allocated by the system only when they are written.

    Raises OSError if the process cannot map as many addresses.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, **PRIVATE)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a page of 2 MiB for each head's first token would be hundreds of MiB
        with suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
