"""Several keys: each with a name, limits and what is stored for it alone; none of them is ever written."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from calls import answering
from servers import NAME, USER, Server, serving, tiny_decoder, until

from specdec.base.errors import SpecDecError
from specdec.serve.clients import Key, find_client, read_keys
from specdec.serve.settings import ServerSettings

KEYS = (Key(name="ann", key="sk-ann"), Key(name="bob", key="sk-bob"), Key(name="cy", key="sk-cy", learn=False))
BODY: dict[str, Any] = {"model": NAME, "messages": USER, "max_tokens": 4, "temperature": 0}


def headers(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer sk-{name}"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tiny_decoder(tmp_path_factory.mktemp("tiny")), keys=KEYS) as running:
        yield running


def chat(server: Server, name: str, **more: Any) -> httpx.Response:
    return server.post("/v1/chat/completions", BODY | more, headers=headers(name))


def test_the_case_of_the_scheme_is_free(server: Server) -> None:
    assert server.get("/v1/models", headers={"Authorization": "bearer sk-ann"}).status_code == 200


def test_keys_have_names_in_the_log_and_in_the_metrics(server: Server) -> None:
    used = sum(chat(server, "ann").json()["usage"]["total_tokens"] for _ in range(2))
    assert chat(server, "dan").status_code == 401
    until(lambda: any(", 401" in line or " 401," in line for line in server.lines))
    found = server.get("/metrics", headers=headers("bob")).text
    assert f'vllm:key_tokens_total{{key="ann",model_name="{NAME}"}} {used:.1f}' in found
    assert f'vllm:key_requests_total{{key="ann",model_name="{NAME}"}} 2.0' in found
    line = next(line for line in server.lines if "/v1/chat/completions 200" in line)
    assert ", req_" in line and ", ann, " in line
    assert "sk-" not in found + "".join(server.lines)


def test_what_is_stored_for_a_key_is_its_own(server: Server) -> None:
    mine = [{"role": "user", "content": "A long question that only one of them has asked before."}]
    usages = [chat(server, name, messages=mine).json()["usage"] for name in ("ann", "bob", "ann")]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert max(cached[:2]) < 20 and cached[2] > 50


def test_no_drafter_learns_from_texts_of_a_key_that_forbids_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, request = list[Any](), server.decoder.request
    monkeypatch.setattr(server.decoder, "request", lambda *a, **k: asked.append(request(*a, **k)) or asked[-1])  # type: ignore[func-returns-value]
    ended, end = list[bool](), server.decoder.drafter.end
    monkeypatch.setattr(server.decoder.drafter, "end", lambda *a: ended.append(a[3]) or end(*a))  # type: ignore[func-returns-value]
    for name in ("ann", "cy", "cy"):
        assert chat(server, name, n=2).status_code == 200
    assert [each.learn for each in asked] == [True, True, False, False, False, False]
    assert ended.count(False) == 4 and ended.count(True) == 2


def test_without_keys_everybody_is_the_same() -> None:
    assert find_client((), "x").scope is find_client((), "").scope is None  # type: ignore[union-attr]
    assert find_client(KEYS, "sk-bob").key.name == "bob"  # type: ignore[union-attr]
    assert not any(find_client(KEYS, given) for given in ("", "sk-bo", "é"))
    assert "sk-" not in repr(KEYS)


def test_without_keys_addresses_are_told_apart(tmp_path: Path) -> None:
    """One that holds all rows with long streams does not keep others waiting."""
    senders = [find_client(keys, "sk-bob", "127.0.0.1").sender for keys in ((), KEYS)]  # type: ignore[union-attr]
    assert senders == ["127.0.0.1", None]
    decoder = tiny_decoder(tmp_path)
    engine = decoder.engine(max_rows=2, num_speculative_tokens=4)
    with serving(decoder, engine) as server, ExitStack() as held:
        for _ in range(4):
            body = BODY | {"max_tokens": 4000, "stream": True}
            held.enter_context(httpx.stream("POST", server.url + "/v1/chat/completions", json=body, timeout=600))
        with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2"), timeout=600) as other:
            assert other.post(server.url + "/v1/chat/completions", json=BODY).status_code == 200
        assert engine.stats().waiting >= 2  # the others go on
    engine.close(drain=False)


GOOD = "- {name: ann, key: sk-1}\n- {name: bob, key: sk-2, priority: 2, max_rows: 1}\n"
BAD = {
    "nothing": ("", "YAML list"),
    "a mapping": ("a: 1", "no file of keys"),
    "a list of nothing": ("[]", "has no keys"),
    "no YAML": ("[", "YAML list"),
    "a date that cannot be": ("- {name: ann, key: 2026-13-01}", "YAML list"),
    "a key with spaces": ("- {name: ann, key: a b}", "0.key"),
    "an unknown member": ("- {name: ann, key: a, colour: 1}", "0.colour"),
    "a name twice": ("- {name: a, key: a}\n- {name: a, key: b}", "the same name twice"),
    "an object": ("!!python/object/apply:os.getcwd []", "YAML list"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_of_keys_is_read_or_refused_in_a_sentence(case: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(GOOD)
    assert [(key.name, key.priority, key.max_rows) for key in read_keys(path)] == [("ann", 0, None), ("bob", 2, 1)]
    text, says = BAD[case]
    path.write_text(text)
    with pytest.raises(SpecDecError, match=says) as refused:
        read_keys(path)
    assert "\n" not in str(refused.value) and "a b" not in str(refused.value)
    with pytest.raises(SpecDecError, match="cannot be read"):
        read_keys(tmp_path / "nowhere")


def test_prompts_and_answers_are_logged_if_that_is_asked_for() -> None:
    for wanted in (False, True):
        with answering("It scatters.", log_requests=wanted) as other:
            request_id = other.chat().headers["x-request-id"]
            until(lambda lines=other.lines, id=request_id: any(id in line and "200" in line for line in lines))
            found = [json.loads(line) for line in other.lines if line.startswith("{")]
        prompt = "[user]" + USER[0]["content"]
        assert found == ([{"id": request_id, "prompt": prompt, "answer": "It scatters."}] if wanted else [])


@pytest.mark.parametrize("own", [Key(name="robot", key="secret", learn=False), Key(name="default", key="other")])
def test_a_key_that_is_given_twice_is_refused(own: Key) -> None:
    """Its limits would be those of one of the two."""
    with pytest.raises(SpecDecError, match=r"the API key has the (key|name) of one in the file of keys"):
        ServerSettings(name="x", api_key="secret", keys=(own,))
