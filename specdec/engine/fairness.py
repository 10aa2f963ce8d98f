"""Whose request is next: rows and admissions are shared out fairly between clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from specdec.engine.request import Request

CLIENTS = 1024  # most clients whose last admission is remembered
Client = tuple[str | None, str | None]  # ``Request.client``


def admits(client: Client, waiting: Sequence[Request], places: float, limit: float) -> bool:
    """Return whether the queue takes another request of ``client``.

    It does if it is not full, or if the client has less than an equal share of ``limit``, so that no client keeps the
    others out. It never takes more than ``limit`` requests beyond its places.

    waiting: the queue. places: how many requests fill it.
    """
    if len(waiting) < places:
        return True
    held = Counter(row.client for row in waiting)
    return len(waiting) < places + limit and held[client] < limit // len({*held, client})


class Fairness:
    """Chooses the order in which waiting requests of several clients begin. It has no queue and changes no request.

    A client is the pair (scope, sender) of a request, ``Request.client``. Preempted requests begin first. Else the
    highest priority comes first, then the client with the fewest running requests, then the one whose last request
    began longest ago. The order of these beginnings is remembered for at most ``CLIENTS`` (1024) clients.
    """

    def __init__(self) -> None:
        self._turns = dict[Client, int]()  # the number of each client's last admission, the earliest first

    def count_turn(self, client: Client) -> None:
        """Record that a request of ``client`` begins now, so that other clients are next."""
        number = next(reversed(self._turns.values()), 0) + 1
        self._turns.pop(client, None)
        self._turns[client] = number
        if len(self._turns) > CLIENTS:
            del self._turns[next(iter(self._turns))]

    def next(self, waiting: Sequence[Request], rows: Sequence[Request]) -> Request | None:
        """Return the request of ``waiting`` that begins next beside the running ``rows``; None if none may run.

        Preempted requests come first. Of the highest priority, the client with the fewest rows is next, and of those
        with equally many the one that has waited longest for a turn; within a client, the first that came. Requests in
        the background begin only if there are no others. A scope with ``Request.scope_rows`` running requests gets no
        more.
        """
        running, scopes = Counter(row.client for row in rows), Counter(row.scope for row in rows)
        idle = all(row.background for row in (*rows, *waiting))
        best: tuple[tuple[int, ...], Request] | None = None
        for row in waiting:
            if row.background and not idle:
                continue
            if row.preempted:
                return row
            if row.scope_rows is None or scopes[row.scope] < row.scope_rows:
                rank = -row.priority, running[row.client], self._turns.get(row.client, 0)
                if best is None or rank < best[0]:
                    best = rank, row
        return None if best is None else best[1]

    def row_to_defer(self, new: Request, decoding: Sequence[Request], rows: Sequence[Request]) -> Request | None:
        """Return the running request that goes back to the queue so that ``new`` can begin; None: ``new`` waits.

        It is the youngest in ``decoding`` of the client with most running requests, if ``new`` is of a client with at
        least two fewer and its priority is not lower.

        new: the waiting request that is next, while there is no free row for it.
        decoding: running requests whose prompts are complete. rows: all running requests.
        """
        running = Counter(row.client for row in rows)
        most = max(running, key=running.__getitem__)
        own = [row for row in decoding if row.client == most and row.priority <= new.priority]
        if new.preempted or not own or running[most] <= running[new.client] + 1:
            return None
        return max(own, key=lambda row: row.submit_time)
