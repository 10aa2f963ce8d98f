"""Tokenizers without transformers: token ids, texts and chats are those of ``AutoTokenizer``."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tiny import save_native
from tiny_gguf import write_gguf
from tiny_tokenizers import TEXTS, letters, special_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from specdec.api.prompts import encode
from specdec.api.text import special_tokens
from specdec.models import catalogue, loading, prepare
from specdec.models.chat_template import render
from specdec.models.gguf.file import read_header
from specdec.models.tokenizer import FILE, Tokenizer, save

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a <city> & more: 'é'",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}
USER, SYSTEM = {"role": "user", "content": "Hi 🙂 <|im_end|> there\n"}, {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": " The answer "}
CHATS: list[tuple[list[Any], dict[str, Any]]] = [
    ([USER], {}),
    ([USER], {"add_generation_prompt": True}),
    ([SYSTEM, USER], {"add_generation_prompt": True}),
    ([SYSTEM, USER, ANSWER, USER], {"add_generation_prompt": True}),
    ([USER, ANSWER], {"continue_final_message": True}),
    ([USER], {"tools": TOOLS, "add_generation_prompt": True}),
    ([SYSTEM, USER], {"tools": TOOLS * 2, "add_generation_prompt": True}),
    ([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "12°"}], {}),
    ([USER, {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}, USER], {}),
    ([USER], {"add_generation_prompt": True, "enable_thinking": False, "custom": [1, None, True, 2.5]}),
]


def folder_of(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def folder_of_gguf(path: Path) -> Path:
    write_gguf(path)
    return prepare.prepare_gguf("it", read_header(path))


def check(folder: Path, source: Path | None = None) -> None:
    """All texts and chats. source: the folder that transformers reads, if it is another one."""
    own, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(source or folder)
    assert len(own) == len(theirs) and own.get_vocab() == theirs.get_vocab()
    assert special_tokens(own).keys() == special_tokens(theirs).keys()
    assert own.special_tokens_map == {name: str(token) for name, token in theirs.special_tokens_map.items()}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "bos_token", "chat_template"):
        assert getattr(own, name) == getattr(theirs, name), name
    for text in TEXTS:
        for how in ({}, {"add_special_tokens": False}, {"add_special_tokens": False, "split_special_tokens": True}):
            ids = own(text, **how).input_ids
            assert ids == theirs(text, **how).input_ids, (text, how)
            for skip in (False, True):
                assert own.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
            assert own.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
        assert own.encode(text) == theirs.encode(text)
    assert own(TEXTS, add_special_tokens=False)["input_ids"] == theirs(TEXTS, add_special_tokens=False)["input_ids"]
    tokens = ["<|im_end|>", "</s>", "a", "no such token"]
    assert own.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    for messages, how in CHATS if own.chat_template else ():
        try:
            expected = theirs.apply_chat_template(messages, tokenize=False, **how)
        except Exception as error:  # a template may refuse it
            with pytest.raises(type(error)):
                own.apply_chat_template(messages, tokenize=False, **how)
            continue
        assert own.apply_chat_template(messages, tokenize=False, **how) == expected, (messages, how)
        continues = how.get("continue_final_message", False)
        more = {name: value for name, value in how.items() if name in ("enable_thinking", "custom")}
        given: dict[str, Any] = {"tools": how.get("tools"), "continue_last": continues, "template": more}
        assert encode(own, messages, **given) == encode(theirs, messages, **given)


def test_the_tokenizer_of_a_gguf_file(cache: Any, tmp_path: Path) -> None:
    check(folder_of_gguf(tmp_path / "it.gguf"))


@pytest.mark.parametrize("kind", ["joined", "marked", "greedy", "eager", "letters"])
def test_a_tokenizer_with_special_tokens(tmp_path: Path, kind: str) -> None:
    check(folder_of(letters() if kind == "letters" else special_tokenizer(kind), tmp_path))


@pytest.mark.parametrize("kind", ["joined", "marked"])
def test_the_tokenizer_of_a_model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    folder = folder_of(special_tokenizer(kind), save_native(tmp_path / "it"))
    found = loading.load(folder)[1]
    assert isinstance(found, Tokenizer)
    check(Path(found.name_or_path), folder)


REAL = [pytest.param(f"qwen2.5-coder-{size}-instruct", marks=pytest.mark.real) for size in ("1.5b", "0.5b")]


@pytest.mark.parametrize("name", [pytest.param(catalogue.DEFAULT_MODEL, marks=pytest.mark.model), *REAL])
def test_the_tokenizer_of_an_embedded_model(name: str) -> None:
    check(prepare.prepare_embedded(name))


TEMPLATES = {
    "loops": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content | trim }};{% endfor %}",
    "json": "{{ tools | tojson }}{{ tools | tojson(indent=2, sort_keys=true) }}",
    "escapes": "{{ 'é<&>' | tojson(ensure_ascii=true) }}{{ 'é<&>' | tojson }}{{ 'é<&>' }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{%- endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "dict": "{% set d = dict(a=1, **{'b': 2}) %}{{ d | tojson }}{{ dict.fromkeys('ab', 1) | tojson }}",
    "blocks": "  {% if messages %}\n  text\n  {% endif %}\n{{ bos_token }}{{ eos_token }}{{ custom is defined }}\n",
    "slices": "{{ messages[1:] | length }}{{ messages[0].content[::-1] }}{{ messages[0]['content'].split(' ')[0] }}",
    "date": "{{ strftime_now('%Y') }}{{ messages[-1].role.upper() }}{{ add_generation_prompt }}{{ documents }}",
    "raises": "{{ raise_exception('no ' + messages[0].role) }}",
    "underscore": "{% set ns = namespace(_x=1) %}{{ ns._x }}",
    "unsafe": "{{ messages.__class__.__mro__ }}",
    "changes": "{{ messages.append(1) }}",
    "class": "{{ dict.__class__ }}{{ ''.__class__.__mro__ }}",
    "broken": "{% for m in messages %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(tmp_path: Path, name: str) -> None:
    theirs = letters()
    theirs.chat_template = TEMPLATES[name]
    own = Tokenizer(folder_of(theirs, tmp_path))
    for messages, how in CHATS:
        results = list[str]()
        for tokenizer in (own, theirs):
            try:
                results.append(tokenizer.apply_chat_template(messages, tokenize=False, **how))
            except Exception as error:
                found = type(error).__module__.partition(".")[0]
                results.append(f"{found}: {error}" if found == "jinja2" and name != "underscore" else found)
        assert results[0] == results[1], (messages, how)


def test_a_template_sees_plain_values_alone() -> None:
    class Odd:
        def __str__(self) -> str:
            return "called"

    assert render("{{ messages[0].content }}", [{"role": "user", "content": Odd()}]) == "<Odd>"
    with pytest.raises(ValueError, match="no messages"):
        render("", [])


def test_what_transformers_alone_can_is_done_by_transformers(tmp_path: Path) -> None:
    own = Tokenizer(folder_of(letters(), tmp_path))
    assert "transformers" not in vars(own)
    assert own(["ab", "c"], padding=True, return_tensors="pt").input_ids.shape == (2, 2)
    assert isinstance(own.transformers, PreTrainedTokenizerFast)
    assert own.padding_side == own.transformers.padding_side
    for token in ("a", None):
        own.pad_token = token
        assert own.pad_token_id == (token and own.convert_tokens_to_ids(token))
    with pytest.raises(AttributeError):
        _ = own._nothing


def test_a_chat_template_in_the_config(tmp_path: Path) -> None:
    folder = folder_of(letters(), tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages[0].role }}"}))
    assert Tokenizer(folder).apply_chat_template([USER], tokenize=False) == "user"


@pytest.mark.parametrize(
    ("joined", "texts"),
    [
        (["ab", "é"], True),
        (["a", " b"], False),  # a token with a space
        (["#version", "ed"], False),  # the text would be read as a comment
    ],
)
def test_merges_are_written_as_texts_where_these_are_read_back_alike(
    tmp_path: Path, joined: list[str], texts: bool
) -> None:
    vocabulary = {token: n for n, token in enumerate([*joined, "".join(joined)])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [tuple(joined)]))
    save(backend, tmp_path)
    written = (tmp_path / FILE).read_text("utf-8")
    assert json.loads(written)["model"]["merges"] == [" ".join(joined) if texts else joined]
    assert tokenizers.Tokenizer.from_str(written).to_str() == backend.to_str()
