"""The drafters of a process in use: an engine has one for itself, and one that teaches itself learns while none has."""

from __future__ import annotations

import atexit
import functools
import math
import threading
import time
import weakref

from specdec.base import background
from specdec.base.background import Stop, Work
from specdec.base.errors import SpecDecError
from specdec.speculation.drafter import Drafter

IDLE = 0.2  # seconds after a generation before a drafter learns

_claiming = threading.Lock()
_busy: set[int] = set()  # ids of the drafters that engines have
_learning = threading.Lock()  # held during a piece of a drafter's work outside of engines
_learners = weakref.WeakKeyDictionary[Drafter, Work[None]]()  # the work of drafters outside of engines


def claim(drafter: Drafter) -> int:
    """Reserve a drafter for an engine; return what ``release`` takes. Raises SpecDecError if another one has it."""
    with _claiming:
        _check_free(drafter)
        _busy.add(id(drafter))
    with _learning:  # wait for the end of a piece of work
        return id(drafter)


def release(claimed: int) -> None:
    _busy.discard(claimed)


def _check_free(drafter: Drafter) -> None:
    """Raise SpecDecError if an engine has the drafter."""
    if id(drafter) in _busy:
        raise SpecDecError(
            "a generation of this SpecDecoder is still open; finish or close it first, or make a second decoder with "
            "with_drafter"
        )


def learn(drafter: Drafter, seconds: float = math.inf) -> bool:
    """Let a drafter learn now, for at most about ``seconds`` or until an engine takes it, and keep what it has learned.

    Returns whether it has more to learn from. Raises SpecDecError if an engine has it.
    """
    _check_free(drafter)
    if (learner := drafter.learner) is None:
        return False
    end, more = time.monotonic() + seconds, True
    while True:
        with _learning:
            free = id(drafter) not in _busy
            if free and more and time.monotonic() < end:
                more = learner.work()
                continue
            if free:
                learner.save()
            return more


def learn_when_idle(drafter: Drafter) -> None:
    """From now on let a drafter learn, piece by piece, while no engine has it, as long as a decoder has it."""
    with _claiming:
        if drafter not in _learners:
            _learners[drafter] = Work(functools.partial(_work, weakref.ref(drafter)), "specdec learning")


def _work(reference: weakref.ref[Drafter], stop: Stop) -> None:
    more = False
    while not stop.wait(0 if more else IDLE) and (drafter := reference()) is not None:
        with _learning:
            more = id(drafter) not in _busy and drafter.learner is not None and drafter.learner.work()
        del drafter


@atexit.register
def _keep_what_was_learned() -> None:
    background.end()
    for drafter in [*_learners]:
        if drafter.learner is not None:
            drafter.learner.save()
