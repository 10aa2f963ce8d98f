"""``specdec serve`` as a process: ready, drained, ended, killed and started again."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from servers import process
from tiny import save_tiny

pytestmark = pytest.mark.slow

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Name three colours."}], "seed": 4, "max_tokens": 32}
LONG = BODY | {"max_tokens": 1000, "stream": True}
ENDLESS = LONG | {"max_tokens": 30_000, "n": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("served") / "tiny", 1 << 15)


def text(url: str) -> str:
    response = httpx.post(url + "/v1/chat/completions", json=BODY, timeout=600)
    return response.json()["choices"][0]["message"]["content"]


def test_a_terminated_server_finishes_what_it_has_begun(model: Path) -> None:
    with process(model) as server, httpx.Client(timeout=600) as client:
        with client.stream("POST", server.url + "/v1/chat/completions", json=LONG) as response:
            parts = response.iter_text()
            got = next(parts)
            server.child.send_signal(signal.SIGTERM)
            got += "".join(parts)
        assert got.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in got
        log = server.rest()
        assert server.child.returncode == 0
        assert "finishing the running requests" in log and "POST /v1/chat/completions 200" in log
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/health")


def test_a_second_signal_ends_it(model: Path) -> None:
    with process(model) as server, httpx.Client(timeout=600) as client:
        with client.stream("POST", server.url + "/v1/chat/completions", json=ENDLESS) as response:
            parts = response.iter_text()
            next(parts)
            server.child.send_signal(signal.SIGTERM)
            assert "finishing" in server.child.stderr.readline()
            server.child.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.RemoteProtocolError):
                for _ in parts:
                    pass
        server.rest()
        assert server.child.returncode == 128 + signal.SIGTERM


def test_a_killed_server_starts_again_on_its_port_and_gives_the_same_text(model: Path) -> None:
    with process(model) as server:
        before, port = text(server.url), int(server.url.rpartition(":")[2])
        server.child.kill()
        server.child.wait()
    with process(model, port=port) as again:
        assert again.url == server.url and text(again.url) == before


def test_options_of_the_command_reach_the_server(model: Path) -> None:
    options = ("--api-key", "secret", "--cors", "https://a.example", "--max-body", "2KB", "--name", "mine")
    with (
        process(model, *options, "--max-rows", "1", "--max-waiting", "1") as server,
        httpx.Client(timeout=600) as client,
    ):
        url, body = server.url + "/v1/chat/completions", BODY | {"model": "mine"}
        assert client.post(url, json=body).status_code == 401
        client.headers["Authorization"] = "Bearer secret"
        for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
            answer = client.post(url, json=body, headers={"Origin": origin})
            assert answer.status_code == 200 and answer.headers.get("Access-Control-Allow-Origin") == allowed
        assert client.post(url, json=body | {"stop": ["x" * 3000]}).status_code == 413
        long = body | {"max_tokens": 30_000, "stream": True}
        with client.stream("POST", url, json=long), client.stream("POST", url, json=long):
            refused = client.post(url, json=body)
            assert refused.status_code == 429 and int(refused.headers["Retry-After"]) > 0
        found = (client.post(url, json=body).status_code for _ in range(100))  # those that went away make room soon
        assert any(status == 200 or time.sleep(0.1) for status in found)


def test_a_port_that_is_taken_is_named_at_once(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "specdec", "serve", "--model", str(model), "--port", str(port)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    told = [line for line in run.stderr.splitlines() if not line.startswith("starting")]  # on a slow machine
    assert run.returncode == 2 and len(told) == 1 and f"port {port}" in told[0]
