"""Models with recurrent layers: what is rejected leaves no trace in their states."""

from __future__ import annotations

import pytest
import torch
from conftest import HYBRIDS, Scripted, greedy_reference, tiny_model
from zoo import PROMPTS, run

from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.runtimes.reference import ReferenceTarget


@pytest.mark.parametrize("family", HYBRIDS)
def test_greedy_equals_generate(family: str) -> None:
    model = tiny_model(family)
    target = ReferenceTarget(model)
    for prompt in PROMPTS:
        expected = greedy_reference(model, prompt, 16)
        for drafter in (PromptLookupDrafter(), PromptLookupDrafter(continuations=3)):
            assert run(target, drafter, [prompt], 16)[0] == [expected]
