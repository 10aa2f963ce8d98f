"""Request bodies: read within limits and parsed in a thread; FastAPI validates them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from anyio.to_thread import run_sync
from fastapi import Request
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from specdec.serve.errors import ApiError
from specdec.serve.schema import ignored

MAX_BODY = 4 * 2**20  # bytes
CLIENT_CLOSED_REQUEST = 499  # status in the log when the client has disconnected


class JsonRequest(Request):
    """A request whose body is JSON of at most ``MAX_BODY`` bytes.

    Reading raises ApiError for a larger body, one that takes longer than the setting ``client_timeout``, an empty one,
    and one that is not JSON, and if the client disconnects.
    """

    async def body(self) -> bytes:
        body, seconds = bytearray(), self.app.state.settings.client_timeout
        try:
            async with asyncio.timeout(seconds):
                async for part in self.stream():
                    body += part
                    if len(body) > MAX_BODY:
                        raise ApiError(413, f"the body is larger than {MAX_BODY} bytes", code="too_large")
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {seconds:g} seconds") from None
        except ClientDisconnect:
            raise ApiError(CLIENT_CLOSED_REQUEST, "the client has disconnected") from None
        if not body:
            raise ApiError(400, "the body is empty; send a JSON object", code="invalid_json")
        self._body = bytes(body)
        return self._body

    async def json(self) -> Any:
        try:
            return await run_sync(lambda: from_json(self._body, allow_inf_nan=False))
        except ValueError as error:
            reason = str(error).replace("unexpected end of hex escape", "half of a surrogate pair is not a character")
            raise ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json") from None


class JsonRoute(APIRoute):
    """A route that reads bodies as a ``JsonRequest``.

    The names of parameters that are ignored are collected in ``request.state.ignored``.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read(request: Request) -> Response:
            request.state.ignored = set[str]()
            ignored.set(request.state.ignored)
            return await handle(JsonRequest(request.scope, request.receive))

        return read
