"""Quantised runs against the reference: what is compared, and which answers."""

import math

import numpy as np
import pytest
import quality_of_activations as quality


def test_divergence_and_agreement_are_those_of_the_distributions() -> None:
    reference = np.log(np.array([[0.5, 0.25, 0.125, 0.125], [0.4, 0.3, 0.2, 0.1]], np.float32))
    run = np.log(np.array([[0.1, 0.7, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]], np.float32)) + 7  # logits have no level
    kl, same = quality.compare(reference, run)
    expected = 0.5 * math.log(0.5 / 0.1) + 0.25 * math.log(0.25 / 0.7) + 0.25 * math.log(0.125 / 0.1)
    assert kl == pytest.approx([expected, 0], abs=1e-6) and same == [False, True]


def test_answers_are_whole_but_the_last_one_and_not_too_short() -> None:
    lines = [{"prompt_ids": [1], "response_ids": list(range(count))} for count in (10, 3, 9, 30, 40)]
    lines.insert(0, {"prompt_ids": [1] * quality.CONTEXT, "response_ids": [2] * 9})
    assert [len(line["response_ids"]) for line in quality.chosen(iter(lines), 40)] == [10, 9, 21]
