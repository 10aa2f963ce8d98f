"""Validation by annotations."""

import sys
import threading

from specdec.base.settings import checked
from specdec.engine.request import Request


def test_simultaneous_first_calls_are_all_checked() -> None:
    interval = sys.getswitchinterval()
    failed = list[BaseException]()

    def call(method, begin: threading.Barrier) -> None:
        begin.wait(60)
        try:
            method(object.__new__(Request), [1, 2], 4)
        except BaseException as error:
            failed.append(error)

    sys.setswitchinterval(1e-6)
    try:
        for _ in range(40):
            method, begin = checked(Request.__init__.__wrapped__), threading.Barrier(4)  # type: ignore[attr-defined]
            threads = [threading.Thread(target=call, args=(method, begin)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not failed
