"""Hostile clients: ``python tests/support/hostile.py URL SECONDS [ATTACK ...]`` runs all attacks, or those named.

Each attack is a function that is called again and again. At the end it prints, as JSON, how often each came to what.
"""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

NAME = "tiny"  # of the model
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
LARGEST = 4 * 2**20 - 256  # bytes of a body
CROWD = 300  # sockets that an attack holds; more than the server has descriptors
VICTIM = (
    "import socket, sys, time; s = socket.create_connection((sys.argv[1], int(sys.argv[2])));"
    "s.sendall(sys.stdin.buffer.read()); print(len(s.recv(4096, socket.MSG_WAITALL)), flush=True); time.sleep(60)"
)


def filled(start: str, item: str, end: str) -> bytes:
    """As many of ``item`` as there is place for."""
    return (start + item * ((LARGEST - len(start) - len(end)) // len(item)) + end).encode()


def keys(start: str, end: str) -> bytes:
    return (start + "{" + ",".join(f'"{n:06}":0' for n in range(300_000)) + "}" + end).encode()


MODEL = f'{{"model":"{NAME}",'
USER = MODEL + '"messages":[{"role":"user","content":"x"}],'
BODIES = {
    "numbers for messages": (CHAT, filled(MODEL + '"messages":[', "0,", "0]}")),
    "empty objects for messages": (CHAT, filled(MODEL + '"messages":[', "{},", "{}]}")),
    "messages": (CHAT, filled(MODEL + '"messages":[', '{"role":"user","content":"x"},', "0]}")),
    "parts": (CHAT, filled(MODEL + '"messages":[{"role":"user","content":[', '{"type":"text","text":""},', "0]}]}")),
    "tools": (CHAT, filled(USER + '"tools":[', "0,", "0]}")),
    "stops": (CHAT, filled(USER + '"stop":[', '"",', '""]}')),
    "empty prompts": (COMPLETION, filled(MODEL + '"prompt":[', '"",', '""]}')),
    "prompts": (COMPLETION, filled(MODEL + '"prompt":[', '"a",', '"a"]}')),
    "lists of ids": (COMPLETION, filled(MODEL + '"prompt":[', "[5],", "[5]]}")),
    "ids": (COMPLETION, filled(MODEL + '"prompt":[', "5,", "5]}")),
    "unknown keys": (CHAT, keys("", "")),
    "biases": (CHAT, keys(USER + '"logit_bias":', "}")),
    "a long text": ("/tokenize", filled('{"prompt":"', "a", '"}')),
    "special tokens in text": (CHAT, filled(MODEL + '"messages":[{"role":"user","content":"', "<|", '"}]}')),
    "tokens": ("/detokenize", filled('{"tokens":[', "5,", "5]}")),
    "a schema": (
        CHAT,
        filled(
            USER + '"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{"enum":[',
            "[],",
            "0]}}}}",
        ),
    ),
    "n": (COMPLETION, (MODEL + '"prompt":"a","echo":true,"n":1000000000000}').encode()),
}
LONG = {"model": NAME, "prompt": "Name three", "max_tokens": 1000, "logprobs": 20}


class Target:
    """The server. held: sockets that an attack keeps open, the last ``CROWD``. bodies: without end."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.address = str(parts.hostname), int(parts.port or 80)
        self.held, self.bodies = deque[socket.socket](maxlen=CROWD), itertools.cycle(BODIES.values())

    def connect(self, receive: int | None = None) -> socket.socket:
        """receive: bytes that the system takes for it."""
        found = socket.socket()
        if receive is not None:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        found.settimeout(30)
        found.connect(self.address)
        return found

    def post(self, path: str, body: bytes | dict[str, object], receive: int | None = None) -> socket.socket:
        """A connection on which a request has been sent."""
        found = self.connect(receive)
        found.sendall(request(path, body))
        return found

    def status(self, path: str, body: bytes | dict[str, object]) -> str:
        """Send a request, and read its whole answer."""
        with self.post(path, body) as raw:
            return status(iter(lambda: raw.recv(2**16), b""))


def request(path: str, body: bytes | dict[str, object]) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def status(parts: Iterable[bytes]) -> str:
    return next(iter(b"".join(parts).split(b" ", 2)[1:2]), b"closed").decode()


def bodies(target: Target) -> str:
    """Large in every way, one way after another."""
    return target.status(*next(target.bodies))


def answers(target: Target) -> str:
    """The largest answers, whole."""
    return target.status(COMPLETION, LONG | {"n": 64, "max_tokens": 100})


def half_bodies(target: Target) -> str:
    """Twelve at once, each of three quarters of the largest size."""
    raw = target.connect()
    raw.sendall(request(COMPLETION, b" " * LARGEST)[: LARGEST * 3 // 4])
    target.held.append(raw)
    time.sleep(0.2)
    if len(target.held) > 12:
        target.held.popleft().close()
    return "sent"


def slow_readers(target: Target) -> str:
    """Twelve who ask for much, as a stream and whole, and read nothing of it."""
    stream = len(target.held) % 2 == 0
    target.held.append(target.post(COMPLETION, LONG | {"stream": stream, "n": 2}, receive=4096))
    time.sleep(0.4)
    if len(target.held) > 12:
        target.held.popleft().close()
    return "sent"


def cancels(target: Target) -> str:
    """Streams that are closed after their first tokens."""
    with target.post(
        CHAT, {"model": NAME, "messages": [{"role": "user", "content": "x"}], "stream": True, "n": 4}
    ) as raw:
        return status([raw.recv(4096, socket.MSG_WAITALL)])


def kills(target: Target) -> str:
    """A client whose process is killed while it is being answered."""
    command = [sys.executable, "-ISc", VICTIM, target.address[0], str(target.address[1])]
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    with subprocess.Popen(command, **pipes) as child:
        assert child.stdin and child.stdout
        child.stdin.write(request(COMPLETION, LONG | {"stream": True}))
        child.stdin.close()
        begun = child.stdout.readline()
        child.kill()
    return "killed" if begun == b"4096\n" else "not served"


ATTACKS: tuple[Callable[[Target], str], ...] = (
    bodies,
    answers,
    half_bodies,
    slow_readers,
    cancels,
    kills,
)


def attack(url: str, seconds: float, names: Iterable[str]) -> dict[str, Counter[str]]:
    """What came of each attack, how often."""
    end, found = time.monotonic() + seconds, dict[str, Counter[str]]()

    def again(function: Callable[[Target], str]) -> None:
        tally, target = found.setdefault(function.__name__, Counter()), Target(url)
        while time.monotonic() < end:
            try:
                tally[function(target)] += 1
            except OSError as error:
                tally[type(error).__name__] += 1
                time.sleep(0.01)

    wanted = set(names)
    threads = [
        threading.Thread(target=again, args=(each,)) for each in ATTACKS if not wanted or each.__name__ in wanted
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


if __name__ == "__main__":
    print(json.dumps(attack(sys.argv[1], float(sys.argv[2]), sys.argv[3:])))
