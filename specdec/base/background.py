"""Work in threads: whoever holds a ``Work`` owns it and takes its result, or stops it.

A thread that still runs while the interpreter ends can read what is freed there. So the end of the process stops all
work, and waits for it: work asks ``Stop`` between short steps whether it goes on.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Stopped(BaseException):
    """Ends work that was stopped. No ``except Exception`` in the work takes it for a failure."""


class Stop(threading.Event):
    """Set when work is to end."""

    def check(self) -> None:
        """Raise Stopped if the work is to end."""
        if self.is_set():
            raise Stopped


class Work(Generic[T]):
    """Work that a thread does from now on, until it is done or stopped. It is stopped, too, when this object goes.

    work: is given the ``Stop`` to ask between its steps.
    """

    def __init__(self, work: Callable[[Stop], T], name: str) -> None:
        self._stop, self._future = Stop(), Future[T]()
        self._thread = threading.Thread(target=_run, args=(work, self._stop, self._future), daemon=True, name=name)
        weakref.finalize(self, self._stop.set).atexit = False
        with _starting:
            if _ended.is_set():
                self._stop.set()
            self._thread.start()
            _threads[self._thread] = self._stop

    @property
    def running(self) -> bool:
        """Whether the work has not ended."""
        return self._thread.is_alive()

    def join(self, seconds: float | None = None) -> None:
        """Wait for the end, at most so long. Returns at once in the work's own thread."""
        if self._thread is not threading.current_thread():
            self._thread.join(seconds)

    def result(self) -> T:
        """Wait for the result. Raises what the work raises, and CancelledError if it was stopped."""
        self.join()
        return self._future.result()

    def stop(self) -> None:
        """Let the work end early, and wait until it has."""
        self._stop.set()
        self.join()


def _run(work: Callable[[Stop], T], stop: Stop, future: Future[T]) -> None:
    try:
        stop.check()
        future.set_result(work(stop))
    except Stopped:
        future.cancel()
    except BaseException as error:
        future.set_exception(error)


_starting = threading.Lock()
_threads = weakref.WeakKeyDictionary[threading.Thread, Stop]()  # those that run, and maybe others
_ended = threading.Event()


@atexit.register
def end() -> None:
    """Stop all work for good, and wait until it has ended."""
    _ended.set()
    with _starting:
        threads = dict(_threads)
    for stop in threads.values():
        stop.set()
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join()
