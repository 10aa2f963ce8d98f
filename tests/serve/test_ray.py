"""Two replicas under Ray Serve on this machine: requests are answered, and sessions keep their replica."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from servers import until
from tiny import save_tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed"),  # importing it takes seconds
]

BODY = {"model": "tiny", "prompt": "Name three colours.", "max_tokens": 12, "seed": 1}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import ray
    from ray import serve

    from specdec.serve.ray import Options, app
    from specdec.serve.run import bind

    model = save_tiny(tmp_path_factory.mktemp("served") / "tiny")
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as env:
        env.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # its processes start slowly beside other tests
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)  # a worker process starts for each
    try:
        with suppress(TimeoutError):  # beside other tests, its proxy may need longer than the minute that is waited
            serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app(Options(model=str(model), drafter="prompt-lookup", name="tiny", replicas=2, cpus=0.5)))
        url = f"http://127.0.0.1:{port}"
        until(lambda: healthy(url))
        yield url
    finally:
        serve.shutdown()
        ray.shutdown()


def healthy(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(url + "/-/healthz", timeout=60).status_code == 200
    return False


def complete(url: str, session: str | None = None, **more: object) -> httpx.Response:
    headers = {} if session is None else {"x-session-id": session}
    return httpx.post(url + "/v1/completions", json=BODY | more, headers=headers, timeout=600)


def served(url: str, session: str) -> float:
    """How many requests the replica of a session has answered."""
    page = httpx.get(url + "/metrics", headers={"x-session-id": session}, timeout=600).text
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("vllm:request_success_total"))


def test_replicas_give_one_text_and_sessions_keep_theirs(url: str) -> None:
    texts = {complete(url).json()["choices"][0]["text"] for _ in range(6)}
    assert len(texts) == 1
    counts: dict[str, float] = {}
    for session in (f"s{n}" for n in range(8)):
        before = served(url, session)
        for _ in range(3):
            assert complete(url, session).status_code == 200
        counts[session] = served(url, session)
        assert counts[session] == before + 3  # all three, and the figures, came from one replica
    streamed = complete(url, "s0", stream=True).text
    assert streamed.count("data: ") > 3 and streamed.endswith("data: [DONE]\n\n")


def test_errors_of_a_replica_reach_the_client(url: str) -> None:
    assert complete(url, model="other").json()["error"]["param"] == "model"


def test_a_path_is_not_an_option() -> None:
    from pydantic import ValidationError

    from specdec.serve.ray import Options

    with pytest.raises(ValidationError, match="replica"):
        Options(replica=Path())  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="Ray Serve accepts the connections"):
        Options(max_connections=8)  # type: ignore[call-arg]


def test_options_of_the_server_reach_its_replicas() -> None:
    from specdec.serve.ray import Options

    given = {
        "allowed_hosts": "a.example, B.example",
        "cors": "https://a.example",
        "max_tokens": "8",
        "max_choices": "2",
    }
    settings = Options(**given, name="tiny", max_body="2048", max_prompt_tokens="5")  # type: ignore[arg-type]
    assert settings.allowed_hosts == ("a.example", "B.example") and settings.cors == ("https://a.example",)
    assert (settings.max_tokens, settings.max_choices, settings.max_body, settings.max_prompt_tokens) == (8, 2, 2048, 5)
