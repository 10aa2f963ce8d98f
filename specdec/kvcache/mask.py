"""Masks: which cached keys each query of a pass may attend to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.base.devices import upload


class Chunk(int):
    """Used as a window: positions are divided into chunks of this size, and queries see the keys of their own."""


class Mask:
    """Which of S keys each query may attend to.

    query, keys: positions [B, T] and [B, S].
    visible: bool [B, T, S], or None: every key is visible to every query.
    causal: whether each query sees just the keys up to its own, the last T of S, and keys stand in order.
    ancestors: the ``tree`` of ``KVCache.register``, [T, U] or [B, T, U].
    memo: what runtimes derive from the mask; one mask serves many layers.
    """

    causal = False
    ancestors: Tensor | None = None

    def __init__(self, query: Tensor, keys: Tensor, visible: Tensor | None) -> None:
        self.query, self.length, self._given = query, keys.shape[1], (keys, visible)
        self.memo: dict[object, Tensor | None] = {}

    def _numbers(self) -> tuple[Tensor, Tensor | None]:
        """``keys`` and ``visible``."""
        return self._given

    def bool_mask(self, window: int | None = None) -> Tensor | None:
        """The mask as bool [B, 1, T, S] (True: attend), or None if nothing is hidden.

        window: a query sees only the last ``window`` positions, itself included, or those of its own ``Chunk``.
        """
        if window not in self.memo:
            keys, visible = self._numbers()
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


class RowMask(Mask):
    """The slots that the tokens of a pass over the rows of a cache may attend to. Its tensors are made when needed.

    query: positions [B, T], or [1, T] if rows differ in their number of tokens and lie one behind the other; there is
        no ``bool_mask`` then.
    committed: number of committed tokens of each row.
    counts: number of tokens of each row in the pass.
    trees: of each row, bool [its tokens, its uncommitted slots]; None: each token sees the slots up to its own.
    ahead: number of uncommitted slots before the tokens.
    places: positions of each row's uncommitted slots, [U] each.
    whole: whether all tokens are committed together.
    """

    def __init__(
        self,
        query: Tensor,
        committed: list[int],
        counts: Sequence[int],
        trees: Sequence[Tensor | None],
        ahead: int,
        places: Sequence[Tensor] | Tensor,
        whole: bool = False,
    ) -> None:
        self.query, self.committed, self.counts, self.trees = query, committed, counts, trees
        self.ahead, self.places, self.whole = ahead, places, whole
        self.chains = all(tree is None for tree in trees)
        self.causal = self.chains and len(set(committed)) == 1
        self.length = max(committed) + ahead + max(counts)
        self.memo = {}

    def tree(self, row: int, window: int | None) -> Tensor | None:
        """The contiguous tree of a row within ``window``."""
        key = row, window
        if key not in self.memo:
            tree = self.trees[row]
            if tree is not None and window is not None and window < tree.shape[1]:
                place = self.places[row]  # (U,)
                tree = tree & (place[-tree.shape[0] :, None] - place < window)
            self.memo[key] = None if tree is None else tree.contiguous()
        return self.memo[key]

    def _numbers(self) -> tuple[Tensor, Tensor | None]:
        (batch, t), device, u = self.query.shape, self.query.device, self.ahead + self.query.shape[1]
        n, every = upload([[n] for n in self.committed], device), torch.arange(self.length, device=device)
        slots = n + torch.arange(u, device=device)  # (B, U), of uncommitted tokens
        places = self.places if isinstance(self.places, Tensor) else torch.stack([*self.places])
        keys = every.repeat(batch, 1).scatter_(1, slots, places)  # (B, S)
        if self.causal and t == 1:
            return keys, None
        chain = torch.ones(t, u, dtype=torch.bool, device=device).tril(self.ahead)
        trees = [chain if tree is None else upload(tree, device, torch.bool) for tree in self.trees]
        seen = (every < n)[:, None].repeat(1, t, 1)  # (B, T, S)
        return keys, seen.scatter_(2, slots[:, None].expand(-1, t, -1), torch.stack(trees))  # (B, T, U)
