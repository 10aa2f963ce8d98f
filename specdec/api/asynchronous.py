"""Requests from an event loop: tasks share one engine, which runs while there are any."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from specdec.api.generation import GenerationOutput
from specdec.api.text import Detokenizer
from specdec.base.errors import SpecDecError
from specdec.engine.engine import Engine
from specdec.engine.request import Handle, Request


class SharedEngine:
    """An engine that starts with its first user and is closed after the last one."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.users, self.lock = 0, threading.Lock()

    @asynccontextmanager
    async def use(self, start: Callable[[], Engine]) -> AsyncIterator[Engine]:
        """The engine, which ``start`` starts if there is none."""
        engine = await asyncio.to_thread(self._enter, start)
        try:
            yield engine
        finally:
            await asyncio.to_thread(self._leave)

    def _enter(self, start: Callable[[], Engine]) -> Engine:
        with self.lock:
            self.engine = self.engine or start()
            self.users += 1
            return self.engine

    def _leave(self) -> None:
        with self.lock:
            self.users -= 1
            if not self.users and self.engine is not None:
                self.engine.close()
                self.engine = None


@asynccontextmanager
async def submitted(engine: Engine, requests: Sequence[Request]) -> AsyncIterator[list[Handle]]:
    """The handles of requests, which are cancelled at the end if they have not ended."""
    handles = list[Handle]()
    try:
        for request in requests:
            handles.append(engine.submit(request))
        yield handles
    finally:
        for handle in handles:
            handle.cancel()


async def pieces(handle: Handle, text: Detokenizer) -> AsyncIterator[str]:
    """The new text of a request as it comes; ``text`` has all of it. Raises the SpecDecError that ends it."""
    async for event in handle:
        for token in event.tokens:
            text.push(token)
        if event.error is not None:
            raise event.error
        if event.finish_reason == "error":
            raise SpecDecError("the model's logits are not finite")
        if piece := text.take() if event.finish_reason is None else text.finish():
            yield piece


async def output(handle: Handle, text: Detokenizer) -> GenerationOutput:
    """The output of a request at its end."""
    async for _ in pieces(handle, text):
        pass
    return GenerationOutput.of(handle.request, text)
