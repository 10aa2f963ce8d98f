"""SpecDecoder: what comes in, what comes out, and what is refused."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from conftest import Scripted, greedy_reference, tiny_model
from test_text import Bytes
from transformers import PreTrainedModel

from specdec import SpecDecError, SpecDecoder

PROMPT = [5, 6, 7, 8]


class Letters(Bytes):
    """Token t is one letter; ids stay below the tiny vocabulary."""

    eos_token_id = 2

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("!") + i) for i in ids if i != 2 or not skip_special_tokens)


@pytest.fixture
def decoder(llama: PreTrainedModel) -> SpecDecoder:
    return SpecDecoder(llama, Letters(), drafter="prompt-lookup")


def test_generate_returns_tokens_text_reason_and_consistent_figures(llama, decoder: SpecDecoder) -> None:
    out = decoder.generate(PROMPT, max_new_tokens=30)
    assert out.token_ids == greedy_reference(llama, PROMPT, 30)
    assert out.text == Letters().decode(out.token_ids) and out.finish_reason == "length"
    m = out.metrics
    assert m.num_new_tokens == 30 == 1 + m.num_spec_steps + m.num_accepted_draft_tokens
    assert m.mean_acceptance_length == pytest.approx(29 / m.num_spec_steps)
    assert m.draft_acceptance_rate == pytest.approx(m.num_accepted_draft_tokens / m.num_draft_tokens)
    assert sum(m.acceptance_histogram) == m.num_spec_steps
    assert sum(n * c for n, c in enumerate(m.acceptance_histogram)) == m.num_accepted_draft_tokens
    assert m.prefill_seconds > 0 and m.decode_seconds > 0
    assert m.tokens_per_second == pytest.approx(29 / m.decode_seconds)
    assert sum(m.ledger.values()) == pytest.approx(m.prefill_seconds + m.decode_seconds)


def test_prompt_kinds_agree(decoder: SpecDecoder) -> None:
    expected = decoder.generate(PROMPT, max_new_tokens=8).token_ids
    assert decoder.generate(torch.tensor([PROMPT]), max_new_tokens=8).token_ids == expected


def test_stream_yields_the_text_of_generate(decoder: SpecDecoder) -> None:
    whole = decoder.generate(PROMPT, max_new_tokens=30)
    pieces = list(decoder.stream(PROMPT, max_new_tokens=30))
    assert "".join(pieces) == whole.text and len(pieces) == 1 + whole.metrics.num_spec_steps


def test_closing_a_stream_early_frees_its_cache_and_the_decoder(decoder: SpecDecoder) -> None:
    stream = decoder.stream(PROMPT, max_new_tokens=60)
    next(stream)
    assert decoder._open is not None
    cache = weakref.ref(decoder._open.loop.state.cache)
    with pytest.raises(SpecDecError, match="still open"):
        decoder.generate(PROMPT)
    stream.close()  # type: ignore[attr-defined]
    gc.collect()
    assert cache() is None
    assert len(decoder.generate(PROMPT, max_new_tokens=3).token_ids) == 3


def test_stop_strings_cut_text_and_tokens_where_plain_decoding_stops(llama, decoder: SpecDecoder) -> None:
    tokens = greedy_reference(llama, PROMPT, 30)
    text = Letters().decode(tokens)
    stop = text[11:13]
    end = text.index(stop)
    for drafter in (
        "none",
        "prompt-lookup",
        Scripted(lambda ids, n: [(t, i) for i, t in enumerate(tokens[len(ids) - 4 :][:n])]),
    ):
        out = SpecDecoder(llama, Letters(), drafter=drafter).generate(PROMPT, max_new_tokens=30, stop=[stop])
        assert out.token_ids == tokens[: end + 2] and out.text == text[:end] and out.finish_reason == "stop"


def test_batch_rows_equal_single_runs(llama, decoder: SpecDecoder) -> None:
    prompts = [PROMPT, [9, 10, 11, 12, 13], [3], [60, 61, 60, 61, 60]]
    outs = decoder.generate_batch(prompts, max_new_tokens=25, num_speculative_tokens=3)
    singles = [decoder.generate(p, max_new_tokens=25, num_speculative_tokens=3) for p in prompts]
    assert [o.token_ids for o in outs] == [o.token_ids for o in singles]


def test_sampling_is_reproducible_by_seed(decoder: SpecDecoder) -> None:
    runs = [decoder.generate(PROMPT, max_new_tokens=20, temperature=1.0, seed=s).token_ids for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_eos_ends_the_output_and_can_be_ignored(decoder: SpecDecoder) -> None:
    tokens = decoder.generate(PROMPT, max_new_tokens=20).token_ids
    decoder.model.generation_config.eos_token_id = [tokens[4], 2]
    try:
        out = decoder.generate(PROMPT, max_new_tokens=20)
        assert out.finish_reason == "eos" and out.token_ids == tokens[: tokens.index(tokens[4]) + 1]
        assert decoder.generate(PROMPT, max_new_tokens=20, ignore_eos=True).token_ids == tokens
    finally:
        decoder.model.generation_config.eos_token_id = 2


def test_the_model_stays_usable_and_unchanged(llama, decoder: SpecDecoder) -> None:
    fresh = tiny_model("llama")
    decoder.generate(PROMPT, max_new_tokens=5)
    assert greedy_reference(decoder.model, PROMPT, 20) == greedy_reference(fresh, PROMPT, 20)
    assert all(torch.equal(a, b) for a, b in zip(llama.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens must be 'auto' or >= 1"),
        ({"temperature": -1}, "temperature must be >= 0"),
        ({"temperature": float("nan")}, "temperature must be >= 0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"prompt": list(range(3, 90)) * 2}, "does not fit the model's context of 128"),
        ({"prompt": [5, 97]}, "outside the model's vocabulary"),
        ({"prompt": []}, "empty"),
    ],
)
def test_bad_input_is_refused_in_one_line(decoder: SpecDecoder, options: dict, message: str) -> None:
    prompt = options.pop("prompt", PROMPT)
    with pytest.raises(SpecDecError, match=message) as caught:
        decoder.generate(prompt, **options)
    assert "\n" not in str(caught.value)
    assert decoder.generate(PROMPT, max_new_tokens=2).finish_reason == "length"  # nothing is left open
