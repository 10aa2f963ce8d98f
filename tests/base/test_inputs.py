"""Files and arguments of users: bounded, decoded, parsed, and refused with a sentence that says where."""

import gzip
import io
from pathlib import Path

import pytest
from refusals import refused

from specdec.api.prompts import encode
from specdec.base import inputs, options
from specdec.base.errors import SpecDecError
from specdec.bench.plan import load_plan
from specdec.bench.prompts import load_prompts
from specdec.bench.results import load_results
from specdec.train import data
from specdec.train.settings import TrainSettings, load_settings

DEEP, NESTED = "[" * 100_000, "[" * 600  # JSON is read by C, YAML by Python
ODD = "2026-13-45", "!!bool maybe", "!!int ''", "!!timestamp x", "1" * 5000, "[", NESTED


@pytest.mark.parametrize("text", ODD, ids=[text[:17] for text in ODD])
def test_yaml_that_cannot_be_read_is_refused_everywhere(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"a: {text}")
    with pytest.raises(SpecDecError, match="takes KEY=VALUE"):
        options.parse_assignments("--drafter-option", [f"a={text}"])
    with pytest.raises(SpecDecError, match="cannot read training preset"):
        load_settings(TrainSettings, "m2r2", str(path), {})
    with pytest.raises(SpecDecError, match=r"x\.yaml"):
        load_plan(path)


@pytest.mark.parametrize("text", ['{"turns": ' + DEEP, '{"turns": ' + "1" * 5000 + "}", '{"turns"'], ids=[0, 1, 2])
def test_json_that_cannot_be_read_is_refused_everywhere(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f"fine\n{text}\n")
    for read in (lambda: load_prompts(str(path)), lambda: data.read([path])):
        with pytest.raises(SpecDecError, match=r"line 2 of '.*' is broken JSON"):
            read()


def test_results_that_are_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(DEEP)
    with pytest.raises(SpecDecError, match="is broken"):
        load_results(tmp_path)


def test_no_more_of_a_file_is_read_than_is_bearable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "LINE", 2_000_000)
    monkeypatch.setattr(inputs, "DOCUMENT", 2_000_000)
    long, packed, sweep = tmp_path / "long.jsonl", tmp_path / "long.jsonl.gz", tmp_path / "long.yaml"
    text = "fine\n" + "x" * 2_000_001
    long.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    sweep.write_text(text)
    for path in (long, packed):
        for read in (lambda path=path: load_prompts(str(path)), lambda path=path: data.read([path])):
            with pytest.raises(SpecDecError, match="line 2 is larger than 2 MB"):
                read()
    for read in (lambda: load_plan(sweep), lambda: load_settings(TrainSettings, "m2r2", str(sweep), {})):
        with pytest.raises(SpecDecError, match="larger than 2 MB"):
            read()

    class Endless(io.RawIOBase):
        taken = 0

        def read(self, size: int = -1) -> bytes:
            assert size >= 0
            self.taken += size
            return b"y" * size

    endless = Endless()
    with pytest.raises(ValueError, match="larger than 1 MB"):
        inputs.read_bounded(endless, 1_000_000)  # type: ignore[arg-type]
    assert endless.taken <= 1_000_001


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenised() -> None:
    class Tokenizer:
        chat_template = None

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "x" * 32: 1}

        def __call__(self, text: str, **how: object) -> None:
            raise AssertionError("minutes go by")

    for chat in (None, False):
        with refused("321 characters, and the model's context of 10 tokens holds at most 320"):
            encode(Tokenizer(), "x" * 321, chat, context=10)
    with pytest.raises(SpecDecError, match="the tokenizer cannot encode this text: minutes"):
        encode(Tokenizer(), "x" * 320, context=10)

    class Chat(Tokenizer):
        chat_template = "there is one"

        def apply_chat_template(self, messages: list[dict[str, str]], **how: object) -> str:
            return messages[0]["content"]

    for prompt in ("x" * 321, [{"role": "user", "content": "x" * 321}]):
        with pytest.raises(SpecDecError, match="321 characters"):
            encode(Chat(), prompt, context=10)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("first\nsecond", "utf-8-sig")
    assert [c.turns[0] for c in load_prompts(str(path)).conversations] == ["first", "second"]
    assert data.read([path]) == [data.Prompt(("first",)), data.Prompt(("second",))]


def test_options_of_one_drafter_add_up() -> None:
    pairs = ["m2r2={width: 2}", "m2r2={nodes: 4, width: 3}", "a=1", "a=2"]
    assert options.parse_assignments("--drafter-option", pairs) == {"m2r2": {"width": 3, "nodes": 4}, "a": 2}
