"""Server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from specdec.api.pieces import Piece
from specdec.serve.choice import Choice

DONE = b"data: [DONE]\n\n"
T = TypeVar("T")


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


class EventStream(StreamingResponse):
    """Events as they come, until the client goes away. end: called then."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], end: Callable[[], object], headers: dict[str, str]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"} | headers)
        self.end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # also where no event has been asked for
            self.end()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """What ``work`` returns; None, with ``work`` ended, once the client has gone."""

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


async def merged(choices: Sequence[Choice], each: bool) -> AsyncIterator[tuple[Choice, Piece]]:
    """The pieces of all choices, as they come."""
    if len(choices) == 1:
        async for piece in choices[0].pieces(each):
            yield choices[0], piece
        return
    arrived: asyncio.Queue[tuple[Choice, Piece] | Exception | None] = asyncio.Queue(maxsize=len(choices))

    async def forward(choice: Choice) -> None:
        try:
            async for piece in choice.pieces(each):
                await arrived.put((choice, piece))
            await arrived.put(None)
        except Exception as error:
            await arrived.put(error)

    tasks = [asyncio.create_task(forward(choice)) for choice in choices]
    try:
        left = len(tasks)
        while left:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
