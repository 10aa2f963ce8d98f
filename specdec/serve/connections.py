"""Connections of clients: accepted while there are descriptors for them, and closed if they bring no request.

Idle clients keep nobody out: where room is short, the connection that has been idle longest is closed.
"""

from __future__ import annotations

import asyncio
import errno
import math
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from specdec.base.terminal import say
from specdec.serve.settings import ServerSettings

MAX_HEADERS = 64 * 2**10  # bytes
DESCRIPTORS = 64  # that the process needs beside connections
NO_ROOM = errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM
RETRY = 1.0  # seconds until a client is accepted again after the system has refused to


def raise_descriptors(wanted: int) -> int | None:
    """Raise the process's limit of file descriptors to ``wanted``, or as far as the system allows; return the limit.

    None: there is no limit. A limit above ``wanted`` stays.
    """
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return None
    if soft < wanted:
        more = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            soft = more
    return soft


class Connection(H11Protocol):
    """An HTTP connection, which is closed when no request arrives for ``timeout`` seconds.

    The connection is idle while it has no request. config, server: those of uvicorn.
    timeout: seconds. changed: called when the connection becomes idle, and when it is closed.
    expiry: timer that closes the connection unless the head of a request arrives; None: a request is being answered.
    unsent: number of bytes of the last answer that had not been sent at the last check.
    """

    def __init__(
        self, config: uvicorn.Config, server: uvicorn.Server, timeout: float, changed: Callable[[], None]
    ) -> None:
        super().__init__(config, server.server_state, server.lifespan.state)
        self.timeout, self.changed = timeout, changed
        self.expiry: asyncio.TimerHandle | None = None
        self.unsent: float = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_idle()
        super().connection_lost(exc)
        self.changed()

    def handle_events(self) -> None:
        answered = self.cycle
        super().handle_events()
        if self.cycle is not answered:
            self._end_idle()

    def on_response_complete(self) -> None:
        self._begin_idle()
        super().on_response_complete()  # may begin the next request
        self.changed()

    def close(self) -> None:
        """Close the connection at once; what was not sent yet is lost."""
        self._end_idle()
        self.transport.abort()

    def _begin_idle(self) -> None:
        self.unsent = float("inf")
        self.expiry = self.loop.call_later(self.timeout, self._expire)

    def _end_idle(self) -> None:
        if self.expiry is not None:
            self.expiry.cancel()
            self.expiry = None

    def _expire(self) -> None:
        """Close the connection: the timer ``expiry`` calls it when it has been idle for ``timeout`` seconds.

        If some of the last answer is unsent, but less than at the last check, the timer starts again instead.
        """
        left = self.transport.get_write_buffer_size()
        if 0 < left < self.unsent:
            self.unsent = left
            self.expiry = self.loop.call_later(self.timeout, self._expire)
        else:
            self.close()


class Server(uvicorn.Server):
    """An HTTP server of ``app`` with the limits in ``settings``.

    settings: the number of connections and the time-out of idle ones are used.
    room: number of connections that file descriptors allow; None: any number, or ``startup`` has not run.
    accepting: the tasks that accept connections, one for each listening socket; [] before ``startup``.
    changed: ``asyncio.Event`` that ``startup`` makes, set when a connection becomes idle or is closed.
    """

    room: int | None = None

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        config = uvicorn.Config(
            app,  # type: ignore[arg-type]
            http="h11",
            loop="asyncio",
            lifespan="off",
            ws="none",
            h11_max_incomplete_event_size=MAX_HEADERS,
            timeout_keep_alive=math.ceil(settings.client_timeout),  # ``Connection`` closes idle ones
            limit_concurrency=settings.max_connections + 1,  # the first number that is refused
            log_config=None,
            access_log=False,
            server_header=False,
        )
        super().__init__(config)
        self.settings, self.accepting = settings, list[asyncio.Task[None]]()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen at ``sockets``, which are bound already, and start the tasks that accept connections there.

        uvicorn calls it. It raises the limit of file descriptors, and sets ``room``.
        """
        most = self.settings.max_connections
        if (found := raise_descriptors(most + DESCRIPTORS)) is not None:
            self.room = found - min(DESCRIPTORS, found // 2)
            if self.room < most:
                say(f"note: at most {self.room} connections, since 'ulimit -n' is {found}; raise it for {most}")
        self.changed = asyncio.Event()
        for listener in sockets or ():
            listener.setblocking(False)
            listener.listen(self.config.backlog)
        await super().startup(sockets=[])
        self.accepting = [asyncio.create_task(self._accept(listener)) for listener in sockets or ()]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self.accepting:
            task.cancel()
        await asyncio.wait(self.accepting)
        await super().shutdown(sockets)

    async def _accept(self, listener: socket.socket) -> None:
        """Accept connections at ``listener``, within the limits, until this task is cancelled.

        ``asyncio``'s own servers have no limit, and log each failure.
        """
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno not in NO_ROOM or not self._close_idle():
                    await self._until_change(RETRY)
                continue
            try:
                await self._make_room()
            except asyncio.CancelledError:  # the server ends
                client.close()
                raise
            with suppress(OSError):  # the client has gone
                await loop.connect_accepted_socket(
                    lambda: Connection(self.config, self, self.settings.client_timeout, self.changed.set), client
                )

    async def _make_room(self) -> None:
        """Wait until there is a file descriptor for one more connection, of a client that was just accepted.

        If there are ``max_connections`` already, the one that has been idle longest is closed; if none is idle, the
        method returns all the same, and uvicorn answers the new client's request with 503. It waits only if there are
        ``room`` connections and none is idle: until one is closed, or becomes idle and can be closed.
        """
        connections, most = self.server_state.connections, self.settings.max_connections
        if len(connections) >= most and self._close_idle():
            await asyncio.sleep(0)  # until it is gone
        while self.room is not None and len(connections) >= self.room:
            if not self._close_idle():
                await self._until_change()
            await asyncio.sleep(0)

    def _close_idle(self) -> bool:
        """Close the longest idle connection, preferably one without an unread answer; return False if none is idle."""
        idle: list[Any] = [c for c in self.server_state.connections if isinstance(c, Connection) and c.expiry]
        if idle:
            min(idle, key=lambda c: (c.transport.get_write_buffer_size() > 0, c.expiry.when())).close()
        return bool(idle)

    async def _until_change(self, seconds: float | None = None) -> None:
        """Wait until a connection becomes idle or is closed, at most ``seconds``; None: no limit."""
        self.changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.changed.wait()
