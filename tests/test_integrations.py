"""``SpecGenerate``: what ``model.generate`` returns with the engine is what it returns without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import FAMILIES, tiny_model
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from specdec.base.errors import SpecDecError
from specdec.integrations.transformers import SpecGenerate

ROWS = [[5, 6, 7, 8, 5, 6], [9, 10, 11], [3, 4, 3, 4, 3, 4, 3]]


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def pair(model: Any, rows: list[list[int]], spec: SpecGenerate | None = None, **given: Any) -> tuple[Any, Any]:
    """What the call returns without the engine, and with it."""
    inputs = padded(rows)
    given = {"max_new_tokens": 20, "do_sample": False, **given}
    spec = spec or SpecGenerate("prompt-lookup", num_speculative_tokens=3)
    return model.generate(**inputs, **given), model.generate(**inputs, **given, custom_generate=spec)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tensors_are_equal(family: str, rows: int) -> None:
    plain, ours = pair(tiny_model(family), ROWS[:rows])
    assert torch.equal(plain, ours)


class NoMore(LogitsProcessor):
    """Of a caller: forbids in each row of the call another token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for b in range(len(scores)):
            scores[b, (input_ids[b, -1] + b) % scores.shape[1]] = -torch.inf
            scores[b, 30 + b] = 9.0 if len(input_ids[0]) % 3 == 0 else scores[b, 30 + b]
        return scores


class After(StoppingCriteria):
    """Ends rows at different lengths."""

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        return torch.tensor([input_ids.shape[1] >= 12 + 2 * b for b in range(len(input_ids))])


OPTIONS: dict[str, dict[str, Any]] = {
    "max_length": {"max_new_tokens": None, "max_length": 15},
    "repetition penalty": {"repetition_penalty": 1.5},
    "encoder repetition penalty": {"encoder_repetition_penalty": 2.0},
    "n-grams": {"no_repeat_ngram_size": 2},
    "n-grams of the prompt": {"encoder_no_repeat_ngram_size": 2},
    "least new tokens": {"min_new_tokens": 9, "eos_token_id": list(range(2, 60))},
    "many ends": {"eos_token_id": list(range(2, 20))},
    "no end": {"eos_token_id": None},
    "prefix function": {"prefix_allowed_tokens_fn": lambda b, ids: [10 + b, 20 + b, 30 + len(ids) % 5]},
    "own processor": {"logits_processor": [NoMore()]},
    "own criterion": {"stopping_criteria": StoppingCriteriaList([After()])},
    "own criterion, no end": {"stopping_criteria": StoppingCriteriaList([After()]), "eos_token_id": -1},
    "several sequences": {"num_return_sequences": 1},
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_honoured(name: str, rows: int) -> None:
    plain, ours = pair(tiny_model(), ROWS[:rows], **OPTIONS[name])
    assert torch.equal(plain, ours)


def test_scores_and_logits_are_returned() -> None:
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain, ours = pair(tiny_model(), ROWS, eos_token_id=list(range(2, 20)), repetition_penalty=1.3, **asked)
    assert isinstance(ours, GenerateDecoderOnlyOutput) and torch.equal(plain.sequences, ours.sequences)
    assert len(ours.scores) == len(plain.scores) and len(ours.logits) == len(plain.logits)
    begin, compared = max(map(len, ROWS)), 0
    for t in range(len(plain.scores)):
        for b in range(len(ROWS)):
            if (
                not (plain.sequences[b, begin : begin + t] < 20)
                .logical_and(plain.sequences[b, begin : begin + t] >= 2)
                .any()
            ):
                torch.testing.assert_close(ours.scores[t][b], plain.scores[t][b], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(ours.logits[t][b], plain.logits[t][b], atol=1e-4, rtol=1e-4)
                compared += 1
    assert compared > len(plain.scores)


def test_drafts_are_accepted() -> None:
    spec = SpecGenerate("prompt-lookup", num_speculative_tokens=3)
    model = tiny_model()
    model.generate(torch.tensor([[5, 6] * 8]), max_new_tokens=60, do_sample=False, custom_generate=spec)
    [metrics] = spec.metrics
    assert metrics.num_accepted_draft_tokens > 0
