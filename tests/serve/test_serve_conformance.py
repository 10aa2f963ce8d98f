"""The cases that clients rely on, by their numbers, over real sockets.

The drafter knows what plain decoding answers and is wrong at every sixth place, so drafts are accepted whole, in part
and not at all. What is expected is what plain decoding gives. (A server sees events, whatever shape drafts have: trees
are in test_drafters_pairwise.)
"""

import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from servers import (
    NAME,
    USER,
    Gate,
    Oracle,
    Server,
    byte_tokenizer,
    content,
    events,
    refusal,
    serving,
    tiny_decoder,
    until,
)
from spies import noted
from tiny import tiny_model

from specdec import SpecDecoder
from specdec.engine import batch, scheduler

GREEDY = {"temperature": 0}
SAMPLED = {"temperature": 0.8, "seed": 5}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def decoder(folder: Path) -> SpecDecoder:
    return tiny_decoder(folder, Oracle(slips=True))


@pytest.fixture
def other(decoder: SpecDecoder) -> SpecDecoder:
    """The same with a drafter of its own, for a second server."""
    return decoder.with_drafter(Oracle(slips=True))


@pytest.fixture(scope="module")
def server(decoder: SpecDecoder) -> Iterator[Server]:
    with serving(decoder) as running:
        yield running


def known(decoder: SpecDecoder, how: dict[str, Any], prompt: list[dict[str, str]] | str = USER, n: int = 1) -> Any:
    """What plain decoding answers, which the drafter knows from now on: a text of 64 tokens, or ``n`` of them."""
    text = prompt if isinstance(prompt, str) else decoder.tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=False
    )  # fmt: skip
    ids = decoder.tokenizer(text).input_ids
    answers = decoder.with_drafter("none").generate_batch([ids] * n, max_new_tokens=64, **how)
    decoder.drafter.texts += [ids + answer.token_ids for answer in answers]
    texts = [answer.text for answer in answers]
    assert all(len(text) == 64 for text in texts)  # a token is a character
    return texts if n > 1 else texts[0]


def answer(server: Server, **more: Any) -> str:
    """The greedy answer to ``USER``."""
    text: str = server.chat(**GREEDY, **more).json()["choices"][0]["message"]["content"]
    return text


def spec(response: dict[str, Any]) -> dict[str, Any]:
    return response["metrics"]["speculative_decoding"]


def test_1_a_stop_string_over_chunks_or_in_a_draft_is_never_sent_in_part(server: Server) -> None:
    text, how, steps = known(server.decoder, SAMPLED), SAMPLED, set[int]()
    for start, length in ((0, 6), (9, 1), (11, 3), (17, 8)):
        stop = text[start : start + length]
        before = text[: text.index(stop)]
        feint = text[5:8] + next(letter for letter in "abcd" if text[5:8] + letter not in text)  # held back, then sent
        body = {**how, "max_tokens": 60, "stop": [feint, stop]}
        whole = server.chat(**body).json()
        assert whole["choices"][0]["message"]["content"] == before and whole["choices"][0]["finish_reason"] == "stop"
        found = events(server.chat(**body, stream=True, per_step_metrics=True))
        assert content(found) == before and found[-1]["choices"][0]["finish_reason"] == "stop"
        assert len(before) < 9 or spec(whole)["num_accepted_draft_tokens"] > 0
        accepted = spec(found[-1])["per_step_accepted"]
        step_of = [0, *(step for step, count in enumerate(accepted, 1) for _ in range(count + 1))]
        steps.add(len(set(step_of[len(before) : len(before) + length])))
    assert min(steps) == 1 < max(steps)  # stop strings in one step, and over several


def spelling(text: str, drafter: Oracle) -> SpecDecoder:
    """A decoder whose tokens are bytes and which goes on with ``text`` after any of its bytes, up to its end."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.chat_template = tokenizer.chat_template + text[0]
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert len(set(ids)) == len(ids)
    drafter.texts.append(ids)
    model = tiny_model(vocab_size=len(tokenizer), eos_token_id=ids[-1], tie_word_embeddings=False)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.lm_head.weight.zero_()
    model.lm_head.weight[ids[1:]] = model.model.embed_tokens.weight[ids[:-1]]
    return SpecDecoder(model, tokenizer, drafter)


def test_2_a_character_of_several_tokens_arrives_whole() -> None:
    text = "né😀,語?"
    with serving(spelling(text, Oracle(slips=True))) as server:
        for before in ("n", "né", "né😀", "né😀,"):  # chunks end at other places
            answer = server.complete(prompt=before, **GREEDY).json()
            assert answer["choices"][0]["text"] == text.removeprefix(before)
            for options in ({}, {"stream_options": {"include_draft_depth": True}}):
                found = events(server.complete(prompt=before, **GREEDY, stream=True, **options))
                pieces = [choice["text"] for chunk in found for choice in chunk["choices"]]
                assert "".join(pieces) == text.removeprefix(before)
                assert not any("\ufffd" in piece for piece in pieces)
                assert spec(found[-1])["num_accepted_draft_tokens"] > 0


def test_3_the_limit_inside_an_accepted_draft_gives_exactly_so_many_tokens(server: Server, monkeypatch) -> None:
    """Also where drafts are longer than what may still come."""
    text, how, accepted = known(server.decoder, GREEDY), GREEDY, 0
    monkeypatch.setattr(batch.Batch, "_deepest", lambda self, b: 8)
    for limit in (1, 2, 3, 4, 5, 7, 30):
        whole = server.chat(**how, max_completion_tokens=limit).json()
        found = events(server.chat(**how, max_tokens=limit, stream=True, stream_options={"include_usage": True}))
        assert whole["choices"][0]["message"]["content"] == content(found) == text[:limit]
        assert whole["choices"][0]["finish_reason"] == found[-2]["choices"][0]["finish_reason"] == "length"
        assert whole["usage"]["completion_tokens"] == found[-1]["usage"]["completion_tokens"] == limit
        accepted += spec(whole)["num_accepted_draft_tokens"]
    assert accepted > 20


def test_4_nothing_follows_the_end_of_sequence_inside_an_accepted_draft(server: Server, monkeypatch) -> None:
    text, how, depths = known(server.decoder, SAMPLED), SAMPLED, list[int]()
    for place in (2, 5, 8, 11):
        [end] = server.decoder.tokenizer(text[place]).input_ids
        monkeypatch.setattr(server.decoder.model.generation_config, "eos_token_id", end)
        expected = text[: text.index(text[place]) + 1]  # here the end token has a text
        whole = server.chat(**how).json()
        found = events(server.chat(**how, stream=True, stream_options={"include_draft_depth": True}))
        assert whole["choices"][0]["message"]["content"] == content(found) == expected
        assert whole["choices"][0]["finish_reason"] == found[-1]["choices"][0]["finish_reason"] == "stop"
        assert whole["usage"]["completion_tokens"] == len(expected)
        depths.append(next(c["choices"][0]["draft_depth"] for c in found[::-1] if "draft_depth" in c["choices"][0]))
        assert server.chat(**how, ignore_eos=True).json()["usage"]["completion_tokens"] == 24
    assert any(depths) and len(set(depths)) > 1


def test_4_the_text_of_the_end_of_sequence_is_not_in_the_answer() -> None:
    with serving(spelling("né😀,語?", Oracle())) as server:
        response = server.complete(prompt="né😀,", **GREEDY).json()
    assert response["choices"][0]["text"] == "語?" and response["choices"][0]["finish_reason"] == "stop"
    assert response["usage"]["completion_tokens"] == 5  # bytes of "語?", and the end
    assert spec(response)["num_accepted_draft_tokens"] >= 3


def test_5_choices_with_a_seed_differ_can_be_repeated_and_share_one_prefill(other: SpecDecoder, monkeypatch) -> None:
    prompt = [{"role": "user", "content": "Is a draft accepted? Say it in four words."}]
    how = {"temperature": 0.9, "seed": 5}
    texts = [text[:24] for text in known(other, how, prompt, n=4)]
    parts = noted(monkeypatch, batch, "run_tokens", lambda target, cache, rows, *more: sum(map(len, rows)))
    with serving(other) as server:
        one = server.chat(messages=prompt, n=4, **how).json()
        assert sum(parts) == one["usage"]["prompt_tokens"] + 3  # each of the others runs its last token
        found = [choice["message"]["content"] for choice in one["choices"]]
        assert [choice["index"] for choice in one["choices"]] == [0, 1, 2, 3] and len(set(found)) == 4
        assert found == texts and one["usage"]["completion_tokens"] == 4 * 24
        assert one["metrics"] == {"speculative_decoding": None}
        assert server.figure("spec_decode_num_accepted_tokens_total") > 0
        two = server.chat(messages=prompt, n=4, **how).json()
        assert [choice["message"]["content"] for choice in two["choices"]] == found
        streamed = events(server.chat(messages=prompt, n=4, stream=True, **how))
        assert [content(streamed, index) for index in range(4)] == found
        alone = server.chat(messages=prompt, **how).json()
        assert alone["choices"][0]["message"]["content"] == found[0]
        assert one["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]  # counted once
        other = server.chat(messages=prompt, n=4, **how | {"seed": 6}).json()
        assert not {choice["message"]["content"] for choice in other["choices"]} & set(found)


def ask(connection: socket.socket, server: Server, **body: Any) -> None:
    """Send a chat request, and do not read the answer."""
    request = httpx.Request("POST", server.url + CHAT, json={"model": NAME} | body)
    head = "".join(f"{key}: {value}\r\n" for key, value in request.headers.items())
    connection.sendall(f"POST {CHAT} HTTP/1.1\r\n{head}\r\n".encode() + request.read())


@pytest.mark.parametrize(
    ("when", "stream"), [("waiting", False), ("in its prompt", True), ("decoding", False), ("decoding", True)]
)
def test_6_the_rows_of_a_client_that_goes_away_are_gone_after_one_step(other, when, stream) -> None:
    text = known(other, GREEDY)
    engine = other.engine(max_rows=3, prefill_chunk=16, kv_memory=2**30)
    answers = list[str]()
    try:
        with serving(other, engine) as server, Gate(engine) as gate:
            stays = threading.Thread(target=lambda: answers.append(answer(server, max_tokens=60)))
            stays.start()
            until(lambda: engine.stats().waiting == 1)
            gate.let(4)
            [staying] = engine.batch.rows
            leaves = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
            prompt = [{"role": "user", "content": "Go on, and on, and on."}]
            ask(leaves, server, messages=prompt, n=2, max_tokens=3000, stream=stream)
            until(lambda: engine.stats().waiting == 2)
            gate.let({"waiting": 0, "in its prompt": 1, "decoding": 6}[when])
            scheduler = engine.scheduler
            rows = [*scheduler.waiting, *scheduler.prefilling.rows, *engine.batch.rows]
            rows.remove(staying)
            assert len(rows) == 2
            places = {"waiting": scheduler.waiting, "in its prompt": scheduler.prefilling.rows}
            assert any(row in places.get(when, engine.batch.rows) for row in rows)
            leaves.close()
            until(lambda: all(row.cancelled for row in rows))  # without a step
            gate.let()
            assert engine.batch.rows == [staying] and not scheduler.waiting and not scheduler.prefilling.rows
            assert all(row.finish_reason == "cancelled" for row in rows)
            assert engine.stats().kv_bytes == engine.batch.cache.nbytes + scheduler.memory.prefixes.nbytes
            until(lambda: any("cancelled" in line for line in server.lines))
            gate.open()
            stays.join(60)
            assert answers == [text[:60]]
            stats = engine.stats()
            assert (stats.running, stats.waiting) == (0, 0)
            assert stats.kv_bytes == scheduler.memory.prefixes.nbytes  # for texts that begin alike
    finally:
        engine.close(drain=False)
    assert engine.stats().kv_bytes == 0


def test_9_the_usage_chunk_comes_last_and_counts_accepted_tokens(server: Server) -> None:
    text, how, options = known(server.decoder, GREEDY), GREEDY, {"include_usage": True}
    found = events(server.chat(**how, stream=True, stream_options=options, per_step_metrics=True))
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert content(found) == text[:24]
    assert all(chunk["usage"] is None for chunk in found[:-1])
    assert [c["choices"][0]["finish_reason"] for c in found[:-1]] == [None] * (len(found) - 2) + ["length"]
    assert found[-2]["choices"][0]["delta"] == {} and found[-1]["choices"] == []
    assert len({chunk["id"] for chunk in found}) == 1
    usage, figures = found[-1]["usage"], spec(found[-1])
    assert usage["completion_tokens"] == 24 and usage["total_tokens"] == usage["prompt_tokens"] + 24
    assert figures["num_draft_tokens"] > figures["num_accepted_draft_tokens"] > 0  # so the difference is seen
    assert figures["num_spec_steps"] + figures["num_accepted_draft_tokens"] in (23, 24)  # the first is the prefill's
    assert sum(figures["per_step_accepted"]) == figures["num_accepted_draft_tokens"]
    rest = {"prompt_tokens_details": None}
    assert server.chat(**how).json()["usage"] | rest == usage | rest


def test_10_log_probabilities_are_those_of_plain_decoding_whoever_drafted_the_token(server: Server) -> None:
    decoder, accepted = server.decoder, server.figure("spec_decode_num_accepted_tokens_total")
    known(decoder, SAMPLED)
    plain = decoder.with_drafter("none").generate(USER, max_new_tokens=24, logprobs=3, **SAMPLED)
    right = [[(token.token_id, token.logprob), *token.top] for token in plain.logprobs]
    tokens = [[decoder.tokenizer.decode(token) for token, _ in row] for row in right]
    values = [value for row in right for _, value in row]
    for stream in (False, True):
        response = server.chat(**SAMPLED, logprobs=True, top_logprobs=3, stream=stream)
        chunks = events(response) if stream else [response.json()]
        parts = [choice["logprobs"]["content"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
        rows = [[each, *each["top_logprobs"]] for part in parts for each in part]
        assert [[each["token"] for each in row] for row in rows] == tokens
        assert [each["logprob"] for row in rows for each in row] == pytest.approx(values, abs=1e-4)
    prompt = decoder.tokenizer.apply_chat_template(USER, add_generation_prompt=True, tokenize=False)
    got = server.complete(prompt=prompt, logprobs=3, **SAMPLED).json()["choices"][0]["logprobs"]
    assert got["tokens"] == [token for token, *_ in tokens]
    assert got["token_logprobs"] == pytest.approx([token.logprob for token in plain.logprobs], abs=1e-4)
    assert [{*likely} for likely in got["top_logprobs"]] == [{*row} for row in tokens]
    assert server.figure("spec_decode_num_accepted_tokens_total") > accepted + 30


def test_11_an_unknown_model_is_not_found(server: Server) -> None:
    error = refusal(server.chat(model="gpt-9"), 404)
    assert error["param"] == "model" and "gpt-9" in error["message"] and NAME in error["message"]
    refusal(server.complete(model="gpt-9"), 404)
    refusal(server.post("/tokenize", {"model": "gpt-9", "prompt": "x"}), 404)
    refusal(server.get("/v1/models/gpt-9"), 404)


KEY = {"Authorization": "Bearer secret"}
WRONG = [None, "Bearer wrong", "secret", "Bearer secretsecret", "Bearer \xe9"]


def test_11_a_wrong_key_is_refused(decoder: SpecDecoder) -> None:
    with serving(decoder.with_drafter("prompt-lookup"), api_key="secret") as server:
        for given in WRONG:
            headers = {} if given is None else {"Authorization": given.encode("latin-1")}
            for path in ("/v1/models", "/nothing"):
                error = refusal(server.get(path, headers=headers), 401)
                assert "secret" not in error["message"]
            refusal(httpx.post(server.url + CHAT, content=b"x", headers=headers), 401)
        assert server.get("/health").json() == {"status": "ok", "drafter": "on"}
        assert server.get("/").status_code == 200
        assert server.get("/v1/models", headers=KEY).json()["data"][0]["id"] == NAME


def test_11_an_unsupported_parameter_is_refused_by_name(server: Server) -> None:
    for response in (server.chat(suffix="x"), server.complete(suffix="x")):
        error = refusal(response, 400)
        assert error["param"] == "suffix" and "suffix" in error["message"]
        assert error["code"] == "unsupported_parameter"
    assert server.complete(suffix="", max_tokens=1).status_code == 200  # the value says that it is not used


@pytest.mark.parametrize("n", [1, 2])
def test_11_a_full_queue_says_when_to_come_back(other: SpecDecoder, n: int) -> None:
    """Of a request with several choices none is started."""
    text, texts = known(other, GREEDY), list[str]()
    engine = other.engine(max_rows=1, max_waiting=1)
    try:
        with serving(other, engine) as server:
            with Gate(engine) as gate:
                asked = [threading.Thread(target=lambda: texts.append(answer(server))) for _ in range(3 - n)]
                for number, thread in enumerate(asked, 1):
                    thread.start()
                    until(lambda number=number: engine.stats().waiting == number)
                response = server.chat(n=n)
                error = refusal(response, 429)
                assert error["type"] == "rate_limit_error" and int(response.headers["Retry-After"]) > 0
                client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
                with client, pytest.raises(openai.RateLimitError, match="waiting"):
                    client.completions.create(model=NAME, prompt="Name", n=n)
                gate.let()
                assert engine.stats().running + engine.stats().waiting == len(asked)
            for thread in asked:
                thread.join(60)
            assert texts == [text[:24]] * len(asked) and server.chat().status_code == 200
    finally:
        engine.close(drain=False)


def test_11_a_prompt_that_is_too_long_is_refused_with_both_numbers(server: Server) -> None:
    for response in (server.complete(prompt=[5] * 4096), server.complete(prompt="x" * 4096)):
        error = refusal(response, 400)
        says = "This model's maximum context length is 4096 tokens; 'prompt' has 4096; shorten it"
        assert error["message"] == says
        assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    error = refusal(server.chat(messages=[{"role": "user", "content": "x" * 5000}]), 400)
    says = "This model's maximum context length is 4096 tokens; 'messages' has 5020; shorten it"
    assert error["message"] == says and error["param"] == "messages"
    for response in (
        server.chat(messages=[{"role": "user", "content": "x " * 300_000}]),
        server.complete(prompt="x" * 300_000),
    ):
        error = refusal(response, 400)
        assert error["message"].startswith("This model's maximum context length is 4096 tokens; the prompt has ")
        assert "characters" in error["message"] and error["code"] == "context_length_exceeded"  # it is not tokenised
    full = server.complete(**GREEDY, prompt=[5] * 4093, max_tokens=50).json()
    assert full["usage"]["completion_tokens"] == 3 and full["choices"][0]["finish_reason"] == "length"


def test_12_a_slow_reader_is_given_up_with_a_bounded_buffer_and_others_go_on(other: SpecDecoder) -> None:
    text = known(other, GREEDY)
    with serving(other, client_timeout=0.5) as server:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        ask(slow, server, messages=USER, max_tokens=4000, n=4, seed=1, stream=True, logprobs=True, top_logprobs=20)
        until(lambda: server.engine.stats().running == 4)
        [connection] = list(server.server.server_state.connections)
        until(lambda: connection.transport.get_write_buffer_size() > 0)
        waiting, right = 0, 0
        while not any("cancelled" in line for line in server.lines):
            waiting, right = max(waiting, connection.transport.get_write_buffer_size()), right + 1
            assert answer(server) == text[:24]
            assert right < 1000
        assert right > 0 and waiting < 2**17  # bytes that the server keeps for it
        until(lambda: server.engine.stats().running == 0)
        slow.close()


def test_12_a_prompt_ahead_of_time_is_answered_while_another_request_runs(other: SpecDecoder, monkeypatch) -> None:
    monkeypatch.setattr(scheduler, "PATIENCE", 0.0)
    engine, statuses = other.engine(max_rows=2), list[int]()
    try:
        with serving(other, engine) as server, Gate(engine) as gate:
            for number, most in enumerate((2000, 0), 1):
                post = partial(server.chat, **GREEDY, max_tokens=most)
                threading.Thread(target=lambda post=post: statuses.append(post().status_code), daemon=True).start()
                until(lambda: engine.stats().waiting == 1)
                gate.let(2 * number)
            assert engine.stats().waiting == 0 and len(engine.batch.rows) == 1
            until(lambda: statuses == [200])
    finally:
        engine.close(drain=False)
