"""Models with recurrent layers: what is rejected leaves no trace in their states."""

from __future__ import annotations

import functools
import random

import pytest
from conftest import HYBRIDS, Scripted, greedy_reference, tiny_model
from transformers import PreTrainedModel
from zoo import PROMPTS, every, new_tokens, run

from specdec.drafters.early_exit import EarlyExitDrafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.engine.depth import FixedDepth
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.runtimes.reference import ReferenceTarget
from specdec.speculation.draft import Drafter
from specdec.verifiers.exact import ExactVerifier

COUNT = 16
Script = list[tuple[int, int]]


@functools.cache
def served(family: str) -> tuple[PreTrainedModel, ReferenceTarget, list[list[int]]]:
    """A model, its target, and its answers to the prompts."""
    model = tiny_model(family)
    return model, ReferenceTarget(model), [greedy_reference(model, prompt, COUNT) for prompt in PROMPTS]


def oracle(texts: list[list[int]], right: float, branches: int = 1) -> Scripted:
    """Drafts that continue one of ``texts``, each token right with a probability.

    branches: as many tokens follow the last one, of which one is continued.
    """
    chance = random.Random(0)

    def script(ids: list[int], limit: int) -> Script:
        [text] = [text for text in texts if text[: len(ids)] == ids]
        right_ones = text[len(ids) : len(ids) + limit]
        drafted: Script = [((token + 2 + other) % 97, 0) for token in right_ones[:1] for other in range(branches - 1)]
        for token in right_ones:
            parent = len(drafted) if len(drafted) >= branches else 0
            drafted.append((token if chance.random() < right else (token + 1) % 97, parent))
        return drafted

    return Scripted(script)


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("rows", [slice(1, 2), slice(3)], ids=["alone", "ragged"])
def test_greedy_equals_generate(family: str, rows: slice) -> None:
    _, target, expected = served(family)
    texts = [prompt + answer for prompt, answer in zip(PROMPTS, expected, strict=True)]
    drafters: dict[str, Drafter] = {
        f"oracle {right} {branches}": oracle(texts, right, branches) for right in (1, 0.6, 0) for branches in (1, 3)
    }
    drafters |= {"prompt-lookup": PromptLookupDrafter(), "early-exit": EarlyExitDrafter(2)}
    drafters |= {"early-exit, a tree": EarlyExitDrafter(3, siblings=(2, 1))}
    for name, drafter in drafters.items():
        out, ran = run(target, drafter, PROMPTS[rows], COUNT)
        assert out == expected[rows], name
        if name == "oracle 1 1":
            assert all(metrics.num_spec_steps < COUNT / 2 for metrics in ran.metrics)


def test_a_text_is_reused_whole_or_not_at_all() -> None:
    model, target, _ = served("qwen3_next")
    drafter = PromptLookupDrafter()
    drafter.bind(target)
    engine = Engine(target, drafter, ExactVerifier(), FixedDepth(4), reuse=True)

    def ask(prompt: list[int]) -> Request:
        request = Request(prompt, 8)
        engine.submit(request)
        for _ in engine.steps():
            pass
        assert request.error is None and new_tokens(request) == greedy_reference(model, prompt, 8)
        return request

    first = ask(list(range(5, 25)))
    assert ask([*first.ids, 7, 8]).metrics.num_cached_tokens == len(first.ids) - 1
    assert ask([*range(5, 15), 3]).metrics.num_cached_tokens == 0


def test_every_drafter_leaves_the_output_unchanged() -> None:
    _, target, expected = served("qwen3_next")
    for name, drafter in every(target).items():
        assert run(target, drafter, PROMPTS, COUNT)[0] == expected, name
