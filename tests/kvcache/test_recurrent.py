"""Models with recurrent layers: what is rejected leaves no trace in their states."""

import functools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from scripted import Scripted
from tiny import HYBRIDS, greedy_reference, model_of, tiny_model
from transformers import PreTrainedModel
from zoo import PROMPTS, finish, new_tokens, run

from specdec.drafters.exits import EarlyExitDrafter
from specdec.drafters.layer_skip import LayerSkipDrafter
from specdec.drafters.none import NoDrafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.engine import scheduler
from specdec.engine.depth import FixedDepth
from specdec.engine.engine import Engine
from specdec.engine.memory import cache_sizes
from specdec.engine.request import Request
from specdec.kvcache.prefix import PrefixStore
from specdec.kvcache.recurrent import ALL_LAYERS, RowStates
from specdec.runtimes.native import library
from specdec.runtimes.native.target import NativeTarget
from specdec.runtimes.target import Target
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation.drafter import Drafter
from specdec.verifiers.exact import ExactVerifier

COUNT = 16
Script = list[tuple[int, int]]


@functools.cache
def served(family: str, runtime: str = "transformers") -> tuple[PreTrainedModel, Target, list[list[int]]]:
    """A model, its target, and its answers to the prompts: in 16 bits those of plain decoding."""
    if runtime == "native":
        if not library.runs():
            pytest.skip("no native kernels here")
        model: Any = model_of(family)
        target: Target = NativeTarget(model)
        return model, target, [run(target, NoDrafter(), [prompt], COUNT)[0][0] for prompt in PROMPTS]
    model = tiny_model(family)
    expected = [greedy_reference(model, prompt, COUNT) for prompt in PROMPTS]
    return model, TransformersTarget(model), expected


def oracle(texts: list[list[int]], right: float, branches: int = 1) -> Scripted:
    """Drafts that continue one of ``texts``, each token right with a probability.

    branches: as many tokens follow the last one, of which one is continued.
    """
    chance = random.Random(0)

    def script(ids: list[int], limit: int) -> Script:
        [text] = [text for text in texts if text[: len(ids)] == ids]
        right_ones = text[len(ids) : len(ids) + limit]
        drafted: Script = [((token + 2 + other) % 97, 0) for token in right_ones[:1] for other in range(branches - 1)]
        for token in right_ones:
            parent = len(drafted) if len(drafted) >= branches else 0
            drafted.append((token if chance.random() < right else (token + 1) % 97, parent))
        return drafted

    return Scripted(script)


def cases() -> Iterator[Any]:
    """(family, runtime, rows): a ragged batch, and alone."""
    yield pytest.param("qwen3_5_text", "native", slice(1, 2), id="qwen3_5_text-native-alone")
    for family, runtime in [*((family, "transformers") for family in HYBRIDS), ("qwen3_5_text", "native")]:
        marks = [] if family == "qwen3_next" or runtime == "native" else [pytest.mark.slow]
        yield pytest.param(family, runtime, slice(3), marks=marks, id=f"{family}-{runtime}-ragged")


@pytest.mark.parametrize(("family", "runtime", "rows"), list(cases()))
def test_greedy_equals_generate(family: str, runtime: str, rows: slice) -> None:
    _, target, expected = served(family, runtime)
    texts = [prompt + answer for prompt, answer in zip(PROMPTS, expected, strict=True)]
    drafters: dict[str, Drafter] = {
        f"oracle {right} {branches}": oracle(texts, right, branches) for right in (1, 0.6, 0) for branches in (1, 3)
    }
    drafters |= {"early-exit": EarlyExitDrafter(2), "nothing is drafted": Scripted(lambda ids, limit: [])}
    for name, drafter in drafters.items():
        out, ran = run(target, drafter, PROMPTS[rows], COUNT)
        assert out == expected[rows], name
        if name == "oracle 1 1":
            assert all(metrics.num_spec_steps < COUNT / 2 for metrics in ran.metrics)


def answer_of(target: Target, prompt: list[int], count: int) -> list[int]:
    if target.runtime == "native":
        return run(target, NoDrafter(), [prompt], count)[0][0]
    return greedy_reference(target.model, prompt, count)


def cached(engine: Engine, prompts: Sequence[list[int]], count: int = 6) -> list[int]:
    """How many tokens of each prompt need not be run, where they come at once. The output is the model's."""
    requests = [Request(prompt, count) for prompt in prompts]
    finish(engine, *requests)
    for request in requests:
        assert request.error is None
        assert new_tokens(request) == answer_of(engine.batch.target, request.prompt, count)
    return [request.metrics.num_cached_tokens for request in requests]


SERVED = pytest.mark.parametrize(
    "kind", [("qwen3_next", "transformers"), ("qwen3_5_text", "native")], ids=["qwen3_next", "qwen3_5_text-native"]
)


def engine_of(kind: tuple[str, str], drafter: Drafter, kv_memory: int | None = None) -> Engine:
    target = served(*kind)[1]
    drafter.bind(target)
    return Engine(target, drafter, ExactVerifier(), FixedDepth(4), kv_memory=kv_memory, prefixes=PrefixStore())


@SERVED
def test_a_text_is_gone_on_with_where_it_ended_or_where_others_forked_off(kind: tuple[str, str]) -> None:
    engine, shared = engine_of(kind, PromptLookupDrafter()), list(range(5, 50))
    text = [*shared, 60, *answer_of(engine.batch.target, [*shared, 60], 6)]
    assert cached(engine, [[*shared, 60]]) == [0]
    assert cached(engine, [[*text, 7, 8]]) == [len(text) - 1]  # where it ended
    assert cached(engine, [[*text, 9]]) == [len(text) - 1]  # and again: the text that went on keeps a checkpoint there
    assert cached(engine, [[*shared, 61]]) == [0]  # the first to fork off at this place
    assert cached(engine, [[*shared, 62]]) == [len(shared)]
    assert cached(engine, [[*range(50, 95), n] for n in (5, 5, 6)]) == [0, 45, 45]  # they know of each other


@SERVED
@pytest.mark.parametrize("chunk", [8, 40])
def test_checkpoints_are_kept_every_so_many_tokens(kind: tuple[str, str], chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(scheduler, "CHECKPOINT", 16)
    engine = engine_of(kind, NoDrafter())
    engine.scheduler.chunk = chunk
    prompt = [3 + n % 90 for n in range(100)]
    assert cached(engine, [prompt]) == [0]
    [text] = engine.scheduler.memory.prefixes.entries
    kept = [text.cache.resumable(0, count) for count in (15, 16, 40, 99)]
    assert kept == ([0, 16, 32, 88] if chunk == 8 else [0, 0, 40, 80])
    assert cached(engine, [[*prompt[:42], 5]]) == [32 if chunk == 8 else 40]


@SERVED
def test_recurrent_states_count_as_memory(kind: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.kvcache.cache.BLOCK", 16)
    token_bytes, state_bytes = cache_sizes(served(*kind)[1])
    assert state_bytes > 10 * token_bytes > 0
    memory = 3 * state_bytes + 200 * token_bytes
    engine = engine_of(kind, NoDrafter(), kv_memory=memory)
    for first in range(5, 10):
        cached(engine, [[first, *range(10, 40)]])
    kept, held = len(engine.scheduler.memory.prefixes.entries), engine.stats().kv_bytes
    assert 1 < kept < 5 and kept * state_bytes < held == engine.scheduler.memory.prefixes.nbytes <= memory


@SERVED
def test_checkpoints_of_prompts_take_memory_where_no_row_decodes(kind: tuple[str, str], monkeypatch) -> None:
    monkeypatch.setattr("specdec.kvcache.cache.BLOCK", 16)
    monkeypatch.setattr(scheduler, "CHECKPOINT", 8)
    token_bytes, state_bytes = cache_sizes(served(*kind)[1])
    memory = 4 * state_bytes + 200 * token_bytes  # of two rows, and of two checkpoints
    engine = engine_of(kind, NoDrafter(), kv_memory=memory)
    engine.scheduler.chunk = 8
    requests = [Request([first, *range(10, 80)], 6) for first in (5, 6)]
    for request in requests:
        engine.submit(request)
    most = 0
    for _ in engine.steps():
        running = engine.stats().running
        most = max(most, running)
        # A step stores at most one checkpoint of a row, for which the next step makes room. Alone, a row has its own.
        assert running < 2 or engine.stats().kv_bytes <= memory + running * state_bytes
    assert most == 2 and engine.stats().preemptions
    for request in requests:
        assert new_tokens(request) == answer_of(engine.batch.target, request.prompt, 6)


def keeps_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: what is rejected stays in the states."""
    make_room, commit, counts = RowStates.make_room, RowStates.commit, dict[int, int]()

    def counted(self: RowStates, slots: int, like: torch.Tensor | None = None) -> None:
        counts[id(self)] = slots
        make_room(self, slots, like)

    def everything(self: RowStates, path: Sequence[int]) -> None:
        commit(self, range(counts[id(self)]) if path and ALL_LAYERS not in self.ahead else path)

    monkeypatch.setattr(RowStates, "make_room", counted)
    monkeypatch.setattr(RowStates, "commit", everything)


@pytest.mark.parametrize(("family", "runtime"), [("qwen3_next", "transformers"), ("qwen3_5_text", "native")])
def test_states_that_keep_what_was_rejected_change_the_output(family: str, runtime: str, monkeypatch) -> None:
    _, target, expected = served(family, runtime)
    keeps_everything(monkeypatch)
    assert run(target, LayerSkipDrafter([1]), PROMPTS, COUNT)[0] != expected
