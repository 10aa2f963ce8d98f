"""A real ``specdec train`` that is killed outright goes on to the weights of one that is not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_tiny
from training import checkpoint_of

pytestmark = pytest.mark.slow  # three processes of their own
STEPS = 120
STOPS = """
import signal
from specdec.cli import main
from specdec.train.run import TrainingRun

def save(run, save=TrainingRun._save):
    run.saved = True
    save(run)

def log(run, line, log=TrainingRun._log):
    log(run, line)
    if line["update"] >= 30 and hasattr(run, "saved"):
        print("reached", flush=True)
        signal.pause()

TrainingRun._save, TrainingRun._log = save, log
main()
"""


def command(folder: Path, output: str, *more: str, program: tuple[str, ...] = ("-m", "specdec")) -> list[str]:
    given = {"segments": "[[2,4]]", "final_projection": "true", "rank": 4, "draft_vocab": 50}
    given |= {"rows": 4, "window": 8, "fit_tokens": 200, "max_new_tokens": 12}
    given |= {"eval_fraction": 0.2, "checkpoint_minutes": 0.0005}  # every few updates
    options = ["--model", str(folder / "model"), "--prompts", str(folder / "prompts.txt"), "--dtype", "float32"]
    options += [f"--set={key}={value}" for key, value in given.items()]
    start = ["train", "m2r2", "--steps", str(STEPS)]
    return [sys.executable, *program, *start, *options, "--output", str(folder / output), *more]


def updates(metrics: Path) -> list[int]:
    text = metrics.read_text("utf-8") if metrics.exists() else ""
    return [json.loads(line)["update"] for line in text.splitlines(keepends=True) if line.endswith("\n")]


def test_a_process_killed_in_training_resumes_to_the_very_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("".join(f"question {n}\n" for n in range(24)))
    whole = subprocess.Popen(command(tmp_path, "whole"), stderr=subprocess.PIPE, text=True)
    stops = command(tmp_path, "parts", program=("-c", STOPS))  # after an update that no checkpoint has
    parts = subprocess.Popen(stops, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert parts.stdout is not None and "reached\n" in iter(parts.stdout.readline, "")
        parts.kill()
        assert parts.wait() == -signal.SIGKILL
        reached = max(updates(tmp_path / "parts" / "metrics.jsonl"))
        assert 30 <= reached < STEPS
        again = subprocess.run(command(tmp_path, "parts", "--resume"), capture_output=True, text=True, timeout=240)
        assert again.returncode == 0, again.stderr
        assert whole.wait(240) == 0, whole.stderr and whole.stderr.read()
    finally:
        for process in (whole, parts):
            process.kill()
    one, two = (checkpoint_of(tmp_path / name) for name in ("whole", "parts"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert {*updates(tmp_path / "parts" / "metrics.jsonl")} == {*updates(tmp_path / "whole" / "metrics.jsonl")}
    assert f"update {STEPS}, " in again.stderr
