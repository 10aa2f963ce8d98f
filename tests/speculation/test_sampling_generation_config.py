"""Greedy output is that of ``model.generate(do_sample=False)`` whatever the model's generation_config asks for."""

from typing import Any

import pytest
from refusals import refused
from scripted import knowing
from tiny import greedy_reference, tiny_model
from transformers import PreTrainedModel, RepetitionPenaltyLogitsProcessor

from specdec import SpecDecoder
from specdec.speculation.sampling import Sampler
from specdec.verify.certificate import expected
from specdec.verify.replay import first_difference, margins

PROMPT, COUNT = [5, 6, 7, 8], 24
PLAIN = greedy_reference(tiny_model(), PROMPT, COUNT)

SETTINGS: dict[str, dict[str, Any]] = {
    "repetition penalty": {"repetition_penalty": 1.7},
    "encoder repetition penalty": {"encoder_repetition_penalty": 4.0},
    "n-grams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [PLAIN[2:3], PLAIN[4:6]]},
    "least length": {"min_length": len(PROMPT) + 12, "eos_token_id": PLAIN[3]},
    "least new tokens": {"min_new_tokens": 9, "eos_token_id": [PLAIN[3], PLAIN[5]]},
    "forced end": {"forced_eos_token_id": 2},
    "forced beginning, of a prompt of one token": {"forced_bos_token_id": 11},
    "several": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 5, "suppress_tokens": [9]},
    "sampling, which is not honoured": {"do_sample": True, "temperature": 0.3, "top_k": 3, "top_p": 0.5},
}
UNCHANGED = {"forced beginning, of a prompt of one token", "sampling, which is not honoured"}


def asking(**settings: Any) -> PreTrainedModel:
    model = tiny_model()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore")  # of transformers, about flags that sampling alone reads
def test_greedy_output_is_that_of_generate(name: str) -> None:
    model = asking(**SETTINGS[name])
    right = greedy_reference(model, PROMPT, COUNT)
    assert (right == PLAIN) == (name in UNCHANGED)
    for drafter in ("prompt-lookup", knowing(PROMPT + right)):
        output = SpecDecoder(model, drafter=drafter).generate(PROMPT, max_new_tokens=COUNT, num_speculative_tokens=3)
        assert output.token_ids == right, drafter
    assert expected(SpecDecoder(model, drafter="none"), PROMPT, COUNT) == right


def test_rows_of_a_batch_have_processors_of_their_own() -> None:
    model = asking(min_new_tokens=6, begin_suppress_tokens=PLAIN[:1], eos_token_id=PLAIN[2])
    prompts = [PROMPT, [9, 10, 11, 12, 13], [*PROMPT, 9], [3]]
    decoder = SpecDecoder(model, drafter="prompt-lookup")
    outputs = decoder.generate_batch(prompts, max_new_tokens=COUNT, num_speculative_tokens=3)
    assert [out.token_ids for out in outputs] == [greedy_reference(model, prompt, COUNT) for prompt in prompts]


def test_explicit_arguments_come_first() -> None:
    decoder = SpecDecoder(asking(repetition_penalty=1.7), drafter="none")
    asked = decoder.generate(PROMPT, max_new_tokens=COUNT).token_ids
    assert decoder.generate(PROMPT, max_new_tokens=COUNT, repetition_penalty=1.0).token_ids == PLAIN != asked
    mine = [RepetitionPenaltyLogitsProcessor(1.0)]
    assert decoder.generate(PROMPT, max_new_tokens=COUNT, logits_processor=mine).token_ids == PLAIN


def test_a_config_that_asks_for_nothing_costs_nothing() -> None:
    decoder = SpecDecoder(tiny_model(), drafter="none")
    with decoder.open([PROMPT]) as generation:
        assert all(request.sampler.plain_greedy for request in generation.requests)


def test_sampling_keeps_to_it_too() -> None:
    decoder = SpecDecoder(asking(suppress_tokens=list(range(3, 60))), drafter="prompt-lookup")
    tokens = decoder.generate(PROMPT, max_new_tokens=40, temperature=5.0, ignore_eos=True).token_ids
    assert not set(tokens) & set(range(3, 60))


def test_replay_sees_what_was_decided_by() -> None:
    model = asking(repetition_penalty=1.7, eos_token_id=None)
    decoder = SpecDecoder(model, drafter="none")
    tokens = decoder.generate(PROMPT, max_new_tokens=COUNT).token_ids
    made = Sampler([decoder.request(PROMPT, max_new_tokens=COUNT).sampler])
    assert margins(decoder.target, PROMPT, tokens, made).max() == 0 < margins(decoder.target, PROMPT, tokens).max()
    other = [*tokens[:5], (tokens[5] + 1) % 97]
    difference = first_difference(decoder.target, PROMPT, other, tokens, made)
    assert difference is not None and (difference.index, difference.near_tie) == (5, False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": 2.0}, "has a state that cannot be rolled back"),
        ({"repetition_penalty": -1.0}, "generation_config cannot be used: `penalty` has to be a strictly positive"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    decoder = SpecDecoder(asking(**settings), drafter="none")
    with refused(message):
        decoder.generate(PROMPT)
    decoder.model.generation_config = tiny_model().generation_config
    assert decoder.generate(PROMPT, max_new_tokens=2).token_ids == PLAIN[:2]
