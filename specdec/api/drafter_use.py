"""Exclusive use of drafters in a process: one engine at a time has a drafter."""

from __future__ import annotations

import os
import threading

from specdec.base.errors import SpecDecError
from specdec.speculation.drafter import Drafter

work_lock = threading.RLock()  # held during a piece of a drafter's work outside of engines
_claiming = threading.RLock()
_busy: set[int] = set()  # ids of the drafters that engines have
if hasattr(os, "register_at_fork"):  # a child has no threads that could release them
    for _lock in (work_lock, _claiming):
        os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def claim(drafter: Drafter) -> int:
    """Reserve a drafter for an engine, and wait until it has stopped learning; return the id that ``release`` takes.

    Raises SpecDecError if another engine has the drafter.
    """
    with _claiming:
        check_free(drafter)
        _busy.add(id(drafter))
    try:
        with work_lock:  # wait for the end of a piece of work
            return id(drafter)
    except BaseException:  # Ctrl-C
        release(id(drafter))
        raise


def release(claimed: int) -> None:
    """End an engine's use of a drafter. Call it once. claimed: what ``claim`` returned."""
    _busy.discard(claimed)


def in_use(drafter: Drafter) -> bool:
    """Return whether an engine uses the drafter (``claim``)."""
    return id(drafter) in _busy


def check_free(drafter: Drafter) -> None:
    """Raise SpecDecError if an engine uses the drafter (``claim``)."""
    if in_use(drafter):
        raise SpecDecError(
            "a generation of this SpecDecoder is still open; finish or close it first, or make a second decoder with "
            "with_drafter"
        )
