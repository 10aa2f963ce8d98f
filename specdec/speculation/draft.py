"""A draft: a tree of proposed tokens for every row (sequence) of the batch.

A step scores a *block* of 1 + M tokens per row with the model. Index 0 is the root, the last token of the text. Indices
1 .. M are the draft's nodes, parents before children.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.base.devices import is_asynchronous, upload
from specdec.runtimes.draft_path import DeviceTree
from specdec.speculation.candidates import CandidateSet


class Draft:
    """A tree of proposed tokens (nodes) for each of B rows, with one tree shape for all rows. Drafters return it.

    The model scores a block of 1 + M tokens per row: block index 0 is the root, the last token of the row's text; block
    index i is node i - 1.

    tokens: token ids, int64 [B, M], or lists [B][M], of which the tensor is made when it is first read. -1: the row
        does not have the node.
    parents: the block index of each node's parent (0: the root). A chain has (0, 1, 2, ...).
    device: the device of the tensor that is made from lists.
    listed: the tokens as lists [B][M]; None while only the device has them.
    held: the nodes on the device while the CPU does not know the tree either; None: it knows ``parents``.
    states: hidden states [B, S, D] at the input of layer ``exit_layer`` for the first S block tokens. The KV cache has
        the keys and values of the layers below, so scoring resumes there. None: scoring begins at layer 0.
    layers: number of layers that each token ran when it was drafted, int64 [B, M]; None: tokens do not leave the model
        early.
    found: the candidates that the draft was chosen from; None: its drafter has no probabilities.
    """

    held: DeviceTree | None = None
    found: CandidateSet | None = None
    states: Tensor | None = None
    exit_layer: int = 0
    layers: Tensor | None = None

    def __init__(
        self, tokens: Tensor | list[list[int]], parents: tuple[int, ...], device: torch.device | str = "cpu"
    ) -> None:
        self.listed: list[list[int]] | None = tokens if isinstance(tokens, list) else None
        self._tokens: Tensor | None = None if isinstance(tokens, list) else tokens
        self._depths: list[int] | None = None
        self.parents = parents
        self.device = torch.device(device) if self._tokens is None else self._tokens.device

    @property
    def tokens(self) -> Tensor:
        """The token ids of the nodes, int64 [B, M] on ``device``; -1: the row does not have the node."""
        if self._tokens is None:
            assert self.listed is not None
            self._tokens = upload(self.listed, self.device).view(len(self.listed), len(self.parents))
        return self._tokens

    def depths(self) -> list[int]:
        """Return the depth of the root (0) and of each of the M nodes, a list of 1 + M numbers."""
        if self._depths is None:
            self._depths = [0]
            for parent in self.parents:
                self._depths.append(self._depths[parent] + 1)
        return self._depths

    def lists(self) -> list[list[int]]:
        """Return the token ids as lists [B][M], which the caller must not change; -1: the row does not have the node.

        Waits for the device if only that has them.
        """
        if self.listed is None:
            self.listed = self.tokens.tolist()
        return self.listed

    @property
    def unread(self) -> list[Tensor]:
        """The device tensors [B, n] that the CPU must read to know the draft's tokens and tree; []: it knows them."""
        return [] if self.listed is not None else [self.tokens if self.held is None else self.held.packed]

    def receive(self, rows: Any) -> list[list[int]] | None:
        """Set the draft's tokens and tree from values that the CPU has read from the device.

        If this renumbers the nodes, it returns, for each row, the new block index of each token of the scored block
        (-1: none). None: block indices (0: the root, i + 1: node i) stay as they are.

        rows: the values of the tensor in ``unread``, [B][n].
        """
        self.listed = [[int(token) for token in row] for row in rows]
        return None

    def paths(self, row: int) -> list[list[int]]:
        """Return, for each node that row ``row`` has, the token ids on the path from the root (excluded) to it."""
        paths: list[list[int] | None] = [[]]
        for token, parent in zip(self.lists()[row], self.parents, strict=True):
            before = paths[parent]
            paths.append(None if before is None or token < 0 else [*before, token])
        return [path for path in paths[1:] if path]

    def ancestors(self) -> Tensor | None:
        """Return which of the root and the M nodes each of them may attend to, bool [1 + M, 1 + M]; None for a chain.

        Entry [i, j] says whether token j is token i or on the path from the root to it; index 0 is the root. If the CPU
        has not read the tree yet, there is one mask per row, [B, 1 + M, 1 + M], on the device.
        """
        return ancestors(self.parents) if self.held is None else self.held.ancestors

    def within(self, depths: list[int]) -> list[int]:
        """Remove nodes that are too deep: their tokens become -1. The shape of the tree stays.

        depths: for each row, the maximum depth of its nodes.

        Returns the indices of the rows whose limit is less than the depth of the tree, whether they had such nodes or
        not.
        """
        deep = self.depths()[1:]
        deepest = max(deep, default=0)
        cut = [b for b, most in enumerate(depths) if most < deepest]
        if not cut:
            return cut
        if self.listed is not None:
            self.listed = [
                [token if depth <= most else -1 for token, depth in zip(row, deep, strict=True)]
                for row, most in zip(self.listed, depths, strict=True)
            ]
            self._tokens = None
        else:
            bound, own = upload([[most] for most in depths], self.device), upload([deep], self.device)
            self._tokens = self.tokens.masked_fill(own > bound, -1)  # (B, M)
        return cut

    def with_chains(self, chains: Sequence[Sequence[int]]) -> Draft:
        """Return a new draft in which chains of tokens replace the nodes of some rows; this draft is unchanged.

        The new draft has further nodes after the M existing ones, as many as the longest chain: the first is a child of
        the root, each other one a child of the one before. In a replaced row the M nodes have token -1, in other rows
        the further ones. The two drafts share ``states``, ``layers`` and ``found``.

        chains: for each row, token ids that follow its root, in order; []: the row keeps its nodes. At least one row
            must have a chain.
        """
        count, deepest = len(self.parents), max(map(len, chains))
        tokens = [
            [*([-1] * count if chain else own), *chain, *[-1] * (deepest - len(chain))]
            for own, chain in zip(self.lists(), chains, strict=True)
        ]
        parents = [0, *range(count + 1, count + deepest)]
        made = Draft(tokens, (*self.parents, *parents), device=self.device)
        made.found, made.states, made.exit_layer, made.layers = self.found, self.states, self.exit_layer, self.layers
        return made

    def spread(self, rows: Sequence[int], batch: int) -> Draft:
        """Return a draft for ``batch`` rows: row ``rows[i]`` has the nodes of this draft's row i, others have none."""
        tokens = self.tokens.new_full((batch, len(self.parents)), -1)  # (B, M)
        return Draft(tokens.index_copy(0, upload([*rows], self.device), self.tokens), self.parents)

    @classmethod
    def empty(cls, batch: int, device: torch.device | str = "cpu") -> Draft:
        """Return a draft without tokens for ``batch`` rows. Scoring it is plain decoding."""
        return cls([[]] * batch, (), device=device)


@functools.lru_cache(256)
def ancestors(parents: tuple[int, ...]) -> Tensor | None:
    """Return the attention mask of a draft tree: which of the root and the M nodes each of them may attend to.

    The mask is bool [1 + M, 1 + M] on the CPU; entry [i, j] says whether token j is token i or on the path from the
    root to it. None for a chain.

    parents: for each node the index of its parent: 0: the root, i + 1: node i.
    """
    if parents == tuple(range(len(parents))):
        return None
    paths = [1]  # a bit for each block token on the path
    for node, parent in enumerate(parents, start=1):
        paths.append(paths[parent] | 1 << node)
    return torch.tensor([[path >> node & 1 for node in range(len(paths))] for path in paths], dtype=torch.bool)


def check_draft(draft: Draft, batch: int, limit: int, vocab_size: int) -> str | None:
    """Return why ``draft`` cannot be scored, as an English phrase; None: it can be.

    It checks shapes, dtypes, depth and token ids. Token ids that only an asynchronous device has are checked when the
    CPU reads them.

    batch: number of rows. limit: maximum depth of a node. vocab_size: V, which token ids must be below.
    """
    count, parents = len(draft.parents), draft.parents
    if draft.held is not None:
        return None
    if any(not 0 <= parent <= node for node, parent in enumerate(parents)):
        return f"its tree is not in topological order (parents {parents})"
    if max(draft.depths()) > limit:
        return f"it is {max(draft.depths())} tokens deep, {limit} are allowed"
    if draft.listed is None and tuple(draft.tokens.shape) != (batch, count):
        return f"its tokens are {tuple(draft.tokens.shape)}, not {batch} rows of {count}"
    if draft.listed is None and draft.tokens.dtype != torch.int64:
        return f"its tokens are {draft.tokens.dtype}, not int64"
    if (states := draft.states) is not None and not (
        states.dim() == 3 and len(states) == batch and states.shape[1] <= 1 + count and draft.exit_layer
    ):
        where = f"at layer {draft.exit_layer}"
        return f"its states {where} are {tuple(states.shape)}, not {batch} rows of {1 + count} tokens or fewer"
    if draft.listed is None and is_asynchronous(draft.device):
        return None
    return check_tokens(draft.lists(), batch, count, vocab_size)


def check_tokens(rows: list[list[int]], batch: int, count: int, vocab_size: int) -> str | None:
    """Return what is wrong with drafted token ids, as an English phrase; None: nothing.

    They must be [batch][count] numbers from -1 (no such node) to vocab_size - 1.

    rows: the token ids of each row. batch: number of rows. count: number of nodes per row.
    """
    if len(rows) != batch or any(len(row) != count for row in rows):
        return f"its tokens are not {batch} rows of {count}"
    for row in rows:
        if row and not -1 <= min(row) <= max(row) < vocab_size:
            return f"token {min(row) if min(row) < -1 else max(row)} is outside the vocabulary of {vocab_size}"
    return None
