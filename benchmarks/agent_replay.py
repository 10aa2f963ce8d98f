"""Replay a coding agent's session turn by turn: seconds to the first token and per turn, beside llama.cpp.

    python benchmarks/agent_replay.py record TRACE.json --session keys --model qwen2.5-coder-1.5b-instruct
    python benchmarks/agent_replay.py replay TRACE.json --model FILE.gguf --llama-cpp plain,ngram-cache

``record`` lets the model answer a session with files of this repository: a system prompt with tools, files that are
read, edits, output of tests. A trace holds its messages and the recorded answers, with their license; an unfinished
trace is continued. ``replay`` sends each turn with the recorded answers of the turns before it, so that all engines do
the same work, and asks for as many tokens as were recorded. Every drafter replays the trace four times: ``cold``;
``warm``, with the caches that ``cold`` left; ``restart``, in a new process that has only the prefix cache on disk;
``last``, in another new process, which asks for the last turn alone. llama.cpp runs ``cold`` and ``warm``, with its own
cache of the last text. The last line is JSON, with a digest of the texts of each replay; the exit code is 1 unless
specdec's texts are equal in all replays.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from peers import Process
from rich.console import Console
from rich.table import Table
from serving import Client, started

ROOT = Path(__file__).parents[1]
LICENCE = "Apache-2.0, as this repository; the answers are the model's"
ANSWER = 160  # tokens of a recorded answer, at most
TOOLS = {
    "read_file": ("Read a file of the repository, whole or some of its lines.", ["path", "first_line", "last_line"]),
    "edit_file": ("Replace one passage of a file by another. The old passage must occur once.", ["path", "old", "new"]),
    "run_tests": ("Run tests by a path or an expression, and return the end of their output.", ["path", "expression"]),
    "search": ("Search all files for a regular expression, and return the lines that match.", ["pattern", "glob"]),
    "list_files": ("List the files of a folder, and their sizes.", ["folder"]),
}
SYSTEM = """You are a careful programmer who works on a Python repository through tools. Think before you act, make the
smallest change that solves the task, and keep to the style of the code around it. Read a file before you edit it. Quote
code exactly as it stands in the file. After an edit, run the tests that cover it. When the task is done, say so in one
sentence. Answer with code in fences, and without explanations that nobody has asked for.

You have these tools:
"""
PREFIX, ROWS, DISK = "specdec/kvcache/prefix.py", "specdec/engine/request.py", "specdec/kvcache/disk.py"
CLIENTS, METRICS, MIDDLE = (f"specdec/serve/{name}.py" for name in ("clients", "metrics", "middleware"))
COUNTERS = (  # what the user, or a tool, says before each answer; {NAME} is a file
    f"The store of prefixes should count its lookups. First look at the file.\n\n{{{PREFIX}}}\n\nWhich class must "
    "change, and which of its methods? Quote the methods whole.",
    "Add attributes `lookups` and `found` to the class and count in `longest`. Give the new `__init__` and `longest`.",
    "edit_file: done.\n\nNow give the whole method `add`, with a check that raises ValueError for an empty `ids`.",
    f"Here is a second file.\n\n{{{ROWS}}}\n\nQuote the class Status and the mapping of its changes.",
    "Add a status PAUSED, which a running request may get and from which it may run again. Give the whole class and "
    "the whole mapping.",
    "run_tests: 1 failed, 41 passed\n\nE   ValueError: a request that is paused cannot become finished\n\nCorrect the "
    "mapping, and give it whole.",
    "run_tests: 42 passed\n\nWrite a test for the counters of the store, with the imports that it needs.",
    "run_tests: 43 passed\n\nGive the final version of `longest` and of the mapping once more, for the description.",
)
KEYS = (
    "The keys of this server shall have a limit of tokens a day. First look at the file.\n\n"
    f"{{{CLIENTS}}}\n\nWhich classes must change? Quote the fields of Key.",
    "Add a field `tokens_per_day` to Key, after `max_rows`. Give the fields, and the line of the docstring.",
    "edit_file: done.\n\nNow give a method `begin` of Client with a check of the daily limit.",
    "run_tests: 1 failed, 11 passed\n\nE   AttributeError: 'Client' object has no attribute 'today'\n\nGive `__init__` "
    "of Client with what is missing.",
    f"run_tests: 12 passed\n\nThe metrics shall show what is left.\n\n{{{METRICS}}}\n\nQuote `record_key`, and the "
    "two counters that it uses.",
    "Add a gauge `key_tokens_left`, and set it in `record_key` from a new argument `left`. Give the lines that change.",
    "edit_file: the old passage does not occur in the file.\n\nQuote it exactly as it stands there: the three lines "
    "before `self.registry.register`.",
    f"edit_file: done.\n\nNow the middleware, which finds the key.\n\n{{{MIDDLE}}}\n\nQuote the class ApiKey whole.",
    "Let it refuse a client without tokens for today with status 429. Give `__call__` of ApiKey whole.",
    "run_tests: 2 failed, 11 passed\n\nE   AttributeError: 'NoneType' object has no attribute 'tokens_per_day'\n\n"
    "Without keys there is no limit. Correct it, and give the lines that change.",
    f"run_tests: 13 passed\n\nNext task: the disk cache shall count the files that it removes.\n\n{{{DISK}}}\n\n"
    "Quote `figures`, `_make_room` and `_remove`.",
    "Add an attribute `removed`, count in `_remove`, and give it in `figures`. Give both methods whole.",
    "run_tests: 14 passed\n\nWrite a test for the count of removed files, with the imports that it needs.",
    "run_tests: 15 passed\n\nGive the final version of `begin` and of `_remove` once more, for the description.",
)
SESSIONS = {"counters": COUNTERS, "keys": KEYS}


def session(name: str) -> list[dict[str, str]]:
    """Return the chat messages of a recorded session: the system message, then a user message before each answer.

    name: a name in ``SESSIONS``. Files that the messages mention are included in full.
    """
    tools = [
        {"name": name, "description": what, "parameters": {key: {"type": "string"} for key in keys}}
        for name, (what, keys) in TOOLS.items()
    ]
    file = "{}:\n```python\n{}```"
    texts = [
        re.sub(r"\{(specdec/[\w/]+\.py)\}", lambda m: file.format(m[1], (ROOT / m[1]).read_text("utf-8")), text)
        for text in SESSIONS[name]
    ]
    system = {"role": "system", "content": SYSTEM + json.dumps(tools, indent=1)}
    return [system, *({"role": "user", "content": text} for text in texts)]


@contextmanager
def server(model: str, drafter: str, folder: str) -> Iterator[Client]:
    """Run ``specdec serve`` during a ``with`` block; yield an HTTP client of it.

    model, drafter: their names. folder: where the server stores its prefix cache.
    """
    with started(model, drafter, "--name", "model", "--prefix-cache", folder) as address:
        yield Client(address)


@dataclass
class Pass:
    """The figures of one replay of a recorded session. A turn is a user message with its answer.

    name: which drafter or engine, and which replay: "cold", "warm", "restart" or "last".
    first: seconds to the first token of each turn.
    seconds: seconds to the last token of each turn.
    cached: number of prompt tokens of each turn that were in a cache.
    texts: the answer of each turn.
    """

    name: str
    first: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        return sum(self.seconds)

    def told(self) -> Pass:
        """Print the figures of this replay to stderr, and return this object."""
        first = " ".join(f"{seconds:.2f}" for seconds in self.first)
        print(f"{self.name}: {self.total:.1f} s; first tokens after {first} s", file=sys.stderr, flush=True)
        return self


def prompts(trace: dict[str, Any], turns: int, first: int = 0) -> Iterator[tuple[list[dict[str, str]], int]]:
    """Yield (messages, number of tokens to generate) for the turns ``first`` to ``turns`` - 1 of a recorded session.

    trace: the recording, with "messages" and "answers". Messages contain the recorded answers of the turns before.
    """
    messages = [trace["messages"][0]]
    for n, (message, answer) in enumerate(zip(trace["messages"][1 : turns + 1], trace["answers"], strict=False)):
        messages.append(message)
        if n >= first:
            yield list(messages), answer["tokens"]
        messages.append({"role": "assistant", "content": answer["text"]})


async def ours(client: Client, name: str, trace: dict[str, Any], turns: int) -> Pass:
    """Replay a recorded session against a server of specdec, and return the figures.

    client: of the server. name: name of this replay; if it ends with "last", only the last turn is asked. trace: the
    recording. turns: number of turns to replay.
    """
    done = Pass(name)
    for messages, tokens in prompts(trace, turns, turns - 1 if name.endswith("last") else 0):
        body = {"model": "model", "messages": messages, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        began = time.perf_counter()
        answer = await client.chat(body | {"stream_options": {"include_usage": True}})
        done.seconds.append(time.perf_counter() - began)
        if answer.status != 200:
            sys.exit(f"the server answers with {answer.status}")
        done.first.append(answer.first)
        done.cached.append(answer.usage["prompt_tokens_details"]["cached_tokens"])
        done.texts.append(answer.text)
    return done.told()


def theirs(path: str, mode: str, asked: Sequence[tuple[list[int], int]], threads: int) -> list[Pass]:
    """Replay a session twice with llama.cpp, which keeps the KV cache of its last text; return both figures.

    path: the GGUF file. mode: how llama.cpp drafts: "" (it does not), "ngram-cache" or "ngram-simple". asked: (prompt
    ids, number of tokens to generate) of each turn. threads: number of threads. The first replay begins with an empty
    cache.
    """
    peer, name = Process("engine_llama_cpp:LlamaCppKeeping"), f"llama.cpp {mode}".strip()
    context = max(len(ids) + tokens for ids, tokens in asked) + 64
    peer.ask("load", path=path, threads=threads, context=context, mode=mode, source="", depth=None)
    passes = [Pass(f"{name}, cold"), Pass(f"{name}, warm")]
    for done in passes:
        for ids, tokens in asked:
            found = peer.ask("generate", ids=ids, count=tokens, eos=[])
            done.first.append(found["arrivals"][0])
            done.seconds.append(found["seconds"])
        done.told()
    peer.close()
    return passes


def digest(texts: Sequence[str]) -> str:
    """Return 16 hex digits that identify a list of texts: the start of their SHA-256."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def record(args: argparse.Namespace) -> int:
    """Let the model answer the messages of a session and write both to a trace file; return the exit code 0.

    args: the options of the command line. An unfinished file is continued.
    """
    told = session(args.session)
    trace: dict[str, Any] = {"licence": LICENCE, "model": Path(args.model).name, "messages": told, "answers": []}
    if args.trace.exists():
        trace = json.loads(args.trace.read_text("utf-8"))

    async def answers(client: Client) -> None:
        messages = trace["messages"][:1]
        for n, message in enumerate(trace["messages"][1:]):
            messages.append(message)
            if n < len(trace["answers"]):
                messages.append({"role": "assistant", "content": trace["answers"][n]["text"]})
                continue
            body = {"model": "model", "messages": messages, "max_tokens": args.max_tokens, "temperature": 0}
            answer = await client.post("/v1/chat/completions", body)
            if "error" in answer:
                sys.exit(f"the server refuses: {answer['error']['message']}")
            text, tokens = answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]
            trace["answers"].append({"text": text, "tokens": tokens})
            messages.append({"role": "assistant", "content": text})
            args.trace.write_text(json.dumps(trace, indent=1) + "\n", "utf-8")

    with tempfile.TemporaryDirectory() as folder, server(args.model, args.drafters[-1], args.cache or folder) as client:
        asyncio.run(answers(client))
    return 0


def replay(args: argparse.Namespace) -> int:
    """Replay a trace file with all drafters and llama.cpp, and print the figures.

    args: the options of the command line. Returns the exit code: 1 if specdec's texts differ between replays, else 0.
    """
    trace = json.loads(args.trace.read_text("utf-8"))
    turns = min(args.turns or len(trace["answers"]), len(trace["answers"]))
    passes, asked = list[Pass](), list[tuple[list[int], int]]()

    async def ids(client: Client) -> None:
        for messages, tokens in prompts(trace, turns):
            asked.append(((await client.post("/tokenize", {"messages": messages}))["tokens"], tokens))

    for drafter in args.drafters:
        with tempfile.TemporaryDirectory() as folder:
            for names in (["cold", "warm"], ["restart"], ["last"]):
                if not (names := [name for name in names if name in args.passes]):
                    continue
                with server(args.model, drafter, folder) as client:
                    if not asked:
                        asyncio.run(ids(client))
                    passes += [asyncio.run(ours(client, f"{drafter}, {name}", trace, turns)) for name in names]
    same = all(each.texts == passes[0].texts[-len(each.texts) :] for each in passes)
    for mode in args.llama_cpp:
        passes += theirs(args.model, "" if mode == "plain" else mode, asked, len(os.sched_getaffinity(0)))
    table = Table("pass", "first token of its first turn", "of others (median)", "seconds", "cached tokens")
    for each in passes:
        others = f"{np.median(each.first[1:]):.2f} s" if each.first[1:] else ""
        table.add_row(each.name, f"{each.first[0]:.2f} s", others, f"{each.total:.1f}", str(sum(each.cached) or ""))
    console = Console()
    console.print(f"{turns} turns, prompts of {len(asked[0][0])} to {len(asked[-1][0])} tokens, answers of", end=" ")
    console.print(f"{sum(tokens for _, tokens in asked)} tokens; texts equal: {same}")
    console.print(table)
    print(json.dumps([asdict(each) | {"texts": digest(each.texts)} for each in passes]))
    return int(not same)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["record", "replay"])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b-instruct", help="for llama.cpp, a GGUF file")
    parser.add_argument("--drafters", type=lambda text: text.split(","), default=["none", "ngram+m2r2"])
    parser.add_argument("--llama-cpp", type=lambda text: text.split(","), default=[], metavar="plain,ngram-cache,..")
    parser.add_argument("--passes", type=lambda text: text.split(","), default=["cold", "warm", "restart", "last"])
    parser.add_argument("--session", choices=SESSIONS, default="counters", help="what is recorded")
    parser.add_argument("--cache", help="folder of the prefix cache while recording; default: one that is removed")
    parser.add_argument("--turns", type=int, help="only the first of the trace")
    parser.add_argument("--max-tokens", type=int, default=ANSWER, help="of a recorded answer")
    args = parser.parse_args()
    return (record if args.command == "record" else replay)(args)


if __name__ == "__main__":
    sys.exit(main())
