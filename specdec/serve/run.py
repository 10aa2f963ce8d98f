"""The server process: its socket, its connections, and shutdown: the first signal drains, the second one stops."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.h11_impl import H11Protocol

from specdec.base import terminal
from specdec.base.errors import SpecDecError
from specdec.base.terminal import say
from specdec.serve.settings import ServerSettings
from specdec.serve.starting import Starting

REUSE = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)  # the latter lets two servers share one on Windows
MAX_HEADERS = 64 * 2**10  # bytes
SEND_BUFFER = 256 * 2**10  # bytes that the system keeps for one client


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises SpecDecError if the address cannot be used."""
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
    """The URL of a server on this socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def uvicorn_config(app: ASGIApp, settings: ServerSettings, write: Callable[[str], object] = say) -> uvicorn.Config:
    """The configuration of uvicorn for ``app``. write: prints warnings about connections."""
    connections = Connections(settings.max_connections, settings.client_timeout, write)
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=connections.protocol,  # type: ignore[arg-type]
        loop="asyncio",
        ws="none",
        h11_max_incomplete_event_size=MAX_HEADERS,
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=connections.backlog,
    )


def serve(make: Callable[[], tuple[ASGIApp, str]], settings: ServerSettings, listener: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish the running requests and return.

    A second signal, or one while the model loads, ends the process. make: loads the model, in a thread, and returns the
    application and a line for the log; until then the server says that it is loading. What it raises is raised.
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


class _Server(uvicorn.Server):
    """error: what ended it before it was ready."""

    error: BaseException | None = None

    def __init__(self, make: Callable[[], tuple[ASGIApp, str]], settings: ServerSettings) -> None:
        self.starting, self.make = Starting(), make
        super().__init__(uvicorn_config(self.starting, settings))

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


BACKLOG = 128  # connections that wait in the listening socket, and that one pass of the event loop accepts
BACKLOGS = 3  # descriptors are kept free for so many full backlogs, since dropped connections close a little later
SPARE = 32  # descriptors for everything else
WARN_EVERY = 60.0  # seconds


class Connections:
    """At most ``most`` open connections, or as many as the limit on file descriptors allows.

    A new connection beyond that replaces the oldest one without a request; if each has a request, the new one is
    closed. A line about it is written at most once a minute.

    timeout: seconds for a client to send the head of a request, or to read what waits for it.
    backlog: connections that may wait in the listening socket.
    idle: connections without a request, the oldest first.
    """

    def __init__(self, most: int, timeout: float, write: Callable[[str], object]) -> None:
        free = _free_descriptors()
        self.backlog = min(BACKLOG, max(1, free // (2 * BACKLOGS)))
        self.most, self.timeout, self.write = min(most, max(1, free - BACKLOGS * self.backlog)), timeout, write
        self.open: dict[Connection, None] = {}
        self.idle: dict[Connection, None] = {}
        self.warned_at = -WARN_EVERY

    def protocol(self, **options: Any) -> Connection:
        """Make uvicorn's protocol object for a connection."""
        return Connection(self, **options)

    def admit(self, new: Connection) -> None:
        self.open[new] = None
        if len(self.open) <= self.most:
            return
        if (now := time.monotonic()) - self.warned_at >= WARN_EVERY:
            self.warned_at = now
            self.write(f"{self.most} connections are open, this server's limit; it closes idle ones")
        next(iter(self.idle), new).drop()


class Connection(H11Protocol):
    """uvicorn's connection, dropped if the client is too slow to send the head of a request or to read an answer."""

    def __init__(self, pool: Connections, **options: Any) -> None:
        super().__init__(**options)
        self.pool = pool
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.pool.admit(self)
        self._restart_timer(idle=True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self in self.pool.idle and self.cycle is not None and not self.cycle.response_complete:
            self._restart_timer(False)

    def on_response_complete(self) -> None:
        super().on_response_complete()  # may begin the next request
        self._restart_timer(self.cycle.response_complete)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._restart_timer(self in self.pool.idle, reading=True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._restart_timer(self in self.pool.idle)

    def drop(self) -> None:
        """Close the connection at once."""
        self._leave()
        self.transport.abort()

    def _leave(self) -> None:
        self.pool.open.pop(self, None)
        self._restart_timer(False)

    def _restart_timer(self, idle: bool, reading: bool = False) -> None:
        """Start the timeout again. idle: for the head of a request. reading: for the client to read."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.pool.idle.pop(self, None)
        if self in self.pool.open and (idle or reading):
            if idle:
                self.pool.idle[self] = None
            self.timer = self.loop.call_later(self.pool.timeout, self._expired, self._unread())

    def _expired(self, before: int) -> None:
        """before: bytes that the client had not read when the timer started."""
        if before - self._unread() >= HIGH_WATER_LIMIT:  # the client is slow, but it reads
            self._restart_timer(self in self.pool.idle, reading=True)
        else:
            self.drop()

    def _unread(self) -> int:
        return self.transport.get_write_buffer_size()


def _free_descriptors() -> int:
    """File descriptors that this process may still open, without ``SPARE``."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except ImportError:  # Windows has no limit
        return 1 << 20
    return 1 << 20 if limit == resource.RLIM_INFINITY else max(1, limit - len(os.listdir("/dev/fd")) - SPARE)
