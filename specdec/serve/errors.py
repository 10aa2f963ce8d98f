"""Errors in the protocol of a path: OpenAI's ``{"error": {message, type, param, code}}``, or Anthropic's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
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
UNKNOWN, MISSING, MISMATCH = "extra_forbidden", "missing", "_type"  # types of pydantic's errors; the last is a suffix
Place = tuple[str | int, ...]  # of a value in a body
UNION_FIELDS = {  # what fields of several types may be
    "prompt": "text, token ids, or a list of texts or of lists of token ids",
    "stop": "text or a list of up to four texts",
    "messages.content": "text or a list of text parts",
    "input": "text or a list of items",
}
PLAIN_WORDS = {  # in place of what pydantic says, which names types of this program
    "model_type": "it must be an object",
    "model_attributes_type": "it must be an object",
    "union_tag_not_found": "it must be an object with a 'type'",
    MISSING: "it is missing",
}
# Of "Input should be ..." and "List should have ... after validation, not 5".
SUBJECT, COUNTED = re.compile(r"^[A-Z]\w+ should "), re.compile(r" after validation, not (\w+)$")


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
        found = [each | {"loc": each["loc"][1:]} for each in error.errors()]  # of the query
        return _from_pydantic(found, dict(request.query_params)).response(request.scope)

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


@contextmanager
def sent_as(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors name a parameter as the client does. names: the client's for those of a chat."""
    try:
        yield
    except ApiError as error:
        param, name = error.param or "", names.get((error.param or "").partition(".")[0])
        if name is None:
            raise
        message = error.message.replace(f"'{param}'", f"'{name}'", 1)
        raise ApiError(error.status, message, name, error.code, error.retry_after) from None


def invalid(error: ValidationError, given: Any) -> ApiError:
    """The answer to the errors of pydantic in ``given``."""
    return _from_pydantic(error.errors(include_url=False, include_input=False), given)


def _from_pydantic(errors: Sequence[Mapping[str, Any]], given: Any) -> ApiError:
    found, place = _most_specific(errors, given)
    param = ".".join(map(str, place))[:200] or None
    if found["type"] == UNKNOWN:
        return ApiError(400, f"parameter '{param}' is not supported; leave it out", param, "unsupported_parameter")
    said = COUNTED.sub(r" and has \1", SUBJECT.sub("it must ", str(found["msg"]).removeprefix("Value error, ")))
    what = PLAIN_WORDS.get(found["type"], said[:LONGEST])
    field = ".".join(part for part in place if isinstance(part, str))
    if field in UNION_FIELDS and found["type"].endswith(MISMATCH):
        what = f"it must be {UNION_FIELDS[field]}"
    return ApiError(400, f"'{param}': {what}" if param else f"the body: {what}", param, "invalid_value")


def _most_specific(errors: Sequence[Mapping[str, Any]], given: Any) -> tuple[Mapping[str, Any], Place]:
    """The first error, and its place in ``given``.

    Of a union's errors it is the first one that is no mismatch of types, else the innermost one, if it is of one type.
    """
    steps = [_steps(given, each["loc"], each["type"]) for each in errors]
    union = next((n for n, step in enumerate(steps[0]) if n != step), len(steps[0]))  # where a type follows a place
    same = [n for n, each in enumerate(errors) if each["loc"][:union] == errors[0]["loc"][:union]]
    found = next((n for n in same if not errors[n]["type"].endswith(MISMATCH)), None)
    if found is None:
        most = max(len(steps[n]) for n in same)
        inner = [n for n in same if len(steps[n]) == most]
        found = inner[0] if len({errors[n]["loc"][: union + 1] for n in inner}) == 1 else 0
    return errors[found], tuple(errors[found]["loc"][step] for step in steps[found])


def _steps(given: Any, location: Place, kind: str, begin: int = 0) -> tuple[int, ...]:
    """The numbers of the parts of a location that lead into ``given``; pydantic names types of unions between them.

    Of several ways the one with most parts, and of these one that reaches the end.
    """
    if begin == len(location):
        return ()
    part, ways = location[begin], [_steps(given, location, kind, begin + 1)]
    last = begin == len(location) - 1
    if isinstance(given, dict) and (part in given or (last and kind == MISSING)):
        ways.append((begin, *_steps(given.get(part), location, kind, begin + 1)))
    elif isinstance(given, list | tuple) and isinstance(part, int) and part < len(given):
        ways.append((begin, *_steps(given[part], location, kind, begin + 1)))
    return max(ways, key=lambda way: (len(way), way[-1:]))
