"""The corpus of the n-gram drafter: what is packed, what is left out, and that replay counts what is drafted."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import ngram_corpus
import pytest
from tiny import save_tiny

from specdec.models.loading import read_tokenizer


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Twelve answers of a tiny model: ten alike, one that is also a measured prompt, and a short one."""
    tokenizer = read_tokenizer(str(save_tiny(tmp_path / "model")))
    texts = ["over and over the same answer comes, word by word, to all that is asked"] * 10
    texts += ["a b c d e f g h i j k l m n o p q r s t u v w", "short"]
    rows = [{"prompt_ids": [n, n], "response_ids": tokenizer(text)["input_ids"]} for n, text in enumerate(texts)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{tmp_path / 'model'}={tmp_path / 'answers.jsonl'}"


def test_what_is_measured_and_what_is_short_is_not_packed(source: str, tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text(json.dumps({"turns": ["see: C D E F G H I J K L M N"]}) + "\n")
    out = tmp_path / "corpus.xz"
    ngram_corpus.pack(out, [source, source], [str(tmp_path / "eval.jsonl")])
    texts = lzma.decompress(out.read_bytes()).decode().split("\0")
    assert len(texts) == 20 and all(text.startswith("over and over") for text in texts)
    ngram_corpus.pack(out, [source], [])
    assert len(lzma.decompress(out.read_bytes()).decode().split("\0")) == 11


def test_replay_finds_more_with_more_of_the_same_answers(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    ngram_corpus.replay(source, 4)
    lines = capsys.readouterr().out.splitlines()
    speeds = [float(line.split()[2]) for line in lines if "tokens a step" in line]
    assert len(speeds) == 4 and speeds[0] < speeds[1] < speeds[2] < speeds[3] and lines[-1].startswith(" ")
