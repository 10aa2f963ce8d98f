"""Building drafts: one tree shape that holds the nodes of every row, from continuations or from candidates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from operator import itemgetter

import torch

from specdec.speculation.candidates import Candidates
from specdec.speculation.draft import Draft, Found, State
from specdec.speculation.trees import MOST_NODES, Prices


def merge(rows: Sequence[Sequence[Sequence[int]]], device: torch.device | str = "cpu") -> tuple[Draft, list[list[int]]]:
    """A draft of each row's continuations of its root. Common prefixes become one path; earlier ones come first.

    Also returns, for each row, the block index at which each of its continuations ends.
    """
    trees, last = [], []
    for continuations in rows:
        tokens, parents, ends = list[int](), list[int](), list[int]()
        nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node
        for continuation in continuations:
            node = 0
            for token in continuation:
                if (node, token) not in nodes:
                    tokens.append(token)
                    parents.append(node)
                    nodes[node, token] = len(tokens)
                node = nodes[node, token]
            ends.append(node)
        trees.append((tokens, parents))
        last.append(ends)
    draft, places = in_one_shape(trees, device)
    return draft, [[own[node] for node in ends] for own, ends in zip(places, last, strict=True)]


def in_one_shape(
    trees: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device | str = "cpu"
) -> tuple[Draft, list[list[int]]]:
    """One draft of each row's tree: its tokens and their parents (0: the root, i + 1: node i), parents first.

    A node of the shape is the n-th child of its parent; rows that lack it have -1 there. Also returns, for each row,
    the block index of its root and of each of its nodes.
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


def worth_scoring(rows: Sequence[Candidates], limit: int, nodes: int | None, prices: Prices | None) -> list[Candidates]:
    """Each row's candidates that a draft keeps.

    nodes: number of nodes of a row; None: those worth their price, or ``limit`` if there are no prices.
    """
    counts = [limit if nodes is None else nodes] * len(rows)
    if prices is not None:
        every = [(score, row) for row, found in enumerate(rows) for score in sorted(found.scores)[-MOST_NODES:]]
        every.sort(key=itemgetter(0), reverse=True)
        count = prices.take([math.exp(score) for score, _ in every]) if nodes is None else sum(counts)
        taken = Counter(row for _, row in every[:count])
        counts = [taken[row] for row in range(len(rows))]
    return [found.best(count) for found, count in zip(rows, counts, strict=True)]


def draft_best(
    rows: Sequence[Candidates],
    limit: int,
    nodes: int | None,
    state: State,
    levels: int = 0,
    free: Sequence[Candidates] | None = None,
) -> Draft:
    """The draft of each row's best candidates, as ``worth_scoring`` says. levels, free: as in ``Found``.

    Without levels, ``free`` are the best ones. No row has candidates deeper than its entry of ``State.depths``.
    """
    rows = [found.within(most) if most < limit else found for found, most in zip(rows, state.depths, strict=True)]
    best = worth_scoring(rows, limit, nodes, state.prices) if levels or free is None else free
    draft, _ = in_one_shape([(found.tokens, found.parents) for found in best], state.cache.device)
    draft.found = Found(rows, levels, free)
    return draft
