"""The best tree for a node budget: against all trees by brute force, and what is refused."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import chain, combinations, product
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest

from specdec.runtimes.tree_drafting import Candidates
from specdec.speculation.draft import Draft
from specdec.speculation.trees import LEARNED, Prices, best_first
from specdec.speculation.trie import draft_best


def paths(tree) -> list[tuple[int, ...]]:
    """The ranks from the root to each node."""
    out: list[tuple[int, ...]] = [()]
    for parent, rank in zip(tree.parents, tree.ranks, strict=True):
        out.append((*out[parent], rank))
    return out[1:]


@pytest.mark.parametrize("seed", range(6))
def test_no_tree_of_as_many_nodes_is_expected_to_keep_more(seed: int) -> None:
    rng = random.Random(seed)
    accuracy = [[rng.random() for _ in range(2)] for _ in range(3)]  # ranks need not be in order
    value = {p: prod(accuracy[d][r] for d, r in enumerate(p)) for n in (1, 2, 3) for p in product(range(2), repeat=n)}
    for budget in (1, 2, 3, 5, 7):
        tree = best_first(accuracy, budget)[0]
        nodes = paths(tree)
        assert len(set(nodes)) == budget
        trees = (s for s in combinations(value, budget) if all(p[:-1] in s or len(p) == 1 for p in s))
        assert sum(value[p] for p in nodes) == pytest.approx(max(sum(value[p] for p in s) for s in trees))


def candidates(rng: random.Random, count: int, base: int) -> Candidates:
    """Random ones; the token of node i is base + i."""
    parents, scores = [rng.randint(0, node) for node in range(count)], list[float]()
    for parent in parents:
        scores.append((scores[parent - 1] if parent else 0.0) + math.log(rng.uniform(0.05, 1.0)))
    return Candidates(scores, list(range(base, base + count)), parents)


def closed(found: Candidates) -> list[tuple[int, ...]]:
    """All sets of nodes that hold each node's parent."""
    nodes = range(len(found.tokens))
    every = chain.from_iterable(combinations(nodes, size) for size in range(len(nodes) + 1))
    return [each for each in every if all(found.parents[i] == 0 or found.parents[i] - 1 in each for i in each)]


@pytest.mark.parametrize("seed", range(30))
def test_no_other_draft_of_all_rows_candidates_is_worth_more_than_the_one_that_is_built(seed: int) -> None:
    rng = random.Random(seed)
    rows = [candidates(rng, rng.randint(0, 5), 100 * number) for number in range(rng.randint(1, 3))]
    power, nodes = rng.choice([0.7, 1.0, 2.0]), [0.0]
    for _ in range(16):  # a price may rise by steps
        nodes.append(nodes[-1] + rng.choice([0.0, 0.1, 0.3]))
    state: Any = SimpleNamespace(prices=Prices(nodes, exponent=power), cache=SimpleNamespace(device="cpu"))
    draft = draft_best(rows, 12, None, state, levels=1)

    def worth(taken: tuple[tuple[int, ...], ...]) -> float:
        sums = [math.exp(power * found.scores[i]) for found, own in zip(rows, taken, strict=True) for i in own]
        return sum(sums) - nodes[len(sums)]

    built = []
    for row, found in enumerate(rows):
        paths = draft.paths(row)
        built.append(tuple(path[-1] - 100 * row for path in paths))
        for path, node in zip(paths, built[-1], strict=True):  # each is where it was found
            assert path[:-1] == ([] if not found.parents[node] else paths[built[-1].index(found.parents[node] - 1)])
    assert worth(tuple(built)) == pytest.approx(max(map(worth, product(*map(closed, rows)))))


def test_a_tree_is_a_draft_s_shape_and_grows_node_by_node() -> None:
    accuracy = [[0.6, 0.2, 0.1], [0.5, 0.3], [0.4]]
    tree = best_first(accuracy, 6)[0]
    assert [d - 1 for d in Draft(None, tree.parents).depths()[1:]] == tree.depths()  # type: ignore[arg-type]
    assert all(rank < len(accuracy[depth]) for depth, rank in zip(tree.depths(), tree.ranks, strict=True))
    smaller = best_first(accuracy, 4)[0]
    assert (smaller.parents, smaller.ranks) == (tree.parents[:4], tree.ranks[:4])


def test_certain_heads_make_a_chain_and_useless_candidates_are_left_out() -> None:
    assert best_first([[1.0, 0.0]] * 3, 9)[0] == ((0, 1, 2), (0, 0, 0))
    assert best_first([[0.0, 0.0]], 5)[0].parents == ()


def test_as_many_nodes_are_taken_as_bring_most_beyond_their_price() -> None:
    likely = [0.9, 0.5, 0.3, 0.2, 0.05]
    assert Prices([0.1 * n for n in range(9)]).take(likely) == 4
    assert Prices([0.0, 2.0, *[2.0] * 8]).take(likely) == 0  # together they bring 1.95
    assert Prices([0.0, 1.9, *[1.9] * 8]).take(likely) == 5
    steps = Prices([0.0, 0.0, 0.0, 0.4, 0.4, 0.4])  # the third has a further pass begin, which two more fill
    assert steps.take(likely) == 5 and steps.expected == pytest.approx(1.95)
    assert steps.take(likely, exactly=2) == 2 and steps.expected == pytest.approx(1.4)
    assert Prices([float(n) for n in range(9)]).take(likely, least=3) == 3


def test_another_level_is_paid_by_all_rows_together() -> None:
    prices = Prices((), level=0.5, node=0.25)
    assert prices.pays([0.8]) and not prices.pays([0.7])
    assert prices.pays([0.5, 0.5]) and not prices.pays([0.7, 0.2, 0.2, 0.2])  # a node that does not pay is not scored


def test_a_learned_level_pays_where_it_is_right_and_the_free_draft_is_not() -> None:
    prices = Prices([0.05 * n for n in range(33)], level=0.4)
    assert prices.learned_pays([0.0] * 4, 0, 1)
    assert prices.free == 0 and prices.added == pytest.approx(
        LEARNED + LEARNED**2 + LEARNED**3
    )  # a fourth does not pay
    assert not replace(prices, trust=0.3).learned_pays([0.0] * 4, 0, 1)
    assert not prices.learned_pays([0.9**level for level in range(1, 9)], 8, 1)
    assert prices.learned_pays([0.9, 0.2, 0.1, 0.0], 3, 1)  # the free draft soon ends, the learned one goes on
    dear = replace(prices, level=1.05)
    assert not dear.learned_pays([0.0] * 4, 0, 1) and dear.learned_pays([0.0] * 4, 0, 4)  # a level serves all rows


def test_a_learned_level_pays_less_where_no_other_node_is_scored() -> None:
    """A pass over two tokens may cost much more than one over a single token, and one over three hardly more."""
    prices = Prices([0.0, *(0.7 + 0.01 * n for n in range(32))], level=0.45)
    assert not prices.learned_pays([0.0] * 4, 0, 1) and prices.learned_pays([0.2, 0.0, 0.0, 0.0], 1, 1)
