"""Servers for tests: in a thread, around a tiny model or events that a test gives; or in a process of their own."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import torch
from scripted import Scripted
from tiny import save_tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specdec import SamplingParams, SpecDecoder
from specdec.engine.engine import EngineStats
from specdec.engine.metrics import RequestMetrics
from specdec.engine.request import Event, Request
from specdec.serve.app import make_app
from specdec.serve.connections import Server as ConnectionServer
from specdec.serve.run import address, bind
from specdec.serve.settings import ServerSettings
from specdec.speculation.sampling import RowSampler

NAME = "tiny"
# Making a client takes as long as a request. A connection is used once, since servers close those that are idle.
CLIENT = httpx.Client(timeout=600, limits=httpx.Limits(max_keepalive_connections=0))
USER = [{"role": "user", "content": "Name three colours."}]


def tiny_decoder(folder: Path, drafter: Any = "prompt-lookup", context: int = 4096) -> SpecDecoder:
    return SpecDecoder.from_pretrained(save_tiny(folder, context), drafter, device="cpu", dtype=torch.float32)


class Oracle(Scripted):
    """A drafter that drafts the next four tokens of the texts that it knows.

    texts: token ids of prompts with their answers. slips: whether it drafts a wrong token at every sixth position, so
    that drafts are accepted whole, in part and not at all.
    """

    def __init__(self, slips: bool = False) -> None:
        super().__init__(self.go_on)
        self.texts, self.slips = list[list[int]](), slips

    def go_on(self, ids: Sequence[int], limit: int) -> list[tuple[int, int]]:
        text = next((text for text in self.texts if text[: len(ids)] == list(ids)), [])
        nodes = list[tuple[int, int]]()
        for depth, token in enumerate(text[len(ids) :][: min(limit, 4)]):
            other = token - 2 if token >= 2 else token + 2
            nodes.append((other if self.slips and (len(ids) + depth) % 6 == 0 else token, depth))
        return nodes


class Gate:
    """A context manager that holds the steps of an engine's thread until ``let`` allows them, or ``open`` all.

    rows: largest number of rows that shared a step.
    """

    def __init__(self, engine: Any) -> None:
        self.engine, self.step, self.rows = engine, engine._step, 0
        self.permits, self.done, self.free = threading.Semaphore(0), threading.Semaphore(0), False

    def __enter__(self) -> Gate:
        self.engine._step = self._step
        return self

    def __exit__(self, *error: object) -> None:
        self.open()
        del self.engine._step

    def _step(self) -> Any:
        if not self.free:
            self.permits.acquire()
        self.rows = max(self.rows, len(self.engine.batch.rows))
        try:
            return self.step()
        finally:
            self.done.release()

    def let(self, steps: int = 1) -> None:
        """Let the engine run ``steps`` steps and wait until they are done."""
        for _ in range(steps):
            self.permits.release()
            assert self.done.acquire(timeout=300)

    def open(self) -> None:
        self.free = True
        self.permits.release()


class Server:
    """A server on a loopback port, in a thread. url: its address. lines: its log."""

    def __init__(self, decoder: SpecDecoder, engine: Any, settings: ServerSettings) -> None:
        self.decoder, self.engine, self.settings, self.lines = decoder, engine, settings, list[str]()
        self.app = make_app(decoder, engine, settings, self.lines.append)
        self.socket = bind("127.0.0.1", 0)
        self.url = address(self.socket)
        self.server = ConnectionServer(self.app, settings)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return CLIENT.post(self.url + path, json=body, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return CLIENT.get(self.url + path, **more)

    def chat(self, **more: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"model": NAME, "messages": USER, "max_tokens": 24} | more)

    def complete(self, **more: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": NAME, "prompt": "Name", "max_tokens": 24} | more)

    def figure(self, name: str) -> float:
        """Return the value of the metric ``vllm:name``. Raises KeyError if there is none."""
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(f"vllm:{name}{{"):
                return float(line.rpartition(" ")[2])
        raise KeyError(name)


def content(found: list[dict[str, Any]], index: int = 0) -> str:
    """Return the text of the streamed choice ``index``. found: the objects of the stream."""
    choices = [choice for chunk in found for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    """Check that the server refused a request with ``status``, and return the error object."""
    assert response.status_code == status, response.text
    [(key, error)] = response.json().items()
    assert key == "error" and set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"]
    return error


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the JSON objects of a stream of server-sent events, which must end with [DONE]."""
    *parts, done, rest = response.text.split("\n\n")
    assert done == "data: [DONE]" and rest == ""
    return [json.loads(part.removeprefix("data: ")) for part in parts]


@contextmanager
def serving(decoder: SpecDecoder, engine: Any = None, **settings: Any) -> Iterator[Server]:
    """Run a server during the ``with`` block. engine: the engine to use; None: one of the decoder.

    settings: of the server.
    """
    own = decoder.engine(max_rows=16, num_speculative_tokens=4) if engine is None else engine  # whatever steps take
    server = Server(decoder, own, ServerSettings(name=NAME, **settings))
    server.thread.start()
    try:
        while not server.server.started:
            assert server.thread.is_alive()
        yield server
    finally:
        server.server.should_exit = True
        server.thread.join(60)
        if engine is None:
            own.close(drain=False)


class Replay:
    """An engine without a model: a request gets the events that ``script(request)`` returns.

    A script that waits holds it.
    handles: the handles of all requests so far. refuse: raised by ``submit``.
    """

    drafting, outage = "on", None

    def __init__(self, script: Callable[[Request], Sequence[Event]], refuse: Exception | None = None) -> None:
        self.script, self.refuse, self.handles, self.closed = script, refuse, list[Any](), False

    def submit(self, request: Request) -> Any:
        if self.refuse is not None:
            raise self.refuse
        request.submit_time = time.perf_counter()
        self.handles.append(_Replayed(request, self.script(request)))
        return self.handles[-1]

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0, None, 0, 0, 0, 0, 0, 0)


class _Replayed:
    def __init__(self, request: Request, script: Sequence[Event]) -> None:
        self.request, self.script, self.cancelled = request, script, False
        self.metrics = RequestMetrics(len(request.prompt))

    def cancel(self) -> None:
        self.cancelled = True

    def __iter__(self) -> Iterator[Event]:
        for event in self.script:
            for token in event.tokens:
                if self.request.text is not None:
                    self.request.text.push(token)
            yield event

    async def __aiter__(self) -> Any:
        for event in self:
            await asyncio.sleep(0)
            yield event


def stand_in(tokenizer: Any, context: int = 4096, vocab: int = 512) -> Any:
    """Return a decoder without a model for servers around ``Replay``. context, vocab: what the model claims."""
    target = SimpleNamespace(context=context, vocab_size=vocab)
    drafter = SimpleNamespace(traits=SimpleNamespace(label="none"))
    made = SimpleNamespace(tokenizer=tokenizer, target=target, drafter=drafter, adapter=None)
    made.verifier, made.eos_ids = SimpleNamespace(threshold=None), lambda: frozenset({0})
    made._request = lambda *given: SpecDecoder._request(made, *given)
    made.request = lambda prompt, **given: SpecDecoder.request(
        made, prompt, sampler=RowSampler(SamplingParams()), **given
    )
    return made


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each byte and a chat template that joins the messages."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


def until(holds: Callable[[], bool]) -> None:
    """Wait until ``holds`` returns True; fail after ten minutes."""
    gate = threading.Event()
    for _ in range(60_000):
        if holds():
            return
        gate.wait(0.01)
    raise AssertionError("it does not come true")
