"""The corpus that a user names: what is read and skipped, kept, built anew, and drafted from."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from specdec import SpecDecError, SpecDecoder
from specdec.drafters import ngram_corpus
from specdec.drafters.ngram_corpus import read_corpus
from specdec.speculation.ngram import SortedTexts


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ngram"


class Bytes:
    """A tokenizer whose tokens are the letters."""

    calls = 0

    def get_vocab(self) -> dict[str, int]:
        return {"a": 1}

    def __call__(self, given: list[str], **_: Any) -> dict[str, list[list[int]]]:
        self.calls += 1
        return {"input_ids": [[ord(letter) for letter in text] for text in given]}

    def decode(self, given: list[int], **_: Any) -> str:
        return "".join(map(chr, given))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "texts"
    (made / "sub").mkdir(parents=True)
    (made / ".git").mkdir()
    (made / "a.txt").write_text("abc\n")
    (made / "sub" / "b.py").write_text("de~")
    (made / ".git" / "c").write_text("hidden")
    (made / ".env").write_text("secret")
    (made / "d.bin").write_bytes(b"x\0y")
    (made / "e.txt").write_bytes(b"\xff\xfe latin")
    (made / "large").write_text("x" * 200)
    (made / "link").symlink_to(made / "a.txt")
    return made


def ids(texts: SortedTexts) -> list[int]:
    return texts.ids.tolist()


READ = [-1, *b"abc\n", -1, *b"de", -1, -1]  # "~" is no token of a vocabulary of 126


def test_text_files_are_read_once_and_again_after_a_change(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ngram_corpus, "MOST_BYTES", 100)
    tokenizer = Bytes()
    first, again = read_corpus(folder, tokenizer, 126), read_corpus(folder, tokenizer, 126)
    assert ids(first) == ids(again) == READ and again.order.tolist() == first.order.tolist()
    assert tokenizer.calls == 1 and isinstance(again.ids, np.memmap)
    lines = re.findall(r"10 tokens of 2 files \(3 skipped", capsys.readouterr().err)
    assert len(lines) == 2
    (folder / "a.txt").write_text("abcd\n")
    assert len(read_corpus(folder, tokenizer, 126).ids) == 11 and tokenizer.calls == 2
    [kept] = cache.iterdir()  # that of the old text is gone
    assert os.name == "nt" or stat.S_IMODE(kept.stat().st_mode) == 0o600


@pytest.mark.parametrize("place", ["size", "version", "count", "token", "order"])
def test_a_damaged_file_is_made_again(place: str, folder: Path, cache: Path) -> None:
    tokenizer = Bytes()
    expected = ids(read_corpus(folder, tokenizer, 126))
    [kept] = cache.iterdir()
    numbers = np.fromfile(kept, np.int32)
    if place == "size":
        numbers = numbers[:-1]
    else:
        numbers[{"version": 0, "count": 1, "token": 5, "order": -1}[place]] = 2**30
    numbers.tofile(kept)
    assert ids(read_corpus(folder, tokenizer, 126)) == expected and tokenizer.calls == 2


def test_a_large_file_is_read_in_pieces_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram_corpus, "PIECE", 4)
    place = tmp_path / "text"
    place.write_text("one t\nthree\nfour five")
    expected = [-1, *b"one t\n", -1, *b"three\n", -1, *b"four fiv", -1, *b"e", -1]
    assert ids(read_corpus(place, Bytes(), 126)) == expected
    monkeypatch.setattr(ngram_corpus, "MOST_TOKENS", 6)
    assert ids(read_corpus(place, Bytes(), 126)) == [-1, *b"one ", -1]


def test_where_nothing_can_be_kept_the_corpus_is_there_all_the_same(folder: Path, cache: Path) -> None:
    cache.parent.write_text("not a folder")
    assert ids(read_corpus(folder / "a.txt", Bytes(), 126)) == [-1, *b"abc\n", -1]


def test_what_cannot_be_read_is_one_sentence(folder: Path) -> None:
    class Broken(Bytes):
        def __call__(self, given: list[str], **_: Any) -> dict[str, list[list[int]]]:
            raise KeyError("no such word")

    for place, words in ((folder / "none", "cannot be read: No such file"), (folder / "d.bin", "has no text")):
        with pytest.raises(SpecDecError, match=words):
            read_corpus(place, Bytes(), 126)
    with pytest.raises(SpecDecError, match="cannot be tokenised: 'no such word'"):
        read_corpus(folder, Broken(), 126)
    with pytest.raises(SpecDecError, match="needs the model's tokenizer"):
        read_corpus(folder, None, 126)


def test_the_text_is_that_of_plain_decoding_in_fewer_steps(llama: PreTrainedModel, tmp_path: Path) -> None:
    prompt, tokenizer = [5, 6, 7, 8], Bytes()
    settings: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True}
    plain = SpecDecoder(llama, None, "none").generate(prompt, **settings)
    place = tmp_path / "texts.txt"
    place.write_text("".join(map(chr, [*prompt, *plain.token_ids])))
    own = {"prior": False, "store": 0, "corpus": str(place)}
    steps = []
    for options in (own, own | {"corpus": None}):
        decoder = SpecDecoder(llama, tokenizer, "ngram", drafter_options=options)
        output = decoder.generate(prompt, num_speculative_tokens=8, **settings)
        assert output.token_ids == plain.token_ids
        steps.append(output.metrics.num_spec_steps)
    assert steps[0] < steps[1]
