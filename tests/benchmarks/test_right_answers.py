"""Right answers under a lossy rule: which problems are asked, what counts as right, and that a run goes on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import right_answers
from rich.console import Console
from tiny import save_tiny


def test_the_last_number_counts_and_the_interval_is_wilsons() -> None:
    assert right_answers.last_number("She pays 3 x $1,250.50.") == 1250.5
    assert right_answers.last_number("none") is None
    assert right_answers.wilson(8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert right_answers.wilson(0, 5)[0] == pytest.approx(0) and right_answers.wilson(5, 5)[1] == pytest.approx(1)


def test_known_problems_are_left_out_and_a_second_run_adds_nothing(tmp_path: Path) -> None:
    lines = [{"turns": [f"what is {n} and {n}"], "reference": str(2 * n)} for n in range(4)]
    file, seen, output = tmp_path / "problems.jsonl", tmp_path / "seen.txt", tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"turns": ["open"]}]))
    seen.write_text("user: what is 1 and 1")
    assert [number for _, number in right_answers.problems(file, None, [seen])] == [0, 4, 6]
    args = argparse.Namespace(
        model=str(save_tiny(tmp_path / "model")), problems=file, seen=[seen], output=output, limit=2,
        max_new_tokens=6, drafters=["early-exit"], thresholds=[0.0], threads=1,
    )  # fmt: skip
    right_answers.run(args, Console(quiet=True))
    before = right_answers.recorded(output)
    right_answers.run(args, Console(quiet=True))
    assert right_answers.recorded(output) == before
    assert [(line["row"], line["problem"]) for line in before] == [
        ("plain", 0), ("early-exit 0", 0), ("plain", 1), ("early-exit 0", 1),
    ]  # fmt: skip
    layers = {line["row"]: line["layers"] / line["tokens"] for line in before}
    assert layers["early-exit 0"] < layers["plain"]
    assert right_answers.table(before).row_count == 2
