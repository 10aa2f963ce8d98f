"""Measure a server under load: tokens per second and latencies by number of clients, with and without the drafter.

    python benchmarks/serving.py --drafter ngram+m2r2
    python benchmarks/serving.py --model qwen2.5-coder-1.5b-instruct --drafter ngram+m2r2 --seconds 8

Requests go over loopback sockets to a server that the script starts, or to ``--url``. Each client sends its next
request after the last answer. A block counts the tokens of some seconds in which all clients receive answers; blocks
with the drafter on and off alternate in one server. Latencies are measured at the client: time to the first text, and
time between deliveries. The last line is JSON; ``--json`` writes it to a file. It takes about 60 times ``--seconds``.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from rich.console import Console
from rich.table import Table

from specdec.bench.prompts import evenly_spaced, load_prompts
from specdec.models.catalogue import DEFAULT_MODEL

_TEXT = re.compile(rb'"content":"[^"]')


@dataclass
class StreamedAnswer:
    """One answer that the server streams.

    status: HTTP status; 0: the answer has not ended.
    began: time of the request in seconds, by ``time.perf_counter``.
    times: times at which data with text arrived.
    text: the whole text.
    usage: the token counts that the server reports.
    """

    status: int
    began: float
    times: list[float] = field(default_factory=list)
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)

    def read(self, received: bytes) -> StreamedAnswer:
        """Set status, text and usage from the whole HTTP response ``received``, and return this object."""
        self.status = int(received.split(maxsplit=2)[1])
        for line in received.splitlines():
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                self.text += "".join(c["delta"].get("content") or "" for c in chunk.get("choices", ()))
                if chunk.get("usage"):
                    self.usage = chunk["usage"]
                if "error" in chunk:
                    self.status = 500
        return self

    @property
    def first(self) -> float:
        """Return the seconds from the request to the first text."""
        return self.times[0] - self.began

    @property
    def gaps(self) -> list[float]:
        """Return the seconds between consecutive deliveries of text."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


class Client:
    """A minimal HTTP/1.1 client with one connection per request. It uses little time: the server needs the cores.

    url: the server's address.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80

    async def _ask(self, method: str, path: str, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=2**24)
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return reader, writer

    async def lines(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[bytes]:
        """Send an HTTP request; yield the status line of the response, and then the lines of its body."""
        reader, writer = await self._ask(method, path, body)
        try:
            yield await reader.readline()
            while (await reader.readline()).strip():
                pass
            while line := await reader.readline():
                yield line
        finally:
            writer.close()

    async def chat(self, body: dict[str, Any], answer: StreamedAnswer | None = None) -> StreamedAnswer:
        """Send a chat request and return its answer, streamed and then parsed.

        body: the fields of the request. answer: the object that gets the answer while it streams; None: a new one.
        """
        answer = StreamedAnswer(0, time.perf_counter()) if answer is None else answer
        reader, writer = await self._ask("POST", "/v1/chat/completions", json.dumps(body | {"stream": True}).encode())
        parts = list[bytes]()
        try:
            while part := await reader.read(2**20):
                parts.append(part)
                if _TEXT.search(part):
                    answer.times.append(time.perf_counter())
        finally:
            writer.close()
        return answer.read(b"".join(parts))

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """Post a JSON body to the path ``path``, and return the JSON value of the answer."""
        found = [line async for line in self.lines("POST", path, json.dumps(body).encode())]
        return json.loads(b"".join(found[1:]))

    async def figures(self) -> dict[str, float]:
        """Return the server's metrics whose names begin with "vllm:", by name without this prefix."""
        found: dict[str, float] = {}
        async for line in self.lines("GET", "/metrics"):
            if match := re.match(rb"vllm:(\w+)\{[^}]*\} (\S+)", line):
                found[match[1].decode()] = float(match[2])
        return found

    async def quiet(self) -> dict[str, float]:
        """Wait, at most ten seconds, until no request runs or waits at the server; return its metrics by name.

        Cancelled requests leave the server only at the end of a decoding step.
        """
        for _ in range(100):
            figures = await self.figures()
            if not figures["num_requests_running"] + figures["num_requests_waiting"]:
                break
            await asyncio.sleep(0.1)
        return figures


@contextmanager
def server(args: argparse.Namespace) -> Iterator[str]:
    """Yield the address of a server for a ``with`` block: that of ``--url``, or a new server that ends with it.

    args: the options of the command line.
    """
    if args.url:
        yield args.url
        return
    with started(args.model, args.drafter, "--max-rows", str(max(args.clients))) as address:
        yield address


@contextmanager
def started(model: str, drafter: str, *more: str) -> Iterator[str]:
    """Run ``specdec serve`` on a free port during a ``with`` block; yield its address.

    model, drafter: their names. more: further arguments of the command.
    """
    command = [sys.executable, "-m", "specdec", "serve", "--model", model, "--drafter", drafter]
    command += ["--port", "0", "--quiet", *more]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stderr is not None
        for line in child.stderr:
            if found := re.search(r"is served at (http://\S+)", line):
                yield found[1]
                break
            print(line, end="", file=sys.stderr)
        else:
            sys.exit("the server does not start")
    finally:
        child.terminate()
        child.wait()


def bodies(args: argparse.Namespace, name: str, temperature: float) -> list[dict[str, Any]]:
    """Return the bodies of the chat requests, one for each prompt, each with its own seed.

    args: the options of the command line. name: the model's name at the server.
    """
    conversations = evenly_spaced(load_prompts(args.prompts).conversations, args.limit)
    return [
        {
            "model": name,
            "messages": [{"role": "user", "content": conversation.turns[0]}],
            "max_tokens": args.max_tokens,
            "temperature": temperature,
            "seed": seed,
            "stream_options": {"include_usage": True},
        }
        for seed, conversation in enumerate(conversations)
    ]


@dataclass
class Block:
    """A measurement of a server under load, for some seconds.

    seconds: its duration.
    tokens: number of tokens that the server generated in this time.
    steps: number of decoding steps of all its requests.
    accepted: number of drafted tokens that were accepted.
    answers: the answers that were requested.
    """

    seconds: float
    tokens: float
    steps: float
    accepted: float
    answers: list[StreamedAnswer]


async def block(client: Client, wanted: Sequence[dict[str, Any]], clients: int, draft: bool, seconds: float) -> Block:
    """Measure the server while ``clients`` clients send requests one after the other, each after its last answer.

    client: connects to the server. wanted: bodies of the requests, sent in turn. draft: whether the server drafts.
    seconds: duration, counted from when all clients are receiving answers.
    """
    left, answers = itertools.cycle(wanted), list[StreamedAnswer]()

    async def work() -> None:
        while True:
            answers.append(StreamedAnswer(0, time.perf_counter()))
            await client.chat(next(left) | ({} if draft else {"num_speculative_tokens": 0}), answer=answers[-1])

    before = await client.quiet()
    tasks = [asyncio.create_task(work()) for _ in range(clients)]
    while len(answers) < clients or not all(answer.times for answer in answers[:clients]):
        await asyncio.sleep(0.01)
        for task in tasks:
            if task.done():
                task.result()  # raises what has ended it
    first, began = await client.figures(), time.perf_counter()
    await asyncio.sleep(seconds)
    last, took = await client.figures(), time.perf_counter() - began
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    after = await client.quiet()
    steps, accepted = (
        after[f"spec_decode_num_{name}_total"] - before[f"spec_decode_num_{name}_total"]
        for name in ("drafts", "accepted_tokens")
    )
    tokens = last["generation_tokens_total"] - first["generation_tokens_total"]
    return Block(took, tokens, steps, accepted, answers)


def percentiles(values: Sequence[float]) -> list[float]:
    """Return the 50th and 99th percentile of times in seconds, converted to milliseconds."""
    return [round(1e3 * float(x), 1) for x in np.percentile(values, (50, 99))] if values else [0.0, 0.0]


def turns(repeats: int) -> Iterator[bool]:
    """Yield for each measurement whether the drafter is on.

    It is on and off ``repeats`` times each, in alternating order.
    """
    for repeat in range(repeats):
        yield from (True, False) if repeat % 2 == 0 else (False, True)


async def load(args: argparse.Namespace, client: Client, name: str, temperature: float) -> list[dict[str, Any]]:
    """Measure all numbers of clients with the drafter on and off; return a dict of figures for each.

    args: the options of the command line. name: the model's name at the server. temperature: of all requests.
    """
    wanted = bodies(args, name, temperature)
    for draft in turns(1):
        await block(client, wanted, max(args.clients), draft, 1)  # warm-up
    rows = list[dict[str, Any]]()
    for clients in args.clients:
        blocks: dict[bool, list[Block]] = {True: [], False: []}
        for draft in turns(args.repeats):
            blocks[draft].append(await block(client, wanted, clients, draft, args.seconds))
        for draft, found in blocks.items():
            answers = [answer for each in found for answer in each.answers]
            rows.append(
                {
                    "clients": clients,
                    "temperature": temperature,
                    "drafter": args.drafter if draft else "none",
                    "tokens_per_second": round(sum(b.tokens for b in found) / sum(b.seconds for b in found), 1),
                    "mean_acceptance_length": round(
                        1 + sum(b.accepted for b in found) / max(sum(b.steps for b in found), 1), 2
                    ),
                    "ttft_ms": percentiles([a.first for a in answers if a.times]),
                    "itl_ms": percentiles([gap for a in answers for gap in a.gaps]),
                    "failed": sum(a.status not in (0, 200) for a in answers),
                }
            )
        ratios = [on.tokens / on.seconds / (off.tokens / off.seconds) for on, off in zip(*blocks.values(), strict=True)]
        rows[-2]["x_off"] = round(float(np.median(ratios)), 3)
    return rows


async def run(args: argparse.Namespace, url: str) -> list[dict[str, Any]]:
    """Measure the server at ``url`` at all temperatures; return a dict of figures for each combination of settings.

    args: the options of the command line.
    """
    client = Client(url)
    models = b"".join([line async for line in client.lines("GET", "/v1/models")][1:])
    name = json.loads(models)["data"][0]["id"]
    return [row for t in args.temperatures for row in await load(args, client, name, t)]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the measured figures as a table. rows: a dict of figures for each combination of settings."""
    columns = ("clients", "T", "drafter", "tokens/s", "x off", "acceptance length", "TTFT P50 P99 ms", "ITL P50 P99 ms")
    made = Table(*columns, box=None)
    for row in rows:
        cells = [row["clients"], row["temperature"], row["drafter"], row["tokens_per_second"], row.get("x_off", "")]
        cells += [row["mean_acceptance_length"], *(" ".join(map(str, row[key])) for key in ("ttft_ms", "itl_ms"))]
        made.add_row(*map(str, cells))
    return made


def main() -> None:
    def numbers(kind: type) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--prompts", default="own", help="a file or the name of a set; first turns")
    parser.add_argument("--limit", type=int, default=16, help="different prompts")
    parser.add_argument("--clients", type=numbers(int), default=[1, 2, 4, 8, 16])
    parser.add_argument("--temperatures", type=numbers(float), default=[0.0, 0.8])
    parser.add_argument("--seconds", type=float, default=5, help="of a block")
    parser.add_argument("--repeats", type=int, default=3, help="blocks with the drafter on, and off")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    with server(args) as url:
        rows = asyncio.run(run(args, url))
    Console().print(table(rows))
    print(json.dumps(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
