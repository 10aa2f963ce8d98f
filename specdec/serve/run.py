"""The server process: a socket, uvicorn, and an end in two steps: finish what is running, or stop now."""

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
from specdec.serve.settings import Settings

MAX_HEADERS = 64 * 2**10  # bytes
UNREAD = 256 * 2**10  # bytes that the system keeps for one client


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet. Raises SpecDecError where there is none to have."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD)  # of its connections
        found.bind(address)
        return found
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "ports go up to 65535"
        raise SpecDecError(f"cannot serve on {host} port {port}: {reason}; choose with --host and --port") from None


def address(found: socket.socket) -> str:
    """The address of a server on this socket, for people and programs on this machine."""
    host, port = found.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def config(app: FastAPI, settings: Settings, write: Callable[[str], object] = say) -> uvicorn.Config:
    """How uvicorn serves ``app``. write: takes lines about connections."""
    connections = Connections(settings.max_connections, settings.patience, write)
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


def serve(app: FastAPI, settings: Settings, found: socket.socket, ready: Callable[[], object]) -> None:
    """Serve ``app`` until SIGTERM or Ctrl-C, then finish its requests; a second signal ends them. Call ``ready`` once.

    Returns when the last response is sent.
    """
    handlers = {number: signal.signal(number, _nothing) for number in (signal.SIGTERM, signal.SIGINT)}
    try:  # uvicorn raises the signals that it has caught again, for the handlers that it found
        asyncio.run(_Server(config(app, settings), ready).serve(sockets=[found]))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _nothing(number: int, frame: FrameType | None) -> None:
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
            os._exit(128 + sig)  # whatever the engine is doing
        super().handle_exit(sig, frame)  # first: the next signal may come as soon as the line is read
        say("finishing the requests under way; a second signal ends them")
