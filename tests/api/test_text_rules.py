"""Where a text may end, and which words may not come: the same with every drafter as token by token."""

import functools
from typing import Any

import pytest
import torch
from tiny import tiny_model
from tiny_tokenizers import Letters
from transformers import PreTrainedModel

from specdec import SpecDecError, SpecDecoder
from specdec.api import prompts

COUNT = 16
PROMPTS = [(5, 6, 7, 8), (9, 9, 4), (20, 21, 20, 21, 20)]
DRAFTERS = ["none", "auto", "prompt-lookup"]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


@functools.cache
@torch.inference_mode()
def plainly(
    model: PreTrainedModel,
    prompt: tuple[int, ...],
    least: int = 0,
    ends: tuple[int, ...] = (),
    words: tuple[str, ...] = (),
) -> list[int]:
    """Greedy decoding one token at a time, by the definition of each rule."""
    new, spelled = list[int](), [Letters()(word).input_ids for word in words]
    while len(new) < COUNT and not (new and new[-1] in ends):
        logits = model(torch.tensor([[*prompt, *new]])).logits[0, -1].float()
        for ids in spelled:
            if new[len(new) - len(ids) + 1 :] == ids[:-1] and len(new) >= len(ids) - 1:
                logits[ids[-1]] = float("-inf")
        if len(new) < least:
            logits[list(ends)] = float("-inf")
        new.append(int(logits.argmax()))
    return new


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_stop_token_ids_end_the_text_and_are_not_in_it(model: PreTrainedModel, drafter: str) -> None:
    decoder = SpecDecoder(model, Letters(), drafter)
    for prompt, plain in [(prompt, plainly(model, prompt)) for prompt in PROMPTS]:
        ends = (plain[7], plain[3])
        out = decoder.generate(prompt, max_new_tokens=COUNT, stop_token_ids=ends, ignore_eos=True)
        assert out.token_ids == plainly(model, prompt, ends=ends) and out.finish_reason == "stop"
        assert out.text == Letters().decode(out.token_ids[:-1])
        pieces = decoder.stream(prompt, max_new_tokens=COUNT, stop_token_ids=ends, ignore_eos=True)
        assert "".join(pieces) == out.text


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_no_end_comes_before_the_least_number_of_tokens(model: PreTrainedModel, drafter: str) -> None:
    decoder = SpecDecoder(model, Letters(), drafter)
    ends = tuple(plainly(model, prompt)[2] for prompt in PROMPTS)
    rows = [plainly(model, prompt, least, ends) for prompt in PROMPTS for least in (0, 9, COUNT)]
    assert {len(row) for row in rows} > {COUNT} and len(set(map(len, rows))) > 2
    engine = decoder.engine(max_rows=4, num_speculative_tokens=4)
    with engine:
        how = {"max_new_tokens": COUNT, "stop_token_ids": ends, "ignore_eos": True}
        cases = [(prompt, least) for prompt in PROMPTS for least in (0, 9, COUNT)]
        asked = [decoder.request(prompt, min_new_tokens=least, **how) for prompt, least in cases]
        for handle in [engine.submit(request) for request in asked]:
            list(handle)
    assert [request.ids[len(request.prompt) :] for request in asked] == rows
    model.generation_config.eos_token_id = ends[0]  # of the model, too
    try:
        out = decoder.generate(PROMPTS[0], max_new_tokens=COUNT, min_new_tokens=9)
    finally:
        model.generation_config.eos_token_id = 2
    assert out.token_ids == plainly(model, PROMPTS[0], 9, ends[:1])


@pytest.mark.parametrize("drafter", DRAFTERS[1:])
def test_no_stop_string_ends_the_text_before_the_least_number_of_tokens(model: PreTrainedModel, drafter: str) -> None:
    decoder, sampled = SpecDecoder(model, Letters(), drafter), {"temperature": 1.0, "seed": 2, "ignore_eos": True}
    whole = decoder.generate(PROMPTS[0], max_new_tokens=COUNT, **sampled).text
    stops = [whole[3:5], whole[9:11], whole[12:15]]
    how = {"max_new_tokens": COUNT, "min_new_tokens": 10, "stop": stops, **sampled}
    out = decoder.generate(PROMPTS[0], **how)
    ends = [(at + len(stop), at) for stop in stops for at in range(COUNT) if whole.startswith(stop, at)]
    end, cut = min(each for each in ends if each[0] >= 10)
    assert out.text == whole[:cut] == "".join(decoder.stream(PROMPTS[0], **how))
    assert out.finish_reason == "stop" and len(out.token_ids) == end > 10 > min(ends)[0]


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_bad_words_do_not_come(model: PreTrainedModel, drafter: str) -> None:
    decoder = SpecDecoder(model, Letters(), drafter)
    for prompt in PROMPTS[:2]:
        whole = Letters().decode(plainly(model, prompt))
        for words in ((whole[4:6],), (whole[3], whole[8:11]), (whole[:1], "~~")):
            out = decoder.generate(prompt, max_new_tokens=COUNT, bad_words=words, ignore_eos=True)
            assert out.token_ids == plainly(model, prompt, words=words)
            assert not any(word in out.text for word in words) and any(word in whole for word in words)


def test_a_prompt_is_encoded_once(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read, given_ids = list[Any](), prompts._given_ids
    monkeypatch.setattr(prompts, "_given_ids", lambda prompt, name: read.append(prompt) or given_ids(prompt, name))
    SpecDecoder(model, Letters(), "none").generate_batch([*PROMPTS, "abc"], max_new_tokens=2)
    assert read == [*PROMPTS, "abc"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stop_token_ids": 5}, "stop_token_ids must be a list"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9, more than max_new_tokens, 8; lower it"),
        ({"bad_words": "word"}, "bad_words must be a list"),
        ({"bad_words": [""]}, "bad_words"),
    ],
)
def test_what_cannot_be_meant_is_refused(model: PreTrainedModel, options: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecDecError, match=says):
        SpecDecoder(model, Letters(), "none").generate(PROMPTS[0], **options)
