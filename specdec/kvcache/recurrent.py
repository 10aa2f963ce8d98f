"""The states of recurrent layers (linear attention, state space, convolution) of a row, with roll-back.

A scan returns only its last state. So the states after the committed tokens stay as they are, and the layers' inputs
of later tokens lie beside them. Roll-back drops inputs; accepted ones ("pending") are run again, only through the
layer's mixer, before the next tokens.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.base.errors import SpecDecError

BRANCH_TOKENS = 1024  # tokens of branches that run at once: bounds memory
RERUN_TOKENS = 16  # so many tokens are cheaper to run again than states to write
SLOT_MULTIPLE = 16  # the buffer of inputs has a multiple of so many slots
EVERY = "states"  # the name of the states of all layers in one piece
States = dict[tuple[str, int], Tensor]  # of a layer, by kind and number, each [B, ...]; empty before the first token
# Inputs [B, T, D], the states before them, whether adapters act -> outputs, and the states after them.
Advance = Callable[[Tensor, States, bool], tuple[Tensor, States]]


class StateShape(NamedTuple):
    """Number of recurrent layers, bytes of a state, and numbers (bf16) of a token's inputs in a layer."""

    layers: int
    state_bytes: int
    width: int


class RowStates:
    """States of one row.

    layers: number of recurrent layers.
    states: after the committed tokens that are not pending: by number of the layer, kind and number there, [1, ...],
        or, for a runtime that takes pointers, those of all layers as uint8 [layers, bytes]. Tensors never change.
    inputs: [layers, slots, width], of pending tokens, or of uncommitted ones in layers where nothing is pending.
    pending: of each layer, how many accepted tokens its states lack. A pass sets it to 0.
    ahead: by number of the layer, or of all: states after uncommitted tokens, and the number of these.
    checkpoints: states by number of tokens. due: the number of the next one.
    """

    def __init__(self, layers: int, shape: StateShape | None = None) -> None:
        self.layers, self.shape = layers, shape
        self.states = dict[tuple[Hashable, ...], Tensor]()
        self.inputs = torch.empty(layers, 0, 0)
        if shape is not None:
            self.states[EVERY,] = torch.zeros(layers, shape.state_bytes, dtype=torch.uint8)
            self.inputs = torch.empty(layers, 0, shape.width, dtype=torch.bfloat16)
        self.pending = (ctypes.c_int32 * layers)()
        self.ahead = dict[Hashable, tuple[int, dict[tuple[Hashable, ...], Tensor]]]()
        self.checkpoints = dict[int, dict[tuple[Hashable, ...], Tensor]]()
        self.due: int | None = None

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.states.values())

    def make_room(self, slots: int, like: Tensor | None = None) -> None:
        """Let ``inputs`` have so many slots. like: inputs [..., width] of a layer."""
        have, like = self.inputs.shape[1], self.inputs if like is None else like
        if slots > have:
            grown = like.new_zeros(self.layers, -(-slots // SLOT_MULTIPLE) * SLOT_MULTIPLE, like.shape[-1])
            if have:
                grown[:, :have] = self.inputs
            self.inputs = grown

    def place(self, held: int, count: int, whole: bool) -> tuple[int | None, ...]:
        """What kernels need for the next ``count`` tokens behind ``held`` uncommitted ones: numbers and pointers.

        whole: whether they are committed together. Then the states after them are written, and no inputs.
        """
        if not (whole and count > RERUN_TOKENS and not held):
            self.ahead = {}
            self.make_room(held + count)
        elif EVERY not in self.ahead or self.ahead[EVERY][0] != count:  # else layers before these began with it
            self.ahead = {EVERY: (count, {(EVERY,): torch.empty_like(self.states[EVERY,])})}
        ahead = self.ahead[EVERY][1][EVERY,].data_ptr() if self.ahead else None
        buffers = self.states[EVERY,].data_ptr(), ahead, self.inputs.data_ptr(), ctypes.addressof(self.pending)
        return held, self.inputs.shape[1], *buffers

    def commit(self, path: Sequence[int]) -> None:
        """Accept the uncommitted tokens listed in ``path``, and drop the others."""
        behind, count = any(self.pending), len(path)
        if self.due is not None and not behind:
            self.checkpoints[self.due], self.due = self._kept(), None
        if count and (after := self._after(path)) is not None:
            self.states |= after
            if self.shape is None:  # the inputs of a long prompt are large
                self.inputs = self.inputs.new_empty(self.layers, 0, 0)
        elif count:
            if behind:
                raise ValueError("cannot commit tokens that did not run through all layers")
            if path[-1] != count - 1:  # else they are in place
                self.inputs[:, :count] = self.inputs[:, list(path)]
            self.pending = type(self.pending)(*[count] * self.layers)
        self.ahead = {}

    def _after(self, path: Sequence[int]) -> dict[tuple[Hashable, ...], Tensor] | None:
        """The states after the tokens of ``path``, if a pass has made them."""
        counts, whole = {count for count, _ in self.ahead.values()}, EVERY in self.ahead
        if whole and counts != {len(path)}:
            raise ValueError(f"cannot commit {len(path)} of {max(counts)} tokens: their pass was to be committed whole")
        if not whole and (counts != {path[-1] + 1} or path[-1] >= len(path) or len(self.ahead) < self.layers):
            return None
        return {key: state for _, states in self.ahead.values() for key, state in states.items()}

    def _kept(self) -> dict[tuple[Hashable, ...], Tensor]:
        """A copy of the states that kernels change in place; others never change."""
        return dict(self.states) if self.shape is None else {key: state.clone() for key, state in self.states.items()}

    def checkpoint(self, count: int) -> None:
        """Store a checkpoint of the states after all ``count`` committed tokens, once none is pending."""
        if count not in self.checkpoints:
            self.due = count

    def begin(self, count: int, states: dict[tuple[Hashable, ...], Tensor]) -> None:
        """Begin with ``states``, those after ``count`` tokens, which are a checkpoint."""
        self.states = self.checkpoints[count] = states
        self.states = self._kept()

    def restored(self, count: int) -> RowStates:
        """The states at the checkpoint after ``count`` tokens."""
        made = RowStates(self.layers, self.shape)
        made.begin(count, self.checkpoints[count])
        made.checkpoints = {n: states for n, states in self.checkpoints.items() if n <= count}
        return made

    def copy(self) -> RowStates:
        """A copy; nothing may be uncommitted."""
        made, pending = RowStates(self.layers, self.shape), max(self.pending, default=0)
        made.states = self._kept()
        made.inputs, made.pending = self.inputs[:, :pending].clone(), type(self.pending)(*self.pending)
        made.checkpoints, made.due = dict(self.checkpoints), self.due
        return made

    def of_layer(self, layer: int) -> States:
        """The states of a layer."""
        return {key[1:]: state for key, state in self.states.items() if key[0] == layer}  # type: ignore[misc]


def run_rows(
    rows: Sequence[RowStates], layer: int, x: Tensor, held: int, tree: Tensor | None, advance: Advance
) -> Tensor:
    """The outputs of recurrent layer number ``layer`` for ``x`` [B, T, D], behind ``held`` uncommitted tokens.

    tree: bool [T, held + T], as in ``KVCache.register``, one for all rows.
    """
    if tree is not None and tree.dim() == 3:
        raise SpecDecError("recurrent layers take one tree for all rows; draft trees of one shape, or chains")
    _absorb(rows, layer, advance)
    for row, own in zip(rows, x, strict=True):
        row.make_room(held + len(own), own)
        row.inputs[layer, held : held + len(own)] = own
    states = _together([row.of_layer(layer) for row in rows])
    if tree is not None:
        for row in rows:
            row.ahead.pop(layer, None)
        return _branches(torch.stack([row.inputs[layer, : tree.shape[1]] for row in rows]), states, tree, advance)
    known = [row.ahead.get(layer, (0, {})) for row in rows]
    if held and all(count == held for count, _ in known):
        states = _together([{key[1:]: state for key, state in found.items()} for _, found in known])  # type: ignore[misc]
    elif held:
        states = advance(torch.stack([row.inputs[layer, :held] for row in rows]), states, False)[1]
    out, after = advance(x, states, True)
    for b, row in enumerate(rows):
        row.ahead[layer] = held + x.shape[1], {(layer, *key): state[b : b + 1] for key, state in after.items()}
    return out


def _together(rows: Sequence[States]) -> States:
    """The states of several rows [B, ...]; zeros for one that has none yet."""
    if len(rows) == 1:
        return rows[0]
    some = max(rows, key=len)
    return {
        key: torch.cat([row[key] if key in row else torch.zeros_like(state) for row in rows])
        for key, state in some.items()
    }


def _absorb(rows: Sequence[RowStates], layer: int, advance: Advance) -> None:
    """Run the pending inputs; rows with equally many tokens together."""
    groups: dict[int, list[RowStates]] = defaultdict(list)
    for row in rows:
        if row.pending[layer]:
            groups[row.pending[layer]].append(row)
    for count, group in groups.items():
        x = torch.stack([row.inputs[layer, :count] for row in group])
        _, made = advance(x, _together([row.of_layer(layer) for row in group]), False)
        for b, row in enumerate(group):
            row.states |= {(layer, *key): state[b : b + 1] for key, state in made.items()}
            row.pending[layer] = 0


def _branches(inputs: Tensor, states: States, tree: Tensor, advance: Advance) -> Tensor:
    """The outputs for the last T of ``inputs`` [B, U, D]; each branch of their ``tree`` is run as a row of its own."""
    (batch, _, width), (t, u) = inputs.shape, tree.shape
    paths = [row.nonzero()[:, 0].tolist() for row in tree.cpu()]
    for node, path in enumerate(paths, start=u - t):
        if node not in path:  # it is a second run of the last token that it sees
            path[-1:] = [node]
    inner = {node for path in paths for node in path[:-1]}
    leaves = [path for path in paths if path[-1] not in inner]
    longest = max(map(len, leaves))
    index = torch.tensor([path + path[-1:] * (longest - len(path)) for path in leaves], device=inputs.device)
    parts = list[Tensor]()
    for some in index.split(max(BRANCH_TOKENS // (batch * longest), 1)):
        x = inputs[:, some].reshape(batch * len(some), longest, width)
        own = {key: state.repeat_interleave(len(some), 0) for key, state in states.items()}
        parts.append(advance(x, own, True)[0].view(batch, len(some), longest, -1))
    out = torch.cat(parts, 1)
    place = {node: (leaf, at) for leaf, path in enumerate(leaves) for at, node in enumerate(path)}
    leaf, at = zip(*(place[node] for node in range(u - t, u)), strict=True)
    return out[:, leaf, at]
