"""Clients that hold connections open: they keep nobody out, and write nothing into the log."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import httpx
import pytest
from servers import Replay, Server, byte_tokenizer, serving, stand_in, until

HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
LONG = 60.0  # seconds after which a test fails
SERVER = """
import resource
from specdec.base import terminal
from specdec.serve import run
from specdec.serve.settings import ServerSettings
from starlette.responses import PlainTextResponse

resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
listener = run.bind("127.0.0.1", 0)
run.serve(lambda: (PlainTextResponse("yes"), run.address(listener)), ServerSettings(name="it"), listener)
"""


def connect(url: str) -> socket.socket:
    place = urlsplit(url)
    return socket.create_connection((str(place.hostname), int(place.port or 0)), timeout=LONG)


def health(url: str) -> int:
    return httpx.get(url + "/health", timeout=LONG).status_code


@contextmanager
def served(**settings: float) -> Iterator[Server]:
    with serving(stand_in(byte_tokenizer()), Replay(lambda request: []), **settings) as running:
        yield running


def test_idle_connections_beyond_the_limit_are_closed_the_longest_idle_first() -> None:
    with served(max_connections=4) as server, ExitStack() as stack:
        idle = [stack.enter_context(connect(server.url)) for _ in range(12)]
        assert health(server.url) == 200
        assert [client.recv(1) for client in idle[:8]] == [b""] * 8
        idle[-1].sendall(HEAD + b"\r\n")
        assert idle[-1].recv(15) == b"HTTP/1.1 200 OK"


def test_a_connection_is_idle_for_the_time_that_is_set() -> None:
    """No timer of uvicorn's closes it before."""
    with served(client_timeout=60.0) as server, connect(server.url) as client:
        client.sendall(HEAD + b"\r\n")
        assert client.recv(15) == b"HTTP/1.1 200 OK"
        [own] = list(server.server.server_state.connections)
        until(lambda: own.expiry and own.timeout_keep_alive_task)
        assert own.expiry.when() <= own.timeout_keep_alive_task.when()


def test_a_head_must_arrive_in_time_however_it_is_sent() -> None:
    with served(client_timeout=0.2) as server, connect(server.url) as silent, connect(server.url) as slow:
        slow.sendall(HEAD)
        assert silent.recv(1) == slow.recv(1) == b""
        with connect(server.url) as again:  # of the next request, too
            again.sendall(HEAD + b"\r\n" + HEAD)
            assert b"".join(iter(lambda: again.recv(2**16), b"")).count(b"HTTP/1.1") == 1


def test_without_room_clients_wait_for_those_that_are_answered() -> None:
    with served() as server, ExitStack() as stack:
        server.server.room = 2
        busy = [stack.enter_context(connect(server.url)) for _ in range(2)]
        for client in busy:  # their bodies do not arrive yet
            client.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n")
        until(lambda: len(server.server.server_state.tasks) == 2)
        third = stack.enter_context(connect(server.url))
        third.sendall(HEAD + b"\r\n")
        busy[0].sendall(b"0123456789")
        assert busy[0].recv(12) == b"HTTP/1.1 400" and third.recv(15) == b"HTTP/1.1 200 OK"
        assert busy[0].recv(2**16) and busy[0].recv(1) == b""  # it was idle
        assert len(server.server.server_state.connections) == 2
        busy[1].sendall(b"0123456789")
        assert busy[1].recv(12) == b"HTTP/1.1 400"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of descriptors")
def test_more_idle_connections_than_descriptors_keep_nobody_out() -> None:
    with subprocess.Popen([sys.executable, "-c", SERVER], stderr=subprocess.PIPE, text=True) as child, ExitStack() as s:
        s.callback(child.kill)
        note, url = next(child.stderr), next(child.stderr).strip()
        assert "ulimit -n" in note
        for _ in range(6):
            for _ in range(50):
                s.enter_context(connect(url))
            assert health(url) == 200
        child.terminate()
        log = child.communicate()[1]
    assert log.count("\n") == 1, log[:2000]
