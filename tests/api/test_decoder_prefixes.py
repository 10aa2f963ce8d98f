"""Texts of earlier calls: later prompts go on with their keys and values; the tokens are those of a fresh decoder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from tiny_tokenizers import Letters
from zoo import eagle3

from specdec import SpecDecError, SpecDecoder
from specdec.api import decoder as api
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.kvcache.cache import KVCache
from specdec.speculation.drafter import Drafter

PROMPT = [3 + n % 90 for n in range(70)]
Call = Callable[[SpecDecoder, list[int]], list[int]]


def generated(decoder: SpecDecoder, prompt: list[int], **given: Any) -> tuple[list[int], int]:
    """The new tokens, and how many tokens of the prompt were not run."""
    out = decoder.generate(prompt, max_new_tokens=20, num_speculative_tokens=3, **given)
    return out.token_ids, out.metrics.num_cached_tokens


@pytest.mark.parametrize("drafter", ["prompt-lookup", "eagle3"])  # the second one reads whole prompts
@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "sampled"])
def test_a_second_turn_runs_what_is_new_only(family: str, drafter: str, sampling: dict[str, Any]) -> None:
    model = tiny_model(family)

    def made(**how: Any) -> SpecDecoder:
        plain = SpecDecoder(model, Letters(), "none", **how)
        own: Drafter = PromptLookupDrafter() if drafter == "prompt-lookup" else eagle3(plain.target)
        return plain.with_drafter(own)

    decoder = made()
    first, cached = generated(decoder, PROMPT, **sampling)
    assert cached == 0
    text = [*PROMPT, *first]
    second = generated(decoder, [*text, 9, 8, 7], **sampling)
    assert second == (generated(made(), [*text, 9, 8, 7], **sampling)[0], len(text) - 1)
    assert generated(made(prefix_reuse=False), [*text, 9, 8, 7], **sampling) == (second[0], 0)


def test_a_stream_that_is_closed_early_and_a_chat_are_gone_on_with(llama: Any) -> None:
    decoder = SpecDecoder(llama, Letters(), "prompt-lookup")
    stream = decoder.stream(PROMPT, max_new_tokens=60, ignore_eos=True)
    next(stream)
    stream.close()
    assert generated(decoder, [*PROMPT, 5])[1] == len(PROMPT)
    turns = [[*PROMPT, n] for n in (5, 6)]
    assert [out.metrics.num_cached_tokens for out in decoder.generate_batch(turns)] == [len(PROMPT)] * 2


def test_each_decoder_of_a_model_has_its_own_texts_and_an_option_turns_them_off(llama: Any) -> None:
    decoder = SpecDecoder(llama, Letters(), "prompt-lookup")
    generated(decoder, PROMPT)
    other = decoder.with_drafter("none")
    assert generated(other, PROMPT)[1] == 0 and generated(other, PROMPT)[1] == len(PROMPT) - 1
    off = SpecDecoder(llama, Letters(), "prompt-lookup", prefix_reuse=False)
    assert [generated(each, PROMPT)[1] for each in (off, off, off.with_drafter("none"))] == [0] * 3


def test_the_oldest_texts_go_first_when_their_share_of_memory_is_full(llama: Any, monkeypatch) -> None:
    decoder = SpecDecoder(llama, Letters(), "none")
    prompts = [[first, *PROMPT] for first in (5, 6, 7)]
    generated(decoder, prompts[0])
    size = decoder.prefixes.nbytes  # type: ignore[union-attr]
    monkeypatch.setattr(api, "free_memory", lambda device: 2 * size * api.PREFIX_SHARE - decoder.prefixes.nbytes)  # type: ignore[union-attr]
    for prompt in prompts[1:]:
        generated(decoder, prompt)
    assert decoder.prefixes is not None and 0 < decoder.prefixes.nbytes <= 2 * size
    assert [generated(decoder, prompt)[1] for prompt in (prompts[2], prompts[1], prompts[0])] == [70, 70, 0]


def test_a_rule_that_commits_unscored_tokens_keeps_no_texts(llama: Any) -> None:
    """The keys and values of such tokens are not the model's own."""
    decoder = SpecDecoder(llama, Letters(), "none", verifier="confident")
    assert [generated(decoder, PROMPT)[1] for _ in range(2)] == [0, 0]


def test_a_failed_step_keeps_no_texts(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = SpecDecoder(llama, Letters(), "none")
    generated(decoder, PROMPT)
    with monkeypatch.context() as patched:
        patched.setattr(type(decoder.target), "layers", lambda *given: 1 / 0)
        with pytest.raises(Exception, match="division"):
            generated(decoder, [9, 9])
    assert decoder.prefixes is not None and decoder.prefixes.nbytes == 0
    expected, _ = generated(SpecDecoder(llama, Letters(), "none"), PROMPT)
    assert generated(decoder, PROMPT) == (expected, 0) and torch.is_inference_mode_enabled() is False


def test_an_engine_keeps_none_of_a_decoder_that_reuses_none(llama: Any, tmp_path: Path) -> None:
    decoder = SpecDecoder(llama, Letters(), "prompt-lookup", prefix_reuse=False)
    with decoder.engine() as engine:
        for _ in range(2):
            for _ in (handle := engine.submit(decoder.request(PROMPT, max_new_tokens=4))):
                pass
            assert handle.request.metrics.num_cached_tokens == 0
        assert engine.stats().prefix_bytes == 0
    with pytest.raises(SpecDecError, match="no prefixes are kept with prefix_reuse=False"):
        decoder.engine(prefix_cache=tmp_path)


@pytest.mark.parametrize("step", [3, 6, 9])
def test_what_an_interrupt_cuts_off_is_not_gone_on_with(monkeypatch, step: int) -> None:
    """Ctrl-C between the states of a recurrent layer and the count of their tokens."""
    model = tiny_model("qwen3_next")
    decoder, left, commit = SpecDecoder(model, Letters(), "prompt-lookup"), iter(range(step)), KVCache.commit

    def cut_off(cache: KVCache, paths: Any) -> None:
        counts = [row.count for row in cache.entries]
        commit(cache, paths)
        if next(left, None) is None:
            for row, count in zip(cache.entries, counts, strict=True):
                row.count = count
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(KVCache, "commit", cut_off)
        generated(decoder, PROMPT, ignore_eos=True)
    plain = generated(SpecDecoder(model, Letters(), "none"), PROMPT, ignore_eos=True)[0]
    for count in range(1, 15):
        prompt = [*PROMPT, *plain[:count], 9]
        assert generated(decoder, prompt)[0] == generated(SpecDecoder(model, Letters(), "none"), prompt)[0]
