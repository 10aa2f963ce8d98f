"""Requests from an event loop: tasks share one engine, which runs while there are any.

Nothing here is an asynchronous generator: at the end of an event loop, asyncio closes each of these by itself, also one
that another is just closing.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

from specdec.api.generation import GenerationOutput
from specdec.api.text import text_of
from specdec.engine.engine import Engine
from specdec.engine.request import Request

T = TypeVar("T")


class SharedEngine:
    """An engine that several requests share: the first one starts it, and the end of the last one closes it.

    engine: the engine; None: no request uses it. users: number of requests that use it.
    lock: held while the two change; requests enter and leave in threads.
    """

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.users, self.lock = 0, threading.Lock()

    def enter(self, start: Callable[[], Engine]) -> Engine:
        """Count one more request that uses the engine, and return the engine.

        start: makes a new engine; called if there is none.
        """
        with self.lock:
            self.engine = self.engine or start()
            self.users += 1
            return self.engine

    def leave(self) -> None:
        """Count one request less; the last one closes the engine and waits for its thread."""
        with self.lock:
            self.users -= 1
            if not self.users and self.engine is not None:
                self.engine.close()
                self.engine = None


class SharedRequest:
    """A request in a shared engine, from ``async with`` to its end; iterating yields its new text as it comes.

    shared: the engine, which the first request starts and the last one closes.
    make: makes the request. start: starts the engine. Both may raise SpecDecError.
    """

    def __init__(self, shared: SharedEngine, start: Callable[[], Engine], make: Callable[[], Request]) -> None:
        self.shared = shared
        self._start = start  # makes the engine of the first user
        self._make = make  # makes the request
        self._left: weakref.finalize[..., SharedRequest] | None = None  # runs if nobody leaves; None: not entered yet

    async def __aenter__(self) -> SharedRequest:
        try:
            await _in_thread(self._enter)
            self._events = aiter(self._handle)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    def _enter(self) -> None:
        """Make and submit the request, and start the engine if this is its first user. Runs in a thread.

        Raises SpecDecError if the request cannot be made, or the engine refuses it.
        """
        self._request = self._make()
        engine = self.shared.enter(self._start)
        self._left = weakref.finalize(self, _abandon, self._request, self.shared)
        self._left.atexit = False
        self._handle = engine.submit(self._request)

    async def __aexit__(self, *error: object) -> None:
        if self._left is not None and self._left.detach():
            self._request.cancelled = True  # a request that has ended stays as it is
            await _in_thread(self.shared.leave)

    def __aiter__(self) -> SharedRequest:
        return self

    async def __anext__(self) -> str:
        """Return the next new text, never "". Raises StopAsyncIteration after the last, or the error of the request."""
        while True:
            event = await anext(self._events)
            if event.error is not None:
                raise event.error
            if text := "".join(piece.text for piece in text_of(self._request).read(event)):
                return text

    def output(self) -> GenerationOutput:
        """Return the output so far. Call it when no more text is read, since it flushes incomplete characters."""
        return GenerationOutput.of(self._request)


def _abandon(request: Request, shared: SharedEngine) -> None:
    """Cancel a request and leave its engine, after its event loop was closed beneath it.

    Any thread may collect garbage, also one that holds a lock or that the engine waits for.
    """
    request.cancelled = True
    threading.Thread(target=shared.leave, daemon=True).start()


async def _in_thread(run: Callable[[], T]) -> T:
    """Run the function ``run`` in a thread, and wait for its end even if the task is cancelled.

    Return its result, or raise its error; raises CancelledError if the task was cancelled meanwhile.
    """
    job, cancelled = asyncio.get_running_loop().run_in_executor(None, run), False
    while not job.done():
        try:
            await asyncio.wait([job])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError from job.exception()
    return job.result()
