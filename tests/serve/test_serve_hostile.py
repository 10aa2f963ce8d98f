"""The server under hostile load beside a steady client: never silent for long, bounded in memory, its texts right."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hostile
import httpx
import pytest
from servers import Process, process
from tiny import save_tiny

pytestmark = pytest.mark.slow

SECONDS = 15.0
SILENCE = 2.0  # seconds between two tokens
MORE = 2**20  # KiB beyond the peak of the quiet server
PROMPTS = ["Name three colours.", "Why is the sky blue?", "Count to ten, then back."]


class Steady:
    """A client that streams one answer after another. texts: by prompt. silence: the longest, in seconds."""

    def __init__(self, url: str) -> None:
        self.url, self.texts, self.silence, self.turned_away = url, {prompt: list[str]() for prompt in PROMPTS}, 0.0, 0

    def ask(self, prompt: str) -> None:
        """Until it is answered: the flood of others may take its place before it has asked."""
        while True:
            parts = list[str]()
            try:
                for part in self.parts(prompt):
                    parts.append(part)
                return self.texts[prompt].append("".join(parts))
            except httpx.TransportError:
                assert not parts  # an answer that has begun is not broken off
                self.turned_away += 1
                time.sleep(0.1)

    def parts(self, prompt: str) -> Iterator[str]:
        body, last = {"model": "tiny", "prompt": prompt, "seed": 4, "max_tokens": 200, "stream": True}, 0.0
        with httpx.stream("POST", self.url + "/v1/completions", json=body, timeout=300) as response:
            assert response.status_code == 200, response.status_code
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    now = time.perf_counter()
                    self.silence, last = max(self.silence, now - (last or now)), now
                    yield json.loads(line[6:])["choices"][0]["text"]

    def ask_all(self) -> None:
        for prompt in PROMPTS:
            self.ask(prompt)


def peak(server: Process) -> int:
    """KiB of memory, the most so far."""
    lines = Path(f"/proc/{server.child.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def limit_memory(server: Process) -> None:
    """It fails then; the machine does not."""
    pages = int(Path(f"/proc/{server.child.pid}/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 4 * 2**30
    resource.prlimit(server.child.pid, resource.RLIMIT_AS, (most, most))


def test_a_steady_client_is_served_beside_all_attacks(tmp_path: Path) -> None:
    with process(save_tiny(tmp_path / "tiny", 4096)) as server:
        log = list[str]()
        threading.Thread(target=log.extend, args=(server.child.stderr,), daemon=True).start()
        quiet, steady = Steady(server.url), Steady(server.url)
        quiet.ask_all()
        before = peak(server)
        limit_memory(server)
        command = [sys.executable, hostile.__file__, server.url, str(SECONDS)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as attacks:
            while attacks.poll() is None:
                steady.ask_all()
            came = json.loads(attacks.stdout.read())
        again = Steady(server.url)
        again.ask_all()
        more = peak(server) - before
        print(came, f"longest silence {steady.silence:.2f} s, {more} KiB more, {steady.turned_away} turned away")
    assert {name: set(texts) for name, texts in steady.texts.items()} == {p: set(t) for p, t in quiet.texts.items()}
    assert again.texts == quiet.texts
    assert steady.silence < SILENCE and more < MORE
    assert sum(map(len, log)) < 2**20
    fault = "".join(log).partition("Traceback")[2]
    assert not fault, fault[:5000]
    for name, tally in came.items():
        assert tally and not any(status.startswith("5") for status in tally), (name, tally)
