"""N-grams: the tree against all paths, what is matched and forgotten, the prior, constraints and noise."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel
from zoo import m2r2

from specdec import SpecDecoder
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.engine.depth import FixedDepth
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.runtimes.reference import ReferenceTarget
from specdec.runtimes.tree_drafting import Candidates
from specdec.speculation.draft import Draft, Drafter, State
from specdec.speculation.ngram import LONGEST, Grower, Prior, Texts
from specdec.speculation.sampling import Sampler, SamplingParams
from specdec.speculation.trees import Prices
from specdec.verifiers.exact import ExactVerifier

NO_CANDIDATES = Candidates([], [], [])
LENGTHS, ESCAPE, RECENCY = (1, 2, 3, 4, 6, 9, 13), 8, 0.9


def texts(*parts: list[int], most: int = 1024) -> Texts:
    made = Texts(most, 32)
    for part in parts:
        made.add([*part, -1])
    return made


def occurrences(window: list[int], text: list[int]) -> list[tuple[int, int]]:
    """The token and the length of each match, the latest first; single tokens where no two match."""
    found = []
    for place in range(len(window) - 1, 0, -1):
        alike = 0
        while alike < min(LONGEST, len(text), place) and window[place - 1 - alike] == text[-1 - alike] >= 0:
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
            upper = [*LENGTHS, LONGEST + 1][level + 1]
            if not any(least <= length < upper for _, length in found):
                continue
            weights = [(token, RECENCY**n) for n, (token, length) in enumerate(found) if length >= least]
            total = sum(weight for _, weight in weights)
            share = trust * total / (trust * total + ESCAPE * least**-1.5)
            p = {token: (1 - share) * each for token, each in p.items()}
            for token, weight in weights:
                p[token] = p.get(token, 0.0) + share * weight / total
    return p


@settings(max_examples=60, deadline=None)
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
    found = grower(own, [(texts(stored), trust), (mine, 1.0)], limit, NO_CANDIDATES, nodes=nodes)
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


def test_a_long_match_overrules_a_learned_tree_and_goes_on_beyond_it() -> None:
    text = [*range(10, 30), *range(10, 20)]
    own = Texts(1024)
    own.add(text)
    learned = Candidates([math.log(0.5), math.log(0.3), math.log(0.45)], [7, 20, 8], [0, 0, 1])
    found = Grower()(text, [(own, 1.0)], 8, learned)
    assert found.tokens[0] == 20 and 7 in found.tokens and set(range(20, 28)) <= set(found.tokens)
    alone = Grower()([1, 2, 3], [], 8, learned)
    assert alone.tokens == [7, 8, 20] and alone.parents == [0, 1, 0]
    assert [math.exp(score) for score in alone.scores] == pytest.approx([0.5, 0.45, 0.3])


def test_the_window_forgets_the_oldest_and_holds_no_more_than_it_says() -> None:
    window = Texts(64, 32)
    size = window.nbytes
    for n in range(40):
        window.add([100 + n, 200 + n, 300 + n, -1])
    assert window.nbytes <= 2 * size + 64
    grow = lambda text: Grower()(text, [(window, 1.0)], 4, NO_CANDIDATES).tokens  # noqa: E731
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
        trees = [Grower()(ids[:n], [(each, 1.0)], 6, NO_CANDIDATES) for each in (small, large)]
        assert trees[0] == trees[1]


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

    found = Grower()(text, [(own, 1.0)], 4, NO_CANDIDATES, masks)
    assert 3 not in found.tokens and found.tokens[0] == 4 and max(map(len, asked)) == 2
    assert math.exp(found.scores[0]) <= 1

    def failing(path: list[int]) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Grower()(text, [(own, 1.0)], 4, NO_CANDIDATES, failing)


def test_noise_decides_between_likely_followers() -> None:
    prior = Prior.count(np.array([1, 2, -1, 1, 3, -1] * 50, np.int32), 10)
    for token in (2, 3):
        noise = torch.full((10,), -1.0)
        noise[token] = 3.0
        assert Grower(prior)([1], [], 1, NO_CANDIDATES, None, [noise]).tokens[0] == token


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


@pytest.mark.parametrize(
    "make", [NgramDrafter, lambda: PromptLookupDrafter(store=True)], ids=["ngram", "prompt-lookup"]
)
def test_texts_of_one_scope_are_not_drafted_from_in_another(
    llama: PreTrainedModel, make: Callable[[], Drafter]
) -> None:
    target, steps, made = ReferenceTarget(llama), [], make()
    made.bind(target)
    engine = Engine(target, made, ExactVerifier(), FixedDepth(8))
    for scope in ("a", "b", "a"):
        request = Request([5, 6, 7, 8], 24, scope=scope)
        engine.submit(request)
        for _ in engine.steps():
            pass
        steps.append(request.metrics.num_spec_steps)
    assert steps[2] < steps[0] == steps[1]


def test_ngrams_draft_alone_where_another_draft_costs_more_than_it_may_add(llama: PreTrainedModel) -> None:
    target = ReferenceTarget(llama)
    drafter = NgramDrafter(prior=False)
    drafter.bind(target)

    def alone(ids: list[int], level: float, rows: int = 1, trust: float = 1.0) -> Prices | None:
        sampler = Sampler(SamplingParams(), streams=range(rows))
        prices = Prices([0.01 * n for n in range(25)], level, exponent=4.0, trust=trust)
        state = State(target, target.new_cache(), sampler, [ids] * rows, prices)
        state.row_states = [drafter.begin() for _ in range(rows)]
        return prices if drafter.alone(state, 8) is not None else None

    copied, new = [5, 6, 7, 8, 9, 10, 11] * 4, list(range(20, 40))
    prices = alone(copied, 0.35)
    assert prices is not None and prices.levels == 0
    assert prices.expected is not None and prices.expected > 3
    assert alone(new, 0.35) is None  # nothing is matched
    assert alone(copied, 0.0) is None  # the other one's levels are as good as free
    assert alone(new, 1.05) is not None  # they cost more than they can add
    assert alone(new, 1.05, rows=4) is None  # for four rows, they may add more
    assert alone(copied, 1.4, rows=4) is not None
    assert alone(new, 0.35, trust=0.3) is not None  # it has added less than expected


def test_a_draft_without_learned_candidates_is_one_of_ngrams_alone(llama: PreTrainedModel) -> None:
    """Else the costs of what drafts while nothing is learned would be those of a learned level."""
    target = ReferenceTarget(llama)
    drafter = NgramDrafter(prior=False)
    drafter.bind(target)
    for learned, levels in ((Candidates([], [], []), 0), (Candidates([-0.1, -0.2], [30, 31], [0, 1]), 2)):
        prices = Prices([0.01 * n for n in range(25)])
        state = State(target, target.new_cache(), Sampler(SamplingParams()), [[5, 6, 7, 8] * 3], prices)
        state.row_states = [drafter.begin()]
        assert drafter.blend(state, 8, [learned]).lists()[0]
        assert prices.levels == levels


def test_sampled_tokens_are_drafted_by_the_learned_drafter(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = ReferenceTarget(llama)
    second = m2r2(target, 0, ((1, 2), (3, 4)), True, False)
    calls, propose = list[Draft](), second.propose

    def spy(state: State, limit: int) -> Draft:
        calls.append(propose(state, limit))
        return calls[-1]

    monkeypatch.setattr(second, "propose", spy)
    drafter = HybridDrafter([NgramDrafter(9), second])
    drafter.bind(target)
    engine = Engine(target, drafter, ExactVerifier(), FixedDepth(3))
    request = Request([5, 6, 7, 5, 6, 7, 5, 6], 12, SamplingParams(temperature=1.0, seed=3))
    engine.submit(request)
    for _ in engine.steps():
        pass
    assert len(calls) == sum(drafted > 0 for drafted in request.metrics.per_step_drafted) > 0


def test_a_pair_drafts_with_both_or_with_ngrams_alone_as_it_is_told(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = ReferenceTarget(llama)
    second, asked = m2r2(target, 0, ((1, 2), (3, 4)), True, False), list[int | None]()
    learned = second.candidates
    monkeypatch.setattr(second, "candidates", lambda state, limit: asked.append(state.exit) or learned(state, limit))
    drafter = HybridDrafter([NgramDrafter(9), second])
    drafter.bind(target)
    assert drafter.num_exits == 2
    for exit, learned_too in ((0, False), (1, True)):
        asked.clear()
        engine = Engine(target, drafter, ExactVerifier(), FixedDepth(3, exit))
        request = Request([5, 6, 7, 5, 6, 7, 5, 6], 12)
        engine.submit(request)
        for _ in engine.steps():
            pass
        assert bool(asked) == learned_too and sum(request.metrics.per_step_drafted) > 0
