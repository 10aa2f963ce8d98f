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
from zoo import EVERY, PROMPTS, run

from specdec.base.errors import SpecDecWarning
from specdec.engine.batch import Batch
from specdec.models import identity
from specdec.runtimes.torch.graphs import CapturedTarget

LAUNCHES = {"none": 25, "m2r2: projection": 300}  # of a step with one row, once all is captured
# Reads of a step, with one row and with three.
READS = {
    "none": (1, 1),
    "ngram (tree)": (1, 1),
    "prompt-lookup": (1, 1),
    "m2r2: projection": (1, 1),
    "m2r2-paper": (1, 1),
    "m2r2 (tree)": (2, 2),
    "ngram+m2r2 (tree)": (2, 2),
    "medusa": (2, 2),
    "medusa (tree)": (2, 2),
    "eagle3": (1, 1),
    "eagle3 (tree)": (2, 1),
    "mtp": (1, 1),
}


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> CapturedTarget:
    fake_device.install(monkeypatch)
    monkeypatch.setattr(identity, "fingerprint", lambda *_: "x")
    model = copy.deepcopy(tiny_model("llama", max_position_embeddings=512))
    move(model)
    with torch.no_grad(), FakeDevice():
        return CapturedTarget(model, record=fake_device.record)


@pytest.mark.parametrize("name", READS)
def test_reads_and_uploads_of_a_step(monkeypatch: pytest.MonkeyPatch, target: CapturedTarget, name: str) -> None:
    model, step = tiny_model("llama", max_position_embeddings=512), Batch.step
    for prompts, most in zip((PROMPTS[1:2], PROMPTS), READS[name], strict=True):
        found = list[tuple[int, ...]]()

        def counted(self: Batch, *given: Any) -> Any:
            counts = fake_device.reads, fake_device.uploads, fake_device.launches
            for count in counts:
                count.clear()
            made = step(self, *given)
            found.append(tuple(count.total() for count in counts))  # noqa: B023
            return made

        with torch.no_grad(), FakeDevice(), monkeypatch.context() as patch:
            drafter = EVERY[name](target)
            for part in (drafter, *(getattr(drafter, name, drafter) for name in ("ngram", "other"))):
                for each in vars(part).values():
                    move(each)
            if name in LAUNCHES and len(prompts) == 1:
                run(target, drafter, prompts, 20)
            patch.setattr(Batch, "step", counted)
            with warnings.catch_warnings():
                warnings.simplefilter("error", SpecDecWarning)  # a drafter that fails is left out
                out, ran = run(target, drafter, prompts, 20)
        assert out == [greedy_reference(model, prompt, 20) for prompt in prompts]
        assert drafter.name == "none" or all(each.num_draft_tokens for each in ran.metrics)
        reads, uploads, launches = map(median, zip(*found, strict=True))
        assert reads <= most and uploads == 0, (fake_device.reads, fake_device.uploads)
        assert name not in LAUNCHES or len(prompts) > 1 or launches <= LAUNCHES[name], fake_device.launches
