"""The states of recurrent layers (linear attention, state space, convolution) of a row (sequence), with roll-back.

A scan over tokens returns only its last state. So the states after the committed tokens stay unchanged while a draft is
verified, and the layers' inputs of the drafted tokens are stored. Roll-back drops these inputs. Accepted tokens whose
inputs are not in the states yet are "pending": the next pass runs their stored inputs through the recurrent layers
before its own tokens.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from specdec.base.devices import upload
from specdec.base.errors import SpecDecError

BRANCH_TOKENS = 1024  # maximum tokens of a tree's branches that run at once: bounds memory
RERUN_TOKENS = 16  # to run up to this many tokens again is cheaper than to write their states
INPUT_MULTIPLE = 16  # the capacity of the buffer of inputs is a multiple of this many tokens
ALL_LAYERS = "states"  # the key of the states of all layers in one tensor
States = dict[tuple[str, int], Tensor]  # of one layer, by kind and index, each [B, ...]; {} before the first token
StatesByKey = dict[tuple[Hashable, ...], Tensor]  # of all layers of a row
# Inputs [B, T, D], the states before them, whether adapters act, and in a captured pass further arguments of
# ``runtimes.torch.model.Layer.advance`` -> outputs [B, T, D], the states after the inputs.
Advance = Callable[..., tuple[Tensor, States]]


class StateShape(NamedTuple):
    """The sizes of a row's (sequence's) recurrent states, as the native kernels store them.

    layers: number of recurrent layers.
    state_bytes: bytes of the states of one layer.
    width: number of bfloat16 values that are stored as the inputs of one token in one layer.
    """

    layers: int
    state_bytes: int
    width: int


class RowStates(ABC):
    """The recurrent states of one row (sequence) with roll-back: base class of ``LayerStates`` and ``KernelStates``.

    Uncommitted tokens are drafted, or just run. Pending tokens are accepted, but not in the states yet. A subclass
    implements ``empty``, ``snapshot`` and ``_take_ahead``.

    layers: number of recurrent layers.
    states: states after the committed tokens that are not pending, as tensors. The subclass chooses the keys.
    inputs: layer inputs of the pending tokens or, in layers without pending tokens, of the uncommitted ones, [layers,
        capacity in tokens, width], with width D or ``StateShape.width``.
    pending: C array with the number of pending tokens of each layer, int32. A pass through the layer sets it to 0.
    ahead: states that may become ``states`` at ``commit``: by number of the recurrent layer, or ``ALL_LAYERS``, (number
        of uncommitted tokens that ran as a chain, the states after them by the keys of ``states``).
    checkpoints: copies of ``states``, by the number of first tokens of the row that they include.
    next_checkpoint: number of tokens of a checkpoint to store as soon as no token is pending; None: there is none.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.states: StatesByKey = {}
        self.inputs = torch.empty(layers, 0, 0)
        self.pending = (ctypes.c_int32 * layers)()
        self.ahead = dict[Hashable, tuple[int, StatesByKey]]()
        self.checkpoints = dict[int, StatesByKey]()
        self.next_checkpoint: int | None = None

    @abstractmethod
    def empty(self) -> Self:
        """Return empty recurrent states of the same kind and size, for a row (sequence) without tokens."""

    @abstractmethod
    def snapshot(self) -> StatesByKey:
        """Return the present ``states``, tensors by the same keys, such that later passes do not change them.

        Tensors that passes change in place are cloned; the others are shared.
        """

    @abstractmethod
    def _take_ahead(self, path: Sequence[int]) -> bool:
        """Use the states in ``ahead`` as ``states`` if they are those after the tokens ``path``; return whether so.

        ``commit`` calls it. If the result is False, the accepted tokens become pending: the next pass runs them again.

        path: ascending indices of the accepted tokens among the uncommitted ones.
        """

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.states.values())

    def make_room(self, tokens: int, like: Tensor | None = None) -> None:
        """Enlarge the buffer ``inputs``, if necessary, so that it holds ``tokens`` tokens; the stored inputs stay.

        like: a tensor [..., width] whose width and dtype the larger buffer gets; None: those of ``inputs``.
        """
        have, like = self.inputs.shape[1], self.inputs if like is None else like
        if tokens > have:
            grown = like.new_zeros(self.layers, -(-tokens // INPUT_MULTIPLE) * INPUT_MULTIPLE, like.shape[-1])
            if have:
                grown[:, :have] = self.inputs
            self.inputs = grown

    def commit(self, path: Sequence[int]) -> None:
        """Accept the uncommitted tokens with the ascending indices ``path``, and drop the others.

        The accepted tokens are then in ``states``, or pending in all layers. A requested checkpoint is stored before
        that if no token was pending.

        Raises ValueError if tokens that were accepted before have not run through all layers.
        """
        was_pending, count = any(self.pending), len(path)
        if self.next_checkpoint is not None and not was_pending:
            self.checkpoints[self.next_checkpoint], self.next_checkpoint = self.snapshot(), None
        if count and not self._take_ahead(path):
            if was_pending:
                raise ValueError("cannot commit tokens that did not run through all layers")
            if path[-1] != count - 1:  # else they are in place
                self.inputs[:, :count] = self.inputs[:, upload([*path], self.inputs.device)]
            self.pending = type(self.pending)(*[count] * self.layers)
        self.ahead = {}

    def checkpoint(self, count: int) -> None:
        """Request a checkpoint after all ``count`` committed tokens of the row.

        The next ``commit`` before which all accepted tokens are in ``states`` (none is pending) puts a copy into
        ``checkpoints``.
        """
        if count not in self.checkpoints:
            self.next_checkpoint = count

    def begin(self, count: int, states: StatesByKey) -> None:
        """Set ``states`` of a row that begins with ``count`` tokens, and store them as a checkpoint, too.

        states: the states after these tokens, by the keys of ``self.states``. The checkpoint is this dict itself, so
            the caller must change neither it nor its tensors afterwards. ``self.states`` is a ``snapshot`` of it, so
            later passes do not change it either.
        """
        self.states = self.checkpoints[count] = states
        self.states = self.snapshot()

    def restored(self, count: int) -> Self:
        """Return a new object with the states of the checkpoint after ``count`` tokens, and the checkpoints up to it.

        Raises KeyError if there is no such checkpoint.
        """
        made = self.empty()
        made.begin(count, self.checkpoints[count])
        made.checkpoints = {n: states for n, states in self.checkpoints.items() if n <= count}
        return made

    def copy(self) -> Self:
        """Return a new object with the same states, pending tokens and checkpoints, but without uncommitted tokens.

        Later passes and commits of one of the two do not change the other.
        """
        made = self.empty()
        made.states = self.snapshot()
        made.inputs = self.inputs[:, : max(self.pending, default=0)].clone()
        made.pending = type(self.pending)(*self.pending)
        made.checkpoints = dict(self.checkpoints)
        made.next_checkpoint = self.next_checkpoint
        return made


class LayerStates(RowStates):
    """The recurrent states of one row (sequence) in a runtime that runs its layers by PyTorch, with roll-back.

    ``states`` has a tensor [1, ...] for each key (layer, kind, index): the number of the layer among the recurrent
    layers only, counted from 0; the kind of state, "conv" or "recurrent"; and an index among the states of this kind in
    the layer. A row without tokens has no states. A pass puts new tensors in place of the old ones, and
    changes none in place, except those in ``home``.

    home: tensors at fixed addresses for states that CUDA graphs change in place, by the same keys; {}: there are none.
    """

    def __init__(self, layers: int) -> None:
        super().__init__(layers)
        self.home: StatesByKey = {}

    def empty(self) -> LayerStates:
        return LayerStates(self.layers)

    def snapshot(self) -> StatesByKey:
        return {key: state.clone() if state is self.home.get(key) else state for key, state in self.states.items()}

    def move(self, home: StatesByKey, inputs: Tensor) -> None:
        """Move the states and layer inputs to memory at fixed addresses, where CUDA graphs change them.

        home: tensors [1, ...] that receive the states, by key (layer, kind, index) as in ``states``; they become
            ``home``. A tensor whose key has no state yet is filled with zeros.
        inputs: tensor that receives the stored layer inputs, [layers, capacity, D]. It is not used if it has room for
            fewer tokens than are pending.
        """
        for key, place in home.items():
            if (state := self.states.get(key)) is not place:
                place.copy_(torch.zeros_like(place) if state is None else state)
                self.states[key] = place
        count = max(self.pending, default=0)
        if self.inputs is not inputs and count <= inputs.shape[1]:
            if count:
                inputs[:, :count] = self.inputs[:, :count]
            self.inputs = inputs
        self.home = home

    def ran(self, layers: Sequence[int]) -> None:
        """Note that a captured pass (CUDA graph) has run ``layers``, so that no token is pending in them.

        Sets their ``pending`` to 0 and drops their ``ahead``.

        layers: numbers of the layers among the recurrent layers, from 0.
        """
        for layer in layers:
            self.pending[layer] = 0
            self.ahead.pop(layer, None)

    def of_layer(self, layer: int) -> States:
        """Return the states of a layer, [1, ...] each, by (kind, index); {}: the row has no tokens yet.

        layer: number of the layer among the recurrent layers, from 0.
        """
        return {key[1:]: state for key, state in self.states.items() if key[0] == layer}  # type: ignore[misc]

    def _take_ahead(self, path: Sequence[int]) -> bool:
        counts = {count for count, _ in self.ahead.values()}
        if counts != {path[-1] + 1} or path[-1] >= len(path) or len(self.ahead) < self.layers:
            return False
        self.states |= {key: state for _, states in self.ahead.values() for key, state in states.items()}
        self.inputs = self.inputs.new_empty(self.layers, 0, 0)  # those of a long prompt are large
        return True


class KernelStates(RowStates):
    """The states of one row's recurrent layers that the native kernels change in place.

    They are one uint8 tensor [layers, bytes], under the key (``ALL_LAYERS``,). shape: the sizes of the states.
    """

    def __init__(self, shape: StateShape) -> None:
        super().__init__(shape.layers)
        self.shape = shape
        self.states[ALL_LAYERS,] = torch.zeros(shape.layers, shape.state_bytes, dtype=torch.uint8)
        self.inputs = torch.empty(shape.layers, 0, shape.width, dtype=torch.bfloat16)

    def empty(self) -> KernelStates:
        return KernelStates(self.shape)

    def snapshot(self) -> StatesByKey:
        return {key: state.clone() for key, state in self.states.items()}

    def arguments(self, uncommitted: int, count: int, whole: bool) -> tuple[int | None, ...]:
        """Prepare the row's buffers for its next ``count`` tokens, and return the native kernels' arguments for them.

        Returns a tuple of six: ``uncommitted``; the capacity of the stored inputs in tokens; and the addresses (int) of
        the states, of the states after the tokens (None: not to be written), of the stored inputs, and of the numbers
        of pending tokens. They are valid until the next call.

        uncommitted: number of uncommitted tokens of the row before these.
        whole: whether the tokens will be committed together. If they are many, the kernels then write the states after
            them instead of their inputs.
        """
        if not (whole and count > RERUN_TOKENS and not uncommitted):
            self.ahead = {}
            self.make_room(uncommitted + count)
        elif (
            ALL_LAYERS not in self.ahead or self.ahead[ALL_LAYERS][0] != count
        ):  # else earlier layers have begun with it
            self.ahead = {ALL_LAYERS: (count, {(ALL_LAYERS,): torch.empty_like(self.states[ALL_LAYERS,])})}
        ahead = self.ahead[ALL_LAYERS][1][ALL_LAYERS,].data_ptr() if self.ahead else None
        buffers = self.states[ALL_LAYERS,].data_ptr(), ahead, self.inputs.data_ptr(), ctypes.addressof(self.pending)
        return uncommitted, self.inputs.shape[1], *buffers

    def _take_ahead(self, path: Sequence[int]) -> bool:
        if not self.ahead:
            return False
        count, states = self.ahead[ALL_LAYERS]
        if count != len(path):
            raise ValueError(f"cannot commit {len(path)} of {count} tokens: their pass was to be committed whole")
        self.states |= states
        return True


def run_rows(
    rows: Sequence[LayerStates], layer: int, x: Tensor, held: int, tree: Tensor | None, advance: Advance
) -> Tensor:
    """Run a recurrent layer on the next T tokens ``x`` [B, T, D] of each row; return its outputs [B, T, D].

    First runs accepted tokens that are not in the states yet. Stores the inputs ``x``, so that the tokens can be rolled
    back. Raises SpecDecError if ``tree`` has a tree for each of several rows.

    rows: the states of each row. layer: number of the layer among the recurrent ones.
    held: U, number of uncommitted tokens of each row before ``x``.
    tree: which of the U + T uncommitted tokens each new token sees, for all rows, bool [T, U + T] or [1, T, U + T];
        None: chains.
    advance: function (inputs [B, T, D], states before them, whether adapters act) that runs the layer and returns
        outputs [B, T, D] and new states; states are tensors [B, ...] by (kind, index).
    """
    if tree is not None and tree.dim() == 3:
        if len(tree) > 1:
            raise SpecDecError("recurrent layers take one tree for all rows; draft trees of one shape, or chains")
        tree = tree[0]
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
    if len(rows) == 1:
        return rows[0]
    some = max(rows, key=len)
    return {
        key: torch.cat([row[key] if key in row else torch.zeros_like(state) for row in rows])
        for key, state in some.items()
    }


def _absorb(rows: Sequence[LayerStates], layer: int, advance: Advance) -> None:
    """Run ``layer`` on each row's pending tokens (accepted, but not in its states yet), which then include them.

    Rows with equal numbers of pending tokens run as a batch.

    layer: number of the layer among the recurrent ones. advance: runs the layer, as in ``run_rows``.
    """
    groups: dict[int, list[LayerStates]] = defaultdict(list)
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
    """Run a recurrent layer on draft trees, each root-to-leaf path as a sequence of its own.

    Returns the outputs of the last T of U uncommitted tokens, [B, T, D].

    inputs: layer inputs of the U uncommitted tokens, [B, U, D]. states: the states before them, each [B, ...].
    tree: which uncommitted tokens are on the path to each of the last T tokens, bool [T, U]; one tree for all rows.
    advance: runs the layer, as in ``run_rows``.
    """
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
