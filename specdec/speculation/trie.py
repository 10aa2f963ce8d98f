"""One draft tree for all rows: common beginnings once, and one shape that holds the nodes of every row."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specdec.speculation.draft import Draft


def merge(rows: Sequence[Sequence[Sequence[int]]], device: torch.device | str = "cpu") -> tuple[Draft, list[list[int]]]:
    """A deterministic tree with each row's continuations of its root, common beginnings once, earlier ones first.

    Also returns, for each row, the block index at which each of its continuations ends.
    """
    trees, last = [], []
    for continuations in rows:
        tokens, parents, ends = list[int](), list[int](), list[int]()
        known: dict[tuple[int, int], int] = {}  # (parent, token) -> node
        for continuation in continuations:
            node = 0
            for token in continuation:
                if (node, token) not in known:
                    tokens.append(token)
                    parents.append(node)
                    known[node, token] = len(tokens)
                node = known[node, token]
            ends.append(node)
        trees.append((tokens, parents))
        last.append(ends)
    draft, places = in_one_shape(trees, device)
    return draft, [[own[node] for node in ends] for own, ends in zip(places, last, strict=True)]


def in_one_shape(
    trees: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device | str = "cpu"
) -> tuple[Draft, list[list[int]]]:
    """One draft for the tree of each row: its tokens and their parents (0: the root, i + 1: node i), parents first.

    A node is the child of that rank of its parent; rows that lack it have -1 there. Also returns, for each row, the
    block index of its root and of each of its nodes.
    """
    shape: list[int] = []  # the parent of each node
    slots: dict[tuple[int, int], int] = {}  # (parent, rank among its children) -> block index
    table, places = [], []
    for tokens, parents in trees:
        own, ranks, row = [0], dict[int, int](), dict[int, int]()
        for token, parent in zip(tokens, parents, strict=True):
            slot = own[parent], ranks.get(own[parent], 0)
            ranks[slot[0]] = slot[1] + 1
            if slot not in slots:
                shape.append(slot[0])
                slots[slot] = len(shape)
            own.append(slots[slot])
            row[slots[slot]] = token
        table.append(row)
        places.append(own)
    draft = Draft([[row.get(n, -1) for n in range(1, len(shape) + 1)] for row in table], tuple(shape), device=device)
    return draft, places
