"""Parameters by the names people know: what each does to the text, and what is ignored, and what is refused."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from servers import NAME, USER, Server, events, serving
from tiny import tiny_model
from tiny_tokenizers import letters

from specdec import SpecDecoder
from specdec.api import prompts
from specdec.serve.messages import MessagesBody
from specdec.serve.responses import ResponsesBody
from specdec.serve.schema import UNUSED, ChatBody, CompletionBody, Options

PROMPT, COUNT = "Name three colours", 24
GREEDY, SAMPLED = {"temperature": 0}, {"temperature": 0.9, "seed": 3}


@pytest.fixture(scope="module")
def decoder() -> SpecDecoder:
    """With the default drafter."""
    tokenizer = letters()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return SpecDecoder(tiny_model(), tokenizer)


@pytest.fixture(scope="module")
def server(decoder: SpecDecoder) -> Iterator[Server]:
    with serving(decoder) as running:
        yield running


@pytest.fixture(scope="module")
def plain(decoder: SpecDecoder) -> SpecDecoder:
    return decoder.with_drafter("none")


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def test_each_parameter_does_to_the_text_what_it_does_in_python(server: Server, plain: SpecDecoder) -> None:
    """Requests with different ones share steps. Greedy text changes by all that can change it."""
    base = plain.generate(PROMPT, apply_chat_template=False, max_new_tokens=COUNT, ignore_eos=True)
    first, penalties = base.token_ids[0], {"frequency_penalty": 2, "presence_penalty": 1, "ignore_eos": True}
    ends = [base.token_ids[5], base.token_ids[2]]
    stops = [base.text[2:4], base.text[15:18]]
    asked: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
        ({"stop_token_ids": ends}, {"stop_token_ids": ends}),
        ({"stop_token_ids": ends, "min_tokens": 9}, {"stop_token_ids": ends, "min_new_tokens": 9}),
        ({"stop": stops, "min_tokens": 9}, {"stop": stops, "min_new_tokens": 9}),
        ({"bad_words": [base.text[3:5], base.text[8]]}, {"bad_words": [base.text[3:5], base.text[8]]}),
        ({"repetition_penalty": 1.8}, {"repetition_penalty": 1.8}),
        ({"top_k": 3}, {"top_k": 3}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"min_p": 0.6}, {"min_p": 0.6}),
        (penalties, penalties),
        ({"logit_bias": {str(first): -100}}, {"logit_bias": {first: -100}}),
    ]
    drawn = [asked[0], *asked[7:10]]
    rows = [(given | GREEDY, same | GREEDY) for given, same in asked]
    rows += [(given | SAMPLED, same | SAMPLED) for given, same in drawn]
    with ThreadPoolExecutor(len(rows)) as pool:
        found = list(pool.map(lambda row: text(server.complete(prompt=PROMPT, max_tokens=COUNT, **row[0])), rows))
    right = [plain.generate(PROMPT, apply_chat_template=False, max_new_tokens=COUNT, **same).text for _, same in rows]
    assert found == right
    greedy, sampled = right[: len(asked)], right[len(asked) :]
    assert len(set(greedy[2:7])) == 5 and base.text not in (*greedy[2:7], *greedy[10:])
    assert sampled[2] == sampled[0] and len({sampled[0], sampled[1], sampled[3]}) == 3


def test_all_protocols_take_them(server: Server, plain: SpecDecoder) -> None:
    asked = [{"role": "user", "content": PROMPT}]
    end = plain.generate(asked, max_new_tokens=COUNT).token_ids[2]
    right = plain.generate(asked, max_new_tokens=COUNT, stop_token_ids=[end], min_new_tokens=2).text
    more = {"model": NAME, "stop_token_ids": [end], "min_tokens": 2, **GREEDY}
    chat = server.chat(messages=asked, **more).json()["choices"][0]["message"]["content"]
    message = server.post("/v1/messages", more | {"messages": asked, "max_tokens": COUNT}).json()
    response = server.post("/v1/responses", more | {"input": PROMPT, "max_output_tokens": COUNT}).json()
    assert chat == message["content"][0]["text"] == response["output"][0]["content"][0]["text"] == right
    assert message["stop_reason"] == "end_turn" and response["status"] == "completed"


def test_a_prompt_is_encoded_once_for_all_its_choices(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    read, given_ids = list[Any](), prompts._given_ids
    monkeypatch.setattr(prompts, "_given_ids", lambda prompt, name: read.append(prompt) or given_ids(prompt, name))
    assert server.complete(n=3, max_tokens=2).status_code == server.chat(n=2, max_tokens=2).status_code == 200
    assert len([prompt for prompt in read if not isinstance(prompt[0], int)]) == 2  # token ids are taken as they are


SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
FORMS: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"json": SCHEMA}}, r'\{"a": [12]\}'),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, r'\{"a": [12]\}'),
    ({"structured_outputs": {"grammar": 'start: "x" "y"'}}, "xy"),
    ({"structured_outputs": {"regex": "[ab]{3}c", "disable_fallback": True}}, "[ab]{3}c"),
    ({"structured_outputs": {"choice": ["red", "blue"]}}, "red|blue"),
]


def test_vllms_names_of_formats_constrain_the_text(server: Server) -> None:
    def ask(form: dict[str, Any]) -> list[str]:
        found = server.complete(n=2, max_tokens=40, **SAMPLED, **form)
        assert found.status_code == 200, found.text
        return [choice["text"] for choice in found.json()["choices"]]

    with ThreadPoolExecutor(len(FORMS)) as pool:
        for (form, pattern), texts in zip(FORMS, pool.map(ask, [form for form, _ in FORMS]), strict=True):
            assert all(re.fullmatch(pattern, each) for each in texts), (form, texts)
    same = {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}
    assert ask(same) == ask(FORMS[0][0]) == ask({"response_format": {"type": "json_object", "schema": SCHEMA}})
    for kind in ("text", "json_schema"):
        wrong = server.complete(response_format={"type": kind, "schema": SCHEMA})
        assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "response_format"
    both = server.complete(structured_outputs={"regex": "a"}, **same)
    assert both.status_code == 400 and "one format only" in both.json()["error"]["message"]


def test_an_unknown_parameter_is_ignored_and_named_in_a_header(server: Server) -> None:
    base = server.chat(**GREEDY)
    odd = {"colour": "red", "caf\u00e9, \n": 1, "messages": [USER[0] | {"mood": 3}], "store": True}
    found = server.chat(**GREEDY, **odd)
    assert found.json()["choices"] == base.json()["choices"]
    assert found.headers["x-specdec-ignored"] == "caf%C3%A9%2C%20%0A, colour, mood, store"
    assert "x-specdec-ignored" not in base.headers
    many = server.complete(max_tokens=1, **{f"odd {n}": 1 for n in range(1000)}, **{"x" * 5000: 1})
    assert many.status_code == 200 and len(many.headers["x-specdec-ignored"]) < 2500
    stream = server.chat(stream=True, **GREEDY, colour="red")
    assert stream.headers["x-specdec-ignored"] == "colour" and events(stream)
    wrong = server.chat(temperature=-1, colour="red")
    assert wrong.status_code == 400 and wrong.headers["x-specdec-ignored"] == "colour"
    for path, body in (
        ("/v1/messages", {"messages": USER, "max_tokens": 2}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 2}),
        ("/tokenize", {"prompt": "a"}),
    ):
        response = server.post(path, {"model": NAME, "colour": 1} | body)
        assert response.status_code == 200 and response.headers["x-specdec-ignored"] == "colour"


NAMED = {
    *("repeat_penalty", "json_schema", "n_predict", "top_n_sigma", "num_beams", "format", "lora", "lora_request"),
    *("adapter", "max_new_tokens", "suffix", "use_beam_search"),
}
NEUTRAL = {  # of what a protocol serves: what the text is made from, and what leaves it as it is
    *("model", "messages", "prompt", "input", "stream", "stream_options", "include_metrics", "per_step_metrics"),
    *("logprobs", "top_logprobs", "metadata"),
}
BODIES: dict[str, tuple[type[Options], dict[str, Any]]] = {
    "/v1/chat/completions": (ChatBody, {"messages": USER}),
    "/v1/completions": (CompletionBody, {"prompt": "a"}),
    "/v1/messages": (MessagesBody, {"messages": USER, "max_tokens": 2}),
    "/v1/responses": (ResponsesBody, {"input": "a"}),
}


@pytest.mark.parametrize("path", BODIES)
def test_what_would_change_the_text_and_cannot_be_served_is_refused_by_name(path: str) -> None:
    """Also what another protocol serves."""
    made, body = BODIES[path]
    served = {name for kind, _ in BODIES.values() for name in kind.model_fields}
    for name in (NAMED | served | UNUSED.keys()) - NEUTRAL - made.model_fields.keys():
        with pytest.raises(ValidationError, match=name):
            made.model_validate({"model": NAME, name: "used"} | body)
        for value in (None, *made.unused[name]):
            made.model_validate({"model": NAME, name: value} | body)


@pytest.mark.parametrize(
    ("path", "given", "advice"),
    [
        ("/v1/chat/completions", {"repeat_penalty": 1.3}, "use 'repetition_penalty'"),
        ("/v1/chat/completions", {"json_schema": {"type": "object"}}, "use 'response_format'"),
        ("/v1/chat/completions", {"stop_sequences": ["a"]}, "use 'stop'"),
        ("/v1/completions", {"n_predict": 3}, "use 'max_tokens'"),
        ("/v1/completions", {"tools": [{}]}, "leave it out"),
        ("/v1/messages", {"format": "json"}, "use 'output_config.format'"),
        ("/v1/messages", {"stop": "a"}, "use 'stop_sequences'"),
        ("/v1/responses", {"max_tokens": 3}, "use 'max_output_tokens'"),
        ("/v1/responses", {"stop": "a"}, "leave it out"),
        ("/v1/responses", {"lora": [{"id": 0}]}, "leave it out"),
    ],
)
def test_the_parameter_that_does_the_same_is_named(server, path, given, advice) -> None:
    response = server.post(path, {"model": NAME, **BODIES[path][1], **given})
    error, (name,) = response.json()["error"], given
    assert response.status_code == 400
    assert error["message"] == f"parameter '{name}' is not supported; {advice}"
    assert path == "/v1/messages" or (error["param"], error["code"]) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("path", "given", "param"),
    [
        ("/v1/completions", {"max_tokens": 24}, "max_tokens"),
        ("/v1/responses", {"max_output_tokens": 24}, "max_output_tokens"),
    ],
)
def test_more_tokens_at_least_than_at_most_are_refused_in_the_clients_words(server, path, given, param) -> None:
    response = server.post(path, {"model": NAME, **BODIES[path][1], **given, "min_tokens": 30})
    error = response.json()["error"]
    assert error["message"] == f"'{param}' allows 24 new tokens, fewer than the 30 of 'min_tokens'; change one of them"
    assert (response.status_code, error["param"]) == (400, param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"bad_words": [""]}, "bad_words.0"),
        ({"top_k": -2}, "top_k"),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"min_tokens": 3, "structured_outputs": {"regex": "a"}}, "min_tokens"),
    ],
)
def test_wrong_values_are_refused(server: Server, body: dict[str, Any], param: str | None) -> None:
    response = server.complete(**body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
    assert "min_new_tokens" not in response.text
