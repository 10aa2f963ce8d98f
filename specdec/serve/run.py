"""The server process: a listening socket, uvicorn, and shutdown: the first signal drains, the second one stops."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from specdec.base.errors import SpecDecError
from specdec.base.terminal import say
from specdec.serve.connections import Connections
from specdec.serve.settings import ServerSettings

MAX_HEADERS = 64 * 2**10  # bytes
SEND_BUFFER = 256 * 2**10  # bytes that the system keeps for one client


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises SpecDecError if the address cannot be used."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # its connections inherit it
        listener.bind(address)
        return listener
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "ports go up to 65535"
        raise SpecDecError(f"cannot serve on {host} port {port}: {reason}; choose with --host and --port") from None


def address(listener: socket.socket) -> str:
    """The URL of a server on this socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def uvicorn_config(app: FastAPI, settings: ServerSettings, write: Callable[[str], object] = say) -> uvicorn.Config:
    """The configuration of uvicorn for ``app``. write: prints warnings about connections."""
    connections = Connections(settings.max_connections, settings.client_timeout, write)
    return uvicorn.Config(
        app,
        http=connections.protocol,  # type: ignore[arg-type]
        loop="asyncio",
        ws="none",
        h11_max_incomplete_event_size=MAX_HEADERS,
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=connections.backlog,
    )


def serve(app: FastAPI, settings: ServerSettings, listener: socket.socket, ready: Callable[[], object]) -> None:
    """Serve ``app`` until SIGTERM or Ctrl-C, then finish the running requests and return.

    A second signal ends the process. ready: called once when the server accepts requests.
    """
    handlers = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT)}
    try:  # uvicorn raises the signals that it has caught once more, for the handlers that it found
        asyncio.run(_Server(uvicorn_config(app, settings), ready).serve(sockets=[listener]))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], object]) -> None:
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            say("ended")
            os._exit(128 + sig)  # without waiting for the engine
        super().handle_exit(sig, frame)  # first: the next signal may come as soon as the line is read
        say("finishing the running requests; a second signal ends them")
