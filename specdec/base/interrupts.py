"""Handling of Ctrl-C, and of SIGTERM where it means the same."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import NoReturn


def interrupt() -> NoReturn:
    """Raise KeyboardInterrupt, as Ctrl-C does."""
    raise KeyboardInterrupt


@contextmanager
def interrupting(call: Callable[[], object], every: bool = False, ended: bool = False) -> Iterator[None]:
    """Let Ctrl-C call ``call`` during the ``with`` block, instead of raising KeyboardInterrupt.

    call: runs in the main thread between two of its instructions; the interrupted code then goes on.
    every: True: each Ctrl-C calls it. False: the first one calls it, and the next one does what it did before the
    block.
    ended: whether SIGTERM, too, calls it.
    A signal that the process ignores stays ignored. In other threads than the main thread, which alone gets signals,
    the ``with`` block has no effect.
    """
    numbers = [signal.SIGINT, *([signal.SIGTERM] if ended else [])]
    before = {number: signal.getsignal(number) for number in numbers}
    # One may be ignored, for example in a script's background jobs.
    before = {n: known for n, known in before.items() if known != signal.SIG_IGN and current_thread() is main_thread()}

    def handler(number: int, frame: object) -> None:
        if not every:
            signal.signal(number, before[signal.Signals(number)])
        call()

    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)
