"""Request bodies: read within limits and validated in a thread, before an endpoint gets them."""

from __future__ import annotations

import asyncio
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

CLIENT_CLOSED_REQUEST = 499  # status in the log when the client has disconnected
MAX_REPORTED = 1000  # names of ignored parameters in the log
NOT_JSON = "the body must be a JSON object, with Content-Type: application/json"
B = TypeVar("B", bound=BaseModel)
Endpoint = Callable[[B, Request], Awaitable[Response]]


class BodyReader:
    """Reads and validates bodies.

    write: prints a line for each parameter that is ignored, once. reported: their names.
    definitions: schemas that theirs refer to.
    """

    def __init__(self, settings: ServerSettings, write: Callable[[str], None]) -> None:
        self.write, self.reported, self.definitions = write, set[str](), dict[str, Any]()
        self.settings = settings

    async def read(self, request: Request, model: type[B]) -> B:
        """The body of ``request`` as a ``model``."""
        body = await self._receive(request)
        if not body:
            raise ApiError(400, "the body is empty; send a JSON object", code="invalid_json")
        if not _is_json(request.headers.get("content-type", "")):
            raise ApiError(400, NOT_JSON, code="invalid_json")
        ignored = request.state.ignored = set[str]()
        found = await run_sync(_validated, body, model, ignored)
        for name in sorted(ignored - self.reported)[: MAX_REPORTED - len(self.reported)]:
            self.reported.add(name)
            self.write(f"the parameter {name[:64]!a} is unknown and is ignored")
        return found

    async def _receive(self, request: Request) -> bytes:
        body = bytearray()
        most, timeout = self.settings.max_body, self.settings.client_timeout
        too_large = ApiError(413, f"the body is larger than {most} bytes, this server's limit", code="too_large")
        if (length := request.headers.get("content-length", "0")).isdecimal() and int(length) > most:
            raise too_large
        try:
            async with asyncio.timeout(timeout):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {timeout:g} seconds") from None
        return bytes(body)


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


def _validated(body: bytes, model: type[B], ignored: set[str]) -> B:
    """The body as a ``model``. ignored: gets the names of parameters that are unknown. Raises ApiError."""
    try:
        given = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        reason = str(error).replace("unexpected end of hex escape", "half of a surrogate pair is not a character")
        raise ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(400, NOT_JSON, code="invalid_json")
    try:
        return model.model_validate(given, context=ignored)
    except ValidationError as error:
        raise invalid(error, given) from None


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
