"""The state of a recurrent layer (linear attention, state space, convolution), with roll-back.

A scan returns only its last state. So the state after the committed tokens is stored with the layer's inputs of the
tokens behind it. Roll-back drops inputs; accepted inputs are run again, through this layer's mixer alone, before the
next tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specdec.base.errors import SpecDecError

BRANCH_TOKENS = 1024  # tokens of branches that run at once: bounds memory
States = dict[tuple[str, int], Tensor]  # by kind and number, each [B, ...]; empty before the first token
# The tokens that adapters act on: True: those of the pass; False: none; for inputs in another order: the number of the
# layer's uncommitted tokens behind each, int64 [B, T].
Adapted = bool | Tensor
# Inputs [B, T, D], the states before them, where adapters act -> outputs, and the states after them.
Advance = Callable[[Tensor, States, Adapted], tuple[Tensor, States]]


class Recurrent:
    """A layer's state for a batch.

    states: after the committed tokens of each row, without those that are ``pending``.
    pending: inputs [n, D] of each row's committed tokens that ``states`` lack.
    inputs: of the uncommitted tokens, [B, U, D].
    ahead: the states after these; None: not known.
    checkpoints: of each row, its states by number of tokens.
    due: rows that get a checkpoint, by number of tokens, when nothing is pending.
    """

    def __init__(self, batch: int) -> None:
        self.states: States = {}
        self.pending: list[Tensor | None] = [None] * batch
        self.inputs: Tensor | None = None
        self.ahead: States | None = None
        self.checkpoints: list[dict[int, States]] = [{} for _ in range(batch)]
        self.due: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.states.values())

    def run(self, x: Tensor, held: int, tree: Tensor | None, advance: Advance) -> Tensor:
        """The outputs for ``x`` [B, T, D], which follows the first ``held`` uncommitted tokens.

        tree: bool [T, held + T], as in ``KVCache.register``, one for all rows.
        """
        if tree is not None and tree.dim() == 3:
            raise SpecDecError("recurrent layers take one tree for all rows; draft trees of one shape, or chains")
        self._absorb(advance)
        current = held == (0 if self.inputs is None else self.inputs.shape[1])
        before = x[:, :0] if self.inputs is None else self.inputs[:, :held]
        self.inputs = torch.cat((before, x), 1)
        if tree is not None:
            self.ahead = None
            return self._branches(tree, advance)
        states = self.ahead
        if not held:
            states = self.states
        elif states is None or not current:
            states = advance(before, self.states, False)[1]
        out, self.ahead = advance(x, states, True)
        return out

    def _branches(self, tree: Tensor, advance: Advance) -> Tensor:
        """The outputs for the last T inputs; each branch of their ``tree`` is run as a row of its own."""
        assert self.inputs is not None
        (batch, _, width), (t, u) = self.inputs.shape, tree.shape
        paths = [row.nonzero()[:, 0].tolist() for row in tree.cpu()]
        for node, path in enumerate(paths, start=u - t):
            if node not in path:  # it is a second run of the last token that it sees
                path[-1:] = [node]
        inner = {node for path in paths for node in path[:-1]}
        leaves = [path for path in paths if path[-1] not in inner]
        longest = max(map(len, leaves))
        index = torch.tensor([path + path[-1:] * (longest - len(path)) for path in leaves], device=self.inputs.device)
        parts = list[Tensor]()
        for some in index.split(max(BRANCH_TOKENS // (batch * longest), 1)):
            x = self.inputs[:, some].reshape(batch * len(some), longest, width)
            states = {key: state.repeat_interleave(len(some), 0) for key, state in self.states.items()}
            behind = (u - 1 - some).repeat(batch, 1)  # (B leaves, longest)
            parts.append(advance(x, states, behind)[0].view(batch, len(some), longest, -1))
        out = torch.cat(parts, 1)
        place = {node: (leaf, at) for leaf, path in enumerate(leaves) for at, node in enumerate(path)}
        leaf, at = zip(*(place[node] for node in range(u - t, u)), strict=True)
        return out[:, leaf, at]

    def _absorb(self, advance: Advance) -> None:
        """Run the pending inputs; rows with equally many tokens together."""
        groups: dict[int, list[int]] = defaultdict(list)
        for row, pending in enumerate(self.pending):
            if pending is not None:
                groups[pending.shape[0]].append(row)
        for rows in groups.values():
            x = torch.stack([pending for row in rows if (pending := self.pending[row]) is not None])
            _, made = advance(x, {key: state[rows] for key, state in self.states.items()}, False)
            for key, state in made.items():
                if len(rows) == len(self.pending):
                    self.states[key] = state
                else:
                    old = self.states.get(key)
                    old = state.new_zeros(len(self.pending), *state.shape[1:]) if old is None else old.clone()
                    old[rows] = state
                    self.states[key] = old
        self.pending = [None] * len(self.pending)
        for row, count in self.due.items():
            self.checkpoints[row][count] = {key: state[row : row + 1].clone() for key, state in self.states.items()}
        self.due = {}

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Accept, for each row, the uncommitted tokens listed in ``paths``, and drop the others."""
        inputs, everything = self.inputs, list(range(0 if self.inputs is None else self.inputs.shape[1]))
        if inputs is not None and self.ahead is not None and all(list(path) == everything for path in paths):
            self.states = self.ahead
        elif inputs is not None:
            for row, path in enumerate(paths):
                if path:
                    self.pending[row] = inputs[row, list(path)]
        self.inputs = self.ahead = None

    def roll_back(self) -> None:
        """Drop everything that is not committed."""
        self.inputs = self.ahead = None

    def restored(self, row: int, count: int) -> Recurrent:
        """The state of one row at the checkpoint after ``count`` tokens."""
        made = Recurrent(1)
        made.states = dict(self.checkpoints[row][count])
        made.checkpoints = [{n: states for n, states in self.checkpoints[row].items() if n <= count}]
        return made

    def select(self, rows: Sequence[int]) -> Recurrent:
        """Only ``rows``, in that order, as a new state."""
        made = Recurrent(len(rows))
        made.states = {key: state[list(rows)] for key, state in self.states.items()}
        made.pending = [self.pending[row] for row in rows]
        made.checkpoints = [dict(self.checkpoints[row]) for row in rows]
        made.due = {to: self.due[row] for to, row in enumerate(rows) if row in self.due}
        return made

    def joined(self, other: Recurrent) -> Recurrent:
        """The rows of ``other`` after those of this state, as a new state."""
        made = Recurrent(0)
        made.pending, made.checkpoints = self.pending + other.pending, self.checkpoints + other.checkpoints
        made.due = self.due | {len(self.pending) + row: count for row, count in other.due.items()}
        for key in self.states.keys() | other.states.keys():
            a, b = self.states.get(key), other.states.get(key)
            shape = (a if a is not None else b).shape[1:]  # type: ignore[union-attr]
            parts = [
                (a if a is not None else b).new_zeros(len(own.pending), *shape) if part is None else part  # type: ignore[union-attr]
                for part, own in ((a, self), (b, other))
            ]
            made.states[key] = torch.cat(parts)
        return made
