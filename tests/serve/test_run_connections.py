"""Connections: idle ones, half heads, clients that do not read, and more of them than the server takes."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
from servers import Replay, Server, byte_tokenizer, serving, stand_in, until

from specdec.engine.request import Event
from specdec.serve.run import Connections

PATIENCE = 0.5  # seconds
HALF = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Half: "
WHOLE = HALF + b"no\r\n\r\n"


def replay() -> Replay:
    return Replay(lambda request: [Event([65], "length", depths=[0])])


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(stand_in(byte_tokenizer()), replay(), client_timeout=PATIENCE, max_connections=8) as running:
        yield running


def connect(server: Server, receive: int | None = None) -> socket.socket:
    found = socket.socket()
    if receive is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    found.settimeout(60)
    found.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    return found


def ended(raw: socket.socket) -> bool:
    """Whether the server has closed it, after what it may have sent."""
    try:
        while raw.recv(2**16):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("sent", [b"", HALF, WHOLE, WHOLE + HALF, WHOLE + b"\r\n"])
def test_a_connection_that_asks_for_nothing_is_closed(server: Server, sent: bytes) -> None:
    with connect(server) as raw:
        raw.sendall(sent)
        assert ended(raw)


def test_a_head_that_comes_byte_by_byte_is_not_waited_for(server: Server) -> None:
    with connect(server) as raw, pytest.raises(ConnectionError):
        for _ in range(2000):
            raw.sendall(b"G")
            time.sleep(0.03)


def test_a_client_that_does_not_read_a_whole_answer_is_given_up() -> None:
    with serving(stand_in(byte_tokenizer(), context=10**7), replay(), client_timeout=PATIENCE) as server:
        body = b'{"prompt": "' + b"x" * 2_000_000 + b'"}'
        with connect(server, receive=4096) as raw:
            head = f"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            raw.sendall((head + "Content-Type: application/json\r\n\r\n").encode() + body)
            until(lambda: any("/tokenize 200" in line for line in server.lines))
            until(lambda: not server.server.server_state.connections)


def test_a_client_that_reads_slowly_gets_the_whole_answer() -> None:
    with serving(stand_in(byte_tokenizer(), context=10**7), replay(), client_timeout=PATIENCE) as server:
        with httpx.Client(timeout=300) as client:
            whole = client.post(server.url + "/tokenize", json={"prompt": "x" * 500_000}).content
        body = b'{"prompt":"' + b"x" * 500_000 + b'"}'
        with connect(server, receive=2**16) as raw:
            head = f"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            raw.sendall((head + "Content-Type: application/json\r\nConnection: close\r\n\r\n").encode() + body)
            got = bytearray()
            while part := raw.recv(2**17):
                got += part
                time.sleep(PATIENCE / 10)
        assert got.endswith(whole)


@pytest.mark.parametrize("sent", [b"", HALF])
def test_beyond_the_limit_those_that_wait_longest_make_room(server: Server, sent: bytes) -> None:
    crowd = [connect(server) for _ in range(40)]
    for raw in crowd:
        with suppress(ConnectionError):
            raw.sendall(sent)
    assert httpx.get(server.url + "/health").status_code == 200
    assert len(server.server.server_state.connections) <= 9
    assert sum("connections are open" in line for line in server.lines) == 1
    for raw in crowd:
        raw.close()


@pytest.mark.parametrize("limit", [64, 256, 1024])
def test_some_descriptors_are_left_free(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr("os.listdir", lambda folder: range(20))
    monkeypatch.setattr("resource.getrlimit", lambda which: (limit, limit))
    found = Connections(1024, 1.0, print)
    assert found.backlog >= 1 and found.most >= 1 and 20 + found.most + 3 * found.backlog < limit


def test_without_a_limit_of_descriptors_the_option_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (-1, -1))
    assert Connections(1024, 1.0, print).most == 1024
