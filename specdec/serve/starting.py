"""What a server answers while its model loads: ``/health`` says so, and everything else must come again."""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from specdec.serve.errors import ApiError


class Starting:
    """An application that hands requests on to ``app``, once that is there."""

    app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self.app or _loading(scope["path"]))(scope, receive, send)


def _loading(path: str) -> JSONResponse:
    error = ApiError(503, "the model is loading; try again in a few seconds", code="loading")
    return JSONResponse({"status": "loading"} if path == "/health" else error.body(), 503, error.headers)
