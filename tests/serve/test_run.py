"""``specdec serve`` as a process: ready, drained, ended, killed and started again."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import httpx
import pytest
from servers import process
from tiny import save_tiny
from typer.testing import CliRunner

from specdec.cli import app

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


def test_a_port_that_is_taken_is_named_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(app, ["serve", "--model", "smollm2-135m-instruct", "--port", str(port)])
    assert done.exit_code == 2 and f"port {port}" in done.stderr and done.stderr.count("\n") == 1, done.output
