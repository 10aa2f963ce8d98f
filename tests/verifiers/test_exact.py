"""Sampling follows the target's distribution, and no draft changes what is sampled: chi-square, with controls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product

import pytest
import torch
from sampled import AcceptsAll, p_value
from torch import Tensor

from specdec.speculation.draft import Draft
from specdec.speculation.sampling import Noise, RowSampler, Sampler, SamplingParams, streams
from specdec.speculation.verifier import Acceptance, Verifier
from specdec.verifiers.exact import ExactVerifier
from specdec.verifiers.typical import TypicalVerifier

V, DEPTH, RUNS, FEW = 3, 3, 2500, 200
TARGET = torch.tensor([[0.3, 0.0, 0.7], [0.15, 0.85, 0.0], [0.0, 0.6, 0.4]])  # row i is the distribution after token i
Choose = Callable[[int, int], int]  # what the target chooses after a token, for a position
Script = Callable[[Choose, int, int], list[tuple[int, int]]]  # (choose, root, its position) -> (token, parent) nodes


def right(choose: Choose, root: int, at: int) -> list[tuple[int, int]]:
    """Just what the target will choose, with a sibling beside each token."""
    first = choose(root, at + 1)
    return [(first, 0), (choose(first, at + 2), 1), ((first + 1) % V, 0), (first, 2)]


def wrong(choose: Choose, root: int, at: int) -> list[tuple[int, int]]:
    return [((choose(root, at + 1) + 1) % V, 0)]


def fixed(choose: Choose, root: int, at: int) -> list[tuple[int, int]]:
    return [((root + 2) % V, 0), ((root + 1) % V, 1), ((root + 1) % V, 0)]


def nothing(choose: Choose, root: int, at: int) -> list[tuple[int, int]]:
    return []


def sampled(
    script: Script, verifier: Verifier, runs: int, noise: Callable[[int], Callable[[int, int], Tensor]] = Noise
) -> list[tuple[int, ...]]:
    """DEPTH tokens after token 0 for each stream of noise, decoded by steps of ``verifier`` (the last step is cut)."""
    found = []
    for stream in range(runs):
        own = noise(stream)

        def choose(token: int, position: int, own: Callable[[int, int], Tensor] = own) -> int:
            return int((TARGET[token].log() + own(position, V)).argmax())

        out = [0]
        while len(out) <= DEPTH:
            at = len(out) - 1
            nodes = script(choose, out[-1], at)
            tokens = [token for token, _ in nodes]
            draft, block = Draft([tokens], tuple(parent for _, parent in nodes)), [out[-1], *tokens]
            chosen = [choose(token, at + 1 + depth) for token, depth in zip(block, draft.depths(), strict=True)]
            accepted = verifier.verify(draft, [chosen], TARGET[block][None])
            out += [tokens[n - 1] for n in accepted.paths[0][1:]] + accepted.next_tokens
        found.append(tuple(out[1 : DEPTH + 1]))
    return found


def fit(found: list[tuple[int, ...]]) -> float:
    expected = {
        o: float(TARGET[0, o[0]] * TARGET[o[0], o[1]] * TARGET[o[1], o[2]]) for o in product(range(V), repeat=DEPTH)
    }
    return p_value(Counter(found), expected, len(found))


def test_samples_follow_the_target_and_no_draft_changes_them() -> None:
    plain = sampled(nothing, ExactVerifier(), RUNS)
    assert fit(plain) > 1e-3
    for script in (right, wrong, fixed):
        assert sampled(script, ExactVerifier(), FEW) == plain[:FEW]
    for rule in (AcceptsAll(), TypicalVerifier()):
        assert sampled(fixed, rule, FEW) != plain[:FEW]


def test_noise_that_repeats_is_caught() -> None:
    def repeats(seed: int) -> Callable[[int, int], Tensor]:
        own = Noise(seed)
        return lambda position, size: own(0, size)

    assert fit(sampled(nothing, ExactVerifier(), RUNS, repeats)) < 1e-6


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


def test_rows_of_a_batch_may_differ_and_are_those_of_a_row_alone() -> None:
    logits = torch.randn(3, 2, 20, generator=torch.Generator().manual_seed(0))
    at = [[4, 5], [9, 10], [4, 5]]
    params = (SamplingParams(0.8, top_k=5, seed=3), SamplingParams(), SamplingParams(0.8, top_k=5, seed=4))
    together = Sampler([RowSampler(params[0])])
    for more in params[1:]:
        together.rows += Sampler([RowSampler(more)]).rows
    chosen = together.choose(together.scores(logits, lambda: []), at)
    for b, own in enumerate(params):
        alone = Sampler([RowSampler(own)])
        assert torch.equal(alone.choose(alone.scores(logits[b : b + 1], lambda: []), [at[b]])[0], chosen[b])
    assert torch.equal(chosen[1], logits[1].argmax(-1)) and not together.plain_greedy
    together = Sampler([together.rows[2], together.rows[1]])
    assert torch.equal(together.choose(together.scores(logits[[2, 1]], lambda: []), [at[2], at[1]]), chosen[[2, 1]])


def test_logits_that_are_not_finite_give_no_token() -> None:
    scores = torch.zeros(1, 4, 5)
    scores[0, 1, 2], scores[0, 2, 3] = float("nan"), float("inf")
    scores[0, 3] = float("-inf")
    for params in (SamplingParams(), SamplingParams(1.0)):
        assert (Sampler([RowSampler(params)]).choose(scores, [[1, 2, 3, 4]])[0] < 0).tolist() == [
            False,
            True,
            True,
            True,
        ]


def test_streams_tell_equal_prompts_apart_and_nothing_else() -> None:
    assert streams([[1], [2], [1], [1, 2], [2], [1]]) == [0, 0, 1, 0, 1, 2]
