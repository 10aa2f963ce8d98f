"""Errors as HTTP responses, in the protocol of the request's path: OpenAI's, or Anthropic's.

OpenAI's are ``{"error": {message, type, param, code}}``, Anthropic's ``{"type": "error", "error": {type, message}}``.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import Scope

from specdec.base.errors import SpecDecError
from specdec.base.settings import UNKNOWN, explain

TOO_LONG = "context_length_exceeded"
ANTHROPIC = "/v1/messages"  # paths with Anthropic's errors begin with it
NAMES = {  # by beginning of the path: what other protocols call parameters of chats; "" if they have none
    ANTHROPIC: {
        "n": "",
        "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
        "reasoning_effort": "output_config.effort",
        "response_format": "output_config.format",
        "stop": "stop_sequences",
    },
    "/v1/completions": dict.fromkeys(
        ("chat_template_kwargs", "messages", "reasoning_effort", "tool_choice", "tools"), ""
    ),
    "/v1/responses": {
        "max_tokens": "max_output_tokens",
        "messages": "input",
        "n": "",
        "reasoning_effort": "reasoning.effort",
        "response_format": "text.format",
        "stop": "",
    },
}
INSTEAD = {  # the parameter of chats that does what another one asks for, which is refused
    name: same
    for same, names in {
        "max_tokens": "max_completion_tokens max_new_tokens max_output_tokens n_predict num_predict",
        "messages": "instructions system",
        "response_format": "format json_schema output_config text",
        "reasoning_effort": "reasoning thinking",
        "structured_outputs": "grammar guided_choice guided_grammar guided_json guided_regex",
        "chat_template_kwargs": "enable_thinking",
        "n": "num_return_sequences",
        "repetition_penalty": "repeat_penalty",
        "stop": "stop_sequences",
        "temperature": "do_sample",
        "tool_choice": "function_call",
        "tools": "functions",
    }.items()
    for name in names.split()
}
ANTHROPIC_TYPES = {  # Anthropic's ``type`` by status
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}  # seconds
NOT_JSON = "the body must be a JSON object, with Content-Type: application/json"
LONGEST = 300  # characters of what pydantic says, which may quote the client


class ErrorObject(BaseModel):
    """The fields of ``ApiError`` in OpenAI's protocol, for the schema of the HTTP interface."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of a response with an error in OpenAI's protocol, for the schema of the HTTP interface."""

    error: ErrorObject


class ApiError(HTTPException):
    """Raised where the client gets an error instead of an answer; ``add_handlers`` makes the response of it.

    status: the HTTP status.
    message: one sentence that says what is wrong and what to do.
    param: the name of the wrong parameter in chats of OpenAI; None: the error is not about one.
    code: the kind of error, for programs, such as "invalid_value"; None: it has no name.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message, HEADERS.get(status))
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """Return the body of the response in OpenAI's protocol."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic_body(self) -> dict[str, Any]:
        """Return the body of the response in Anthropic's protocol."""
        kind = ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def response(self, scope: Scope) -> JSONResponse:
        """Return the response to the ASGI request ``scope``, in the protocol of its path."""
        body = self.body()
        if scope["path"].startswith(ANTHROPIC):
            body = self.anthropic_body() | {"request_id": scope.get("state", {}).get("request_id")}
        return JSONResponse(body, self.status, self.headers)

    def as_sent(self, path: str) -> ApiError:
        """Return this error with the parameter called as in the client's protocol, in ``param`` and in the message.

        Protocols differ: what is "max_tokens" for one is "max_output_tokens" for another. If the name is the same, this
        object is returned.

        path: path of the request, such as "/v1/responses", which has one protocol.
        """
        param = self.param or ""
        if not (name := _names(path).get(param.partition(".")[0])):
            return self
        return ApiError(self.status, self.message.replace(f"'{param}'", f"'{name}'", 1), name, self.code)


class TooLongError(ApiError):
    """Raised where a prompt exceeds the model's context.

    Agents recognise it by the beginning of the message, in their protocol, and then shorten the chat.
    param: the name of the parameter with the prompt. context: maximum number of tokens of a prompt and its answer.
    rest: end of the message of OpenAI's protocol. brief: that of Anthropic's.
    """

    def __init__(self, param: str, context: int, rest: str, brief: str) -> None:
        super().__init__(400, f"This model's maximum context length is {context} tokens; {rest}", param, TOO_LONG)
        self.brief = brief

    def as_sent(self, path: str) -> ApiError:
        if path.startswith(ANTHROPIC):
            return ApiError(400, f"prompt is too long: {self.brief}", self.param, self.code)
        return super().as_sent(path)


def invalid(param: str, message: str) -> ApiError:
    """Return (not raise) the error for a parameter of a request that has an unusable value, with status 400.

    param: name of the parameter in OpenAI's chats. message: one sentence that says what is wrong and what to do.
    """
    return ApiError(400, message, param, "invalid_value")


def _names(path: str) -> dict[str, str]:
    """Return {OpenAI's parameter name: name in the protocol of ``path``}, without names that are the same.

    The name is "" if the protocol has no such parameter. path: path of the request.
    """
    return next((names for start, names in NAMES.items() if path.startswith(start)), {})


def add_handlers(app: FastAPI) -> None:
    """Make ``app`` answer every exception that an endpoint raises with the response of an ``ApiError``."""

    @app.exception_handler(ApiError)
    def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.as_sent(request.scope["path"]).response(request.scope)

    @app.exception_handler(SpecDecError)
    def specdec_error(request: Request, error: SpecDecError) -> JSONResponse:
        return ApiError(400, str(error)).response(request.scope)

    @app.exception_handler(RequestValidationError)
    def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(error, request.scope["path"]).response(request.scope)

    @app.exception_handler(HTTPException)
    def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = {
            404: f"there is no path {request.url.path[:100]}",
            405: f"{request.url.path} does not allow the method {request.method}",
        }
        answer = ApiError(error.status_code, message.get(error.status_code, str(error.detail)))
        answer.headers = error.headers
        return answer.response(request.scope)

    @app.exception_handler(Exception)
    def unexpected_error(request: Request, error: Exception) -> JSONResponse:
        found = ApiError(500, f"unexpected {type(error).__name__}; the server's log has more").response(request.scope)
        state = request.scope.get("state", {})
        if "id_header" in state:  # this response does not go through AccessLog
            found.headers[state["id_header"]] = state["request_id"]
        return found


def _invalid(error: RequestValidationError, path: str) -> ApiError:
    """Return (not raise) the error for a body that is no JSON object, or in which pydantic found a wrong parameter.

    path: path of the request, such as "/v1/responses"; the parameter is called as in its protocol.
    """
    if not isinstance(error.body, dict):
        return ApiError(400, NOT_JSON, code="invalid_json")
    found, place, text = explain([each | {"loc": each["loc"][1:]} for each in error.errors()], error.body)
    param = ".".join(map(str, place))[:200] or None
    if found["type"] == UNKNOWN:
        same = INSTEAD.get(param or "", param)
        name = _names(path).get(same or "", same)
        advice = f"use '{name}'" if name and name != param else "leave it out"
        return ApiError(400, f"parameter '{param}' is not supported; {advice}", param, "unsupported_parameter")
    what = f"it {text}"[:LONGEST] if text.startswith(("must ", "is ")) else text[:LONGEST]
    return ApiError(400, f"'{param}': {what}" if param else f"the body: {what}", param, "invalid_value")
