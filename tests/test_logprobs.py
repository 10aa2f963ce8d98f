"""Log-probabilities: the model's own at each position, whoever drafted the token, and those of the prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_model
from zoo import EOS, PROMPTS, every, new_tokens, together

from specdec import Request, SamplingParams, SpecDecError, SpecDecoder
from specdec.drafters.none import NoDrafter
from specdec.engine.depth import FixedDepth
from specdec.runtimes.native import library
from specdec.runtimes.native.target import NativeTarget
from specdec.runtimes.reference import ReferenceTarget
from specdec.runtimes.target import Target
from specdec.speculation.draft import Drafter

PARAMS = [SamplingParams(), SamplingParams(0.9, top_k=20, repetition_penalty=1.3, seed=3), SamplingParams(1.5)]
DRAFTERS = sorted(every(ReferenceTarget(tiny_model())))


def ran(target: Target, drafter: Drafter, count: int = 20, **more: Any) -> list[Request]:
    """Rows that are chosen in different ways, one without log-probabilities among them."""
    drafter.bind(target)
    eos, tops = frozenset([EOS]), (2, None, 0)
    rows = [
        Request(prompt, count, params, eos=eos, logprobs=top)
        for prompt, params, top in zip(PROMPTS * 2, PARAMS * 2, [*tops, None, 3, 1], strict=True)
    ]
    together(target, drafter, rows, FixedDepth(4), **more)
    return rows


def check(model: Any, row: Request) -> None:
    """The log-probabilities of a row are those of the model itself."""
    if row.logprobs is None:
        assert row.scored == []
        return
    new = new_tokens(row)
    expected = model(torch.tensor([row.ids])).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1)
    assert [each.token_id for each in row.scored] == new
    got = torch.tensor([each.logprob for each in row.scored])
    torch.testing.assert_close(got, expected.gather(1, torch.tensor(new)[:, None])[:, 0], atol=1e-4, rtol=1e-4)
    for each, logs in zip(row.scored, expected, strict=True):
        values, ids = logs.topk(row.logprobs)
        assert [token for token, _ in each.top] == ids.tolist()
        torch.testing.assert_close(torch.tensor([p for _, p in each.top]), values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", DRAFTERS)
def test_they_are_the_models_own_whoever_drafts(name: str) -> None:
    model = tiny_model()
    target = ReferenceTarget(model)
    for row in ran(target, every(target)[name]):
        check(model, row)


def test_a_single_greedy_row_has_them() -> None:
    model = tiny_model()
    target = ReferenceTarget(model)
    row = Request(PROMPTS[1], 20, logprobs=3)
    drafter = every(target)["early-exit (tree)"]
    drafter.bind(target)
    together(target, drafter, [row], FixedDepth(4))
    check(model, row)
    assert row.metrics.num_accepted_draft_tokens


@pytest.mark.skipif(not library.runs(), reason="there are no native kernels here")
def test_in_the_native_runtime_they_are_those_of_plain_decoding_bit_for_bit() -> None:
    target = NativeTarget(tiny_model(hidden_size=64, head_dim=32, intermediate_size=96).bfloat16())
    plain = ran(target, NoDrafter(), max_rows=1)
    for name in ("prompt-lookup", "m2r2: grown level by level (tree)", "medusa (tree)", "early-exit", "draft-model"):
        for row, other in zip(ran(target, every(target)[name]), plain, strict=True):
            assert row.ids == other.ids and row.scored == other.scored, name


def test_rows_that_gave_way_have_them_once() -> None:
    model = tiny_model()
    target = ReferenceTarget(model)
    rows = [Request(prompt, 40, logprobs=1, prompt_logprobs=True) for prompt in PROMPTS]
    engine = together(target, every(target)["prompt-lookup"], rows, FixedDepth(4), kv_memory=60_000, prefill_chunk=3)
    assert engine.stats().preemptions
    for row in rows:
        check(model, row)
        assert [each.token_id for each in row.prompt_scored] == row.prompt[1:]


@pytest.mark.parametrize("native", [False, True])
def test_of_the_prompt_in_parts_and_after_a_kept_prefix(native: bool) -> None:
    if native and not library.runs():
        pytest.skip("there are no native kernels here")
    model = tiny_model(hidden_size=64, head_dim=32, intermediate_size=96)
    target = NativeTarget(model.bfloat16()) if native else ReferenceTarget(model)
    prompt = list(range(3, 60))
    rows = [Request(prompt, limit, logprobs=2, prompt_logprobs=limit != 5) for limit in (5, 0, 3)]
    together(target, NoDrafter(), rows, FixedDepth(0), prefill_chunk=7, reuse=True)
    logs = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    expected = logs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    for row in rows[1:]:
        got = torch.tensor([each.logprob for each in row.prompt_scored])
        torch.testing.assert_close(got, expected, atol=0.3 if native else 1e-4, rtol=0)
        assert row.prompt_scored == rows[1].prompt_scored
    assert new_tokens(rows[1]) == [] and rows[1].finished == "length" and rows[1].scored == []
    assert rows[0].prompt_scored == [] and len(rows[0].scored) == 5


def test_the_library_gives_them_and_refuses_what_has_none() -> None:
    decoder = SpecDecoder(tiny_model(), None, "prompt-lookup", runtime="reference")
    output = decoder.generate([5, 6, 7], max_new_tokens=6, logprobs=2, prompt_logprobs=True)
    assert [each.token_id for each in output.logprobs or ()] == output.token_ids
    assert [each.token_id for each in output.prompt_logprobs or ()] == [6, 7]
    assert output.as_dict()["logprobs"][0]["logprob"] <= 0
    assert "logprobs" not in decoder.generate([5], max_new_tokens=2).as_dict()
    with pytest.raises(SpecDecError, match="goes with logprobs"):
        decoder.generate([5], prompt_logprobs=True)
    lossy = SpecDecoder(tiny_model(), None, "early-exit", verifier="confident")
    with pytest.raises(SpecDecError, match="without scoring"):
        lossy.generate([5], logprobs=1)
