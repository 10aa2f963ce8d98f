"""Request bodies: read within limits and validated in a thread, before an endpoint gets them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from anyio.to_thread import run_sync
from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from specdec.serve.errors import ApiError, invalid
from specdec.serve.settings import ServerSettings

SMALL = 64 * 2**10  # bytes; a larger body is a large one
MAX_LARGE = 16  # large bodies of the largest size that may be in memory at once
CLIENT_CLOSED_REQUEST = 499  # status in the log when the client has disconnected
MAX_REPORTED = 1000  # names of ignored parameters in the log
MAX_CONTAINERS = 100_000  # lists and objects in a body; with millions of them, garbage collection takes seconds
NOT_JSON = "the body must be a JSON object, with Content-Type: application/json"
T = TypeVar("T")
B = TypeVar("B", bound=BaseModel)
Endpoint = Callable[[B, Request], Awaitable[Response]]


class BodyReader:
    """Reads and validates bodies.

    write: prints a line for each parameter that is ignored, once. reported: their names.
    held: bytes of bodies in memory. definitions: schemas that theirs refer to.
    """

    def __init__(self, settings: ServerSettings, write: Callable[[str], None]) -> None:
        self.write, self.reported, self.definitions = write, set[str](), dict[str, Any]()
        self.settings, self.held, self.large_lock = settings, 0, asyncio.Semaphore()

    async def read(self, request: Request, model: type[B]) -> B:
        """The body of ``request`` as a ``model``. Stores its size in the request's state."""
        body = bytearray()
        try:
            await self._receive(request, body)
            if not body:
                raise ApiError(400, "the body is empty; send a JSON object", code="invalid_json")
            if not _is_json(request.headers.get("content-type", "")):
                raise ApiError(400, NOT_JSON, code="invalid_json")
            request.state.size = len(body)
            ignored = request.state.ignored = set[str]()
            found = await self.run(request, _validated, body, model, ignored)
            for name in sorted(ignored - self.reported)[: MAX_REPORTED - len(self.reported)]:
                self.reported.add(name)
                self.write(f"the parameter {name[:64]!a} is unknown and is ignored")
            return found
        finally:
            self.held -= len(body)

    async def run(self, request: Request, function: Callable[..., T], *args: Any) -> T:
        """Run ``function(*args)``, which works on the body of ``request``, in a thread."""
        return await self.in_thread(request.state.size > SMALL, function, *args)

    async def in_thread(self, large: bool, function: Callable[..., T], *args: Any) -> T:
        """Run ``function(*args)`` in a thread.

        Large work may hold the interpreter lock for long. It runs one at a time, and after each the event loop gets as
        much time as that took.
        """
        if not large:
            return await run_sync(function, *args)
        async with self.large_lock:
            began = time.perf_counter()
            try:
                return await run_sync(function, *args)
            finally:
                await asyncio.sleep(time.perf_counter() - began)

    async def _receive(self, request: Request, body: bytearray) -> None:
        most, timeout = self.settings.max_body, self.settings.client_timeout
        too_large = ApiError(413, f"the body is larger than {most} bytes, this server's limit", code="too_large")
        if (length := request.headers.get("content-length", "0")).isdecimal() and int(length) > most:
            raise too_large
        try:
            async with asyncio.timeout(timeout):
                async for part in request.stream():
                    body += part
                    self.held += len(part)
                    if len(body) > most:
                        raise too_large
                    if len(body) > SMALL and self.held > MAX_LARGE * most:
                        raise ApiError(429, "too many large bodies arrive at once; try again later", code="busy")
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {timeout:g} seconds") from None


def post(app: FastAPI, path: str, model: type[B]) -> Callable[[Endpoint[B]], None]:
    """Register an endpoint that gets its body as a ``model``."""

    def register(endpoint: Endpoint[B]) -> None:
        async def read(request: Request) -> Response:
            try:
                body = await app.state.reader.read(request, model)
            except ClientDisconnect:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            return await endpoint(body, request)

        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        app.state.reader.definitions |= schema.pop("$defs", {})
        content = {"application/json": {"schema": schema}}
        document = {"requestBody": {"required": True, "content": content}}
        app.post(path, name=endpoint.__name__, openapi_extra=document)(read)

    return register


def _validated(body: bytearray, model: type[B], ignored: set[str]) -> B:
    """The body as a ``model``. ignored: gets the names of parameters that are unknown. Raises ApiError."""
    if _containers(body) > MAX_CONTAINERS and _containers(_without_strings(body)) > MAX_CONTAINERS:
        raise ApiError(400, f"the body has more than {MAX_CONTAINERS} lists and objects", code="too_large")
    try:
        given = from_json(bytes(body), allow_inf_nan=False)
    except ValueError as error:
        reason = str(error).replace("unexpected end of hex escape", "half of a surrogate pair is not a character")
        raise ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(400, NOT_JSON, code="invalid_json")
    try:
        return model.model_validate(given, context=ignored)
    except ValidationError as error:
        raise invalid(error, given) from None


def _containers(json: bytes | bytearray) -> int:
    """Lists and objects that begin in ``json``, brackets in strings included."""
    return json.count(b"[") + json.count(b"{")


def _without_strings(json: bytearray) -> bytes:
    return b"".join(bytes(json).replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
