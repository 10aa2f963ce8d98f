"""Builds drafts: one tree shape that holds the nodes of every row (sequence), from continuations or candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

import torch

from specdec.speculation.candidates import Candidates, CandidateSet
from specdec.speculation.draft import Draft
from specdec.speculation.state import State
from specdec.speculation.trees import MOST_NODES, Prices


def merge(rows: Sequence[Sequence[Sequence[int]]], device: torch.device | str = "cpu") -> tuple[Draft, list[list[int]]]:
    """Merge each row's continuations into a tree, in which common prefixes are one path; earlier ones come first.

    Returns (draft, ends): ends[b][c] is the block index of the last token of row b's continuation c. Block index 0 is
    the root, the last token of the row's text, and i + 1 is node i of the draft.

    rows: rows[b][c] has the token ids of a continuation after the root; an empty one ends at the root.
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
    draft, indices = in_one_shape(trees, device)
    return draft, [[own[node] for node in ends] for own, ends in zip(indices, last, strict=True)]


def in_one_shape(
    trees: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device | str = "cpu"
) -> tuple[Draft, list[list[int]]]:
    """Merge the trees of all rows into a draft, whose one tree shape holds the nodes of every row.

    A node of the common shape is the n-th child of its parent; a row that lacks it has token -1 there. Returns (draft,
    indices): indices[b] has the block index of the root (0) and of each node of row b's tree in the draft, where block
    index i + 1 is node i.

    trees: for each row (tokens, parents): token ids, and the parent of each node (0: the root, i + 1: node i), parents
        before children.
    device: the device of the draft's tensors.
    """
    if len(trees) == 1:
        [(tokens, parents)] = trees
        return Draft([[*tokens]], tuple(parents), device=device), [[*range(1 + len(tokens))]]
    shape: list[int] = []  # the parent of each node
    found: dict[tuple[int, int], int] = {}  # (parent, rank among its children) -> block index
    table, indices = [], []
    for tokens, parents in trees:
        own, ranks, row = [0], dict[int, int](), dict[int, int]()
        for token, parent in zip(tokens, parents, strict=True):
            child = own[parent], ranks.get(own[parent], 0)
            ranks[child[0]] = child[1] + 1
            if child not in found:
                shape.append(child[0])
                found[child] = len(shape)
            own.append(found[child])
            row[found[child]] = token
        table.append(row)
        indices.append(own)
    draft = Draft([[row.get(n, -1) for n in range(1, len(shape) + 1)] for row in table], tuple(shape), device=device)
    return draft, indices


def worth_scoring(rows: Sequence[Candidates], limit: int, nodes: int | None, prices: Prices | None) -> list[Candidates]:
    """Return, for each row, the tree of its likeliest candidates that the model is to score.

    With prices, the candidates of all rows compete, so that some rows may get none. A row's own maximum depth is not
    considered.

    rows: the candidates of each row.
    limit: maximum number of nodes of a row if neither ``nodes`` nor ``prices`` are given.
    nodes: maximum number of nodes of a row or, with prices, of all rows on average; None: as many as add more expected
        accepted tokens than they cost.
    prices: what scoring nodes costs, in accepted tokens; None: unknown.
    """
    counts = [limit if nodes is None else nodes] * len(rows)
    if prices is not None:
        beyond = prices.beyond or [0.0] * len(rows)
        every = [
            (math.exp(score) - beyond[row], row)
            for row, found in enumerate(rows)
            for score in sorted(found.scores)[-MOST_NODES:]
        ]
        every.sort(key=itemgetter(0), reverse=True)
        count = prices.take([net for net, _ in every]) if nodes is None else sum(counts)
        taken = [row for _, row in every[:count]]
        counts = [taken.count(row) for row in range(len(rows))]
    return [found.best(count) for found, count in zip(rows, counts, strict=True)]


def draft_best(
    rows: Sequence[Candidates],
    limit: int,
    nodes: int | None,
    state: State,
    levels: int = 0,
    without_levels: Sequence[Candidates] | None = None,
) -> Draft:
    """Return a draft of each row's best candidates, none deeper than the row's ``state.depths``.

    rows: the candidates of each row. limit: maximum depth of a draft; also the maximum number of nodes of a row if
        neither ``nodes`` nor ``state.prices`` are given.
    nodes: maximum number of nodes of a row, on average with prices; None: as many as add more expected accepted tokens
        than they cost.
    state: the rows of the batch, with ``prices``: what scoring a node costs (None: unknown).
    levels: number of draft levels (depths of the tree), each one pass of the drafter; 0: none was needed.
    without_levels: for each row the nodes that would be drafted without any such pass; they are the draft if ``levels``
        is 0. None: there is no such draft.
    """
    rows = [found.within(most) if most < limit else found for found, most in zip(rows, state.depths, strict=True)]
    best = worth_scoring(rows, limit, nodes, state.prices) if levels or without_levels is None else without_levels
    draft, _ = in_one_shape([(found.tokens, found.parents) for found in best], state.cache.device)
    draft.found = CandidateSet(rows, levels, without_levels)
    return draft
