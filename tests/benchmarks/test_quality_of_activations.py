"""Quantised runs against the reference: what is compared, what is kept, and that a later call goes on."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import quality_of_activations as quality
from rich.console import Console

VOCABULARY = 4


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


def test_a_later_call_goes_on_where_the_first_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = tmp_path / "answers.in"
    answers.write_text("".join(json.dumps({"prompt_ids": [1, n], "response_ids": [2] * 20}) + "\n" for n in (5, 6)))
    asked: list[tuple[str, int]] = []

    class Engine:
        broken = False

        def __init__(self, run: str) -> None:
            self.run = run

        def ask(self, do: str, ids: list[int], count: int, path: str) -> None:
            if self.broken and ids[1] == 6:
                raise KeyboardInterrupt
            asked.append((self.run, ids[1]))
            np.save(path, np.full((count, VOCABULARY), 1.0, np.float32) * np.arange(VOCABULARY) * (ids[1] - 4))

    @contextmanager
    def engine(run: str, args: Namespace):
        yield Engine(run)

    monkeypatch.setattr(quality, "engine", engine)
    args = Namespace(answers=answers, positions=30, output=tmp_path, runs=["auto"])
    monkeypatch.setattr(Engine, "broken", True)
    with pytest.raises(KeyboardInterrupt):
        quality.measure(args, Console(quiet=True))
    monkeypatch.setattr(Engine, "broken", False)
    found = quality.measure(args, Console(quiet=True))
    assert asked == [("float32", 5), ("float32", 6), ("auto", 5), ("auto", 6)]
    assert [row["kl"] for row in found["auto"]] == [[0.0] * 20, [0.0] * 10]
    assert quality.measure(args, Console(quiet=True)) == found and len(asked) == 4
