"""Server-sent events, and the end of work for clients that disconnect."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
T = TypeVar("T")


def sse(value: dict[str, Any]) -> bytes:
    """Return a JSON object as the bytes of a server-sent event, ``data: JSON`` and an empty line."""
    return b"data: " + to_json(value, inf_nan_mode="null") + b"\n\n"


class EventStream(StreamingResponse):
    """A response of server-sent events.

    events: the bytes of each event. end: called after the last event, or when the client disconnects, or does not read
    for ``timeout`` seconds. headers: further headers of the response.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], end: Callable[[], object], headers: dict[str, str], timeout: float
    ) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"} | headers)
        self.end, self.timeout = end, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(self.timeout):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnect from None

        try:
            with suppress(ClientDisconnect):
                await super().__call__(scope, receive, send_in_time)
        finally:  # also if the client disconnects before the first event
            self.end()


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Return the result of ``work``, or raise its error; if the client disconnects first, cancel it and return None.

    receive: the ASGI function that returns the client's next message; its messages are dropped.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.create_task(work), asyncio.create_task(watch())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()
