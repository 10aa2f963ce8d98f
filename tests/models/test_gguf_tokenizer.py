"""Tokenizers that are built from a GGUF header: files and token ids are those that transformers makes of it."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from refusals import refused
from tiny import rough_model
from tiny_gguf import ARCHITECTURES, finish, write_family, write_gguf
from tiny_tokenizers import TEXTS
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from specdec.models import prepare
from specdec.models.catalogue import EMBEDDED
from specdec.models.gguf import model as gguf_model
from specdec.models.gguf import tokenizer as gguf_tokenizer
from specdec.models.gguf.file import read_header
from specdec.models.tokenizer import CONFIG, FILE, TEMPLATE, Tokenizer


def both(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Folders of a file: with the tokenizer that is built here, and with that of transformers."""
    file, folders = read_header(path), (tmp_path / "own", tmp_path / "theirs")
    for folder in folders:
        folder.mkdir()
        gguf_model.write_parts("it", file, folder)
        monkeypatch.setattr(gguf_tokenizer, "_read", lambda *given: None)
    monkeypatch.undo()
    return folders


def same(own: Path, theirs: Path, whole: bool = False) -> None:
    """whole: whether words that are tokens stay whole, which transformers' converter does not know."""
    parts = [json.loads((folder / FILE).read_text("utf-8")) for folder in (own, theirs)]
    if whole:
        assert parts[0]["model"]["ignore_merges"]
        parts[1]["model"]["ignore_merges"], parts[1]["post_processor"] = True, parts[0]["post_processor"]
        (theirs / FILE).write_text(json.dumps(parts[1]), "utf-8")
    for part in parts[0]:
        assert parts[0][part] == parts[1][part], part
    configs = [json.loads((folder / CONFIG).read_text("utf-8")) for folder in (own, theirs)]
    named = [{key: value for key, value in config.items() if key.endswith("_token")} for config in configs]
    theirs_named = {k: v for k, v in named[1].items() if v and not k.startswith("add_")}
    assert {k: v for k, v in named[0].items() if v} == theirs_named
    assert (own / TEMPLATE).is_file() == (theirs / TEMPLATE).is_file()
    if (own / TEMPLATE).is_file():
        assert (own / TEMPLATE).read_text("utf-8") == (theirs / TEMPLATE).read_text("utf-8")
    mine, others = Tokenizer(own), AutoTokenizer.from_pretrained(theirs)
    for text in TEXTS:
        assert mine(text).input_ids == others(text).input_ids == mine.transformers(text).input_ids, text


SPLIT = sorted({*gguf_tokenizer.SPLITS, *gguf_tokenizer.DIGITS_APART, *gguf_tokenizer.WORDS})


@pytest.mark.parametrize("pre", SPLIT)
def test_a_file_that_says_how_it_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pre: str) -> None:
    write_gguf(tmp_path / "it.gguf", pre=pre)
    same(*both(tmp_path / "it.gguf", tmp_path, monkeypatch), whole=pre in gguf_tokenizer.WHOLE)
    assert gguf_tokenizer.SPLITS.get(pre) == GGUF_PRE_TOKENIZER_SPLITS.get(pre)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_file_of_each_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    own, theirs = both(write_family(tmp_path / "it.gguf", rough_model(kind)), tmp_path, monkeypatch)
    if kind in gguf_tokenizer.NORMALIZED - {"qwen2"}:  # transformers' converter knows the normalizer of qwen2 alone
        part = json.loads((theirs / FILE).read_text("utf-8"))
        (theirs / FILE).write_text(json.dumps(part | {"normalizer": {"type": "NFC"}}), "utf-8")
    same(own, theirs)


def with_tokens(path: Path, first: bool, last: bool, **more: Any) -> Path:
    """A file whose tokens are of all types."""
    tokens = ["<|endoftext|>", "<s>", "</s>", "<think>", "[odd ]", "<later>", *"abcdefghi", "ab", "é"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(more.get("pre", "llama-bpe"))
    writer.add_token_list(tokens)
    writer.add_token_types([1, 3, 3, 4, 3, 1, *[1] * 9, 1, 1])
    writer.add_token_merges(more.get("merges", ["a b"]))
    writer.add_bos_token_id(more.get("bos", 1))
    writer.add_eos_token_id(5)
    writer.add_add_bos_token(first)
    writer.add_add_eos_token(last)
    finish(writer)
    return path


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_tokens_of_all_types(tmp_path: Path, first: bool, last: bool) -> None:
    file, folder = read_header(with_tokens(tmp_path / "it.gguf", first, last)), tmp_path / "own"
    folder.mkdir()
    gguf_tokenizer.write("it", file, "llama", folder)
    theirs, own = gguf_tokenizer.converted("it", file), Tokenizer(folder)
    assert own.added_tokens_decoder.keys() == theirs.added_tokens_decoder.keys() | {4}  # which theirs spells in bytes
    for number, token in theirs.added_tokens_decoder.items():
        assert repr(own.added_tokens_decoder[number]) == repr(token)
    assert own("[odd ]", add_special_tokens=False).input_ids == [4] and own.added_tokens_decoder[4].special
    for text in ("abc<think>ab <s>a</s>", "", "<later>é<|endoftext|>"):
        assert own(text).input_ids == theirs(text).input_ids
        assert own(text, add_special_tokens=False).input_ids == theirs(text, add_special_tokens=False).input_ids
    assert (own("a").input_ids[0] == 1) == first and (own("a").input_ids[-1] == 5) == last


def test_llama_3_begins_texts_and_keeps_words_whole(tmp_path: Path) -> None:
    tokens = ["<s>", *"abc", "bc", "ab", "abc"]  # "abc" cannot be merged from "ab"
    for pre, ids in (("llama3", [0, 6]), ("qwen2", [5, 3])):
        writer = gguf.GGUFWriter(tmp_path / f"{pre}.gguf", "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3, 1, 1, 1, 1, 1, 1])
        writer.add_token_merges(["a b", "b c"])
        writer.add_bos_token_id(0)  # and no key says whether to add it
        finish(writer)
        (folder := tmp_path / pre).mkdir()
        gguf_tokenizer.write("it", read_header(tmp_path / f"{pre}.gguf"), "llama", folder)
        assert Tokenizer(folder)("abc").input_ids == ids


@pytest.mark.parametrize("more", [{"merges": ["ab"]}, {"bos": 99}, {"merges": ["a z"]}])
def test_a_broken_vocabulary_is_one_line(tmp_path: Path, more: dict[str, Any]) -> None:
    file = read_header(with_tokens(tmp_path / "it.gguf", False, False, **more))
    with refused("has no usable tokenizer: that of its GGUF file is broken"):
        gguf_tokenizer.write("it", file, "llama", tmp_path)


def test_an_unknown_kind_is_converted(tmp_path: Path) -> None:
    for pre, kind, expected in (("tekken", "llama", None), ("llama-bpe", "qwen3_5_moe_text", None)):
        file = read_header(with_tokens(tmp_path / f"{pre}.gguf", False, False, pre=pre))
        assert gguf_tokenizer._read("it", file, kind) is expected


@pytest.mark.real
@pytest.mark.parametrize("name", EMBEDDED)
def test_that_of_a_real_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    same(*both(prepare.prepare_embedded(name) / prepare.GGUF, tmp_path, monkeypatch))
