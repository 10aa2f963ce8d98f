"""Tests of what a step costs beside the device's own work: reads, uploads that wait, operations outside captures.

``fake_device`` registers a device for the whole process: ``tests/runtimes/torch/test_graphs_budgets.py`` runs these
tests in a process of their own.
"""

import copy
import functools
import warnings
from statistics import median
from typing import Any

import fake_device
import pytest
import torch
from fake_device import FakeDevice, move
from scripted import made
from tiny import greedy_reference, tiny_model
from zoo import EOS, EVERY, PROMPTS, FixedExit, decode, m2r2, new_tokens, other_model, run, together

from specdec.base.errors import SpecDecWarning
from specdec.base.options import SamplingParams
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.none import NoDrafter
from specdec.engine.batch import Batch
from specdec.engine.request import Request
from specdec.models import identity
from specdec.runtimes.target import Target
from specdec.runtimes.torch.graphs import CapturedTarget
from specdec.runtimes.torch.target import TorchTarget
from specdec.speculation.constraints import Json
from specdec.speculation.drafter import Drafter
from specdec.speculation.sampling import RowSampler

RECURRENT = "m2r2: adapters in a recurrent layer"
DRAFTERS = EVERY | {RECURRENT: lambda target: m2r2(target, 0, ((2, 3),), True, False)}
# Operations outside captures, and replays, of any step with one row in which nothing is captured; also where a draft
# vocabulary grows.
LAUNCHES = {
    "none": (10, 2),
    "m2r2 (tree)": (36, 3),
    "m2r2: two projections, no early layer": (36, 3),
    "medusa": (35, 3),
    "medusa (tree)": (35, 3),
    "eagle3": (35, 3),
    "eagle3 (tree)": (35, 3),
    "dspark": (35, 3),
    "dspark (tree)": (35, 3),
    "mtp": (35, 3),
}
# The captured functions of a drafter, beside those of the model.
KINDS = {"m2r2": ["draft"], "medusa": ["medusa"], "eagle3": ["pairs"], "dspark": ["pairs"], "mtp": ["pairs"]}
COUNT = 14  # tokens of an answer
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
    "m2r2: an early exit, one behind a projection": (2, 2),
}


# Of families with experts and recurrent layers, and of sampled rows: family, drafter, temperature, reads.
MORE: list[tuple[str, str, float, tuple[int, int]]] = [
    *(("mixtral", name, 0.0, ONE) for name in ("none", "ngram (tree)", "medusa")),
    *(("qwen3_5_text", name, 0.0, ONE) for name in ("none", "ngram (tree)", "medusa")),
    *((family, RECURRENT, 0.0, ONE) for family in ("qwen3_5_text", "qwen3_next")),
    ("gpt_oss", "none", 0.0, ONE),
    ("qwen3_next", "none", 0.0, ONE),
    *(("llama", name, 0.8, ONE) for name in ("none", "m2r2 (tree)", "ngram+m2r2 (tree)", "medusa (tree)", "eagle3")),
]
CASES = [*(("llama", name, 0.0, most) for name, most in READS.items()), *MORE]


def on_device(target: CapturedTarget) -> DraftModelDrafter:
    """A draft model that is there, too."""
    model = copy.deepcopy(other_model(target.vocab_size).model)
    move(model)
    return DraftModelDrafter(CapturedTarget(model, record=fake_device.record))


class Steps:
    """Counts what each step of a batch does: reads, uploads that wait, operations outside captures, replays, captures.

    captured: the keys of what was captured, in order. kinds: the names of the captured functions that were called.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.counts = list[tuple[int, ...]]()
        self.captured, self.kinds = list[Any](), set[str]()
        step, capture = Batch.step, CapturedTarget._capture

        def kept(target: CapturedTarget, key: Any, make: Any) -> Any:
            self.kinds.add(key[1])
            if key not in target.captured_functions:
                self.captured.append(key)
            return capture(target, key, make)

        def counted(batch: Batch, *given: Any) -> Any:
            counts = (
                fake_device.reads,
                fake_device.uploads,
                fake_device.launches,
                fake_device.replays,
                fake_device.recordings,
            )
            for count in counts:
                count.clear()
            made = step(batch, *given)
            self.counts.append(tuple(count.total() for count in counts))
            return made

        patch.setattr(Batch, "step", counted)
        patch.setattr(CapturedTarget, "_capture", kept)

    def waits(self) -> list[float]:
        """Return how often a step reads, and uploads, by the median of all steps."""
        return [median(own[n] for own in self.counts) for n in range(2)]

    def most(self) -> list[int]:
        """Return the most operations outside captures, and the most replays, of a step in which nothing is captured."""
        settled = [own for own in self.counts if not own[4]]
        assert settled, self.counts
        return [max(own[n] for own in settled) for n in (2, 3)]


def with_all(drafter: Drafter) -> Drafter:
    """Move a drafter's modules to the device."""
    for part in (drafter, *(getattr(drafter, name, drafter) for name in ("ngram", "other"))):
        for each in vars(part).values():
            move(each)
    return drafter


@functools.cache
def plain(family: str, count: int, sampling: tuple[tuple[str, float], ...]) -> list[list[int]]:
    """What plain decoding on the host answers; without noise, it is what the model's own code does."""
    model = tiny_model(family, max_position_embeddings=512)
    out, _ = run(TorchTarget(model), EVERY["none"](TorchTarget(model)), PROMPTS, count, **dict(sampling))
    assert sampling or out == [greedy_reference(model, prompt, count) for prompt in PROMPTS]
    return out


@functools.cache
def target_of(family: str) -> CapturedTarget:
    """One target for all drafters, so that each of them finds what others have captured."""
    model = copy.deepcopy(tiny_model(family, max_position_embeddings=512))
    move(model)
    with torch.no_grad(), FakeDevice():
        return CapturedTarget(model, record=fake_device.record)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device.install(monkeypatch)
    monkeypatch.setattr(identity, "fingerprint", lambda *_: "x")
    warnings.simplefilter("error", SpecDecWarning)  # a drafter that fails is left out


@pytest.mark.parametrize(("family", "name", "temperature", "bounds"), CASES)
def test_reads_and_uploads_of_a_step(
    monkeypatch: pytest.MonkeyPatch, family: str, name: str, temperature: float, bounds: tuple[int, int]
) -> None:
    how: dict[str, Any] = {"temperature": temperature, "seed": 3} if temperature else {}
    expected = plain(family, COUNT, tuple(how.items()))
    target = target_of(family)
    for prompts, most in zip((PROMPTS[1:2], PROMPTS), bounds, strict=True):
        with torch.no_grad(), FakeDevice(), monkeypatch.context() as patch:
            drafter = on_device(target) if name == "draft-model" else with_all(DRAFTERS[name](target))
            drafter.bind(target)
            steps = Steps(patch)
            out, ran = decode(target, drafter, prompts, COUNT, **how)
        if name in LAUNCHES:
            missing = {"layers", "largest", *KINDS.get(name.split()[0].rstrip(":"), ())} - steps.kinds
            assert temperature or not missing, f"these run outside of captured functions: {missing}"
        assert out == (expected if len(prompts) > 1 else expected[1:2]), (out, expected)
        whole = [each.num_draft_tokens for each, tokens in zip(ran.metrics, out, strict=True) if len(tokens) == COUNT]
        assert whole and (drafter.name == "none" or all(whole)), whole  # others ended before anything could be drafted
        reads, uploads = steps.waits()
        assert reads <= most and uploads == 0, (reads, uploads, fake_device.reads, fake_device.uploads)
        if name in LAUNCHES and len(prompts) == 1:
            assert len(steps.captured) == len(set(steps.captured)), "captured twice"
            with torch.no_grad(), FakeDevice(), monkeypatch.context() as patch:
                again = Steps(patch)
                assert decode(target, drafter, prompts, COUNT, **how)[0] == out
            assert not again.captured, (again.captured, "captured again for the next request")
            outside, replays = LAUNCHES[name]
            for each in (steps, again):
                ran_outside, replayed = each.most()
                assert ran_outside <= outside + (SAMPLING if temperature else 0), (each.counts, fake_device.launches)
                assert replayed <= replays, each.counts


@pytest.mark.parametrize("name", ["none", "m2r2 (tree)", "eagle3"])
def test_a_greedy_row_under_a_constraint_is_read_once_a_step(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The read has the likeliest tokens after each node, of which the host takes the best that is allowed.

    Masks come from the host, so drafts have none. A step reads once more only if none of these tokens is allowed.
    """
    rule, model = (
        Json({"type": "array", "items": {"type": "integer"}}),
        tiny_model("llama", max_position_embeddings=512),
    )

    def answer(target: Target, drafter: Drafter) -> list[int]:
        drafter.bind(target)
        sampler = RowSampler(SamplingParams(), [made(rule).state(PROMPTS[0])])
        request = Request(PROMPTS[0], COUNT, sampler, eos=frozenset([EOS]))
        together(target, drafter, [request], FixedExit(4, None))
        return new_tokens(request)

    expected = answer(TorchTarget(model), NoDrafter())
    target = target_of("llama")
    with torch.no_grad(), FakeDevice(), monkeypatch.context() as patch:
        drafter = with_all(EVERY[name](target))
        steps = Steps(patch)
        assert answer(target, drafter) == expected
    reads, uploads = steps.waits()
    assert reads <= 1 and uploads == 0, (steps.counts, fake_device.reads, fake_device.uploads)
