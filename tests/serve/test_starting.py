"""A server whose model loads: what it answers, and what becomes of it."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse

from specdec.base.errors import SpecDecError
from specdec.serve import run
from specdec.serve.settings import ServerSettings


def started(make: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[str, threading.Thread, list[BaseException]]:
    """The address of a server in a thread, the thread, and what it raises."""
    listener, errors = run.bind("127.0.0.1", 0), list[BaseException]()
    monkeypatch.setattr(run.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(run._Server, "install_signal_handlers", lambda self: None, raising=False)

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
        loaded.set()
        assert told.wait(60)
        assert client.get(url + "/health").text == "served"
    assert not errors


def test_what_loading_raises_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise SpecDecError("no such model")

    _, thread, errors = started(fail, monkeypatch)
    thread.join(60)
    assert str(errors[0]) == "no such model"
