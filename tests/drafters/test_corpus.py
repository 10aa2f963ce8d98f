"""The corpus of the n-gram drafter: kept, bounded, and of odd tokenizers."""

import lzma
import re
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specdec import SpecDecoder
from specdec.base.errors import SpecDecWarning
from specdec.drafters import corpus
from specdec.drafters.ngram import NgramDrafter
from specdec.speculation.ngram import Prior


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ngram"


class Words:
    """A tokenizer of no library: of each text three tokens, of which the first is its length modulo 90."""

    calls = 0

    def get_vocab(self) -> dict[str, int]:
        return {"a": 1}

    def __call__(self, given: list[str], **_: Any) -> dict[str, list[list[int]]]:
        self.calls += 1
        return {"input_ids": [[len(text) % 90, 2, 99] for text in given]}


def fast(model: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    if isinstance(model, models.BPE):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with three texts."""
    (tmp_path / "corpus.xz").write_bytes(lzma.compress(b"one\0three\0eleven char"))
    monkeypatch.setattr(corpus, "SHIPPED", str(tmp_path / "corpus.xz"))


SMALL = [-1, 3, 2, -1, -1, 5, 2, -1, -1, 11, 2, -1, -1]  # 99 is no token of a vocabulary of 50


@pytest.mark.usefixtures("small")
def test_a_corpus_is_kept_for_every_model_of_the_tokenizer(cache: Path) -> None:
    tokenizer = Words()
    assert corpus.corpus(tokenizer, 50).tolist() == corpus.corpus(tokenizer, 50).tolist() == SMALL
    assert tokenizer.calls == 1 and corpus.corpus(tokenizer, 100).max() == 99
    [kept] = cache.iterdir()
    kept.write_bytes(b"")  # as a full disk may leave it
    assert corpus.corpus(tokenizer, 50).tolist() == SMALL and tokenizer.calls == 2


@pytest.mark.usefixtures("small")
def test_where_nothing_can_be_kept_the_corpus_is_there_all_the_same(cache: Path) -> None:
    cache.parent.write_text("not a folder")
    assert corpus.corpus(Words(), 50).tolist() == SMALL


BYTES = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
TOKENIZERS = {
    "no unknown token": models.WordLevel({"a": 0}),
    "words": models.WordLevel({f"w{n}": n for n in range(96)} | {"?": 96}, unk_token="?"),
    "bytes": models.BPE(BYTES, []),
    "many": models.BPE(BYTES | {f"filler {n}": n for n in range(256, 100_000)}, []),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_any_tokenizer_gives_a_corpus_of_bounded_size_and_a_request_that_succeeds(kind, llama, monkeypatch) -> None:
    monkeypatch.setattr(corpus, "MAX_TOKENS", 20_000)
    tokenizer = fast(TOKENIZERS[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpecDecWarning)
        ids = corpus.corpus(tokenizer, 10**6)
    assert ids[-1] == -1 and (len(ids) == 1 if kind == "no unknown token" else 9_000 < len(ids) <= 20_000)
    prior = Prior.count(ids, 10**6)
    assert prior.begin.nbytes + prior.after.nbytes + prior.p.nbytes < 5_000_000
    decoder = SpecDecoder(llama, tokenizer, NgramDrafter())
    assert decoder.generate([5, 6, 7, 5, 6], max_new_tokens=24, ignore_eos=True).metrics.num_spec_steps < 24


def test_a_tokenizer_that_is_none_gives_an_empty_corpus() -> None:
    class Broken:
        def get_vocab(self) -> dict[str, int]:
            raise NotImplementedError

    assert corpus.corpus(Broken(), 50).tolist() == [-1]


@pytest.mark.slow  # it changes with the data alone
def test_no_long_passage_of_the_prompts_that_are_measured_is_in_the_corpus() -> None:
    def grams(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 12]) for i in range(len(words) - 11)}

    packed = files("specdec.drafters").joinpath(corpus.SHIPPED).read_bytes()
    assert len(packed) < 3_000_000
    found = grams(lzma.decompress(packed).decode().replace("\0", " "))
    for prompts in files("specdec.bench").joinpath("data").iterdir():
        assert not grams(prompts.read_text("utf-8")) & found
