"""The best tree for a node budget: against all trees by brute force, and what is refused."""

import math
import random
from itertools import chain, combinations, product
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest

from specdec.speculation.candidates import Candidates
from specdec.speculation.tree_builder import draft_best
from specdec.speculation.trees import Prices, likeliest_paths


def by_table(accuracy: list[list[float]], budget: int) -> Candidates:
    """accuracy[depth][token]: the probability that the token is right at that depth."""
    every = [[(token, p, p) for token, p in enumerate(own)] for own in accuracy]
    return likeliest_paths(lambda path: every[len(path)] if len(path) < len(every) else (), budget)


@pytest.mark.parametrize("seed", range(3))
def test_no_tree_of_as_many_nodes_is_expected_to_keep_more(seed: int) -> None:
    rng = random.Random(seed)
    accuracy = [[rng.random() for _ in range(2)] for _ in range(3)]  # ranks need not be in order
    value = {p: prod(accuracy[d][r] for d, r in enumerate(p)) for n in (1, 2, 3) for p in product(range(2), repeat=n)}
    for budget in (1, 2, 3, 5, 7):
        tree, nodes = by_table(accuracy, budget), list[tuple[int, ...]]()
        for token, parent in zip(tree.tokens, tree.parents, strict=True):
            nodes.append((*(nodes[parent - 1] if parent else ()), token))
        assert len(set(nodes)) == budget
        trees = (s for s in combinations(value, budget) if all(p[:-1] in s or len(p) == 1 for p in s))
        assert sum(value[p] for p in nodes) == pytest.approx(max(sum(value[p] for p in s) for s in trees))


def candidates(rng: random.Random, count: int, base: int) -> Candidates:
    """Random ones; the token of node i is base + i."""
    parents, scores = [rng.randint(0, node) for node in range(count)], list[float]()
    for parent in parents:
        scores.append((scores[parent - 1] if parent else 0.0) + math.log(rng.uniform(0.05, 1.0)))
    return Candidates(scores, list(range(base, base + count)), parents, [[1.0] * count])


def closed(found: Candidates) -> list[tuple[int, ...]]:
    """All sets of nodes that hold each node's parent."""
    nodes = range(len(found.tokens))
    every = chain.from_iterable(combinations(nodes, size) for size in range(len(nodes) + 1))
    return [each for each in every if all(found.parents[i] == 0 or found.parents[i] - 1 in each for i in each)]


@pytest.mark.parametrize("seed", range(10))
def test_no_other_draft_of_all_rows_candidates_is_worth_more_than_the_one_that_is_built(seed: int) -> None:
    rng = random.Random(seed)
    rows = [candidates(rng, rng.randint(0, 5), 100 * number) for number in range(rng.randint(1, 3))]
    nodes = [0.0]
    for _ in range(16):  # a price may rise by steps
        nodes.append(nodes[-1] + rng.choice([0.0, 0.1, 0.3]))
    state: Any = SimpleNamespace(prices=Prices(nodes), cache=SimpleNamespace(device="cpu"), depths=[12] * len(rows))
    draft = draft_best(rows, 12, None, state, levels=1)

    def worth(taken: tuple[tuple[int, ...], ...]) -> float:
        sums = [math.exp(found.scores[i]) for found, own in zip(rows, taken, strict=True) for i in own]
        return sum(sums) - nodes[len(sums)]

    built = []
    for row, found in enumerate(rows):
        paths = draft.paths(row)
        built.append(tuple(path[-1] - 100 * row for path in paths))
        for path, node in zip(paths, built[-1], strict=True):  # each is where it was found
            assert path[:-1] == ([] if not found.parents[node] else paths[built[-1].index(found.parents[node] - 1)])
    assert worth(tuple(built)) == pytest.approx(max(map(worth, product(*map(closed, rows)))))


def test_certain_candidates_make_a_chain_and_useless_ones_are_left_out() -> None:
    assert by_table([[1.0, 0.0]] * 3, 9).parents == [0, 1, 2]
    assert by_table([[0.0, 0.0]], 5).parents == []


def test_as_many_nodes_are_taken_as_bring_most_beyond_their_price() -> None:
    likely = [0.9, 0.5, 0.3, 0.2, 0.05]
    assert Prices([0.1 * n for n in range(9)]).take(likely) == 4
    assert Prices([0.0, 2.0, *[2.0] * 8]).take(likely) == 0  # together they bring 1.95
    assert Prices([0.0, 1.9, *[1.9] * 8]).take(likely) == 5
    steps = Prices([0.0, 0.0, 0.0, 0.4, 0.4, 0.4])  # the third has a further pass begin, which two more fill
    assert steps.take(likely) == 5


def chain_of(*likely: float) -> Candidates:
    """A free draft whose tokens are accepted with these probabilities."""
    scores = [math.log(p) for p in likely]
    return Candidates(scores, list(range(len(likely))), list(range(len(likely))), [[1.0] * len(likely)])


def levels(price: float, rate: float, *free: Candidates, first: float = 0.0, tried: bool = False) -> int:
    rates, nodes = [[rate] * 8 for _ in free], [0.05 * n for n in range(33)]
    return Prices(nodes, price, first, rates, level_allowance=float(tried)).levels(free)


def test_a_learned_level_pays_where_it_is_right_and_the_free_draft_is_not() -> None:
    none = Candidates.none()
    assert levels(0.4, 0.6, none) == 1 and levels(0.4, 0.9, none) == 7  # an eighth adds 0.43 and costs 0.45
    assert levels(0.4, 0.4, none) == 0 and levels(0.4, 0.6, none, first=0.2) == 0
    assert levels(0.2, 0.6, chain_of(*(0.95**level for level in range(1, 9)))) == 0
    assert levels(0.25, 0.6, chain_of(0.9)) == 3  # the free draft soon ends, the levelled one goes on
    assert levels(1.05, 0.6, none) == 0 and levels(1.05, 0.6, *[none] * 4) > 0  # a level serves all rows
    assert levels(1.05, 0.6, none, tried=True) == 1


def test_a_level_pays_less_where_no_other_node_is_scored() -> None:
    """A pass over two tokens may cost much more than one over a single token, and one over three hardly more."""
    prices = Prices([0.0, *(0.7 + 0.01 * n for n in range(32))], 0.45, rates=[[0.6] * 8])
    assert not prices.levels() and prices.levels([chain_of(0.2)])


def test_levels_serve_the_rows_that_may_draft_as_deep() -> None:
    """A row without levels neither adds tokens nor pays, and one with fewer adds none beyond them."""
    nodes, rates = [0.01 * n for n in range(60)], [0.9] * 6
    alone = Prices(nodes, 0.3, rates=[rates])
    for others in ([], [[]], [[], []]):
        prices = Prices(nodes, 0.3, rates=[*others, rates, *others])
        assert prices.best_levels() == alone.best_levels() and prices.limits(6, 1) == alone.limits(6, 1)
    short = Prices(nodes, 0.8, rates=[rates, rates[:2]])
    assert short.levels() == 2 < Prices(nodes, 0.8, rates=[rates, rates]).levels()
