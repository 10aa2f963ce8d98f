"""Exact acceptance, and the noise by which tokens are drawn. tests/test_reference.py compares whole texts."""

from collections import Counter
from itertools import product

import pytest
import torch
from sampled import p_value

from specdec.speculation.draft import Draft
from specdec.speculation.sampling import Noise, RowSampler, Sampler, SamplingParams, streams
from specdec.speculation.verifier import Acceptance
from specdec.verifiers.exact import ExactVerifier


def test_greedy_takes_the_matching_sibling() -> None:
    draft = Draft(torch.tensor([[2, 1, 0, -1]]), (0, 0, 2, 3))
    assert ExactVerifier().verify(draft, [[1, 0, 0, 2, 2]], None) == Acceptance([[0, 2, 3]], [2])
    assert ExactVerifier().verify(draft, [[-1, 0, 0, 2, 2]], None) == Acceptance([[0]], [-1])  # -1 matches nothing


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
    sampler = Sampler([RowSampler(SamplingParams(1.0))])
    drawn_ = [int(sampler.choose(scores, [[position]])[0, 0]) for position in range(300)]
    assert set(drawn_) == {7}


@pytest.mark.parametrize("count", [1, 31, 32, 1000, 4099])
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_a_draw_is_the_largest_of_all_scores_plus_noise(count: int, spread: float) -> None:
    """Noise is made only where it can decide."""
    scores = spread * torch.randn(1, 60, count, generator=torch.Generator().manual_seed(count))
    scores[0, ::2, count // 2 :] += 20.0
    scores[0, 1::3, 1 : count // 3] = -torch.inf
    positions, sampler = [[*range(60)]], Sampler([RowSampler(SamplingParams(1.0, seed=7))])
    noisy = sampler.perturb(scores, positions, count)
    chosen = sampler.choose(scores, positions)
    assert torch.equal(chosen, noisy.argmax(-1)) and (count < 99 or len(chosen.unique()) > 20)


def test_logits_that_are_not_finite_give_no_token() -> None:
    scores = torch.zeros(1, 4, 5)
    scores[0, 1, 2], scores[0, 2, 3] = float("nan"), float("inf")
    scores[0, 3] = float("-inf")
    for params in (SamplingParams(), SamplingParams(1.0)):
        chosen = Sampler([RowSampler(params)]).choose(scores, [[1, 2, 3, 4]])[0]
        assert (chosen < 0).tolist() == [False, True, True, True]


def test_streams_tell_equal_prompts_apart_and_nothing_else() -> None:
    assert streams([[1], [2], [1], [1, 2], [2], [1]]) == [0, 0, 1, 0, 1, 2]
