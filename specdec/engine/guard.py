"""Errors of a drafter end no request: after one the drafter is off, and starts again after a pause."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from specdec.base.errors import one_line
from specdec.runtimes.target import Target
from specdec.speculation.drafter import Drafter, DrafterWarning

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds
T = TypeVar("T")
log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())  # a program without a log has the warnings


@dataclass(frozen=True)
class Outage:
    """Why a drafter is off, and until when.

    error: what it did wrong, as the end of a sentence about it, such as "failed (ValueError: ...)".
    since: Unix time of its error, in seconds.
    until: time of its restart, in seconds of ``time.monotonic``.
    """

    error: str
    since: float
    until: float

    @property
    def seconds_left(self) -> float:
        """Seconds until the drafter restarts; 0: it restarts with the next step."""
        return max(self.until - time.monotonic(), 0.0)


class DrafterGuard:
    """Calls a drafter, and turns it off for a while when it fails, so that requests go on without drafts.

    While the drafter is off, ``call`` does nothing. After a pause it is restarted. The pause doubles with each failure,
    up to ``LONGEST_PAUSE`` seconds, and is short again after as long a time without one. Failures and restarts are
    logged, failures also as DrafterWarning.

    target: the model to which it is bound again when it restarts.
    configured: the drafter, on or off.
    drafter: the same drafter; None while it is off. As an argument, it is on, and bound to the target.
    failures: number of times that it failed so far.
    outage: why it is off; None while it is on.
    """

    def __init__(self, drafter: Drafter, target: Target) -> None:
        self.configured = drafter
        self.target = target
        self.failures = 0  # so far
        self.drafter: Drafter | None = drafter
        self.outage: Outage | None = None
        self._pause, self._started = 0.0, time.monotonic()

    def call(self, use: Callable[[Drafter], T]) -> T | None:
        """Return ``use(drafter)``; None if the drafter is off, or if ``use`` raises.

        After an exception, whatever its class, the drafter is off until its pause is over, with a warning. Only a
        DrafterWarning, where warnings are errors, propagates.
        """
        if self.drafter is None:
            return None
        try:
            return use(self.drafter)
        except DrafterWarning:  # where warnings are errors
            raise
        except Exception as error:
            self.fail(f"failed ({type(error).__name__}: {one_line(error)})")
            return None

    def fail(self, why: str) -> None:
        """Turn the drafter off until a pause is over, and warn. why: the reason, as in ``Outage.error``."""
        now = time.monotonic()
        lasted = now - self._started >= LONGEST_PAUSE
        self._pause = FIRST_PAUSE if lasted or not self._pause else min(2 * self._pause, LONGEST_PAUSE)
        self.drafter = None
        self.failures += 1
        self.outage = Outage(why, time.time(), now + self._pause)
        what = f"drafter '{self.configured.traits.label}' {why}; decoding goes on without it"
        log.warning(message := f"{what}, and it starts again in {self._pause:g} s")
        warnings.warn(message, DrafterWarning, stacklevel=2)

    def restart(self, begin: Callable[[Drafter], object]) -> bool:
        """Restart the drafter if its pause is over: bind it to the target, and begin the running rows with it.

        Return whether that was tried. If it fails again, the drafter is off for a longer pause.

        begin: function that calls the drafter's ``begin`` for each running row, and stores the results.
        """
        outage = self.outage
        if outage is None or outage.seconds_left:
            return False
        self.drafter = self.configured
        self.outage = None
        self._started = time.monotonic()
        self.call(lambda drafter: drafter.bind(self.target))
        self.call(begin)
        if self.drafter is not None:
            after = time.time() - outage.since
            log.info("drafter '%s' is on again, %.0f s after it %s", self.drafter.traits.label, after, outage.error)
        return True
