"""Errors in the protocol of a path: OpenAI's ``{"error": {message, type, param, code}}``, or Anthropic's."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import Scope

from specdec.base.errors import SpecDecError

ANTHROPIC = "/v1/messages"  # paths with Anthropic's errors begin with it
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
RETRY_AFTER = 1  # seconds
LONGEST = 300  # characters of what pydantic says, which may quote the client
_FIELD = re.compile(r"[a-z_]+")
_UNION_BRANCHES = {"str", "int", "float", "bool", "dict", "list"}  # types of a union in pydantic's locations
UNKNOWN, MISMATCH = "extra_forbidden", "_type"  # types of pydantic's errors; the second is a suffix
UNION_FIELDS = {  # what fields of several types may be
    "prompt": "text, token ids, or a list of texts or of lists of token ids",
    "stop": "text or a list of up to four texts",
    "messages.content": "text or a list of text parts",
}


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorObject


class ApiError(Exception):
    """What the client gets instead of an answer.

    param: the parameter that is wrong. code: the kind of error, for programs.
    retry_after: seconds after which a client that asks too much may come again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int = RETRY_AFTER,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 429:
            return {"Retry-After": str(self.retry_after)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic_body(self) -> dict[str, Any]:
        kind = ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def response(self, scope: Scope, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """The answer to the request of ``scope``. headers: in place of the error's own."""
        body = self.body()
        if scope["path"].startswith(ANTHROPIC):
            body = self.anthropic_body() | {"request_id": scope.get("state", {}).get("request_id")}
        return JSONResponse(body, self.status, self.headers if headers is None else headers)


def add_handlers(app: FastAPI) -> None:
    """Answer every error of ``app``."""

    @app.exception_handler(ApiError)
    def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response(request.scope)

    @app.exception_handler(SpecDecError)
    def specdec_error(request: Request, error: SpecDecError) -> JSONResponse:
        return ApiError(400, str(error)).response(request.scope)

    @app.exception_handler(RequestValidationError)
    def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return _from_pydantic(_most_specific(error.errors())).response(request.scope)

    @app.exception_handler(HTTPException)
    def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = {
            404: f"there is no path {request.url.path[:100]}",
            405: f"{request.url.path} does not allow the method {request.method}",
        }
        answer = ApiError(error.status_code, message.get(error.status_code, str(error.detail)))
        return answer.response(request.scope, error.headers)

    @app.exception_handler(Exception)
    def unexpected_error(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, f"unexpected {type(error).__name__}; the server's log has more").response(request.scope)


def _most_specific(errors: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The first error; of a union's errors the first one that is no mismatch of types."""
    first = errors[0]
    place = next((n for n, part in enumerate(first["loc"]) if n and _is_branch(part)), len(first["loc"]))
    same = [each for each in errors if each["loc"][:place] == first["loc"][:place]]
    return next((each for each in same if not each["type"].endswith(MISMATCH)), first)


def _is_branch(part: Any) -> bool:
    """Whether a part of a location names a type of a union, not a field."""
    return isinstance(part, str) and (part in _UNION_BRANCHES or not _FIELD.fullmatch(part))


def _from_pydantic(found: Mapping[str, Any]) -> ApiError:
    """The answer to an error of pydantic."""
    place = itertools.takewhile(lambda part: found["type"] == UNKNOWN or not _is_branch(part), found["loc"][1:])
    parts = list(map(str, place))
    param = ".".join(parts)[:200] or None
    if found["type"] == UNKNOWN:
        return ApiError(400, f"parameter '{param}' is not supported; leave it out", param, "unsupported_parameter")
    what = str(found["msg"]).removeprefix("Value error, ")[:LONGEST]
    field = ".".join(part for part in parts if not part.isdigit())
    if field in UNION_FIELDS and found["type"].endswith(MISMATCH):
        what = f"it must be {UNION_FIELDS[field]}"
    return ApiError(400, f"'{param}': {what}" if param else f"the body: {what}", param, "invalid_value")
