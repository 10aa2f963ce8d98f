"""The server's process: while its model loads, drained, and ended."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from servers import USER
from starlette.responses import PlainTextResponse
from tiny import save_tiny
from typer.testing import CliRunner

from specdec.base.errors import SpecDecError
from specdec.cli import app
from specdec.serve import run
from specdec.serve.settings import ServerSettings


def started(make: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[str, threading.Thread, list[BaseException]]:
    """The address of a server in a thread, the thread, and what it raises."""
    listener, errors = run.bind("127.0.0.1", 0), list[BaseException]()
    monkeypatch.setattr(run.signal, "signal", lambda number, handler: None)

    def body() -> None:
        try:
            run.serve(make, ServerSettings(name="tiny"), listener)
        except BaseException as error:
            errors.append(error)

    url, thread = run.address(listener), threading.Thread(target=body, daemon=True)
    thread.start()
    return url, thread, errors


def test_a_loading_server_says_so_and_then_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, told = threading.Event(), threading.Event()
    monkeypatch.setattr(run, "say", lambda line: told.set())
    url, _, errors = started(lambda: (loaded.wait(60), PlainTextResponse("served"), "ready")[1:], monkeypatch)
    transport = httpx.HTTPTransport(retries=20)
    with httpx.Client(timeout=60, transport=transport) as client:
        health, other = client.get(url + "/health"), client.post(url + "/v1/chat/completions", json={})
        assert health.status_code == other.status_code == 503 and health.json() == {"status": "loading"}
        assert health.headers["Retry-After"] and other.json()["error"]["code"] == "loading"
        assert client.post(url + "/v1/messages", json={}).json()["type"] == "error"
        loaded.set()
        assert told.wait(60)
        assert client.get(url + "/health").text == "served"
    assert not errors


def test_what_loading_raises_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    _, thread, errors = started(Mock(side_effect=SpecDecError("no such model")), monkeypatch)
    thread.join(60)
    assert str(errors[0]) == "no such model"


def test_the_first_signal_drains_and_the_second_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, said = list[int](), list[str]()
    monkeypatch.setattr(run.os, "_exit", ended.append)
    monkeypatch.setattr(run, "say", said.append)
    server = run._Server(lambda: (PlainTextResponse(""), ""), ServerSettings(name="tiny"))
    server.starting.app = PlainTextResponse("")
    server.handle_exit(signal.SIGTERM, None)
    assert server.should_exit and not ended and "a second signal" in said[0]
    server.handle_exit(signal.SIGTERM, None)
    assert ended == [128 + signal.SIGTERM]
    loading = run._Server(lambda: (PlainTextResponse(""), ""), ServerSettings(name="tiny"))
    loading.handle_exit(signal.SIGINT, None)
    assert ended[1:] == [128 + signal.SIGINT]


def test_a_port_is_bound_again_while_the_system_keeps_its_last_connections() -> None:
    with run.bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        first.listen()
        with socket.create_connection(("127.0.0.1", port)) as client:
            first.accept()[0].close()  # the side that closes first waits
            assert client.recv(1) == b""
    run.bind("127.0.0.1", port).close()


def test_a_port_that_is_taken_is_named_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(app, ["serve", "--model", "smollm2-135m-instruct", "--port", str(port)])
    assert done.exit_code == 2 and f"port {port}" in done.stderr and done.stderr.count("\n") == 1, done.output


@pytest.mark.slow
def test_a_terminated_process_finishes_what_it_has_begun(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny")
    command = [sys.executable, "-m", "specdec", "serve", "--model", str(model), "--drafter", "prompt-lookup"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    body = {"model": "tiny", "messages": USER, "max_tokens": 1000, "stream": True}
    with subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True, env=environment) as child:
        url = next(found[1] for line in child.stderr if (found := re.search(r"is served at (http://\S+)", line)))
        with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=600) as response:
            parts = response.iter_text()
            got = next(parts)
            child.send_signal(signal.SIGTERM)
            got += "".join(parts)
        assert got.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in got
        log = child.communicate(timeout=600)[1]
    assert child.returncode == 0
    assert "finishing the running requests" in log and "POST /v1/chat/completions 200" in log
