"""A server under load: tokens per second and latencies by number of clients, with and without the drafter.

    python benchmarks/serving.py --model qwen2.5-coder-1.5b-instruct --drafter prompt-lookup+m2r2 --clients 1,2,4,8,16
    python benchmarks/serving.py --soak 1000 --clients 16

Requests go over sockets on loopback to a server that this starts, or to ``--url``. Each client sends its next request
when the last one is answered. Blocks with the drafter on and off take turns in one server. Times are those at which
data arrive: to the first text, and between two deliveries. The last line is JSON.

``--soak N``: N requests of which a tenth goes away early and one in twenty is not valid. Every text must be the one
that a quiet server gave, no answer may be a 5xx, and at the end nothing may run or wait. Exits with 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from rich.console import Console
from rich.table import Table

from specdec.bench.prompts import load_prompts, spread
from specdec.models.catalogue import DEFAULT_MODEL

TIMEOUT = 600  # seconds for an answer
BAD = (b"{", b'{"model": 3}', b"\xff\xfe", b"[]", b"null", b'{"model": "none", "messages": [{}]}')


@dataclass
class Answer:
    """status: of HTTP; 0: the client went away. times: when data with text arrived."""

    status: int
    began: float
    times: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int = 0
    length: float = 1.0  # mean acceptance length

    @property
    def first(self) -> float:
        return self.times[0] - self.began

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


class Client:
    """HTTP/1.1 over one connection per request, as lean as it gets: the cores belong to the server."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80

    async def lines(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[bytes]:
        """The status line, and then the lines of the body."""
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=2**24)
        try:
            head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            yield await reader.readline()
            while (await reader.readline()).strip():
                pass
            while line := await reader.readline():
                yield line
        finally:
            writer.close()

    async def chat(self, body: dict[str, Any], leave: int | None = None) -> Answer:
        """Stream an answer; ``leave``: go away after so many deliveries."""
        answer = Answer(0, time.perf_counter())
        lines = self.lines("POST", "/v1/chat/completions", json.dumps(body | {"stream": True}).encode())
        status = 0
        async for line in lines:
            if not status:
                status = int(line.split()[1])
            elif line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                texts = [c["delta"].get("content") for c in chunk.get("choices", ())]
                if any(texts):
                    answer.times.append(time.perf_counter())
                    answer.text += "".join(filter(None, texts))
                if chunk.get("usage"):
                    answer.tokens = chunk["usage"]["completion_tokens"]
                    answer.length = chunk["metrics"]["speculative_decoding"]["mean_acceptance_length"]
                if "error" in chunk:
                    status = 500
            if leave is not None and len(answer.times) >= leave:
                await lines.aclose()
                return answer
        answer.status = status
        return answer

    async def raw(self, body: bytes) -> int:
        """The status of the answer to a body."""
        lines = self.lines("POST", "/v1/chat/completions", body)
        found = [line async for line in lines]
        return int(found[0].split()[1])

    async def figures(self) -> dict[str, float]:
        found: dict[str, float] = {}
        async for line in self.lines("GET", "/metrics"):
            if match := re.match(rb"vllm:(\w+)\{[^}]*\} (\S+)", line):
                found[match[1].decode()] = float(match[2])
        return found


@contextmanager
def server(args: argparse.Namespace) -> Iterator[tuple[str, int | None]]:
    """The address of a server, and its process."""
    if args.url:
        yield args.url, None
        return
    command = [sys.executable, "-m", "specdec", "serve", "--model", args.model, "--drafter", args.drafter]
    command += ["--port", "0", "--quiet", "--max-rows", str(max(args.clients))]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stderr is not None
        for line in child.stderr:
            if found := re.search(r"is served at (http://\S+)", line):
                yield found[1], child.pid
                break
            print(line, end="", file=sys.stderr)
        else:
            sys.exit("the server does not start")
    finally:
        child.terminate()
        child.wait()


def resident(pid: int | None) -> int:
    """Bytes of memory that a process holds."""
    if pid is None:
        return 0
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def bodies(args: argparse.Namespace, name: str, temperature: float) -> list[dict[str, Any]]:
    conversations = spread(load_prompts(args.prompts).conversations, args.limit)
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


async def block(
    client: Client, wanted: Sequence[dict[str, Any]], clients: int, draft: bool
) -> tuple[float, list[Answer]]:
    """Seconds and answers of ``clients`` that share the requests ``wanted``."""
    left, answers = list(reversed(wanted)), list[Answer]()

    async def work() -> None:
        while left:
            body = left.pop() | {"speculative_decoding": draft}
            answers.append(await asyncio.wait_for(client.chat(body), TIMEOUT))

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(clients)))
    return time.perf_counter() - began, answers


def percentiles(values: Sequence[float]) -> list[float]:
    """P50 and P99, in milliseconds."""
    return [round(1e3 * float(x), 1) for x in np.percentile(values, (50, 99))] if values else [0.0, 0.0]


async def load(args: argparse.Namespace, client: Client, name: str, temperature: float) -> list[dict[str, Any]]:
    """A row for each number of clients and each of drafter on and off; blocks take turns."""
    wanted = bodies(args, name, temperature)
    await block(client, wanted[:2], 1, True)  # warm-up
    await block(client, wanted[:2], 1, False)
    rows = list[dict[str, Any]]()
    for clients in args.clients:
        seconds, answers = dict[bool, list[float]](), dict[bool, list[Answer]]()
        requests = [wanted[i % len(wanted)] for i in range(max(args.requests, 2 * clients))]
        for repeat in range(args.repeats):
            for draft in (True, False) if repeat % 2 == 0 else (False, True):
                took, found = await block(client, requests, clients, draft)
                seconds.setdefault(draft, []).append(took)
                answers.setdefault(draft, []).extend(found)
        for draft in (True, False):
            found = answers[draft]
            rate = sum(a.tokens for a in found) / sum(seconds[draft])
            rows.append(
                {
                    "clients": clients,
                    "temperature": temperature,
                    "drafter": args.drafter if draft else "none",
                    "tokens_per_second": round(rate, 1),
                    "mean_acceptance_length": round(float(np.mean([a.length for a in found])), 2),
                    "ttft_ms": percentiles([a.first for a in found if a.times]),
                    "itl_ms": percentiles([gap for a in found for gap in a.gaps]),
                    "failed": sum(a.status != 200 for a in found),
                }
            )
        rows[-2]["x_off"] = round(rows[-2]["tokens_per_second"] / rows[-1]["tokens_per_second"], 3)
    return rows


async def soak(args: argparse.Namespace, client: Client, name: str, pid: int | None) -> dict[str, Any]:
    """``args.soak`` requests, of which some go away and some are not valid."""
    wanted, chance = bodies(args, name, 0.8), random.Random(0)
    alone = [(await client.chat(body)).text for body in wanted]
    await block(client, [wanted[i % len(wanted)] for i in range(4 * max(args.clients))], max(args.clients), True)
    before, began = resident(pid), time.perf_counter()
    outcomes, left = Counter[str](), args.soak

    async def work() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            dice = chance.random()
            if dice < 0.05:
                status = await asyncio.wait_for(client.raw(chance.choice(BAD)), TIMEOUT)
                outcomes["refused" if 400 <= status < 500 else f"bad body: {status}"] += 1
                continue
            which = chance.randrange(len(wanted))
            leave = chance.randrange(1, 8) if dice < 0.15 else None
            answer = await asyncio.wait_for(client.chat(wanted[which], leave), TIMEOUT)
            if answer.status == 0:
                outcomes["gone"] += 1
            elif answer.status != 200:
                outcomes[f"status {answer.status}"] += 1
            else:
                outcomes["right" if answer.text == alone[which] else "wrong text"] += 1

    await asyncio.gather(*(work() for _ in range(max(args.clients))))
    took = time.perf_counter() - began
    for _ in range(100):  # requests that were given up leave with the step under way
        figures = await client.figures()
        if not figures["num_requests_running"] + figures["num_requests_waiting"]:
            break
        await asyncio.sleep(0.1)
    return {
        "requests": args.soak,
        "clients": max(args.clients),
        "seconds": round(took, 1),
        "outcomes": dict(outcomes),
        "running": figures["num_requests_running"],
        "waiting": figures["num_requests_waiting"],
        "kv_usage": figures["kv_cache_usage_perc"],
        "resident_bytes": [before, resident(pid)],
        "passed": set(outcomes) <= {"right", "gone", "refused"}
        and not figures["num_requests_running"] + figures["num_requests_waiting"],
    }


async def run(args: argparse.Namespace, url: str, pid: int | None) -> dict[str, Any]:
    client = Client(url)
    models = b"".join([line async for line in client.lines("GET", "/v1/models")][1:])
    name = json.loads(models)["data"][0]["id"]
    if args.soak:
        return await soak(args, client, name, pid)
    return {"rows": [row for t in args.temperatures for row in await load(args, client, name, t)]}


def table(rows: Sequence[dict[str, Any]]) -> Table:
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
    parser.add_argument("--requests", type=int, default=16, help="of a block, at least twice the clients")
    parser.add_argument("--repeats", type=int, default=3, help="blocks with the drafter on, and off")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--soak", type=int, metavar="N", help="N requests, some of which go away or are not valid")
    args = parser.parse_args()
    with server(args) as (url, pid):
        found = asyncio.run(run(args, url, pid))
    if "rows" in found:
        Console().print(table(found["rows"]))
    print(json.dumps(found))
    if not found.get("passed", True):
        sys.exit(1)


if __name__ == "__main__":
    main()
