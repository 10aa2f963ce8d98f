"""Bodies: read within bounds, and checked in a thread before an endpoint sees them; large ones one after another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from anyio.to_thread import run_sync
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from specdec.serve.errors import ApiError
from specdec.serve.settings import Settings

SMALL = 64 * 2**10  # bytes
HELD = 16  # large bodies of the largest size that are in memory at once
CLOSED = 499  # status, in the log, of a request whose client has gone
MAX_NESTS = 100_000  # lists and objects in a body; of millions of them, collecting garbage takes seconds
NO_JSON = "the body must be a JSON object, with Content-Type: application/json"
T = TypeVar("T")


class Intake:
    """What is done with bodies: reading them, and work on what is in them (``run``), or comes of them (``work``).

    held: bytes that are in memory.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.held, self.turn = settings, 0, asyncio.Semaphore()

    async def take(self, request: Request, model: type[BaseModel]) -> BaseModel:
        """The body of ``request``, which is a ``model``. Leaves its size in the request's state."""
        body = bytearray()
        try:
            await self._read(request, body)
            if not body:
                raise ApiError(400, "the body is empty; send a JSON object", code="invalid_json")
            if not _is_json(request.headers.get("content-type", "")):
                raise ApiError(400, NO_JSON, code="invalid_json")
            request.state.size = len(body)
            return await self.run(request, _checked, body, model)
        finally:
            self.held -= len(body)

    async def run(self, request: Request, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)``, work on the body of ``request``, in a thread."""
        return await self.work(request.state.size > SMALL, function, *args)

    async def work(self, large: bool, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)`` in a thread.

        What is ``large`` may keep the interpreter to itself for a while. So it is done one after another, and as much
        time as it takes is left to all else before the next.
        """
        if not large:
            return await run_sync(function, *args)
        async with self.turn:
            began = time.perf_counter()
            try:
                return await run_sync(function, *args)
            finally:
                await asyncio.sleep(time.perf_counter() - began)

    async def _read(self, request: Request, body: bytearray) -> None:
        most, patience = self.settings.max_body, self.settings.patience
        if (length := request.headers.get("content-length", "0")).isdecimal() and int(length) > most:
            raise _too_large(most)
        try:
            async with asyncio.timeout(patience):
                async for part in request.stream():
                    body += part
                    self.held += len(part)
                    if len(body) > most:
                        raise _too_large(most)
                    if len(body) > SMALL and self.held > HELD * most:
                        raise ApiError(429, "too many large bodies are on their way; try again later", code="busy")
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {patience:g} seconds") from None


class BodyRoute(APIRoute):
    """A path whose endpoint takes a body, if it takes one, as the application's ``state.intake`` has read it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        model = self.body_field.field_info.annotation

        async def read(request: Request) -> Response:
            found = _Read(request.scope, request.receive)
            try:
                found.model = await request.app.state.intake.take(found, model)
            except ClientDisconnect:
                return Response(status_code=CLOSED)
            found._body = b"{}"  # FastAPI looks whether there is one
            return await handle(found)

        return read


class _Read(Request):
    """A request whose body has been read and checked."""

    model: Any

    async def json(self) -> Any:
        return self.model


def _checked(body: bytearray, model: type[BaseModel]) -> BaseModel:
    """Raises ApiError or RequestValidationError, with what is wrong first."""
    if _nests(body) > MAX_NESTS and _nests(_without_strings(body)) > MAX_NESTS:
        raise ApiError(400, f"the body has more than {MAX_NESTS} lists and objects in it", code="too_large")
    try:
        given = from_json(bytes(body))
    except ValueError as error:
        reason = str(error).replace("unexpected end of hex escape", "half of a surrogate pair is no character")
        raise ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(400, NO_JSON, code="invalid_json")
    try:
        return model.model_validate(given)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        raise RequestValidationError([each | {"loc": ("body", *each["loc"])} for each in found]) from None


def _nests(json: bytes | bytearray) -> int:
    return json.count(b"[") + json.count(b"{")


def _without_strings(json: bytearray) -> bytes:
    return b"".join(bytes(json).replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])


def _is_json(header: str) -> bool:
    kind = header.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes, the most that this server takes", code="too_large")
