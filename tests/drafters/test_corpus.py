"""The corpus of the n-gram drafter: kept, damaged, too large, of odd tokenizers, and with the user's own texts."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import warnings
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from specdec import SpecDecoder
from specdec.base.errors import SpecDecError, SpecDecWarning
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


def ship(path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    (path / "corpus.xz").write_bytes(data)
    monkeypatch.setattr(corpus, "SHIPPED", str(path / "corpus.xz"))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with three texts."""
    ship(tmp_path, monkeypatch, lzma.compress(b"one\0three\0eleven char"))


SMALL = [-1, 3, 2, -1, -1, 5, 2, -1, -1, 11, 2, -1, -1]  # 99 is no token of a vocabulary of 50
DAMAGES: dict[str, Callable[[bytes], bytes] | None] = {
    "none": None,
    "shorter": lambda data: data[:-6],
    "empty": lambda data: b"",
    "another file": lambda data: b"PK\3\4" * 9,
    "other numbers": lambda data: np.array([-1, -7, -1], "<i4").tobytes(),
    "huge": lambda data: data + b"\xff" * (4 * corpus.MOST),
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_kept_corpus_is_used_unless_it_is_damaged(damage: str, cache: Path) -> None:
    tokenizer = Words()
    assert corpus.corpus(tokenizer, 50).tolist() == SMALL and tokenizer.calls == 1
    [kept] = cache.iterdir()
    if change := DAMAGES[damage]:
        kept.write_bytes(change(kept.read_bytes()))
    assert corpus.corpus(tokenizer, 50).tolist() == SMALL
    assert tokenizer.calls == (2 if change else 1)
    assert corpus.corpus(tokenizer, 100).max() == 99  # of a model with a larger vocabulary


@pytest.mark.usefixtures("small")
def test_where_nothing_can_be_kept_the_corpus_is_there_all_the_same(cache: Path) -> None:
    cache.parent.write_text("not a folder")
    assert corpus.corpus(Words(), 50).tolist() == SMALL


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (lzma.compress(b"one\0" + bytes(range(97, 123)) * 4000)[:-60], None),
        (lzma.compress(b"one\0tw\xffo"), 2),
        (b"no xz", 1),
        (b"", 1),
        (lzma.compress(b"a" * (corpus.MOST_BYTES + 10)), 1),
    ],
    ids=["truncated", "not UTF-8", "no xz", "nothing", "huge"],
)
def test_a_damaged_package_makes_the_corpus_smaller_and_says_so(
    data: bytes, texts: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship(tmp_path, monkeypatch, data)
    with pytest.warns(SpecDecWarning, match="corpus of the n-gram drafter is damaged"):
        found = corpus.corpus(Words(), 100)
    assert texts is None or (found == 2).sum() == texts


def test_without_its_file_the_corpus_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SHIPPED", "not/there.xz")
    with pytest.warns(SpecDecWarning, match="damaged"):
        assert (corpus.corpus(Words(), 100) >= 0).sum() <= 3


BYTES = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
TOKENIZERS = {
    "no unknown token": models.WordLevel({"a": 0}),
    "words": models.WordLevel({f"w{n}": n for n in range(96)} | {"?": 96}, unk_token="?"),
    "bytes": models.BPE(BYTES, []),
    "a million": models.BPE(BYTES | {f"filler {n}": n for n in range(256, 10**6)}, []),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_any_tokenizer_gives_a_corpus_of_bounded_size_and_a_request_that_succeeds(
    kind: str, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "MOST", 20_000)
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


def test_no_long_passage_of_the_prompts_that_are_measured_is_in_the_corpus() -> None:
    def grams(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 12]) for i in range(len(words) - 11)}

    packed = files("specdec.drafters").joinpath(corpus.SHIPPED).read_bytes()
    assert len(packed) < 3_000_000
    found = grams(lzma.decompress(packed).decode().replace("\0", " "))
    for prompts in files("specdec.bench").joinpath("data").iterdir():
        assert not grams(prompts.read_text("utf-8")) & found


# --- the user's own texts --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_own_texts_stand_behind_those_of_the_package_and_take_their_place_where_there_is_no_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer, seen = Words(), list[tuple[int, int]]()
    assert corpus.own_tokens(tokenizer) == 0
    monkeypatch.setattr(corpus, "BATCH", 1)
    assert corpus.save_own(["seventh", "eighteen"], tokenizer, lambda *at: seen.append(at))
    mine = [-1, 7, 2, 99, -1, 8, 2, 99, -1]
    shipped = [-1, 3, 2, 99, -1, 5, 2, 99, -1, 11, 2, 99, -1]
    assert corpus.corpus(tokenizer, 100).tolist() == [*shipped, *mine]
    assert corpus.own_tokens(tokenizer) == 6 and seen == [(4, corpus.MOST_OWN), (8, corpus.MOST_OWN)]
    monkeypatch.setattr(corpus, "MOST", len(mine) + 4)
    assert corpus.corpus(tokenizer, 100).tolist() == [-1, 3, 2, 99, *mine]
    monkeypatch.setattr(corpus, "MOST_OWN", 5)
    assert not corpus.save_own(["seventh", "eighteen", "more"], tokenizer, lambda *at: None)
    assert corpus.own_tokens(tokenizer) == 3
    corpus.reset(tokenizer)
    assert corpus.own_tokens(tokenizer) == 0 and len(corpus.corpus(tokenizer, 100)) == len(SMALL)


def test_what_own_texts_say_is_drafted(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = fast(models.WordLevel({f"w{n}": n for n in range(97)}, unk_token="w0"))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = SpecDecoder(llama, tokenizer, NgramDrafter(store=0))
    text = plain.generate([5, 6, 7], max_new_tokens=40, ignore_eos=True)
    corpus.save_own([" ".join(f"w{token}" for token in [5, 6, 7, *text.token_ids])], tokenizer, lambda *at: None)
    again = SpecDecoder(llama, tokenizer, NgramDrafter(store=0)).generate([5, 6, 7], max_new_tokens=40, ignore_eos=True)
    assert again.token_ids == text.token_ids
    assert again.metrics.num_spec_steps < text.metrics.num_spec_steps


def test_files_are_plain_text_or_records_and_long_texts_come_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "PIECE", 10)
    (tmp_path / "a.txt").write_text("def f():\n    return 1\n\nend")
    parts = list(corpus.read(tmp_path / "a.txt"))
    assert "".join(parts) == "def f():\n    return 1\n\nend" and 2 < max(map(len, parts)) <= 10
    records = [
        {"text": "a text of 21 letters."},
        {"prompt": "p"},
        {"turns": ["t", "u"]},
        {"messages": [{"role": "user", "content": "m"}, {"role": "assistant", "content": "n"}, {"content": None}]},
    ]
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    found = list(corpus.read(tmp_path / "b.jsonl.gz"))
    assert found == ["a text of ", "21 letters", ".", "p", "t", "u", "m", "n"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"good\nbad \xff\n", "line 2 is not UTF-8"),
        ("a.jsonl", b'{"text": "good"}\n{"text": \n', "line 2 of .* is broken JSON"),
        ("a.jsonl", b'{"other": 1}\n', "line 1 of .* has no usable 'text', 'prompt' or 'messages'"),
        ("a.txt", None, "No such file"),
        ("a.txt.gz", b"not gzip", "cannot read"),
        ("a.txt", b"x" * 200, "larger than"),
        ("a.txt", b"\n \n", "no text in these files"),
    ],
)
def test_a_bad_file_is_named_and_earlier_texts_stay(
    name: str, data: bytes | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specdec.base.inputs.LINE", 100)
    tokenizer = Words()
    corpus.save_own(["earlier"], tokenizer, lambda *at: None)
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(SpecDecError, match=words):
        corpus.save_own(corpus.read(tmp_path / name), tokenizer, lambda *at: None)
    assert corpus.own_tokens(tokenizer) == 3


def test_texts_that_cannot_be_kept_or_read_are_an_error(cache: Path) -> None:
    with pytest.raises(SpecDecError, match="tokenizer cannot read these texts"):
        corpus.save_own(["b"], fast(TOKENIZERS["no unknown token"]), lambda *at: None)
    cache.parent.write_text("not a folder")
    with pytest.raises(SpecDecError, match="cannot keep the texts"):
        corpus.save_own(["b"], Words(), lambda *at: None)
    with pytest.raises(SpecDecError, match="cannot delete"):
        corpus.reset(Words())
    assert corpus.own_tokens(Words()) == 0
