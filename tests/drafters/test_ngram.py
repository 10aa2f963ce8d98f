"""N-grams: the tree against all paths, what is matched and forgotten, the prior, constraints and noise."""

import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel
from zoo import finish, m2r2

from specdec import SpecDecoder
from specdec.drafters.joined import JoinedDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.engine.depth import FixedDepth
from specdec.engine.depth.calibration import RAW_PROBABILITIES
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.runtimes.draft_path import KNOTS, calibrated
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation.candidates import Candidates
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Drafter
from specdec.speculation.ngram import MATCH_TOKENS, Grower, Prior, SortedTexts, Texts
from specdec.speculation.sampling import Noise, RowSampler, Sampler, SamplingParams
from specdec.speculation.state import State
from specdec.speculation.tree_builder import worth_scoring
from specdec.speculation.trees import MOST_NODES, Prices
from specdec.verifiers.exact import ExactVerifier

LENGTHS, ESCAPE, RECENCY = (1, 2, 3, 4, 6, 9, 13), 8, 0.9


def texts(part: list[int], ends: bool = True) -> Texts:
    """ends: whether other text may follow."""
    made = Texts(1024, 32)
    made.add([*part, -1] if ends else part)
    return made


def occurrences(window: list[int], text: list[int]) -> list[tuple[int, int]]:
    """The token and the length of each match, the latest first; single tokens where no two match."""
    found = []
    for place in range(len(window) - 1, 0, -1):
        alike = 0
        while alike < min(MATCH_TOKENS, len(text), place) and window[place - 1 - alike] == text[-1 - alike] >= 0:
            alike += 1
        if alike and window[place] >= 0:
            found.append((window[place], alike))
    pairs = [each for each in found if each[1] > 1][:32]
    return pairs or found[:8]


def followers(text: list[int], base: dict[int, float], sources: list[tuple[list[int], float]]) -> dict[int, float]:
    """``ngram.c``'s blend, written plainly."""
    p = dict(base)
    for window, trust in sources:
        found = occurrences(window, text)
        for level, least in enumerate(LENGTHS):
            upper = [*LENGTHS, MATCH_TOKENS + 1][level + 1]
            if not any(least <= length < upper for _, length in found):
                continue
            weights = [(token, RECENCY**n) for n, (token, length) in enumerate(found) if length >= least]
            total = sum(weight for _, weight in weights)
            share = trust * total / (trust * total + ESCAPE * least**-1.5)
            p = {token: (1 - share) * each for token, each in p.items()}
            for token, weight in weights:
                p[token] = p.get(token, 0.0) + share * weight / total
    return p


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_tree_has_the_likeliest_paths_and_their_probabilities(data: st.DataObject) -> None:
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    vocab, limit, nodes = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    counted = [rng.randrange(vocab) for _ in range(60)]
    stored, own = [rng.randrange(vocab) for _ in range(40)], [rng.randrange(vocab) for _ in range(30)]
    trust = rng.choice([0.25, 1.0])
    grower = Grower(Prior.count(np.array(counted, np.int32), vocab), least=0.0)
    mine = Texts(1024, 32)
    mine.add(own)
    found = grower(own, [(texts(stored), trust), (mine, 1.0)], limit, nodes=nodes)
    after = defaultdict(Counter)
    for a, b in itertools.pairwise(counted):
        after[a][b] += 1
    values: dict[tuple[int, ...], float] = {(): 1.0}
    for depth in range(limit):
        for path in [path for path in values if len(path) == depth]:
            text = own + list(path)
            base = {t: n / (after[text[-1]].total() + 2) for t, n in after[text[-1]].items()}
            for token, p in followers(text, base, [([*stored, -1], trust), (own, 1.0)]).items():
                values[(*path, token)] = values[path] * p
    del values[()]
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(found.tokens, found.parents, strict=True):
        paths.append((*paths[parent], token))
    assert len(set(paths)) == len(paths) == 1 + min(nodes, len(values))
    for path, score in zip(paths[1:], found.scores, strict=True):
        assert math.exp(score) == pytest.approx(values[path], rel=1e-3)
    best = sorted(values.values(), reverse=True)[: len(found.tokens)]
    assert [math.exp(score) for score in found.scores] == pytest.approx(best, rel=1e-3)


def tree(*nodes: tuple[int, int, float]) -> Candidates:
    """A learned drafter's: the token, the parent and the probability of each node."""
    tokens, parents, said = (list(part) for part in zip(*nodes, strict=True))
    scores = list[float]()
    for parent, p in zip(parents, said, strict=True):
        scores.append((scores[parent - 1] if parent else 0.0) + math.log(max(p, 1e-9)))
    return Candidates(scores, tokens, parents, [said])


def test_a_long_match_overrules_a_learned_tree_and_goes_on_beyond_it() -> None:
    text = [*range(10, 30), *range(10, 20)]
    learned = tree((7, 0, 0.5), (20, 0, 0.3), (8, 1, 0.9))
    found = Grower()(text, [(texts(text, ends=False), 1.0)], 8, learned)
    assert found.tokens[0] == 20 and 7 in found.tokens and set(range(20, 28)) <= set(found.tokens)
    alone = Grower()([1, 2, 3], [], 8, learned)
    assert alone.tokens == [7, 8, 20] and alone.parents == [0, 1, 0]
    assert [math.exp(score) for score in alone.scores] == pytest.approx([0.5, 0.45, 0.3])
    assert alone.raw == [[0.0] * 3, [0.0] * 3, pytest.approx([0.5, 0.9, 0.3])]


COPY = [1, 2, 3, 4, 5, 9] * 3 + [1, 2]


def grown(learned: Candidates | None = None, tables: Sequence[Sequence[float]] = ()) -> Candidates:
    """What follows ``COPY``, which has gone on with 3 each time: the first token of each path."""
    found = Grower(least=0.0)(COPY, [(texts(COPY, ends=False), 1.0)], 1, learned, tables=tables)
    assert set(found.parents) == {0}
    return found


def likely(found: Candidates) -> dict[int, float]:
    return {token: math.exp(score) for token, score in zip(found.tokens, found.scores, strict=True)}


def test_what_each_source_says_of_a_token_is_told_apart() -> None:
    """N-grams alone, n-grams where the learned drafter has other tokens, and the learned drafter."""
    [[sure]] = grown().raw
    assert 0.7 < sure < 1
    other, same = grown(tree((7, 0, 0.4))), grown(tree((7, 0, 0.4), (3, 0, 0.3)))
    assert other.tokens == [3, 7] and same.tokens == [3, 7]
    assert other.raw == [[0.0, 0.0], pytest.approx([sure, 0.0]), pytest.approx([0.0, 0.4])]
    assert same.raw == [[0.0, 0.0], [0.0, 0.0], pytest.approx([0.3, 0.4])]
    # A token of both is as likely as the surer one says; less likely ones share what the likeliest leaves.
    assert likely(other) == pytest.approx({3: sure, 7: 1 - sure}) and likely(same) == pytest.approx(likely(other))


@pytest.mark.parametrize("p", [0.003, 0.01, 0.1, 0.4, 0.5, 0.73, 0.97, 0.99999])
def test_tables_say_how_likely_each_kind_is_as_they_do_in_torch(p: float) -> None:
    rng = random.Random(0)
    table = sorted(rng.random() for _ in KNOTS)
    flat, never = [1.0] * len(KNOTS), [0.0] * len(KNOTS)
    expected = float(calibrated(torch.tensor([p]), torch.tensor([table])))
    learned = Grower(least=0.0)([1, 2, 3], [], 1, tree((7, 0, p)), tables=(flat, flat, table))
    assert likely(learned) == pytest.approx({7: expected}, rel=1e-4)
    [[sure]] = grown().raw
    own = float(calibrated(torch.tensor([sure]), torch.tensor([table])))
    assert likely(grown(None, (table, never, flat))) == pytest.approx({3: own}, rel=1e-4)
    assert likely(grown(tree((7, 0, p)), (flat, table, never))) == pytest.approx({3: own}, rel=1e-4)


def test_tables_decide_which_source_leads() -> None:
    learned = tree((7, 0, 0.6), (8, 1, 0.9))
    low, high = [0.1] * len(KNOTS), [0.8] * len(KNOTS)
    orders = [
        Grower()(COPY, [(texts(COPY, ends=False), 1.0)], 2, learned, tables=(each, each, other)).tokens[:2]
        for each, other in ((low, high), (high, low))
    ]
    assert orders == [[7, 8], [3, 4]]


def test_ngrams_follow_a_learned_path_and_a_learned_drafter_goes_on_behind_their_nodes() -> None:
    """Nodes of probability 0 are those that n-grams had given the learned drafter, which drafted behind one."""
    learned = tree((7, 0, 0.3), (3, 0, 0.0), (30, 2, 0.95), (31, 3, 0.9))
    found = Grower(least=1e-5)(COPY, [(texts(COPY, ends=False), 1.0)], 3, learned)
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(found.tokens, found.parents, strict=True):
        paths.append((*paths[parent], token))
    assert {(3,), (3, 4), (3, 30), (3, 30, 31), (7,)} <= set(paths)
    ending = Grower()([6, 7, 8, 9, 6], [(texts([6, 7, 8, 9, 6], ends=False), 1.0)], 3, tree((5, 0, 0.5), (7, 1, 0.9)))
    assert 8 in ending.tokens  # what follows 7 in the text


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.0, 0.3), min_size=1, max_size=MOST_NODES), st.integers(0, 10**6))
def test_only_nodes_that_are_never_worth_their_price_are_left_out(added: list[float], seed: int) -> None:
    rng = random.Random(seed)
    text, prices = [rng.randrange(6) for _ in range(60)], Prices([0.0, *itertools.accumulate(added)])
    sources = [(texts(text, ends=False), 1.0)]
    every, some = Grower()(text, sources, 6), Grower()(text, sources, 6, prices=prices.nodes)
    assert worth_scoring([some], 6, None, prices) == worth_scoring([every], 6, None, prices)
    assert len(some.tokens) <= len(every.tokens)


def test_the_window_forgets_the_oldest() -> None:
    window = Texts(64, 32)
    for n in range(40):
        window.add([100 + n, 200 + n, 300 + n, -1])
    grow = lambda text: Grower()(text, [(window, 1.0)], 4).tokens  # noqa: E731
    assert grow([100 + 39, 200 + 39])[0] == 300 + 39
    assert grow([100, 200]) == []


def test_texts_of_other_lengths_and_tokens_are_matched_alike_before_and_after_the_window_grows() -> None:
    rng = random.Random(3)
    ids = [rng.randrange(50) for _ in range(3000)]
    small, large = Texts(4096, 32), Texts(4096, 4096)
    for n in range(0, 3000, 7):
        small.add(ids[n : n + 7])
    large.add(ids)
    for n in range(20, 3000, 311):
        trees = [Grower()(ids[:n], [(each, 1.0)], 6) for each in (small, large)]
        assert trees[0] == trees[1]


def ending(ids: list[int], place: int) -> list[int]:
    """The tokens before a place, the last first, up to the beginning of its text."""
    return [*itertools.takewhile(lambda token: token >= 0, ids[max(place - MATCH_TOKENS, 0) : place][::-1])]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(0, 400))
def test_sorted_texts_are_in_order_and_give_the_longest_matches(seed: int, vocab: int, size: int) -> None:
    rng = random.Random(seed)
    ids = [rng.randrange(-1, vocab) for _ in range(size)]
    array = np.array(ids, np.int32)
    order = SortedTexts.sort(array)
    assert sorted(order.tolist()) == [*range(size)]
    keys = [ending(ids, place) for place in order.tolist()]
    assert keys == sorted(keys)
    text = [rng.randrange(vocab) for _ in range(rng.choice([1, 5, 30]))]
    grower = Grower(least=0.0)
    found = grower(text, [(SortedTexts(array, order), 1.0)], 1)
    longest = sorted(occurrences(ids, text), key=lambda each: -each[1])
    if not longest or longest[0][1] < 2:
        assert not found.tokens  # single tokens are left to the prior
    else:
        leading = {token for token, length in longest if length == longest[0][1]}
        assert set(found.tokens) <= {token for token, _ in longest} and (
            len(longest) > 16 or leading <= {*found.tokens}
        )


def test_a_long_text_is_followed_in_sorted_texts_to_its_end() -> None:
    ids = np.array([-1, *range(100, 140), -1, 7, 120, 9, -1], np.int32)
    found = Grower()([*range(90, 120)], [(SortedTexts(ids, SortedTexts.sort(ids)), 1.0)], 30)
    assert found.tokens == [*range(120, 140)] and found.parents == [*range(20)]


def test_under_a_mask_only_what_is_allowed_is_drafted_and_an_error_comes_through() -> None:
    own = Texts(1024)
    text = [1, 2, 3, 9, 1, 2, 4, 9, 1, 2]
    own.add(text)
    asked = list[list[int]]()

    def masks(path: list[int]) -> torch.Tensor | None:
        asked.append(path)
        allowed = torch.ones(10, dtype=torch.bool)
        allowed[3] = False
        return allowed if len(path) < 2 else None

    found = Grower()(text, [(own, 1.0)], 4, None, masks)
    assert 3 not in found.tokens and found.tokens[0] == 4 and max(map(len, asked)) == 2
    assert math.exp(found.scores[0]) <= 1

    with pytest.raises(KeyboardInterrupt):
        Grower()(text, [(own, 1.0)], 4, None, Mock(side_effect=KeyboardInterrupt))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), position=st.integers(0, 10**6))
def test_the_noise_of_the_target_decides_between_likely_followers(seed: int, position: int) -> None:
    prior, noise = Prior.count(np.array([1, 2, -1, 1, 3, -1] * 50, np.int32), 10), Noise(seed, 1)
    found = Grower(prior)([1], [], 1, noise=(noise, position))
    assert found.tokens[0] == 2 + int(noise(position, 10)[2:4].argmax())


def test_the_prior_counts_followers_and_no_pair_across_texts() -> None:
    prior = Prior.count(np.array([-1, 1, 2, -1, 1, 2, 1, 3, -1], np.int32), 5)
    own = slice(*prior.begin[1:3])
    assert prior.after[own].tolist() == [2, 3] and prior.p[own].tolist() == pytest.approx([2 / 5, 1 / 5])
    assert prior.begin.tolist() == [0, 0, 2, 3, 3, 3] and prior.after[2] == 1


def test_earlier_requests_are_matched_and_a_drafter_without_a_store_knows_none(llama: PreTrainedModel) -> None:
    prompt = [5, 6, 7, 8]
    for store, known in ((True, True), (0, False)):
        decoder = SpecDecoder(llama, None, NgramDrafter(store=store))
        first = decoder.generate(prompt, max_new_tokens=24, num_speculative_tokens=8)
        again = decoder.generate(prompt, max_new_tokens=24, num_speculative_tokens=8)
        assert first.token_ids == again.token_ids
        better = again.metrics.num_spec_steps < first.metrics.num_spec_steps
        assert better == known


def test_texts_of_one_scope_are_not_drafted_from_in_another(llama: PreTrainedModel) -> None:
    target, steps, made = TransformersTarget(llama), [], NgramDrafter()
    made.bind(target)
    engine = Engine(target, made, ExactVerifier(), FixedDepth(8))
    for scope in ("a", "b", "a"):
        request = Request([5, 6, 7, 8], 24, scope=scope)
        finish(engine, request)
        steps.append(request.metrics.num_spec_steps)
    assert steps[2] < steps[0] == steps[1]


class Levels(Drafter):
    """Drafts ``nodes`` by levels, and keeps what it was asked."""

    name = "levels"

    def __init__(self, nodes: Candidates) -> None:
        self.nodes, self.given = nodes, list[Sequence[Candidates] | None]()

    def propose(self, state: State, limit: int) -> Draft:
        raise AssertionError("it has candidates")

    def candidates(
        self, state: State, limit: int, given: Sequence[Candidates] | None = None
    ) -> list[Candidates] | None:
        self.given.append(given)
        return [self.nodes for _ in state.ids]


def pair(
    llama: PreTrainedModel, text: list[int], prices: Prices | None, rows: int = 1, learned: Candidates | None = None
) -> tuple[Draft, Levels]:
    """A draft of n-grams with a levelled drafter after ``text``."""
    target, second = TransformersTarget(llama), Levels(tree((30, 0, 0.9), (31, 1, 0.8)) if learned is None else learned)
    drafter = JoinedDrafter(NgramDrafter(prior=False), second)
    drafter.bind(target)
    sampler = Sampler([RowSampler(SamplingParams(), stream=n) for n in range(rows)])
    state = State(target, target.new_cache(), sampler, [text] * rows, prices)
    state.row_states = [drafter.begin() for _ in range(rows)]
    return drafter.propose(state, 8), second


def prices_of(level: float, rate: float = 0.6, rows: int = 1) -> Prices:
    tables = [[RAW_PROBABILITIES] * 3] * rows
    return Prices([0.01 * n for n in range(200)], level, rates=[[rate] * 8] * rows, tables=tables)


COPIED, NEW = [5, 6, 7, 8, 9, 10, 11] * 4, list(range(20, 40))


@pytest.mark.parametrize(
    ("text", "level", "rate", "rows", "alone"),
    [
        (COPIED, 0.35, 0.6, 1, True),
        (NEW, 0.35, 0.6, 1, False),  # nothing is matched
        (COPIED, 0.0, 0.6, 1, False),  # levels are as good as free
        (NEW, 1.05, 0.6, 1, True),  # they cost more than they can add
        (NEW, 1.05, 0.6, 4, False),  # for four rows, they may add more
        (COPIED, 1.4, 0.6, 4, True),
        (NEW, 0.35, 0.2, 1, True),  # they are rarely right
    ],
)
def test_ngrams_draft_alone_where_levels_cost_more_than_they_may_add(llama, text, level, rate, rows, alone) -> None:
    draft, second = pair(llama, text, prices_of(level, rate, rows), rows)
    assert (not second.given) == alone == (draft.found.levels == 0)
    assert len(draft.found.rows[0].raw) == (1 if alone else 3)
    assert not alone or text is NEW or len(draft.lists()[0]) > 3


def test_without_prices_and_before_anything_is_learned_as_many_nodes_are_drafted_as_are_asked_for(llama) -> None:
    branches = [token for other in range(20, 36) for token in (5, other, other + 20)] + [5]
    draft, second = pair(llama, branches, None, learned=Candidates.none())
    assert second.given and len(draft.lists()[0]) == 8


def test_levels_begin_where_ngrams_end(llama: PreTrainedModel) -> None:
    """The levelled drafter gets their tree, and the draft says what of it there would be without levels."""
    draft, second = pair(llama, [*range(40, 60), 5, 6, 7, *range(60, 80), 5, 6], prices_of(0.05))
    [[given]] = second.given
    assert given.tokens[0] == 7 and draft.found is not None and draft.found.without_levels is not None
    assert draft.found.levels == 2 and draft.found.without_levels[0].tokens[0] == 7
    assert {7, 30, 31} <= set(draft.lists()[0])
    assert [draft.found.rows[0].source(node) for node in draft.found.rows[0].path([30, 31])] == [2, 2]
    assert [draft.found.rows[0].source(node) for node in draft.found.rows[0].path([7])] == [1]


def test_a_draft_without_learned_candidates_is_one_of_ngrams_alone(llama: PreTrainedModel) -> None:
    """Else the costs of what drafts while nothing is learned would be those of a learned level."""
    for learned, levels in ((Candidates.none(), 0), (tree((30, 0, 0.9), (31, 1, 0.9)), 2)):
        draft, second = pair(llama, [5, 6, 7, 8] * 3, prices_of(0.0), learned=learned)
        assert second.given and draft.found is not None and draft.found.levels == levels and draft.lists()[0]


def test_sampled_tokens_are_drafted_by_the_learned_drafter(llama: PreTrainedModel, monkeypatch) -> None:
    target = TransformersTarget(llama)
    second = m2r2(target, 0, ((1, 2), (3, 4)), True, False)
    calls, candidates = list[Any](), second.candidates

    def spy(state: State, limit: int, given: Sequence[Candidates] | None = None) -> Any:
        calls.append(candidates(state, limit, given))
        return calls[-1]

    monkeypatch.setattr(second, "candidates", spy)
    drafter = JoinedDrafter(NgramDrafter(9), second)
    drafter.bind(target)
    engine = Engine(target, drafter, ExactVerifier(), FixedDepth(3))
    request = Request([5, 6, 7, 5, 6, 7, 5, 6], 12, RowSampler(SamplingParams(temperature=1.0, seed=3)))
    finish(engine, request)
    assert len(calls) == sum(drafted > 0 for drafted in request.metrics.per_step_drafted) > 0
