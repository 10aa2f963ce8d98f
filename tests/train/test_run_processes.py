"""Several processes train one drafter: torchrun starts the very command, and the weights are those of one process."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from tiny import save_tiny
from training import checkpoint_of, launched
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow  # four processes of their own


def test_two_processes_train_the_weights_of_one(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    model, draw = AutoModelForCausalLM.from_pretrained(folder), random.Random(0)
    prompts = [[draw.randrange(3, 97) for _ in range(draw.randrange(2, 9))] for _ in range(24)]
    with (tmp_path / "answers.jsonl").open("w") as file:
        for prompt in prompts:
            answer = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :]
            file.write(json.dumps({"prompt_ids": prompt, "response_ids": answer.tolist()}) + "\n")

    def arguments(output: str, steps: int) -> list[str]:
        given = {"segments": "[[2,4]]", "final_projection": "true", "rank": 4, "draft_vocab": 0}
        given |= {"rows": 4, "window": 8, "fit_tokens": 200}
        options = ["--model", str(folder), "--prompts", str(tmp_path / "answers.jsonl"), "--dtype", "float32"]
        options += [f"--set={key}={value}" for key, value in given.items()]
        return ["train", "m2r2", *options, "--steps", str(steps), "--output", str(tmp_path / output)]

    for processes, output in ((1, "one"), (2, "two")):
        run = launched(processes, arguments(output, 12))
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("mean acceptance length") == 1  # one of them speaks
    one, two = (checkpoint_of(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:  # sums in another order: float32 rounding, and Adam's division by small second moments
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=2e-5)
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert [json.loads(a)["tokens"] for a in logs[0]] == [json.loads(b)["tokens"] for b in logs[1]]
