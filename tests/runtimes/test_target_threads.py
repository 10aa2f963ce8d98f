"""Threads that share a model or a target get what they would get alone.

``interleaved`` forces the worst schedule: a whole generation in another thread between any two lines of the runtimes.
"""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import Replay
from targets import needs_native
from tiny import SIZES, greedy_reference, tiny_model
from zoo import m2r2, run

from specdec.api.decoder import SpecDecoder
from specdec.base.errors import SpecDecError
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.runtimes import target
from specdec.runtimes.native import library, linear
from specdec.runtimes.native.target import NativeTarget
from specdec.runtimes.target import Pass, Target, lock_of
from specdec.runtimes.torch.graphs import CapturedTarget
from specdec.runtimes.torch.target import TorchTarget
from specdec.runtimes.transformers import TransformersTarget

RUNTIMES = Path(target.__file__).parent
FOLDERS = (RUNTIMES, RUNTIMES / "native", RUNTIMES / "torch", RUNTIMES.parent / "kvcache")
PROMPTS = [[5, 6, 7, 8, 9] * 3, [10, 11, 12, 13, 10, 11, 12], [20, 21, 22, 23, 24, 25] * 4]
FILES = {"library", "linear", "drafting", "target", "transformers", "model", "attention", "graphs", "cache"}


def interleaved(mine: Callable[[], Any], other: Callable[[], Any], model: torch.nn.Module) -> tuple[Any, list[Any]]:
    """What ``mine`` returns, and what ``other`` does each time that it runs in another thread, in one go.

    That is before each line of the runtimes and caches, the first time that it is reached without a lock.
    """
    seen, others, before = set[tuple[str, int]](), list[Any](), sys.gettrace()

    def trace(frame: Any, event: str, _: object) -> Any:
        path = Path(frame.f_code.co_filename)
        if path.parent not in FOLDERS or path.stem not in FILES:
            return None
        line = path.stem, frame.f_lineno
        locked = lock_of(model)._is_owned() or linear._arena.lock.locked() or target._finding.locked()
        if event == "line" and line not in seen and not locked:
            seen.add(line)
            thread = threading.Thread(target=lambda: others.append(other()))
            thread.start()
            thread.join(300)
            assert not thread.is_alive(), f"{line} waits for another thread"
        return trace

    sys.settrace(trace)
    try:
        return mine(), others
    finally:
        sys.settrace(before)


def grown(target: Target) -> Any:
    return m2r2(target, 0, ((1, 2), (3, 4)), True, False, nodes=6, width=2)


def projecting(target: Target) -> Any:
    return m2r2(target, 1, ((2, 4),), False, True)


def make(runtime: str) -> Target:
    if runtime == "native":
        return NativeTarget(tiny_model("llama", **SIZES).bfloat16())
    model = tiny_model("llama")
    return {"torch": lambda: TorchTarget(model), "graphs": lambda: CapturedTarget(model, record=Replay)}[runtime]()


@pytest.mark.parametrize(
    ("runtime", "drafters"),
    [
        pytest.param("native", (grown, grown), marks=[needs_native, pytest.mark.slow]),
        pytest.param("native", (projecting, PromptLookupDrafter), marks=needs_native),
        ("torch", (projecting, PromptLookupDrafter)),
        pytest.param("graphs", (projecting, PromptLookupDrafter), marks=pytest.mark.slow),
    ],
    ids=["native grown", "native", "torch", "graphs"],
)
def test_generations_on_one_target_interleave(runtime: str, drafters: Sequence[Any]) -> None:
    shared = make(runtime)

    def request(kind: Any, prompt: list[int], count: int) -> Callable[[], list[int]]:
        def once() -> list[int]:  # with a drafter of its own: what it makes of the target is part of the generation
            drafter = kind(shared) if kind is not PromptLookupDrafter else kind()
            return run(shared, drafter, [prompt], count, eos=None)[0][0]

        return once

    mine, other = request(drafters[0], PROMPTS[2], 4), request(drafters[1], PROMPTS[1], 2)
    expected = mine(), other()
    shared = make(runtime)  # nothing is made yet
    found, others = interleaved(mine, other, shared.model)
    assert found == expected[0]
    assert len(others) > 20 and all(each == expected[1] for each in others)


def test_a_reference_runtime_leaves_the_head_of_a_fused_one_alone() -> None:
    """The reference runtime puts a drafter's head into the model while it reads out."""
    model = tiny_model("llama")
    fused, reference = TorchTarget(model), TransformersTarget(model)
    mine = lambda: run(fused, PromptLookupDrafter(), [PROMPTS[0]], 6, eos=None)[0]  # noqa: E731
    expected, x, head = mine(), torch.randn(1, 1, 32), fused.reduced_head(torch.arange(9))
    found = list[Any]()

    class Head(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            thread = threading.Thread(target=lambda: found.append(mine()))
            thread.start()
            thread.join(300)
            return super().forward(x)

    between = Head(32, 9, bias=False)
    between.weight = head.weight
    with torch.inference_mode():
        reference.readout(x, between)
    assert found == [expected]


@torch.inference_mode()
def test_passes_of_the_reference_runtime_take_turns() -> None:
    """A second one that began within the first and ended after it would leave the first one's gates in the model."""
    model = tiny_model("llama")
    reference, own = TransformersTarget(model), model.model.layers
    entered, finished, found = threading.Event(), threading.Event(), list[torch.Tensor]()

    def run_layers() -> torch.Tensor:
        with torch.inference_mode():
            cache, positions = reference.new_cache(), torch.arange(3)[None]
            x = torch.ones(1, 3, 32).cumsum(2) / 32
            return reference.layers(x, 0, 4, Pass(positions, cache.register(0, positions), cache))

    def meet(*_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            other.start()
            entered.wait(0.2)
        else:
            entered.set()
            finished.wait(300)

    expected = run_layers()
    other = threading.Thread(target=lambda: found.append(run_layers()))
    hook = own[1].register_forward_pre_hook(meet)
    found.append(run_layers())
    finished.set()
    other.join(300)
    hook.remove()
    assert model.model.layers is own
    assert all(torch.equal(each, expected) for each in found) and len(found) == 2


@needs_native
def test_weights_that_are_packed_at_once_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread packs while this one does: between looking for memory and having it."""
    torch.manual_seed(1)
    weights, x = [torch.randn(64, 64).bfloat16() for _ in range(2)], torch.randn(3, 64).bfloat16()
    kernels, packed = library.load(), list[linear.Packed]()

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(kernels, name)

        def specdec_pack(self, *arguments: Any) -> None:
            if threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=lambda: packed.append(linear.Packed([weights[1]])))
                thread.start()
                thread.join(300)
            kernels.specdec_pack(*arguments)

    monkeypatch.setattr(library, "load", Slow)
    packed.append(linear.Packed([weights[0]]))
    for mine, weight in zip(packed, reversed(weights), strict=True):
        assert torch.allclose(mine(x).float(), x.float() @ weight.float().T, rtol=0.02, atol=0.1)
    begins = sorted((each.tiles[0].data_ptr(), each.nbytes) for each in packed)
    assert begins[0][0] + begins[0][1] <= begins[1][0]


def test_decoders_are_made_at_once_on_one_model() -> None:
    model, begin = tiny_model("llama"), threading.Barrier(3)
    expected = greedy_reference(model, PROMPTS[0], 8)

    def generated(runtime: str) -> list[int]:
        begin.wait(60)
        decoder = SpecDecoder(model, None, "prompt-lookup", runtime=runtime)
        return decoder.generate(PROMPTS[0], max_new_tokens=8, num_speculative_tokens=3).token_ids

    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            assert list(pool.map(generated, ("torch", "transformers", "torch"))) == [expected] * 3


def test_a_second_request_is_refused_whenever_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """At any point of opening the first one, by a thread that would otherwise get through."""
    decoder = SpecDecoder(tiny_model("llama"), None, "prompt-lookup", runtime="transformers")
    refused, policy = list[str](), SpecDecoder._policy

    def second() -> None:
        with pytest.raises(SpecDecError, match="still open") as error:
            decoder.generate(PROMPTS[1], max_new_tokens=2)
        refused.append(str(error.value))

    def slow(self: SpecDecoder, depth: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=second)
            thread.start()
            thread.join(300)
        return policy(self, depth)

    monkeypatch.setattr(SpecDecoder, "_policy", slow)
    first = decoder.generate(PROMPTS[0], max_new_tokens=4)
    assert len(refused) == 1 and "with_drafter" in refused[0]
    assert len(first.token_ids) == 4
    assert decoder.generate(PROMPTS[0], max_new_tokens=4).token_ids == first.token_ids


def test_closing_waits_for_the_step_of_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next request would begin while the drafter is still in use."""
    decoder = SpecDecoder(tiny_model("llama"), None, "prompt-lookup", runtime="transformers")
    generation, closed, propose = decoder.open([PROMPTS[0]]), list[bool](), PromptLookupDrafter.propose

    def slow(self: PromptLookupDrafter, *arguments: Any) -> Any:
        thread = threading.Thread(target=generation.close)
        thread.start()
        while not generation.engine.closed:
            time.sleep(0.001)
        closed.append(not thread.is_alive())
        return propose(self, *arguments)

    steps = generation.steps()
    next(steps)
    monkeypatch.setattr(PromptLookupDrafter, "propose", slow)
    next(steps)
    assert closed == [False]
    assert list(steps) == [] and generation.outputs()[0].finish_reason == "interrupted"
