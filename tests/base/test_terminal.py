"""What a terminal and a pipe are shown: control characters, progress, streams that fail."""

import io
import logging
import re
import sys
from pathlib import Path
from threading import Event

import pytest
from rich.console import Console

import specdec
from specdec.base import terminal

NASTY = "a\x1b]0;title\x07\x1b[2Jb\x9b31m\x7f\u202ec\r"
SAFE = "a\\x1b]0;title\\x07\\x1b[2Jb\\x9b31m\\x7f\\u202ec\\x0d"


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


class Heard(io.StringIO):
    """A pipe that says when something has been written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.event = Event()

    def write(self, text: str) -> int:
        count = super().write(text)
        if text.endswith("\n"):
            self.event.set()
        return count


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    """stderr as a pipe, for ``terminal.stderr``, with a line of progress every few milliseconds."""
    stream = Heard()
    monkeypatch.setattr(terminal, "stderr", lambda: Console(file=stream, highlight=False))
    monkeypatch.setattr(terminal, "LINE_INTERVAL", 0.005)
    return stream


def test_control_characters_are_escaped_on_a_terminal_and_untouched_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, shown in ((Tty(), SAFE), (io.StringIO(), NASTY)):
        monkeypatch.setattr(sys, "stdout", stream)
        for piece in NASTY:  # as a model streams it: a sequence comes in pieces
            terminal.write(piece)
        assert stream.getvalue() == shown
    assert terminal.printable("é\t\n漢👩‍💻 שלום") == "é\t\n漢👩‍💻 שלום"


def test_names_are_escaped_and_are_no_markup_wherever_a_terminal_shows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Tty(), Tty()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    name = "x\x1b]0;[bold]y\x07"
    terminal.print_table(("name", name), [("model", name)])
    assert out.getvalue().count("x\\x1b]0;[bold]y\\x07") == 2
    terminal.note(name)
    terminal.error(name)
    terminal.tell(terminal.stderr(), name)
    with terminal.status(name), terminal.Progress() as bars:
        bars.add_task(name)
    shown = err.getvalue()
    assert "\x1b]0;" not in shown and "\x07" not in shown and shown.count("x\\x1b]0;[bold]y\\x07") >= 4


def test_a_narrow_terminal_breaks_no_name_in_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Tty()
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stdout", out)
    name, path = "organisation/quite-a-long-name-of-a-model-7b", "/a/folder" * 15
    terminal.print_table(("name", "licence", "drafters", "where"), [(name, "Apache-2.0", "m2r2, m2r2-paper", path)] * 2)
    shown = re.sub(r"\x1b\[\d*m", "", out.getvalue())
    assert shown.count(name) == shown.count("m2r2-paper") == shown.count("Apache-2.0") == 2
    assert max(map(len, shown.splitlines())) <= 100 and path not in shown


@pytest.mark.parametrize("width", [60, 80, 110])
def test_a_narrow_terminal_loses_nothing_of_a_wide_table(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    out = Tty()
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "stdout", out)
    row = ["organisation/quite-a-long-name", *(chr(ord("a") + n) * 14 for n in range(7))]
    terminal.print_table([f"column{n}" for n in range(8)], [row])
    shown = re.sub(r"\x1b\[\d*m", "", out.getvalue())
    assert max(map(len, shown.splitlines())) <= width
    body = shown.split("organisation", 1)[1] if "organisation" in shown else shown
    for cell in row[1:]:
        assert body.count(cell[0]) >= len(cell)


def test_a_pipe_gets_lines_while_something_is_under_way(heard: Heard) -> None:
    with terminal.status("loading [bold]"):
        assert heard.event.wait(300)
    assert heard.getvalue().splitlines()[0] == "loading [bold] (1 s)"


def test_a_pipe_gets_a_line_for_each_task_that_has_not_ended(heard: Heard) -> None:
    with terminal.Progress() as bars:
        bars.add_task("done", total=2, completed=2)
        bars.add_task("hidden", total=2, visible=False)
        bars.update(bars.add_task("answers", total=4), advance=1)
        bars.add_task("converting", total=None)
        heard.event.clear()
        assert heard.event.wait(300)
    shown = heard.getvalue()
    assert re.search(r"^answers: 25 % \(\d+ s\)$", shown, re.M) and "done" not in shown and "hidden" not in shown


def test_a_bar_shows_the_rate_and_the_time_left() -> None:
    stream, now = Tty(), [0.0]
    with terminal.Progress(console=Console(file=stream, width=100), get_time=lambda: now[0]) as bars:
        task = bars.add_task("states", total=300, unit="tokens")
        for _ in range(3):
            now[0] += 1
            bars.advance(task, 50)
    assert "50 tokens/s, 3 s left" in stream.getvalue()


def test_progress_that_cannot_be_written_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = Event()

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            tried.set()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(terminal, "stderr", lambda: Console(file=Full()))
    monkeypatch.setattr(terminal, "LINE_INTERVAL", 0.005)
    with terminal.status("loading"):
        assert tried.wait(300)


def test_progress_has_one_home() -> None:
    """Bars and spinners of rich alone would be silent in a pipe, and take names for markup."""
    root = Path(specdec.__file__).parent
    for path in root.rglob("*.py"):
        text = path.read_text("utf-8")
        if path.name != "terminal.py":
            assert not re.search(r"from rich\.progress import [^\n]*\bProgress\b|console\.status\(", text), path


def test_the_package_s_log_is_printed_line_by_line(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    log = logging.getLogger("specdec")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "level", log.level)
    terminal.log_in_lines()
    logging.getLogger("specdec.engine.guard").info("on again, %d s later", 3)
    logging.getLogger("specdec.engine.guard").debug("not this")
    logging.getLogger("others").warning("nor this")
    assert heard.getvalue() == "on again, 3 s later\n"
