"""Tests of what a step costs beside the device's own work: reads, uploads that wait, operations outside captures.

``fake_device`` registers a device for the whole process: ``tests/runtimes/torch/test_graphs_budgets.py`` runs these
tests in a process of their own.
"""

import copy
import warnings
from statistics import median
from typing import Any

import fake_device
import pytest
import torch
from fake_device import FakeDevice, move
from tiny import greedy_reference, tiny_model
from zoo import EVERY, PROMPTS, other_model, run

from specdec.base.errors import SpecDecWarning
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.engine.batch import Batch
from specdec.models import identity
from specdec.runtimes.torch.graphs import CapturedTarget
from specdec.runtimes.torch.target import TorchTarget

# Operations outside captures, and replays, of a step with one row, once all is captured.
LAUNCHES = {
    "none": (10, 2),
    "m2r2 (tree)": (30, 3),
    "m2r2: two projections, no early layer": (30, 3),
    "medusa": (30, 3),
    "medusa (tree)": (30, 3),
    "eagle3": (35, 3),
    "eagle3 (tree)": (35, 3),
    "dspark": (35, 3),
    "dspark (tree)": (35, 3),
    "mtp": (35, 3),
}
SAMPLING = 20  # more operations, of rows that are sampled
# Reads of a step, with one row and with three.
ONE = 1, 1
READS: dict[str, tuple[int, int]] = {
    "none": ONE,
    "ngram (tree)": ONE,
    "m2r2: projection": ONE,
    "prompt-lookup": ONE,
    "m2r2-paper": ONE,
    "m2r2: two projections, no early layer": ONE,
    "m2r2 (tree)": ONE,
    "ngram+m2r2 (tree)": ONE,
    "medusa": ONE,
    "medusa (tree)": ONE,
    "ngram+medusa (tree)": ONE,
    "eagle3": ONE,
    "eagle3 (tree)": ONE,
    "dspark": ONE,
    "dspark (tree)": ONE,
    "mtp": ONE,
    "draft-model": ONE,
    "early-exit": (2, 2),
    "deed": (2, 2),
    "m2r2: three early exits": (2, 2),
    "m2r2: an early exit, one behind a projection": (2, 2),
}


# Of families with experts and recurrent layers, and of sampled rows: family, drafter, temperature, reads.
MORE: list[tuple[str, str, float, tuple[int, int]]] = [
    *(("mixtral", name, 0.0, ONE) for name in ("none", "ngram (tree)", "medusa")),
    *(("qwen3_5_text", name, 0.0, ONE) for name in ("none", "ngram (tree)", "medusa")),
    ("gpt_oss", "none", 0.0, ONE),
    ("qwen3_next", "none", 0.0, ONE),
    *(("llama", name, 0.8, ONE) for name in ("none", "m2r2 (tree)", "ngram+m2r2 (tree)", "medusa (tree)", "eagle3")),
]
CASES = [*(("llama", name, 0.0, most) for name, most in READS.items()), *MORE]


def target_of(family: str) -> CapturedTarget:
    model = copy.deepcopy(tiny_model(family, max_position_embeddings=512))
    move(model)
    with torch.no_grad(), FakeDevice():
        return CapturedTarget(model, record=fake_device.record)


def on_device(target: CapturedTarget) -> DraftModelDrafter:
    """A draft model that is there, too."""
    model = copy.deepcopy(other_model(target.vocab_size).model)
    move(model)
    return DraftModelDrafter(CapturedTarget(model, record=fake_device.record))


@pytest.mark.parametrize(("family", "name", "temperature", "bounds"), CASES)
def test_reads_and_uploads_of_a_step(
    monkeypatch: pytest.MonkeyPatch, family: str, name: str, temperature: float, bounds: tuple[int, int]
) -> None:
    model, step = tiny_model(family, max_position_embeddings=512), Batch.step
    how: dict[str, Any] = {"temperature": temperature, "seed": 3} if temperature else {}
    expected = run(TorchTarget(model), EVERY["none"](TorchTarget(model)), PROMPTS, 20, **how)[0]
    fake_device.install(monkeypatch)
    monkeypatch.setattr(identity, "fingerprint", lambda *_: "x")
    target = target_of(family)
    for prompts, most in zip((PROMPTS[1:2], PROMPTS), bounds, strict=True):
        found = list[tuple[int, ...]]()

        def counted(self: Batch, *given: Any) -> Any:
            counts = fake_device.reads, fake_device.uploads, fake_device.launches, fake_device.replays
            for count in counts:
                count.clear()
            made = step(self, *given)
            found.append(tuple(count.total() for count in counts))  # noqa: B023
            return made

        with torch.no_grad(), FakeDevice(), monkeypatch.context() as patch:
            drafter = on_device(target) if name == "draft-model" else EVERY[name](target)
            for part in (drafter, *(getattr(drafter, name, drafter) for name in ("ngram", "other"))):
                for each in vars(part).values():
                    move(each)
            if name in LAUNCHES and len(prompts) == 1:
                run(target, drafter, prompts, 20, **how)
            patch.setattr(Batch, "step", counted)
            with warnings.catch_warnings():
                warnings.simplefilter("error", SpecDecWarning)  # a drafter that fails is left out
                out, ran = run(target, drafter, prompts, 20, **how)
        assert out == (expected if len(prompts) > 1 else expected[1:2])
        assert temperature or out == [greedy_reference(model, prompt, 20) for prompt in prompts]
        whole = [each.num_draft_tokens for each, tokens in zip(ran.metrics, out, strict=True) if len(tokens) == 20]
        assert whole and (drafter.name == "none" or all(whole))  # others ended before anything could be drafted
        reads, uploads, *ran_outside = map(median, zip(*found, strict=True))
        assert reads <= most and uploads == 0, (fake_device.reads, fake_device.uploads)
        if name in LAUNCHES and len(prompts) == 1:
            outside, replays = LAUNCHES[name]
            within = zip(ran_outside, (outside + (SAMPLING if temperature else 0), replays), strict=True)
            assert all(count <= bound for count, bound in within), (ran_outside, fake_device.launches)
