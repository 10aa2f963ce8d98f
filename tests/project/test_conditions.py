"""A fixed set of requests gives the same tokens on a quiet machine, in a process that gets one thread, and beside
processes that take all cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BUSY = 2  # loops that run beside the requests
SECONDS = 120  # until a run is given up
SETTINGS = {"max_new_tokens": 16, "num_speculative_tokens": 4, "ignore_eos": True}


def requests() -> dict[str, list[int]]:
    """Greedy and seeded requests to tiny models, by runtime, drafter and settings: their new tokens.

    Two at once, on each target.
    """
    import torch
    from at_once import BF16, PROMPTS, at_once, grown, projecting
    from tiny import tiny_model

    from specdec.api.decoder import SpecDecoder
    from specdec.drafters.layer_skip import LayerSkipDrafter
    from specdec.runtimes.native import library

    torch.set_num_threads(2)
    os.sched_getaffinity = lambda process: {0, 1}  # two threads, whatever is here
    models: dict[str, Any] = {"fused": tiny_model("llama"), "reference": tiny_model("qwen3")}
    if library.runs():
        models["native"] = tiny_model("llama", **BF16).bfloat16()
    found = {}
    for runtime, model in models.items():
        base = SpecDecoder(model, None, "prompt-lookup", runtime=runtime)
        drafters = grown(base.target), projecting(base.target), LayerSkipDrafter([1])
        decoders = [base, *map(base.with_drafter, drafters)]
        runs = {
            f"{runtime} {number} {decoder.drafter.name} {more}": lambda decoder=decoder, number=number, more=more: (
                decoder.generate(PROMPTS[number % len(PROMPTS)], **SETTINGS, **more).token_ids
            )
            for more in ({}, {"temperature": 0.9, "seed": 5})
            for number, decoder in enumerate(decoders)
        }
        found |= {name: each() for name, each in runs.items()}
        for name, both in zip(list(runs)[:2], at_once(*list(runs.values())[:2]), strict=True):
            assert both == [found[name]] * len(both), name
    return found


class Child:
    """``requests`` in a process of its own, which imports what it needs and then waits for ``answer``."""

    def __init__(self, **environment: str) -> None:
        given = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path), **environment}
        command = [sys.executable, str(Path(__file__))]
        self.process = subprocess.Popen(
            command, env=given, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ready(self) -> None:
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def answer(self) -> dict[str, list[int]]:
        said, errors = self.process.communicate("go\n", timeout=SECONDS)
        assert self.process.returncode == 0, errors[-2000:]
        return dict(json.loads(said.splitlines()[-1]))


@pytest.fixture(scope="module")
def children() -> Iterator[list[Child]]:
    """One for a quiet machine, one that gets one thread, one more. All have imported what they need."""
    made = [Child(), Child(OMP_THREAD_LIMIT="1"), Child()]
    for child in made:
        child.ready()
    yield made
    for child in made:
        child.process.kill()
        child.process.wait()


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Meanwhile other processes take all that the system gives them."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@pytest.mark.slow
def test_one_thread_and_a_busy_machine_give_the_tokens_of_a_quiet_one(children: list[Child]) -> None:
    quiet = children[0].answer()
    assert len(quiet) >= 16 and all(len(tokens) == 16 for tokens in quiet.values())
    assert children[1].answer() == quiet
    with busy():
        assert children[2].answer() == quiet


if __name__ == "__main__":
    import at_once  # noqa: F401 (it takes its time)

    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(requests()))
