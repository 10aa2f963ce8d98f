"""Attention masks: which cached keys each token of a forward pass may attend to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.base.devices import upload


class Chunk(int):
    """The chunk size in tokens of chunked attention, used in place of a window.

    A query attends only to keys whose position // chunk size equals its own. A chunk size equals no window.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chunk) and int(self) == int(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((Chunk, int(self)))


class Mask:
    """An attention mask: which of S keys each of T queries in B rows (sequences) may attend to. Made for each pass.

    query: positions of the queries, int64 [B, T].
    keys: positions of the keys, int64 [B, S].
    visible: whether a query may attend to a key, bool [B, T, S]; None: each query may attend to all keys.
    length: S.
    causal: whether the queries are the last T of the S keys, in order, and each attends to the keys up to itself.
    ancestors: which uncommitted (drafted) tokens each query attends to, bool [T, U] or [B, T, U]; None: a chain, so all
        earlier ones and itself.
    memo: cache of tensors that are derived from the mask, because one mask serves many layers; each user of it chooses
        keys of its own.
    """

    causal = False
    ancestors: Tensor | None = None

    def __init__(self, query: Tensor, keys: Tensor, visible: Tensor | None) -> None:
        self.query = query
        self.length = keys.shape[1]
        self._given = keys, visible
        self.memo: dict[object, Tensor | None] = {}

    def _keys_and_visible(self) -> tuple[Tensor, Tensor | None]:
        return self._given

    def bool_mask(self, window: int | None = None) -> Tensor | None:
        """Return the mask as bool [B, 1, T, S], True where a query attends; None if all queries attend to all keys.

        window: attention window: a query attends only to the last ``window`` positions, its own included, or to those
            of its chunk if ``window`` is a ``Chunk``; None: no limit.
        """
        if window not in self.memo:
            keys, visible = self._keys_and_visible()
            if window is not None:
                query, keys = self.query[:, :, None], keys[:, None, :]
                chunked = isinstance(window, Chunk)
                near = keys // window == query // window if chunked else query - keys < window  # (B, T, S)
                if visible is not None:
                    visible = visible & near
                elif near.device.type != "cpu" or not bool(near.all()):  # elsewhere, reading costs more than a mask
                    visible = near
            self.memo[window] = None if visible is None else visible[:, None]  # (B, 1, T, S)
        return self.memo[window]

    def filled(self, count: int) -> Tensor:
        """Return which of S keys belong to committed or to the first ``count`` uncommitted tokens, bool [B, 1, 1, S].

        Uncommitted tokens are drafted, or run in this pass. Raises NotImplementedError in this class: only subclasses
        know which keys are uncommitted.
        """
        raise NotImplementedError


class RowMask(Mask):
    """The mask of a pass over the rows (sequences) of a ``KVCache``. Its tensors are made when they are needed.

    Committed tokens belong to the text, and all are visible; uncommitted ones are drafted, or run in this pass.

    query: positions of the tokens, int64 [B, T]; [1, T] if the rows have different numbers of tokens and lie one after
        the other. ``bool_mask`` is then not available.
    committed: number of committed tokens of each row.
    counts: number of tokens of each row in the pass.
    trees: for each row, which of its U uncommitted tokens (``ahead``, then those of the pass) each token of the pass
        attends to, bool [tokens, U]; None: a chain, in which each attends to all earlier ones and to itself.
    ahead: number of uncommitted tokens of each row before those of the pass.
    drafted: positions of each row's uncommitted tokens, int64 [B, U], or a tensor [U] for each row.
    whole: whether the caller commits all tokens of the pass.
    chains: whether no row has a tree.
    """

    def __init__(
        self,
        query: Tensor,
        committed: list[int],
        counts: Sequence[int],
        trees: Sequence[Tensor | None],
        ahead: int,
        drafted: Sequence[Tensor] | Tensor,
        whole: bool = False,
    ) -> None:
        self.query = query
        self.committed = committed
        self.counts = counts
        self.trees = trees
        self.ahead = ahead
        self.drafted = drafted
        self.whole = whole
        self.chains = all(tree is None for tree in trees)
        self.causal = self.chains and len(set(committed)) == 1
        self.length = max(committed) + ahead + max(counts)
        self.memo = {}

    def tree(self, row: int, window: int | None) -> Tensor | None:
        """Return which uncommitted tokens each token of row ``row`` attends to, bool [tokens, U]; None: a chain.

        The result is ``trees[row]``, contiguous and limited to ``window``. It is cached, and must not be changed.

        window: attention window in tokens, outside of which nothing is visible; None: no limit.
        """
        key = row, window
        if key not in self.memo:
            tree = self.trees[row]
            if tree is not None and window is not None and window < tree.shape[1]:
                positions = self.drafted[row]  # (U,)
                tree = tree & (positions[-tree.shape[0] :, None] - positions < window)
            self.memo[key] = None if tree is None else tree.contiguous()
        return self.memo[key]

    def filled(self, count: int) -> Tensor:
        ends = upload([[[[n + count]]] for n in self.committed], self.query.device)
        return torch.arange(self.length, device=self.query.device) < ends

    def _keys_and_visible(self) -> tuple[Tensor, Tensor | None]:
        (batch, t), device, u = self.query.shape, self.query.device, self.ahead + self.query.shape[1]
        n, every = upload([[n] for n in self.committed], device), torch.arange(self.length, device=device)
        slots = n + torch.arange(u, device=device)  # (B, U), of uncommitted tokens
        drafted = self.drafted if isinstance(self.drafted, Tensor) else torch.stack([*self.drafted])
        keys = every.repeat(batch, 1).scatter_(1, slots, drafted)  # (B, S)
        if self.causal and t == 1:
            return keys, None
        chain = torch.ones(t, u, dtype=torch.bool, device=device).tril(self.ahead)
        trees = [chain if tree is None else upload(tree, device, torch.bool) for tree in self.trees]
        seen = (every < n)[:, None].repeat(1, t, 1)  # (B, T, S)
        return keys, seen.scatter_(2, slots[:, None].expand(-1, t, -1), torch.stack(trees))  # (B, T, U)
