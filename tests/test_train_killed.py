"""A real ``specdec train`` that is killed outright goes on to the weights of one that is not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import save_tiny

STEPS = 120


def command(folder: Path, output: str, *more: str) -> list[str]:
    given = {"segments": "[[2,4]]", "search": "false", "final_leap": "true", "rank": 4, "draft_vocab": 50}
    given |= {"rows": 4, "window": 8, "fit_tokens": 200, "compile": "false", "max_new_tokens": 12}
    given |= {"eval_fraction": 0.2, "checkpoint_minutes": 0.0005}  # every few updates
    options = ["--model", str(folder / "model"), "--prompts", str(folder / "prompts.txt"), "--dtype", "float32"]
    options += [f"--set={key}={value}" for key, value in given.items()]
    start = [sys.executable, "-m", "specdec", "train", "m2r2", "--steps", str(STEPS)]
    return [*start, *options, "--output", str(folder / output), *more]


def updates(metrics: Path) -> list[int]:
    text = metrics.read_text("utf-8") if metrics.exists() else ""
    return [json.loads(line)["update"] for line in text.splitlines(keepends=True) if line.endswith("\n")]


def test_a_process_killed_in_training_resumes_to_the_very_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("".join(f"question {n}\n" for n in range(24)))
    whole = subprocess.Popen(command(tmp_path, "whole"), stderr=subprocess.PIPE, text=True)
    parts = subprocess.Popen(command(tmp_path, "parts"), stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 240
        while max(updates(tmp_path / "parts" / "metrics.jsonl"), default=0) < 10 and time.monotonic() < end:
            time.sleep(0.005)
        parts.kill()
        assert parts.wait() == -signal.SIGKILL
        reached = max(updates(tmp_path / "parts" / "metrics.jsonl"))
        assert 10 <= reached < STEPS
        with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
            file.write('{"seconds": 1')  # as if it had been writing just then
        again = subprocess.run(command(tmp_path, "parts", "--resume"), capture_output=True, text=True, timeout=240)
        assert again.returncode == 0, again.stderr
        assert whole.wait(240) == 0, whole.stderr and whole.stderr.read()
    finally:
        for process in (whole, parts):
            process.kill()
    one, two = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert updates(tmp_path / "parts" / "metrics.jsonl") == updates(tmp_path / "whole" / "metrics.jsonl")
    assert f"update {STEPS}, " in again.stderr
