"""What the server takes, refuses and says, over real sockets, with a tiny model."""

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from calls import answering
from servers import (
    NAME,
    USER,
    Oracle,
    Replay,
    Server,
    byte_tokenizer,
    content,
    events,
    refusal,
    serving,
    stand_in,
    tiny_decoder,
    until,
)
from tiny import save_tiny
from typer.testing import CliRunner

from specdec import SpecDecoder
from specdec.api import prompts
from specdec.base.errors import SpecDecError
from specdec.cli import app
from specdec.engine.metrics import RequestMetrics
from specdec.engine.request import Event
from specdec.serve import bodies
from specdec.serve.app import make_app
from specdec.serve.metrics import Metrics
from specdec.serve.settings import ServerSettings

GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> SpecDecoder:
    return tiny_decoder(tmp_path_factory.mktemp("tiny"), Oracle())


@pytest.fixture(scope="module")
def server(decoder: SpecDecoder) -> Iterator[Server]:
    with serving(decoder) as running:
        yield running


@pytest.fixture(scope="module")
def truth(decoder: SpecDecoder) -> str:
    """The greedy answer to ``USER``, which the drafter knows from now on."""
    plain = decoder.with_drafter("none").generate(USER, max_new_tokens=64)
    ids = decoder.tokenizer.apply_chat_template(USER, add_generation_prompt=True, tokenize=False)
    decoder.drafter.texts.append(decoder.tokenizer(ids, add_special_tokens=False).input_ids + plain.token_ids)
    assert len(plain.text) == 64
    return plain.text


def accepted(response: dict[str, Any]) -> int:
    return response["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"]


def test_figures_follow_the_schema_of_vllm(server: Server, truth: str) -> None:
    figures = server.chat(**GREEDY).json()["metrics"]
    spec = figures.pop("speculative_decoding")
    assert set(figures) == {
        "time_to_first_token_ms", "generation_time_ms", "queue_time_ms", "mean_itl_ms", "tokens_per_second"
    }  # fmt: skip
    assert all(value >= 0 for value in figures.values())
    steps, histogram = spec["num_spec_steps"], spec["acceptance_histogram"]
    assert len(histogram) == spec["num_spec_tokens"] + 1 and sum(histogram) == steps
    assert sum(n * count for n, count in enumerate(histogram)) == spec["num_accepted_draft_tokens"] > 0
    assert spec["mean_acceptance_length"] == 1 + spec["num_accepted_draft_tokens"] / steps
    assert spec["draft_acceptance_rate"] == spec["num_accepted_draft_tokens"] / spec["num_draft_tokens"]
    assert "per_step_accepted" not in spec
    assert "metrics" not in server.chat(include_metrics=False).json()


def test_drafting_can_be_switched_off_and_a_header_names_the_drafter(server: Server, truth: str) -> None:
    on, off = server.chat(**GREEDY), server.chat(**GREEDY, num_speculative_tokens=0)
    assert on.headers["X-Specdec-Drafter"] == "scripted" and off.headers["X-Specdec-Drafter"] == "none"
    assert on.json()["choices"] == off.json()["choices"]
    assert off.json()["metrics"]["speculative_decoding"]["num_draft_tokens"] == 0 < accepted(on.json())


def test_depths_say_which_tokens_were_drafted(server: Server, truth: str) -> None:
    options = {"include_draft_depth": True}
    found = events(server.chat(**GREEDY, stream=True, stream_options=options, per_step_metrics=True))
    depths = [c["draft_depth"] for chunk in found for c in chunk["choices"] if "draft_depth" in c]
    assert content(found) == truth[:24] and len(depths) == 24 and depths[0] == 0
    figures = found[-1]["metrics"]["speculative_decoding"]
    expected = [0] + [d for n in figures["per_step_accepted"] for d in [*range(1, n + 1), 0]]
    assert depths == expected[:24]


def test_completions_take_texts_ids_and_lists_of_both_and_echo(server: Server) -> None:
    ids = server.post("/tokenize", {"prompt": "Name"}).json()["tokens"]
    text = server.complete(**GREEDY).json()["choices"][0]["text"]
    assert server.complete(**GREEDY, prompt=ids).json()["choices"][0]["text"] == text
    many = server.complete(**GREEDY, prompt=["Name", "Colour"], n=2, echo=True).json()
    assert [c["index"] for c in many["choices"]] == [0, 1, 2, 3]
    assert [c["text"][:4] for c in many["choices"]] == ["Name", "Name", "Colo", "Colo"]
    assert many["choices"][0]["text"] == "Name" + text and many["usage"]["prompt_tokens"] == len("NameColour")
    found = events(server.complete(**GREEDY, prompt=[ids, ids], echo=True, stream=True))
    texts = ["", ""]
    for chunk in found:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["Name" + text] * 2
    assert server.complete(**GREEDY, max_tokens=None).json()["usage"]["completion_tokens"] == 16


def test_tokens_of_a_chat_are_those_that_the_model_reads(server: Server) -> None:
    found = server.post("/tokenize", {"messages": USER}).json()
    assert found["count"] == len(found["tokens"]) == server.chat().json()["usage"]["prompt_tokens"]
    assert found["max_model_len"] == 4096
    text = server.post("/detokenize", {"tokens": found["tokens"]}).json()["prompt"]
    assert text == "[user] Name three colours.\n[assistant] "


def test_messages_may_be_parts_and_come_from_developers(server: Server) -> None:
    parts = [{"type": "text", "text": "Name three "}, {"type": "text", "text": "colours."}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    tokens = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    text = server.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert text == "[system] Be brief.\n[user] Name three \ncolours.\n[assistant] "
    answered = [*USER, {"role": "assistant", "content": "Red.", "refusal": None, "tool_calls": None}, *USER]
    assert server.chat(messages=answered, max_tokens=1).status_code == 200


def test_tokens_of_a_text_may_be_white_space_and_do_without_added_ones(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.post("/tokenize", {"prompt": "\n"}).json()["count"] == 1
    assert server.complete(prompt="\n", **GREEDY).json()["usage"]["prompt_tokens"] == 1
    asked, token_ids = list[bool](), prompts.token_ids
    noted = lambda tokenizer, text, added: asked.append(added) or token_ids(tokenizer, text, added)  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(prompts, "token_ids", noted)
        for more in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
            assert server.post("/tokenize", {"prompt": "Name"} | more).json()["count"] == 4
    assert asked == [True, True, False]
    refusal(server.post("/tokenize", {"messages": USER, "add_special_tokens": True}), 400)
    assert server.post("/tokenize", {"messages": USER, "add_special_tokens": False}).status_code == 200
    for wrong in (server.chat(add_special_tokens=True), server.complete(add_special_tokens=False)):
        message = "parameter 'add_special_tokens' is not supported; leave it out"
        assert refusal(wrong, 400)["message"] == message
    assert server.chat(add_special_tokens=False, max_tokens=1).status_code == 200
    assert server.complete(add_special_tokens=True, max_tokens=1).status_code == 200


def test_an_answer_goes_on_with_a_last_message_by_each_name_of_that(server: Server) -> None:
    begun = {"role": "assistant", "content": "Red"}
    right = server.chat(messages=[*USER, begun], continue_final_message=True, **GREEDY).json()
    found = server.chat(messages=[*USER, begun | {"prefix": True}], **GREEDY).json()
    assert found["choices"] == right["choices"]
    assert found["usage"]["prompt_tokens"] == right["usage"]["prompt_tokens"]
    again = server.chat(messages=[*USER, begun, *USER], max_tokens=1).json()["usage"]["prompt_tokens"]
    earlier = server.chat(messages=[*USER, begun | {"prefix": True}, *USER], max_tokens=1).json()["usage"]
    assert earlier["prompt_tokens"] == again
    count = server.post("/tokenize", {"messages": [*USER, begun], "continue_final_message": True}).json()["count"]
    assert count == right["usage"]["prompt_tokens"]
    for wrong in (
        server.chat(messages=[USER[0] | {"prefix": True}]),
        server.chat(messages=[*USER, begun | {"prefix": True}], add_generation_prompt=True),
        server.post("/tokenize", {"messages": USER, "add_generation_prompt": False}),
    ):
        refusal(wrong, 400)


def test_other_values_of_not_used_and_other_forms_of_numbers(server: Server) -> None:
    base = server.complete(**GREEDY).json()
    same: dict[str, Any] = {"temperature": 0.9, "top_p": 0, "seed": -1, "top_k": -1.0, "n": 1.0, "max_tokens": 24.0}
    assert server.complete(**same).json()["choices"] == base["choices"]
    assert server.complete(**GREEDY, max_tokens=-1, stop=base["choices"][0]["text"][9]).status_code == 200
    assert server.chat(**GREEDY, max_completion_tokens=-1).json()["usage"]["completion_tokens"] == 24
    body = {"messages": USER, "max_tokens": 3}
    assert server.post("/v1/chat/completions", body).json()["model"] == NAME
    assert server.post("/v1/messages", body).json()["model"] == NAME
    assert server.post("/v1/responses", {"input": "a", "max_output_tokens": 3.0}).json()["model"] == NAME
    result = [*USER, {"role": "tool", "content": None}]
    assert server.chat(messages=result, max_tokens=1).status_code == 200
    for wrong in ({"max_tokens": -2}, {"max_tokens": 1.5}, {"seed": -2}, {"top_p": -1}, {"top_p": False}, {"n": 0.0}):
        refusal(server.complete(**wrong), 400)


def test_reasoning_has_two_names() -> None:
    template = "{% for m in messages %}[{{ m.reasoning_content }}]{{ m.content }}{% endfor %}"
    with answering("ok", template=template) as other:
        for name in ("reasoning", "reasoning_content"):
            other.chat(messages=[*USER, {"role": "assistant", "content": "a", name: "Hm."}, *USER])
            assert "[Hm.]a" in other.decoder.tokenizer.decode(other.engine.handles[-1].request.prompt)


NUMBER = {"name": "f", "arguments": 5}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
WRONG: dict[str, tuple[dict[str, Any], str | None, str]] = {  # a body, the parameter, a part of the message
    "a message without a role": ({"messages": [{"content": "x"}]}, "messages.0.role", ""),
    "an image": (
        {"messages": [{"role": "user", "content": [IMAGE]}]},
        "messages.0.content.0.type",
        "'messages.0.content.0.type': it must be 'text'",
    ),
    "a number": ({"messages": [{"role": "user", "content": 5}]}, None, "it must be a valid string or a valid list"),
    "a call whose arguments are a number": (
        {"messages": [*USER, {"role": "assistant", "tool_calls": [{"id": "1", "function": NUMBER}]}]},
        "messages.1.tool_calls.0.function.arguments",
        "",
    ),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "messages.0", "a message needs content"),
    "a penalty by which logits become infinite": ({"repetition_penalty": 5e-324}, "repetition_penalty", ""),
    "a bias of no token": ({"logit_bias": {"x": 1}}, "logit_bias.x", "it must be a valid integer"),
    "a bias of a token that the model lacks": ({"logit_bias": {"99999": 1}}, "logit_bias", ""),
    "a character without a token": ({"messages": [{"role": "user", "content": "\x1b"}]}, "messages", ""),
    "a million choices": ({"n": 1_000_000}, "n", ""),
    "sixty-five stops": ({"stop": ["a"] * 65}, "stop", "'stop': it must have at most 64 items and has 65"),
    "an option of a stream": ({"stream_options": {"include_usage": True}}, None, ""),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused_with_one_sentence(server: Server, case: str) -> None:
    body, param, says = WRONG[case]
    error = refusal(server.chat(**body), 400)
    assert (error["param"] == param or param is None) and says in error["message"], error
    assert len(error["message"]) < 300


NONE: list[tuple[Any, str, str]] = [  # prompts that are none, the place of the fault, and what is said
    ([[]], "prompt.0", ""),
    (["a", ""], "prompt.1", ""),
    ([99], "prompt", "outside the model's vocabulary"),
    (None, "prompt", "is missing"),
    ([], "prompt", "'prompt': it must have at least 1 item and has 0"),
    ([-1], "prompt.0", "'prompt.0': it must be greater than or equal to 0"),
    ({"a": 1}, "prompt", "'prompt': it must be a valid string or a valid list"),
]


@pytest.mark.parametrize(("prompt", "place", "says"), NONE)
def test_prompts_that_are_none_are_refused(server: Server, prompt: Any, place: str, says: str) -> None:
    error = refusal(server.complete(prompt=prompt), 400)
    assert error["param"] == place and says in error["message"], error


def test_an_unexpected_error_has_the_id_of_its_line_in_the_log() -> None:
    def fail(_: Any) -> list[Event]:
        raise RuntimeError("broken")

    with serving(stand_in(byte_tokenizer()), Replay(fail)) as server:
        for header, path in (("x-request-id", "/v1/chat/completions"), ("request-id", "/v1/messages")):
            response = server.post(path, {"model": NAME, "messages": USER, "max_tokens": 4})
            request_id = response.headers[header]
            assert response.status_code == 500
            until(lambda id=request_id: any(id in line and " 500," in line for line in server.lines))


BODIES = {
    "nothing": (b"", "the body is empty; send a JSON object"),
    "half": (b'{"model": "tiny", ', ""),
    "a list": (b"[]", ""),
    "null": (b"null", ""),
    "not UTF-8": (b'{"model": "\xff\xfe"}', ""),
    "nested": (b"[" * 100_000, ""),
    "digits": (b'{"seed":' + b"9" * 10_000 + b"}", ""),
    "not finite": (b'{"model": "tiny", "prompt": "x", "metadata": {"a": NaN}}', ""),
    "half of a character": (b'{"model": "tiny", "prompt": "\\ud800"}', "half of a surrogate pair"),
    "half of one in a name": (b'{"model": "tiny", "prompt": "x", "\\ud800": 1}', "half of a surrogate pair"),
}


@pytest.mark.parametrize("case", BODIES)
def test_bodies_that_are_not_json_objects_are_refused(server: Server, case: str) -> None:
    content, says = BODIES[case]
    headers = {"Content-Type": "application/json"}
    assert says in refusal(httpx.post(server.url + "/v1/completions", content=content, headers=headers), 400)["message"]


def test_a_body_of_another_type_is_refused(server: Server) -> None:
    """Web pages of other sites can send text without asking; they cannot send JSON."""
    response = httpx.post(server.url + "/tokenize", content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"})
    assert "application/json" in refusal(response, 400)["message"]


def test_what_does_not_exist_is_refused_in_the_same_shape(server: Server) -> None:
    refusal(server.get("/v1/embeddings"), 404)
    refusal(server.get("/v1/completions"), 405)


def test_the_line_of_a_request_says_what_it_was(server: Server, truth: str) -> None:
    server.chat(**GREEDY)
    until(lambda: server.lines and "POST /v1/chat/completions 200" in server.lines[-1])
    assert " prompt + 24 new tokens, " in server.lines[-1] and " per step, length" in server.lines[-1]


@pytest.fixture(scope="module")
def limited(decoder: SpecDecoder) -> Iterator[Server]:
    with serving(
        decoder.with_drafter("prompt-lookup"), api_key="secret", cors=("https://a.example",), max_tokens=8
    ) as running:
        yield running


KEY = {"Authorization": "Bearer secret"}


def test_limits_are_kept(limited: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def chat(**more: Any) -> httpx.Response:
        return limited.post("/v1/chat/completions", {"model": NAME, "messages": USER} | more, headers=KEY)

    assert chat().json()["usage"]["completion_tokens"] == 8
    assert "8" in refusal(chat(max_tokens=9), 400)["message"]
    short = limited.post("/v1/completions", {"model": NAME, "prompt": "Name"}, headers=KEY)  # 16 tokens elsewhere
    assert short.json()["usage"]["completion_tokens"] == 8
    assert "64" in refusal(chat(n=65, max_tokens=2), 400)["message"]
    monkeypatch.setattr(bodies, "MAX_BODY", 5000)
    assert "5000" in refusal(chat(messages=[{"role": "user", "content": "x" * 6000}]), 413)["message"]

    def pieces() -> Iterator[bytes]:  # without a Content-Length
        for _ in range(10):
            yield b" " * 1000

    refusal(httpx.post(limited.url + "/tokenize", content=pieces(), headers=KEY), 413)


def test_other_origins_are_let_in_only_if_they_are_named(server: Server, limited: Server) -> None:
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    url = "/v1/chat/completions"
    assert httpx.options(limited.url + url, headers=asked).headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert httpx.options(limited.url + url, headers=asked | {"Origin": "https://b.example"}).status_code == 400
    assert "Access-Control-Allow-Origin" not in httpx.options(server.url + url, headers=asked).headers


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_in_decoding_is_an_error_of_that_request(stream: bool) -> None:
    script = [Event([65], depths=[0]), Event(finish_reason="error", error=SpecDecError("the logits are not finite"))]
    with serving(stand_in(byte_tokenizer()), Replay(lambda request: script)) as server:
        response = server.chat(stream=stream)
        error = events(response)[-1]["error"] if stream else refusal(response, 500)
        assert "the logits are not finite" in error["message"] and error["type"] == "server_error"


def test_health_and_requests_say_that_the_engine_has_ended() -> None:
    engine = Replay(lambda request: [Event([65], "length", depths=[0])])
    with serving(stand_in(byte_tokenizer()), engine) as server:
        assert server.get("/health").status_code == 200
        engine.closed = True
        assert refusal(server.get("/health"), 503)["code"] == "engine_ended"
        assert "restart the server" in refusal(server.chat(), 503)["message"]


def test_a_client_that_sends_its_body_slowly_is_given_up() -> None:
    settings = ServerSettings(name=NAME, client_timeout=0.05)
    app = make_app(stand_in(byte_tokenizer()), Replay(lambda request: []), settings, print)
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/tokenize", "raw_path": b"/tokenize", "query_string": b"",
        "headers": [], "client": ("x", 1), "server": ("x", 1), "scheme": "http", "root_path": "", "http_version": "1.1",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }  # fmt: skip
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 60))
    assert sent[0]["status"] == 408


def test_prometheus_has_the_figures_of_vllm(server: Server) -> None:
    names = (
        "prompt_tokens_total", "generation_tokens_total", "spec_decode_num_drafts_total",
        "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total",
        "spec_decode_num_accepted_tokens_per_pos_total", "num_requests_running", "num_requests_waiting",
        "time_to_first_token_seconds_count", "inter_token_latency_seconds_count", "e2e_request_latency_seconds_count",
        "kv_cache_usage_perc", "prefix_cache_queries_total", "prefix_cache_hits_total",
    )  # fmt: skip

    def answer() -> dict[str, Any]:
        """An answer that has been counted, which may be after its end."""
        known = server.figure("e2e_request_latency_seconds_count")
        found: dict[str, Any] = server.chat(**GREEDY).json()
        until(lambda: server.figure("e2e_request_latency_seconds_count") > known)
        return found

    answer()
    before = {name: server.figure(name) for name in names}
    response = answer()
    grown = {name: server.figure(name) - before[name] for name in names}
    spec = response["metrics"]["speculative_decoding"]
    assert grown["prompt_tokens_total"] == response["usage"]["prompt_tokens"]
    assert grown["generation_tokens_total"] == 24 and grown["time_to_first_token_seconds_count"] == 1
    assert grown["spec_decode_num_drafts_total"] == spec["num_spec_steps"]
    assert grown["spec_decode_num_draft_tokens_total"] == spec["num_draft_tokens"]
    assert grown["spec_decode_num_accepted_tokens_total"] == spec["num_accepted_draft_tokens"]


def test_prometheus_has_the_receipt_of_drafting(server: Server) -> None:
    figures = Metrics(NAME, server.engine.stats)
    request = RequestMetrics(per_step_drafted=[6, 0, 0, 0], per_step_accepted=[5, 0, 0, 0], draft_saved_seconds=0.5)
    request.accepted_by_source = {"ngram": 2, "m2r2": 3}
    figures.record_finished(request, "stop", 1.0)

    def figure(name: str, **labels: str) -> float | None:
        return figures.registry.get_sample_value(f"vllm:spec_decode_{name}_total", {"model_name": NAME} | labels)

    assert (figure("num_drafted_steps"), figure("saved_seconds")) == (1, 0.5)
    assert [figure("num_accepted_tokens_per_source", source=name) for name in ("ngram", "m2r2")] == [2, 3]
    assert request.draft_note is not None and figure("notes", reason=request.draft_note.partition(":")[0]) == 1


def test_the_command_takes_vllms_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = dict[str, Any]()

    def engine(self: SpecDecoder, **how: Any) -> None:
        made.update(how, drafter=self.drafter.traits.label)
        raise SpecDecError("ended")

    monkeypatch.setattr(SpecDecoder, "engine", engine)
    noted = lambda **how: made.update(how) or ServerSettings(**how)  # noqa: E731
    monkeypatch.setattr("specdec.serve.settings.ServerSettings", noted)
    command = ["serve", "--model", str(save_tiny(tmp_path / "tiny")), "--port", "0"]
    command += ["--max-num-seqs", "7", "--served-model-name", "mine", "--allowed-origins", '["https://a.example", "*"]']
    command += ["--enable-log-requests"]
    config = '{"method": "prompt_lookup", "num_speculative_tokens": 3, "prompt_lookup_max": 4}'
    found = CliRunner().invoke(app, [*command, "--speculative-config", config])
    assert "ended" in found.stderr and "'prompt_lookup_max' of --speculative-config has no effect" in found.stderr
    assert made["max_rows"] == 7 and made["name"] == "mine" and made["cors"] == ("https://a.example", "*")
    assert made["drafter"] == "prompt-lookup" and made["num_speculative_tokens"] == 3 and made["log_requests"]
    own = ["--name", "other", "--max-rows", "1", "--max-waiting", "3", "--api-key", "secret"]
    CliRunner().invoke(app, [*command[:5], *own, "--cors", "https://b.example"])
    assert (made["name"], made["max_rows"], made["max_waiting"], made["api_key"]) == ("other", 1, 3, "secret")
    assert made["cors"] == ("https://b.example",)
    model = ["--speculative-config", '{"model": "/nowhere"}']
    assert "/nowhere" in CliRunner().invoke(app, [*command, *model]).stderr  # a draft model
    for wrong in ("{", "[]", "{}", '{"method": 3}', '{"method": "m2r2", "model": 3}', '{"num_speculative_tokens": 3}'):
        assert "takes a JSON object" in CliRunner().invoke(app, [*command, "--speculative-config", wrong]).stderr
    both = CliRunner().invoke(app, [*command, "--drafter", "none", "--speculative-config", config])
    assert "give one or the other" in both.stderr
    for wrong, says in (("[3]", "JSON list of texts"), ("[", "JSON list of texts"), ('["evil"]', "takes an origin")):
        assert says in CliRunner().invoke(app, [*command, "--allowed-origins", wrong]).stderr


EVIL = "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "[::1].x", "evil.local"


@pytest.mark.parametrize("host", EVIL)
def test_other_hosts_are_refused(server: Server, host: str) -> None:
    assert "--allowed-hosts" in refusal(server.get("/health", headers={"Host": host}), 421)["message"]


def test_hosts_of_this_machine_and_those_named_are_answered(server: Server, decoder: SpecDecoder) -> None:
    own = socket.gethostname()
    names = own, f"{own}.local", "host.docker.internal:8000", "host.containers.internal"
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1", "[::1]:8000", "10.0.0.7:1", *names):
        assert server.get("/health", headers={"Host": host}).status_code == 200, host
    for hosts in (("a.example",), ("*",)):
        with serving(decoder, Replay(lambda request: []), allowed_hosts=hosts) as named:
            assert named.get("/v1/models", headers={"Host": "a.example:80"}).status_code == 200


def test_a_path_forges_no_line_and_what_clients_look_for_has_a_head(server: Server) -> None:
    assert server.get("/x%0a127.0.0.1%20GET%20/%20200%1b[2J%c2%9b").status_code == 404
    until(lambda: any("GET /x" in line for line in server.lines))
    [line] = [line for line in server.lines if "GET /x" in line]
    assert line.isascii() and line.isprintable()
    for path in ("/", "/health", "/v1/models", f"/v1/models/{NAME}"):
        found = httpx.head(server.url + path)
        assert found.status_code == 200 and not found.content, path


def test_an_empty_key_opens_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_API_KEY", "")
    result = CliRunner().invoke(app, ["serve", "--model", "/nowhere"])
    assert result.exit_code == 2 and "SPECDEC_API_KEY is empty" in result.output


def test_a_quiet_server_logs_what_it_is_asked_to(decoder: SpecDecoder) -> None:
    with serving(decoder.with_drafter("none"), log_requests=True, log_access=False) as running:
        running.chat(**GREEDY)
        until(lambda: len(running.lines) > 0)
        assert len(running.lines) == 1 and json.loads(running.lines[0])["answer"]


WRONG_OPTIONS = [
    ("--cors", "https://a.example/path"), ("--name", ""), ("--name", "a\nb"), ("--prefix-cache-size", "big"),
    ("--allowed-hosts", "http://a"), ("--prefix-cache", " "), ("--kv-memory", "1kB"), ("--api-key", "é"),
]  # fmt: skip


@pytest.mark.parametrize("options", WRONG_OPTIONS)
def test_options_that_cannot_be_meant_are_refused_at_start(options: tuple[str, str]) -> None:
    result = CliRunner().invoke(app, ["serve", "--model", "/nowhere", *options])
    assert isinstance(result.exception, SpecDecError) or result.exit_code == 2
    said = str(result.exception) + result.output
    assert options[0] in said and "/nowhere" not in said, (result.output, result.exception)
