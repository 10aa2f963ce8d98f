"""Errors in the shape of OpenAI's API: a status and ``{"error": {message, type, param, code}}``."""

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

from specdec.base.errors import SpecDecError

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
RETRY_AFTER = 1  # seconds
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
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 429:
            return {"Retry-After": str(RETRY_AFTER)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def add_handlers(app: FastAPI) -> None:
    """Answer every error of ``app`` in the shape of OpenAI's API."""

    @app.exception_handler(ApiError)
    def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(SpecDecError)
    def specdec_error(request: Request, error: SpecDecError) -> JSONResponse:
        return ApiError(400, str(error)).response()

    @app.exception_handler(RequestValidationError)
    def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return _from_pydantic(_most_specific(error.errors())).response()

    @app.exception_handler(HTTPException)
    def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = {
            404: f"there is no path {request.url.path[:100]}",
            405: f"{request.url.path} does not allow the method {request.method}",
        }
        answer = ApiError(error.status_code, message.get(error.status_code, str(error.detail)))
        return JSONResponse(answer.body(), answer.status, error.headers)

    @app.exception_handler(Exception)
    def unexpected_error(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, f"unexpected {type(error).__name__}; the server's log has more").response()


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
    what = str(found["msg"]).removeprefix("Value error, ")
    field = ".".join(part for part in parts if not part.isdigit())
    if field in UNION_FIELDS and found["type"].endswith(MISMATCH):
        what = f"it must be {UNION_FIELDS[field]}"
    return ApiError(400, f"'{param}': {what}" if param else f"the body: {what}", param, "invalid_value")
