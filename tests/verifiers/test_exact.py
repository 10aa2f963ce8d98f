"""Sampling follows the target's distribution whatever is drafted: chi-square on joint outcomes, with controls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product

import pytest
import torch
from sampled import DRAFTS, AcceptsAll, p_value, sample
from torch import Tensor

from specdec.speculation.draft import Acceptance, Draft, Verifier
from specdec.speculation.sampling import Noise, Sampler, SamplingParams, streams
from specdec.verifiers.exact import ExactVerifier


@pytest.mark.parametrize("kind", DRAFTS)
def test_sampling_is_exact(kind: str) -> None:
    assert sample(DRAFTS[kind], ExactVerifier()) > 1e-3


class AcceptsLikely(ExactVerifier):
    """Control: a drafted token that the target likes well enough is accepted, too."""

    def verify(self, draft: Draft, chosen: list[list[int]], p: Tensor | None) -> Acceptance:
        assert p is not None
        own = [row.copy() for row in chosen]
        for node, parent in enumerate(draft.parents):
            if parent == node and p[0, parent, draft.lists()[0][node]] > 0.4:
                own[0][parent] = draft.lists()[0][node]
        return super().verify(draft, own, p)


@pytest.mark.parametrize("verifier", [AcceptsAll(), AcceptsLikely()])
def test_biased_rules_are_caught(verifier: Verifier) -> None:
    assert sample(DRAFTS["deterministic"], verifier) < 1e-6


def test_noise_that_repeats_is_caught() -> None:
    def repeats(seed: int) -> Callable[[int, int], Tensor]:
        own = Noise(seed)
        return lambda position, size: own(0, size)

    assert sample(DRAFTS["q = p"], ExactVerifier(), repeats) < 1e-6


def test_greedy_takes_the_matching_sibling() -> None:
    draft = Draft(torch.tensor([[2, 1, 0, -1]]), (0, 0, 2, 3))
    assert ExactVerifier().verify(draft, [[1, 0, 0, 2, 2]], None) == Acceptance([[0, 2, 3]], [2])
    assert ExactVerifier().verify(draft, [[-1, 0, 0, 2, 2]], None) == Acceptance([[0]], [-1])  # -1 matches nothing


# -- the noise --------------------------------------------------------------------------------------------------------


def test_noise_depends_on_seed_stream_and_position_alone() -> None:
    noise = Noise(5, 1)
    later, first = noise(9, 50).clone(), noise(2, 50).clone()
    again = Noise(5, 1)
    assert torch.equal(again(2, 50), first) and torch.equal(again(9, 50), later)
    others = (Noise(6, 1)(2, 50), Noise(5, 2)(2, 50), Noise(5, 1)(3, 50), Noise(6, 0)(2, 50))
    assert all(not torch.equal(other, first) for other in others)
    again.forget(9)
    assert list(again.made) == [9] and torch.equal(again(2, 50), first)


def test_streams_of_near_seeds_are_independent() -> None:
    """Draws of seed s, stream 1 and of seed s + 1, stream 0 from one distribution: all pairs as often as due."""
    p, counts = torch.tensor([0.5, 0.3, 0.2]), Counter[tuple[int, ...]]()
    for seed in range(3000):
        pair = [int((p.log() + noise(4, 3)).argmax()) for noise in (Noise(seed, 1), Noise(seed + 1, 0))]
        counts[tuple(pair)] += 1
    expected = {(a, b): float(p[a] * p[b]) for a, b in product(range(3), repeat=2)}
    assert p_value(counts, expected, 3000) > 1e-3


def test_rare_tokens_are_drawn_as_rarely_as_they_should() -> None:
    """A noise of too few bits would draw some token of a large vocabulary out of turn."""
    scores = torch.full((1, 1, 50_000), -40.0)
    scores[..., 7] = 0.0
    sampler = Sampler(SamplingParams(1.0))
    drawn_ = [int(sampler.choose(scores, [[position]])[0, 0]) for position in range(300)]
    assert set(drawn_) == {7}


def test_rows_of_a_batch_may_differ_and_are_those_of_a_row_alone() -> None:
    logits = torch.randn(3, 2, 20, generator=torch.Generator().manual_seed(0))
    at = [[4, 5], [9, 10], [4, 5]]
    params = (SamplingParams(0.8, top_k=5, seed=3), SamplingParams(), SamplingParams(0.8, top_k=5, seed=4))
    together = Sampler(params[0])
    for more in params[1:]:
        together.rows += Sampler(more).rows
    chosen = together.choose(together.scores(logits, lambda: []), at)
    for b, own in enumerate(params):
        alone = Sampler(own)
        assert torch.equal(alone.choose(alone.scores(logits[b : b + 1], lambda: []), [at[b]])[0], chosen[b])
    assert torch.equal(chosen[1], logits[1].argmax(-1)) and not together.plain_greedy
    together = Sampler.of([together.rows[2], together.rows[1]])
    assert torch.equal(together.choose(together.scores(logits[[2, 1]], lambda: []), [at[2], at[1]]), chosen[[2, 1]])


def test_logits_that_are_not_finite_give_no_token() -> None:
    scores = torch.zeros(1, 4, 5)
    scores[0, 1, 2], scores[0, 2, 3] = float("nan"), float("inf")
    scores[0, 3] = float("-inf")
    for params in (SamplingParams(), SamplingParams(1.0)):
        assert (Sampler(params).choose(scores, [[1, 2, 3, 4]])[0] < 0).tolist() == [False, True, True, True]


def test_streams_tell_equal_prompts_apart_and_nothing_else() -> None:
    assert streams([[1], [2], [1], [1, 2], [2], [1]]) == [0, 0, 1, 0, 1, 2]
