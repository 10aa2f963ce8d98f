"""The server process: its socket, what it answers while the model loads, and its end.

After the first signal the server finishes the running requests, after the second one it ends at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from specdec.base import terminal
from specdec.base.errors import SpecDecError
from specdec.base.terminal import say
from specdec.serve import connections
from specdec.serve.errors import ApiError
from specdec.serve.settings import ServerSettings

REUSE = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)  # with the latter two servers share one on Windows
SEND_BUFFER = 256 * 2**10  # bytes that the system keeps for one client


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to a TCP port and does not listen yet.

    host: a name or an IP address of this machine. port: its number; 0 takes a free one.
    Raises SpecDecError if the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, REUSE, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # its connections inherit it
        listener.bind(address)
        return listener
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "ports go up to 65535"
        raise SpecDecError(f"cannot serve on {host} port {port}: {reason}; choose with --host and --port") from None


def address(listener: socket.socket) -> str:
    """Return the URL of a server at the bound socket ``listener``."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(make: Callable[[], tuple[ASGIApp, str]], settings: ServerSettings, listener: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish the running requests and return. Call it in the main thread.

    A second signal, or one while the model loads, ends the process.
    make: loads the model, in a thread, and returns the application and a line for the log. Until it returns, requests
    get status 503. What it raises ends the server and is raised here.
    settings: those of the server. listener: the socket of ``bind``.
    """
    ignore: Any = lambda number, frame: None  # noqa: E731
    handlers = {number: signal.signal(number, ignore) for number in (signal.SIGTERM, signal.SIGINT)}
    server = _Server(make, settings)
    try:  # uvicorn raises the signals that it has caught once more, for the handlers that it found
        asyncio.run(server.serve(sockets=[listener]))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if server.error is not None:
        raise server.error


class Starting:
    """An application that passes requests on to another one, and answers with status 503 until that one exists.

    app: the other application; None while the model is loading.
    """

    app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (app := self.app) is None:
            error = ApiError(503, "the model is loading; try again in a few seconds", code="loading")
            loading = JSONResponse({"status": "loading"}, 503, error.headers)
            app = loading if scope["path"] == "/health" else error.response(scope)
        await app(scope, receive, send)


class _Server(connections.Server):
    """A server that loads its model after it has begun to listen.

    starting: the application that is served, which answers with status 503 until the model is loaded.
    make: loads the model, in a thread, and returns the application and a line for the log.
    error: exception that ``make`` has raised; None: it has raised none.
    """

    error: BaseException | None = None

    def __init__(self, make: Callable[[], tuple[ASGIApp, str]], settings: ServerSettings) -> None:
        self.starting = Starting()
        self.make = make
        super().__init__(self.starting, settings)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        threading.Thread(target=self._load, daemon=True, name="specdec loading").start()

    def _load(self) -> None:
        try:
            self.starting.app, line = self.make()
            say(line)
        except BaseException as error:
            self.error, self.should_exit = error, True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit or self.starting.app is None:
            terminal.clear()
            say("ended")
            os._exit(128 + sig)  # without waiting for the engine, or for the thread that loads
        super().handle_exit(sig, frame)  # first: the next signal may come as soon as the line is read
        say("finishing the running requests; a second signal ends them")
