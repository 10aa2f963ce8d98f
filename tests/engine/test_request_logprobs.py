"""Log-probabilities: the model's own at each position, whoever drafted the token, and those of the prompt."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import byte_tokenizer, events, serving, tiny_decoder
from targets import target_of
from tiny import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from zoo import EOS, EVERY, PROMPTS, alike, new_tokens, together

from specdec import Request, SamplingParams, SpecDecError, SpecDecoder
from specdec.drafters.none import NoDrafter
from specdec.engine.depth import FixedDepth
from specdec.kvcache.prefix import PrefixStore
from specdec.runtimes.target import Target
from specdec.runtimes.transformers import TransformersTarget
from specdec.serve.logprobs import TextOffsets, token_bytes, token_text
from specdec.speculation.drafter import Drafter
from specdec.speculation.sampling import RowSampler

PARAMS = [SamplingParams(), SamplingParams(0.9, top_k=20, repetition_penalty=1.3, seed=3), SamplingParams(1.5)]
SOME = ("none", "prompt-lookup", "medusa (tree)")


def ran(target: Target, drafter: Drafter, count: int = 20, **more: Any) -> list[Request]:
    """Rows that are chosen in different ways, one without log-probabilities among them."""
    drafter.bind(target)
    eos, tops = frozenset([EOS]), (2, None, 0)
    rows = [
        Request(prompt, count, RowSampler(params), eos=eos, logprobs=top)
        for prompt, params, top in zip(PROMPTS * 2, PARAMS * 2, [*tops, None, 3, 1], strict=True)
    ]
    together(target, drafter, rows, FixedDepth(4), **more)
    return rows


def check(model: Any, row: Request) -> None:
    """The log-probabilities of a row are those of the model itself."""
    if row.logprobs is None:
        assert row.token_logprobs == []
        return
    new = new_tokens(row)
    expected = model(torch.tensor([row.ids])).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1)
    assert [each.token_id for each in row.token_logprobs] == new
    got = torch.tensor([each.logprob for each in row.token_logprobs])
    torch.testing.assert_close(got, expected.gather(1, torch.tensor(new)[:, None])[:, 0], atol=1e-4, rtol=1e-4)
    for each, logs in zip(row.token_logprobs, expected, strict=True):
        values, ids = logs.topk(row.logprobs)
        assert [token for token, _ in each.top] == ids.tolist()
        torch.testing.assert_close(torch.tensor([p for _, p in each.top]), values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SOME)
def test_log_probabilities_are_the_models_own(name: str) -> None:
    """(With every drafter they are those of plain decoding: test_drafters_pairwise.)"""
    model = tiny_model()
    target = TransformersTarget(model)
    for row in ran(target, EVERY[name](target)):
        check(model, row)


def test_the_native_runtime_gives_those_of_plain_decoding_bit_for_bit() -> None:
    target = target_of("native")
    plain = ran(target, NoDrafter(), max_rows=1)
    for name in ("prompt-lookup", "m2r2 (tree)", "medusa (tree)", "early-exit", "draft-model"):
        for row, other in zip(ran(target, EVERY[name](target)), plain, strict=True):
            assert row.ids == other.ids and row.token_logprobs == other.token_logprobs, name


@pytest.mark.parametrize("runtime", ["transformers", "native"])
def test_of_the_prompt_in_parts_and_after_a_kept_prefix(runtime: str) -> None:
    target = target_of(runtime)
    prompt = list(range(3, 60))
    rows = [Request(prompt, limit, logprobs=2, prompt_logprobs=limit != 5) for limit in (5, 0, 3)]
    together(target, NoDrafter(), rows, FixedDepth(0), prefill_chunk=7, prefixes=PrefixStore())
    logs = target.model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    expected = logs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    for row in rows[1:]:
        got = torch.tensor([each.logprob for each in row.prompt_token_logprobs])
        torch.testing.assert_close(got, expected, atol=0.3 if runtime == "native" else 1e-4, rtol=0)
        alike(row.prompt_token_logprobs, rows[1].prompt_token_logprobs)
    assert new_tokens(rows[1]) == [] and rows[1].finish_reason == "length" and rows[1].token_logprobs == []
    assert rows[0].prompt_token_logprobs == [] and len(rows[0].token_logprobs) == 5


def test_the_library_gives_them_and_refuses_what_has_none() -> None:
    decoder = SpecDecoder(tiny_model(), None, "prompt-lookup", runtime="transformers")
    output = decoder.generate([5, 6, 7], max_new_tokens=6, logprobs=2, prompt_logprobs=True)
    assert [each.token_id for each in output.logprobs or ()] == output.token_ids
    assert [each.token_id for each in output.prompt_logprobs or ()] == [6, 7]
    assert output.as_dict()["logprobs"][0]["logprob"] <= 0
    assert "logprobs" not in decoder.generate([5], max_new_tokens=2).as_dict()
    with pytest.raises(SpecDecError, match="needs logprobs"):
        decoder.generate([5], prompt_logprobs=True)
    lossy = SpecDecoder(tiny_model(), None, "early-exit", verifier="confident")
    with pytest.raises(SpecDecError, match="without scoring"):
        lossy.generate([5], logprobs=1)


@pytest.mark.parametrize("count", [0, 1])
def test_lm_evals_request_for_the_logprobs_of_a_prompt(tmp_path: Path, count: int) -> None:
    decoder = tiny_decoder(tmp_path)
    prompts = [[5, 6, 7, 8, 9], [11, 12, 13]]
    body = {"prompt": prompts, "max_tokens": count, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    with serving(decoder) as server:
        found = server.complete(**body).json()
        streamed = events(server.complete(**body, stream=True))
    assert found["usage"]["completion_tokens"] == 2 * count
    for prompt, choice in zip(prompts, found["choices"], strict=True):
        assert choice["finish_reason"] == "length"
        logs = decoder.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        expected = [float(logs[n, token]) for n, token in enumerate(prompt[1:])]
        got = choice["logprobs"]
        assert got["token_logprobs"][0] is got["top_logprobs"][0] is None
        assert got["token_logprobs"][1 : len(prompt)] == pytest.approx(expected, abs=1e-4)
        assert "".join(got["tokens"]) == choice["text"] and len(got["tokens"]) == len(prompt) + count
        for n, likely in enumerate(got["top_logprobs"][1 : len(prompt)]):
            best = max(likely, key=lambda token: likely[token])
            assert best == token_text(decoder.tokenizer, int(logs[n].argmax()))
        choices = [c for each in streamed for c in each["choices"] if c["index"] == choice["index"]]
        parts = [each["logprobs"] for each in choices if each["logprobs"]]
        assert [each for part in parts for each in part["tokens"]] == got["tokens"]
        assert [each for part in parts for each in part["text_offset"]] == got["text_offset"]


def test_what_the_server_refuses_of_them(tmp_path: Path) -> None:
    with serving(tiny_decoder(tmp_path)) as server:
        assert server.chat(top_logprobs=2).status_code == server.chat(logprobs=True, top_logprobs=21).status_code == 400
        assert server.chat(logprobs=False, top_logprobs=0).json()["choices"][0]["logprobs"] is None
        assert len(server.complete(logprobs=0).json()["choices"][0]["logprobs"]["tokens"]) == 24


def test_offsets_are_those_of_the_text_that_the_client_gets() -> None:
    byte = byte_tokenizer()
    text = "\u00e9 \u20ac 1"
    offsets = TextOffsets(byte, lambda: text)
    found = [offsets.next(token) for token in byte(text).input_ids]
    assert found == [0, 0, 1, 2, 2, 2, 3, 4]
    words = Tokenizer(WordLevel({"<s>": 0, "\u2581ab": 1, "\u2581cd": 2}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
    for text, expected in (("ab cd", [0, 0, 2]), (" ab cd", [0, 0, 3]), ("<s> ab cd", [0, 3, 6])):
        offsets = TextOffsets(tokenizer, lambda text=text: text)  # type: ignore[misc]
        assert [offsets.next(token) for token in (0, 1, 2)] == expected


def test_a_part_of_a_character_is_named_by_its_bytes() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("\u00e9 a").input_ids
    assert b"".join(token_bytes(tokenizer, each) for each in ids) == "\u00e9 a".encode()
    assert [token_text(tokenizer, each) for each in ids] == ["bytes:\\xc3", "bytes:\\xa9", " ", "a"]
    assert json.dumps(token_text(tokenizer, ids[0]))
