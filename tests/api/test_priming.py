"""Learning ahead of time: how many prompts are answered in the time that is given."""

from types import SimpleNamespace
from typing import Any

import pytest

from specdec.api import priming


class Clock:
    """Seconds pass only while prompts are answered and learned from."""

    def __init__(self, seconds_a_prompt: float) -> None:
        self.now, self.cost, self.batches = 0.0, seconds_a_prompt, list[int]()

    def monotonic(self) -> float:
        return self.now

    def generate(self, decoder: Any, prompts: list[list[int]], limit: int, learn: bool) -> list[list[int]]:
        self.batches.append(len(prompts))
        self.now += self.cost * len(prompts)
        return [[1, 2, 3] for _ in prompts]


@pytest.mark.parametrize(
    ("cost", "batches"), [(1.0, [4, 16, 16, 16, 8]), (8.0, [4, 3]), (100.0, [4]), (0.5, [4, *[16] * 7, 4])]
)
def test_the_last_batch_is_as_small_as_the_time_left(monkeypatch, cost: float, batches: list[int]) -> None:
    clock, shown = Clock(cost), list[float]()
    monkeypatch.setattr(priming, "time", clock)
    monkeypatch.setattr(priming, "_generate", clock.generate)
    monkeypatch.setattr(priming, "_questions", lambda decoder, count: [[1]] * count)
    monkeypatch.setattr(priming, "_acceptance_length", lambda decoder, prompts: 1.0)
    decoder: Any = SimpleNamespace(
        drafter=SimpleNamespace(learner=SimpleNamespace(claim=lambda: None)), learn=lambda: None
    )
    found = priming.prime(decoder, [], 60.0, lambda spent, *rest: shown.append(spent))
    assert clock.batches == batches and found.tokens == 3 * sum(batches)
    assert shown == sorted(shown) and shown[-1] <= 60


def test_made_up_questions_begin_after_the_whole_system_prompt(monkeypatch) -> None:
    """Also where that prompt speaks of questions."""
    system, starts = "You answer questions.\n### Question:\n", list[list[int]]()
    tokenizer = SimpleNamespace(
        chat_template="a template",
        apply_chat_template=lambda chat, **options: f"{system}{chat[0]['content']}\n### Answer:\n",
        encode=lambda text, **options: [*text.encode()],
        decode=lambda ids, **options: bytes(ids).decode(),
    )
    decoder: Any = SimpleNamespace(tokenizer=tokenizer, eos_ids=lambda: {0})

    def generate(decoder: Any, prompts: list[list[int]], *rest: Any, **more: Any) -> list[list[int]]:
        starts.extend(prompts)
        return [[*b"Why is the sky blue?"] for _ in prompts]

    monkeypatch.setattr(priming, "_generate", generate)
    monkeypatch.setattr(priming, "encode", lambda tokenizer, text: [*text.encode()])
    assert priming._questions(decoder, 2) == [[*b"Why is the sky blue?"]] * 2
    assert [bytes(ids).decode() for ids in starts] == [system] * 2
