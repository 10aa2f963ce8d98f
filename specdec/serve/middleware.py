"""Middleware: the access log, the check of the Host header, and the API key."""

from __future__ import annotations

import re
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specdec.serve.bodies import CLIENT_CLOSED_REQUEST
from specdec.serve.clients import Key, find_client
from specdec.serve.errors import ANTHROPIC, ApiError
from specdec.serve.settings import ServerSettings

PUBLIC = ("/", "/health")  # paths without the key
IGNORED = "x-specdec-ignored"  # header that names parameters that are ignored
MAX_NAMED = 32  # names in it
CONTAINERS = "host.docker.internal", "host.containers.internal"  # what containers call the machine that runs them
UNLOGGED = ("/health", "/metrics")  # paths without a log line


class AccessLog:
    """Writes a line for each request: method, path, status, seconds, id, and what its endpoint put into ``summary``.

    ``summary`` is a list of texts in ``scope["state"]``. The id is in a header of the answer, too, ``request-id`` or
    ``x-request-id``. The header ``x-specdec-ignored`` names ignored parameters.
    app: the ASGI application that answers. write: prints the line.
    """

    def __init__(self, app: ASGIApp, write: Callable[[str], None]) -> None:
        self.app, self.write = app, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNLOGGED:
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), CLIENT_CLOSED_REQUEST
        request_id = f"req_{uuid.uuid4().hex[:24]}"
        header = "request-id" if scope["path"].startswith(ANTHROPIC) else "x-request-id"

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[header] = request_id
                if ignored := scope["state"].get("ignored"):  # parameters of the body
                    names = [quote(name[:64]) for name in sorted(ignored)[:MAX_NAMED]]
                    MutableHeaders(scope=message)[IGNORED] = ", ".join(names)
            await send(message)

        summary: list[str] = []
        scope.setdefault("state", {}).update(summary=summary, request_id=request_id, id_header=header)
        try:
            await self.app(scope, receive, send_and_note)
        except Exception:
            status = 500
            raise
        finally:
            client = scope["client"][0] if scope.get("client") else "-"
            line = f"{client} {scope['method']} {quote(scope['path'][:100])} {status}"
            self.write(", ".join([line, f"{time.perf_counter() - began:.3f} s", request_id, *summary]))


class AllowedHosts:
    """Refuses Host headers other than ``settings.allowed_hosts``, names of this machine and IP addresses.

    The names are localhost, the machine's own, with and without ".local", and ``CONTAINERS``. No public DNS has them.
    Otherwise a web page could make its own name point to this server and use it (DNS rebinding). The status is 421.
    app: the ASGI application that answers. settings: those of the server; the name "*" in them allows all.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        own = socket.gethostname()
        names = "", "localhost", own, f"{own}.local", *CONTAINERS, *settings.allowed_hosts
        self.app, self.hosts = app, set(map(str.lower, names))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_allowed(Headers(scope=scope).get("host", "")):
            message = "the Host header does not name this server; allow the name with --allowed-hosts"
            return await ApiError(421, message, code="unknown_host").response(scope)(scope, receive, send)
        await self.app(scope, receive, send)

    def _is_allowed(self, header: str) -> bool:
        host = re.sub(r":[0-9]*$", "", header.lower()).rstrip(".")
        if "*" in self.hosts or host in self.hosts:
            return True
        try:
            return bool(ip_address(host.removeprefix("[").removesuffix("]")))
        except ValueError:
            return False


class ApiKey:
    """Refuses requests without a known key. Puts the ``Client`` into ``scope["state"]``, and its name into the log.

    app: the ASGI application that answers. keys: the known keys; empty: all requests pass. The page at ``/`` and
    ``/health`` need no key.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[Key]) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PUBLIC:
            headers = Headers(scope=scope)
            scheme, _, bearer = headers.get("authorization", "").partition(" ")
            given = bearer if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            address = scope["client"][0] if scope.get("client") else None
            if (client := find_client(self.keys, given, address)) is None:
                message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
                return await ApiError(401, message, code="invalid_api_key").response(scope)(scope, receive, send)
            scope.setdefault("state", {})["client"] = client
            if client.key is not None:
                scope["state"].setdefault("summary", []).append(client.key.name)
        await self.app(scope, receive, send)
