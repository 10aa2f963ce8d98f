"""Typical acceptance: the threshold, the longest path, and greedy decoding as the exact rule."""

import math

import pytest
import torch
from torch import Tensor

from specdec import SpecDecError
from specdec.speculation.draft import Draft
from specdec.speculation.verifier import Acceptance
from specdec.verifiers.exact import ExactVerifier
from specdec.verifiers.typical import TypicalVerifier


def verify(rule: TypicalVerifier, tokens: list[int], parents: tuple[int, ...], p: Tensor) -> Acceptance:
    return rule.verify(Draft(torch.tensor([tokens]), parents), p.argmax(-1).tolist(), p)


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
        kept = verify(TypicalVerifier(), [token], (0,), torch.tensor([[p, p]])).paths[0]
        assert kept == ([0, 1] if chance > least else [0])


def test_the_longest_plausible_path_stands_and_then_the_likeliest() -> None:
    p = torch.tensor([[0.7, 0.25, 0.05]]).expand(1, 8, 3)
    # 2 is implausible, whatever follows it; of two paths of two tokens the likelier one stands, though it comes later.
    accepted = verify(TypicalVerifier(), [2, 1, 0, 0, 1, 0], (0, 0, 0, 1, 2, 3), p)
    assert accepted.paths == [[0, 3, 6]]
    assert verify(TypicalVerifier(), [0, 1, -1], (0, 0, 2), p).paths == [[0, 1]]
    assert verify(TypicalVerifier(), [0, 1, 1], (0, 0, 2), p).paths == [[0, 2, 3]]


def test_at_temperature_zero_it_is_the_exact_rule() -> None:
    generator = torch.Generator().manual_seed(4)
    for _ in range(50):
        draft = Draft(torch.randint(0, 3, (2, 6), generator=generator), (0, 0, 0, 1, 2, 4))
        chosen = torch.randint(0, 3, (2, 7), generator=generator).tolist()
        assert TypicalVerifier().verify(draft, chosen, None) == ExactVerifier().verify(draft, chosen, None)


@pytest.mark.parametrize("options", [{"epsilon": 0}, {"epsilon": 1}, {"delta": 0}, {"epsilon": "much"}])
def test_bad_thresholds_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(SpecDecError, match=rf"{next(iter(options))} must be .*; got "):
        TypicalVerifier(**options)
