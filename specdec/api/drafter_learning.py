"""Drafters that teach themselves: in a process, each learns while no engine has it."""

from __future__ import annotations

import atexit
import functools
import math
import threading
import time
import weakref

from specdec.api.drafter_use import check_free, in_use, work_lock
from specdec.base import background
from specdec.base.background import Stop, Work
from specdec.speculation.drafter import Drafter

IDLE = 0.2  # seconds after a generation before a drafter learns
_starting = threading.Lock()
_learners = weakref.WeakKeyDictionary[Drafter, Work[None]]()  # the work of drafters outside of engines


def learn(drafter: Drafter, seconds: float = math.inf) -> bool:
    """Let a drafter learn now from the texts that it has seen, for at most about ``seconds``, and save the result.

    Ends early if an engine begins to use the drafter. Returns whether there is more to learn from; False for a drafter
    that does not learn. Raises SpecDecError if an engine uses the drafter already.
    """
    check_free(drafter)
    if (learner := drafter.learner) is None:
        return False
    end, more = time.monotonic() + seconds, True
    while True:
        with work_lock:
            free = not in_use(drafter)
            if free and more and time.monotonic() < end:
                more = learner.work()
                continue
            if free:
                learner.save()
            return more


def learn_when_idle(drafter: Drafter) -> None:
    """Start a thread, one for each drafter, that lets it learn while no engine uses it. Returns at once.

    The thread ends when the drafter is deleted, or the process ends.
    """
    with _starting:
        if drafter not in _learners:
            _learners[drafter] = Work(functools.partial(_work, weakref.ref(drafter)), "specdec learning")


def _work(reference: weakref.ref[Drafter], stop: Stop) -> None:
    """Let the drafter behind ``reference`` learn until it is deleted or ``stop`` is set, while no engine uses it."""
    more = False
    while not stop.wait(0 if more else IDLE) and (drafter := reference()) is not None:
        with work_lock:
            more = not in_use(drafter) and drafter.learner is not None and drafter.learner.work()
        del drafter


@atexit.register
def _keep_what_was_learned() -> None:
    """End all background work, and save what every drafter has learned. Python calls it when the process ends."""
    background.end()
    for drafter in [*_learners]:
        if drafter.learner is not None:
            drafter.learner.save()
