"""Work in threads ends with its owner, and with the process."""

import gc
import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from contextlib import suppress

import pytest

from specdec.base import background
from specdec.base.background import Stop, Work


def until_stopped(stop: Stop) -> None:
    while True:
        stop.wait(60)
        stop.check()


def test_a_result_is_that_of_the_work_and_so_is_an_error() -> None:
    assert Work(lambda stop: 5, "five").result() == 5
    with pytest.raises(ZeroDivisionError):
        Work(lambda stop: 1 / 0, "error").result()


def test_work_that_is_stopped_has_ended_and_has_no_result() -> None:
    work = Work(until_stopped, "endless")
    assert work.running
    work.stop()
    assert not work.running
    with pytest.raises(CancelledError):
        work.result()


def test_no_handler_of_errors_takes_a_stop_for_a_failure() -> None:
    def handles(stop: Stop) -> str:
        with suppress(Exception):
            until_stopped(stop)
        return "went on"

    work = Work(handles, "handles errors")
    work.stop()
    with pytest.raises(CancelledError):
        work.result()


def test_work_without_an_owner_ends() -> None:
    ended = threading.Event()

    def endless(stop: Stop) -> None:
        try:
            until_stopped(stop)
        finally:
            ended.set()

    work = [Work(endless, "endless")]
    work.clear()
    gc.collect()
    assert ended.wait(60)


def test_work_that_begins_when_the_process_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_ended", threading.Event())
    work = Work(until_stopped, "endless")
    background.end()
    assert not work.running
    with pytest.raises(CancelledError):
        Work(until_stopped, "too late").result()


PROCESS = """
import atexit, threading
atexit.register(print, "freed", flush=True)  # runs behind what was registered later
from specdec.base.background import Work
begun = threading.Event()
def work(stop):
    begun.set()
    stop.wait(60)
    print("stopped", flush=True)
work = Work(work, "work")
begun.wait()
{end}
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(2)", "raise KeyboardInterrupt"])
def test_a_process_ends_when_its_work_has_ended(end: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROCESS.format(end=end)], capture_output=True, text=True, timeout=50)
    assert done.stdout == "stopped\nfreed\n"
