"""Typical acceptance: the threshold, the longest path, greedy decoding as the exact rule, and that it is lossy."""

from __future__ import annotations

import math

import pytest
import torch
from test_exact import TARGET, sample, tree
from torch import Tensor

from specdec import SpecDecError
from specdec.draft import Draft, Verdict
from specdec.sampling import one_hot
from specdec.verifiers.exact import ExactVerifier
from specdec.verifiers.typical import TypicalVerifier


def judge(rule: TypicalVerifier, tokens: list[int], parents: tuple[int, ...], p: Tensor) -> Verdict:
    return rule.judge(Draft(torch.tensor([tokens]), parents), p, [torch.Generator().manual_seed(0)])


@pytest.mark.parametrize(
    ("p", "least"),
    [
        ([0.5, 0.3, 0.15, 0.05], 0.09),  # exp(-H) = 0.319: 0.3 of it is 0.0958, epsilon is less
        ([0.25, 0.25, 0.25, 0.25], 0.3 / 4),  # exp(-H) = 1 / 4
        ([1.0, 0.0, 0.0, 0.0], 0.09),
    ],
)
def test_a_token_stands_if_the_model_finds_it_plausible(p: list[float], least: float) -> None:
    entropy = -sum(x * math.log(x) for x in p if x)
    assert least == pytest.approx(min(0.09, 0.3 * math.exp(-entropy)))
    for token, chance in enumerate(p):
        kept = judge(TypicalVerifier(), [token], (0,), torch.tensor([[p, p]])).paths[0]
        assert kept == ([0, 1] if chance > least else [0])


def test_the_longest_plausible_path_stands_and_then_the_likeliest() -> None:
    p = torch.tensor([[0.7, 0.25, 0.05]]).expand(1, 8, 3)
    # 2 is implausible, whatever follows it; of two paths of two tokens the likelier one stands, though it comes later.
    verdict = judge(TypicalVerifier(), [2, 1, 0, 0, 1, 0], (0, 0, 0, 1, 2, 3), p)
    assert verdict.paths == [[0, 3, 6]]
    assert judge(TypicalVerifier(), [0, 1, -1], (0, 0, 2), p).paths == [[0, 1]]
    assert judge(TypicalVerifier(), [0, 1, 1], (0, 0, 2), p).paths == [[0, 2, 3]]


def test_at_temperature_zero_it_is_the_exact_rule() -> None:
    generator = torch.Generator().manual_seed(4)
    for _ in range(50):
        draft = Draft(torch.randint(0, 3, (2, 6), generator=generator), (0, 0, 0, 1, 2, 4))
        draft.tokens[:, 1] = (draft.tokens[:, 0] + 1) % 3  # siblings differ
        draft.tokens[:, 2] = (draft.tokens[:, 0] + 2) % 3
        p = one_hot(torch.randint(0, 3, (2, 7), generator=generator), 3)
        generators = [torch.Generator(), torch.Generator()]
        assert TypicalVerifier().judge(draft, p, generators) == ExactVerifier().judge(draft, p, generators)


def test_the_test_of_exactness_tells_it_apart() -> None:
    assert sample(tree, TARGET, TypicalVerifier()) < 1e-6 and not TypicalVerifier.lossless


@pytest.mark.parametrize("options", [{"epsilon": 0}, {"epsilon": 1}, {"delta": 0}, {"epsilon": "much"}])
def test_bad_thresholds_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(SpecDecError, match=rf"{next(iter(options))} of typical acceptance must be .*; got "):
        TypicalVerifier(**options)
