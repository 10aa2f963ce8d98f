"""What every request goes through: a line in the log, the name it is for, and the key."""

from __future__ import annotations

import hashlib
import hmac
import re
import socket
import time
from collections.abc import Callable
from ipaddress import ip_address
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specdec.serve.bodies import CLOSED
from specdec.serve.errors import ApiError
from specdec.serve.settings import Settings

OPEN = ("/", "/health")  # without the key
QUIET = ("/health", "/metrics")  # without a line


class Log:
    """Print a line for each request: method, path, status, seconds, and the ``summary`` that its endpoint left."""

    def __init__(self, app: ASGIApp, write: Callable[[str], None]) -> None:
        self.app, self.write = app, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in QUIET:
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), CLOSED

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        summary: list[str] = []
        scope.setdefault("state", {})["summary"] = summary
        try:
            await self.app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            client = scope["client"][0] if scope.get("client") else "-"
            seconds = f"{time.perf_counter() - began:.3f} s"
            self.write(
                ", ".join([f"{client} {scope['method']} {quote(scope['path'][:100])} {status}", seconds, *summary])
            )


class Hosts:
    """Refuse requests to other names than ``settings.hosts``, this machine's, and addresses.

    A page of another site can have its own name lead here (DNS rebinding), and would be read as one of this server.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.hosts = app, {"", "localhost", socket.gethostname().lower(), *settings.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._known(Headers(scope=scope).get("host", "")):
            message = "this server does not have the name in the Host header; allow it with --allowed-hosts"
            return await ApiError(421, message, code="unknown_host").response()(scope, receive, send)
        await self.app(scope, receive, send)

    def _known(self, given: str) -> bool:
        host = re.sub(r":[0-9]*$", "", given.lower()).rstrip(".")
        if "*" in self.hosts or host in self.hosts:
            return True
        try:
            return bool(ip_address(host.removeprefix("[").removesuffix("]")))
        except ValueError:
            return False


class Key:
    """Refuse requests without the key, in a time that does not depend on what they have instead. ``caller`` says whose
    key it is: what one has sent serves no other."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.wanted = None if settings.api_key is None else f"Bearer {settings.api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.wanted is not None and scope["type"] == "http" and scope["path"] not in OPEN:
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self.wanted):
                message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
                return await ApiError(401, message, code="invalid_api_key").response()(scope, receive, send)
            scope.setdefault("state", {})["caller"] = hashlib.sha256(given).hexdigest()
        await self.app(scope, receive, send)
