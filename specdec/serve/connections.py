"""Connections: how many there are, and how long one may keep the server waiting."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.h11_impl import H11Protocol

BACKLOG = 128  # connections that the system holds, and that are taken in together
ROUNDS = 3  # of taking in connections, before one of the first round, or another in its place, is closed
SPARE = 32  # descriptors for anything else
MINUTE = 60.0


class Connections:
    """At most ``most`` connections, fewer where the system allows fewer descriptors.

    One more takes the place of the oldest that has asked for nothing yet; where there is none, it is closed. ``write``
    takes a line about it, at most once a minute. patience: seconds for a head, and for reading what waits. backlog:
    connections that may be taken in together.
    """

    def __init__(self, most: int, patience: float, write: Callable[[str], object]) -> None:
        free = _free_descriptors()
        self.backlog = min(BACKLOG, max(1, free // (2 * ROUNDS)))
        self.most, self.patience, self.write = min(most, max(1, free - ROUNDS * self.backlog)), patience, write
        self.open: dict[Connection, None] = {}
        self.waiting: dict[Connection, None] = {}  # for a head, the oldest first
        self.said = -MINUTE

    def protocol(self, **how: Any) -> Connection:
        """What uvicorn makes for each connection."""
        return Connection(self, **how)

    def admit(self, new: Connection) -> None:
        self.open[new] = None
        if len(self.open) <= self.most:
            return
        if (now := time.monotonic()) - self.said >= MINUTE:
            self.said = now
            self.write(f"{self.most} connections are open, the most that this server takes; idle ones are closed")
        next(iter(self.waiting), new).drop()


class Connection(H11Protocol):
    """uvicorn's, dropped after ``patience`` seconds without a whole head, or without reading what waits."""

    def __init__(self, all: Connections, **how: Any) -> None:
        super().__init__(**how)
        self.all = all
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.all.admit(self)
        self._watch(waiting=True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self in self.all.waiting and self.cycle is not None and not self.cycle.response_complete:
            self._watch(False)

    def on_response_complete(self) -> None:
        super().on_response_complete()  # may begin the next request
        self._watch(self.cycle.response_complete)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(self in self.all.waiting, timed=True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch(self in self.all.waiting)

    def drop(self) -> None:
        """Close the connection now, whatever is to be written."""
        self._leave()
        self.transport.abort()

    def _leave(self) -> None:
        self.all.open.pop(self, None)
        self._watch(False)

    def _watch(self, waiting: bool, timed: bool = False) -> None:
        """Count its seconds anew. waiting: for a head. timed: for the client to read."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.all.waiting.pop(self, None)
        if self in self.all.open and (waiting or timed):
            if waiting:
                self.all.waiting[self] = None
            self.timer = self.loop.call_later(self.all.patience, self._expired, self._unread())

    def _expired(self, before: int) -> None:
        """before: bytes that waited to be read when it began to count."""
        if before - self._unread() >= HIGH_WATER_LIMIT:  # slow, but reading
            self._watch(self in self.all.waiting, timed=True)
        else:
            self.drop()

    def _unread(self) -> int:
        return self.transport.get_write_buffer_size()


def _free_descriptors() -> int:
    """How many more this process may open, but for those that are kept back."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return 1 << 20
    return max(1, limit - len(os.listdir("/proc/self/fd")) - SPARE)
