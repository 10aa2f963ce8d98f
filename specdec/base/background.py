"""Background threads that can be stopped. The owner of a ``Work`` waits for its result, or stops it.

A thread that runs while the interpreter ends may read freed memory. So the end of the process stops all work and waits
for it. Work must call ``Stop.check`` between short steps.
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
    """Raised by ``Stop.check`` in a ``Work`` that was stopped, to end it.

    A BaseException, so that no ``except Exception`` in the function of the work catches it.
    """


class Stop(threading.Event):
    """An event that, once set, tells the function of a ``Work`` to end. The function calls ``check`` between steps."""

    def check(self) -> None:
        """Raise Stopped if the event is set; otherwise return at once."""
        if self.is_set():
            raise Stopped


class Work(Generic[T]):
    """A function that runs in a new thread until it returns or is stopped.

    Deleting this object also tells the function to end, and does not wait for that.
    """

    def __init__(self, work: Callable[[Stop], T], name: str) -> None:
        """Start the thread ``name``. work: the function; it gets the ``Stop`` to check between its steps."""
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
        """Return whether the thread is still running."""
        return self._thread.is_alive()

    def join(self, seconds: float | None = None) -> None:
        """Wait until the thread ends, at most ``seconds`` (None: no limit). Does not raise the function's exception.

        No effect if it is called in this very thread.
        """
        if self._thread is not threading.current_thread():
            self._thread.join(seconds)

    def result(self) -> T:
        """Wait until the function ends; return its result or raise its exception.

        Raises ``concurrent.futures.CancelledError`` if it was stopped.
        """
        self.join()
        return self._future.result()

    def stop(self) -> None:
        """Tell the function to end (``Stop``), and wait without limit until its thread has ended."""
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
_threads = weakref.WeakKeyDictionary[threading.Thread, Stop]()  # running threads, and maybe ended ones
_ended = threading.Event()


@atexit.register
def end() -> None:
    """Stop every ``Work``, and those that start later, and wait until their threads have ended.

    Called at the end of the process, by ``atexit``.
    """
    _ended.set()
    with _starting:
        threads = dict(_threads)
    for stop in threads.values():
        stop.set()
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join()
