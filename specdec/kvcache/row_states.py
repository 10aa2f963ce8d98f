"""The recurrent states of a row in all recurrent layers, with roll-back, for a runtime that takes pointers to them.

As in ``recurrent.py``, the states after the committed tokens stay as they are, and the inputs of later ones lie beside
them. A pass runs the accepted ones ("pending") again, before its own tokens, and writes the states after them. A pass
over a part of a text, which is committed whole, writes its states to another place, and keeps no inputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RERUN_TOKENS = 16  # so many tokens are cheaper to run again than states to write
SLOT_MULTIPLE = 16  # the buffer of inputs has a multiple of so many slots


class StateShape(NamedTuple):
    """Number of recurrent layers, bytes of a state, and numbers (bf16) of a token's inputs in a layer."""

    layers: int
    state_bytes: int
    width: int


class RowStates:
    """States of one row.

    states: uint8 [layers, bytes], after the committed tokens that are not pending.
    inputs: bf16 [layers, slots, width], of pending tokens, or of uncommitted ones in layers where nothing is pending.
    pending: of each layer, how many accepted tokens its state lacks. A pass sets it to 0.
    ahead: states after all tokens of a pass, and their number, until they are committed; None: inputs are kept.
    checkpoints: states by number of tokens; they are never changed. due: the number of the next one.
    """

    def __init__(self, shape: StateShape, states: Tensor | None = None) -> None:
        self.shape = shape
        size = shape.layers, shape.state_bytes
        self.states = torch.zeros(size, dtype=torch.uint8) if states is None else states.clone()
        self.inputs = torch.empty(shape.layers, 0, shape.width, dtype=torch.bfloat16)
        self.pending = (ctypes.c_int32 * shape.layers)()
        self.ahead: tuple[Tensor, int] | None = None
        self.checkpoints: dict[int, Tensor] = {}
        self.due: int | None = None

    def place(self, held: int, count: int, whole: bool) -> tuple[int | None, ...]:
        """What kernels need for the next ``count`` tokens behind ``held`` uncommitted ones: numbers and pointers.

        whole: whether they are committed together.
        """
        if not (whole and count > RERUN_TOKENS and not held):
            self.ahead = None
            self._make_room(held + count)
        elif self.ahead is None or self.ahead[1] != count:  # else layers before these began with it
            self.ahead = torch.empty_like(self.states), count
        ahead = None if self.ahead is None else self.ahead[0].data_ptr()
        buffers = self.states.data_ptr(), ahead, self.inputs.data_ptr(), ctypes.addressof(self.pending)
        return held, self.inputs.shape[1], *buffers

    def _make_room(self, slots: int) -> None:
        have = self.inputs.shape[1]
        if slots > have:
            grown = self.inputs.new_empty(
                self.shape.layers, -(-slots // SLOT_MULTIPLE) * SLOT_MULTIPLE, self.shape.width
            )
            grown[:, :have] = self.inputs
            self.inputs = grown

    def commit(self, path: Sequence[int]) -> None:
        """Accept the uncommitted tokens listed in ``path``, and drop the others."""
        behind = any(self.pending)
        if self.due is not None and not behind:
            self.checkpoints[self.due], self.due = self.states.clone(), None
        if self.ahead is not None and path:
            states, count = self.ahead
            if len(path) != count:
                raise ValueError(f"cannot commit {len(path)} of {count} tokens: their pass was to be committed whole")
            self.states = states
        elif path:
            if behind:
                raise ValueError("cannot commit tokens that did not run through all layers")
            if path[-1] != len(path) - 1:  # else they are in place
                self.inputs[:, : len(path)] = self.inputs[:, list(path)]
            self.pending = type(self.pending)(*[len(path)] * self.shape.layers)
        self.ahead = None

    def checkpoint(self, count: int) -> None:
        """Store a checkpoint of the states after all ``count`` committed tokens, once none is pending."""
        if count not in self.checkpoints:
            self.due = count

    def restored(self, count: int) -> RowStates:
        """The states at the checkpoint after ``count`` tokens."""
        made = RowStates(self.shape, self.checkpoints[count])
        made.checkpoints = {n: states for n, states in self.checkpoints.items() if n <= count}
        return made

    def copy(self) -> RowStates:
        """A copy; nothing may be uncommitted."""
        made, pending = RowStates(self.shape, self.states), max(self.pending)
        made.inputs, made.pending = self.inputs[:, :pending].clone(), type(self.pending)(*self.pending)
        made.checkpoints, made.due = dict(self.checkpoints), self.due
        return made
