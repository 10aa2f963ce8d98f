"""Connections: limits on their number and on the time for which one may keep the server waiting."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.h11_impl import H11Protocol

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
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return 1 << 20
    return max(1, limit - len(os.listdir("/proc/self/fd")) - SPARE)
