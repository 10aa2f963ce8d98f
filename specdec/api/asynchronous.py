"""Requests from an event loop: tasks share one engine, which runs while there are any."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from specdec.api.text import AnswerText
from specdec.engine.engine import Engine
from specdec.engine.request import Handle


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


async def pieces(handle: Handle, answer: AnswerText) -> AsyncIterator[str]:
    """The new text of a request as it comes; ``answer`` has all of it. Raises the SpecDecError that ends it."""
    async for event in handle:
        if event.error is not None:
            raise event.error
        for piece in answer.read(event):
            if piece.text:
                yield piece.text
