"""Merging continuations that were found, not drafted token by token, into one draft tree for all rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specdec.speculation.draft import Draft


def merge(rows: Sequence[Sequence[Sequence[int]]], device: torch.device | str = "cpu") -> tuple[Draft, list[list[int]]]:
    """A deterministic tree with each row's continuations of its root, common beginnings once, earlier ones first.

    The tree's shape is what the rows need together. Also returns, for each row, the block index at which each of its
    continuations ends.
    """
    parents: list[int] = []
    slots: dict[tuple[int, int], int] = {}  # (parent, rank among its children) -> block index, in the common shape
    found, ends = [], []
    for continuations in rows:
        own: dict[tuple[int, int], int] = {}  # (parent, token) -> block index, in this row
        ranks: dict[int, int] = {}  # children that this row has given to a node
        tokens: dict[int, int] = {}
        last = []
        for continuation in continuations:
            node = 0
            for token in continuation:
                if (node, token) not in own:
                    slot = (node, ranks.get(node, 0))
                    ranks[node] = slot[1] + 1
                    if slot not in slots:
                        parents.append(node)
                        slots[slot] = len(parents)
                    own[node, token] = slots[slot]
                    tokens[slots[slot]] = token
                node = own[node, token]
            last.append(node)
        found.append(tokens)
        ends.append(last)
    table = [[tokens.get(node, -1) for node in range(1, len(parents) + 1)] for tokens in found]
    return Draft(table, tuple(parents), device=device), ends
