"""The terminal: standard streams, notes, errors, tables, progress, and text with control characters.

On a terminal, progress is a spinner or a bar, and control characters are escaped. In a pipe, progress is a line every
half minute, and text is unchanged. Imports nothing heavy.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from threading import Event, RLock, Thread
from typing import IO, Any

from rich import progress
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from specdec.base.errors import SpecDecError, SpecDecWarning

LINE_INTERVAL = 30.0  # seconds between two lines of progress in a pipe
SILENCE = 1.0  # seconds without output on a terminal before a line says what is running
_python_warns = warnings.showwarning

# C0 without tab and newline, DEL, C1, and characters that change the direction of text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return ``text`` with control characters escaped, such as ``\\x1b``, because they could control a terminal."""
    return _CONTROL.sub(lambda found: f"\\{'x%02x' if ord(found[0]) < 256 else 'u%04x'}" % ord(found[0]), text)


def as_text(console: Console, text: str, style: str = "") -> Text:
    """Return ``text`` for ``console`` as rich text without markup; on a terminal, control characters are escaped.

    style: rich's name of a style, such as "dim"; "": none.
    """
    return Text(printable(text) if console.is_terminal else text, style=style)


def write(text: str) -> None:
    """Write text of a model or a user to stdout, without a line break, and flush it.

    On a terminal, control characters are escaped (``printable``).
    """
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def stderr() -> Console:
    """Return a console that prints to standard error, as it is at the time of the call."""
    return Console(file=sys.stderr, stderr=True, highlight=False)


def tell(console: Console, text: str) -> None:
    """Print ``text`` and a line break to ``console``, without markup and without wrapping."""
    console.print(as_text(console, text), soft_wrap=True)


def say(message: str) -> None:
    """Print one line to stderr."""
    tell(stderr(), message)


def note(message: str) -> None:
    """Print one dim line to stderr if stderr is a terminal; in a pipe, print nothing."""
    console = stderr()
    if console.is_terminal:
        console.print(as_text(console, message, style="dim"))


def error(message: str) -> None:
    """Print ``error: <message>`` to stderr as one line. The process goes on."""
    console, line = stderr(), " ".join(message.split())
    console.print(Text.assemble(("error: ", "bold red"), as_text(console, line)), soft_wrap=True)


def warn_in_lines(verbose: bool = False) -> None:
    """From now on, print each ``SpecDecWarning`` of this process as one line on stderr, and hide other warnings.

    verbose: let libraries print their warnings, too.
    """
    warnings.showwarning = _warn
    if not verbose:
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("default", category=SpecDecWarning)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported
        if (logging := sys.modules.get("transformers.utils.logging")) is not None:
            logging.set_verbosity_error()


def _warn(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    if issubclass(category, SpecDecWarning):
        say(f"note: {message}")
    else:
        _python_warns(message, category, *where, **more)


def log_in_lines() -> None:
    """From now on, print each message of the logger "specdec", from level INFO on, as one line on stderr.

    To be called once: each call adds a handler.
    """
    log = logging.getLogger("specdec")
    log.setLevel(logging.INFO)
    log.addHandler(_Lines())


class _Lines(logging.Handler):
    """A handler of log records that prints the message of each, without level or time, as one line on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to stdout, aligned on a terminal and tab-separated in a pipe.

    header: names of the columns. rows: the cells of each row, as many as the header has.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        for row in (header, *rows):
            print("\t".join(row))  # rich would expand the tabs
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for number, name in enumerate(header):
        # The first column has names, which break last; a fixed least width would push other columns off a terminal.
        table.add_column(Text(printable(name)), overflow="fold", min_width=1, no_wrap=not number)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


# --- standard streams ------------------------------------------------------------------------------------------------


class Stream:
    """A wrapper of a standard stream that calls ``failed`` at the first error of a write or flush.

    From then on, text is discarded. Other attributes are those of the stream.
    stream: the stream to write to. failed: called once, with the error; what it raises, the write raises.
    """

    def __init__(self, stream: IO[str], failed: Callable[[OSError], None]) -> None:
        self._stream, self._failed = stream, failed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(lambda: self._stream.write(text))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except OSError as error:
            self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)
            self._failed(error)
        return 0


def guard_streams() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr`` so that errors of stderr are ignored and those of stdout are reported.

    A later write to stdout that fails raises SpecDecError, or BrokenPipeError if the reader has closed the pipe. If
    stdout is closed already, this call raises SpecDecError. Answers go to stdout and statistics to stderr: statistics
    that cannot be written must not cost the answer.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = Stream(sys.stderr, lambda error: None)  # type: ignore[assignment]
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        raise SpecDecError("stdout is closed, so the output is lost; leave it open, or redirect it to a file")
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack characters
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout = Stream(sys.stdout, _stdout_failed)  # type: ignore[assignment]


def _stdout_failed(error: OSError) -> None:
    if isinstance(error, BrokenPipeError):  # the command line ends quietly
        raise error
    raise SpecDecError(f"cannot write to stdout: {error.strerror or error}") from None


# --- progress --------------------------------------------------------------------------------------------------------


class Words(progress.ProgressColumn):
    """A column of a progress bar: what ``text`` returns for a task, as plain text with escaped control characters.

    text: function from a task of rich to the text to show, called at each refresh.
    """

    def __init__(self, text: Callable[[progress.Task], str]) -> None:
        super().__init__()
        self.text = text

    def render(self, task: progress.Task) -> Text:
        return Text(printable(self.text(task)))


class Progress(progress.Progress):
    """A display of running tasks on stderr: bars on a terminal; in a pipe, a line per task every half minute.

    A task is a piece of work with a number of units done and in all (``add_task``, ``advance``). A task with a
    ``unit``, a plural such as "tokens", is shown with its rate and remaining time. A context manager: it is shown in a
    ``with`` block. While ``Progress`` objects are nested, the innermost one is shown.
    columns: rich's columns between the task's name and its rate. more: further arguments of rich's ``Progress``.
    console: where to show it; None: stderr.
    later: whether to show nothing on a terminal in the first second of the process (``SILENCE``).
    """

    def __init__(
        self, *columns: progress.ProgressColumn, console: Console | None = None, later: bool = False, **more: Any
    ) -> None:
        console = console or stderr()
        name = Words(lambda task: task.description)
        self._shown_from = _begun + SILENCE if later else 0.0
        super().__init__(name, *columns, Words(pace), console=console, disable=not console.is_terminal, **more)
        self._ended, self._thread = Event(), Thread(target=self._lines, daemon=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables() if time.monotonic() >= self._shown_from else [Text()]

    def start(self) -> None:
        with _showing:
            if self in _open:
                return
            for outer in _open[-1:]:
                outer.live.stop()
            _open.append(self)
            super().start()
        if self.disable and not self.console.quiet:
            self._thread.start()

    def stop(self) -> None:
        with _showing:
            super().stop()
            if self not in _open:
                return
            _open.remove(self)
            for outer in _open[-1:]:
                super(Progress, outer).start()
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _lines(self) -> None:
        while not self._ended.wait(LINE_INTERVAL):
            for task in self.tasks if _open[-1:] == [self] else []:
                if task.visible and (task.total is None or task.completed < task.total):
                    share = "" if task.total is None else f": {task.percentage:.0f} %"
                    details = ", ".join(part for part in (duration(task.elapsed or 0.0), pace(task)) if part)
                    with suppress(OSError, ValueError):  # a stderr that is full or closed
                        tell(self.console, f"{task.description}{share} ({details})")


_open: list[Progress] = []  # running displays, the innermost last
_showing = RLock()  # held while a display starts or stops
_begun = time.monotonic()  # the start of the process


def clear() -> None:
    """Remove all spinners and bars from the terminal, before the process ends without cleaning up."""
    for shown in _open[::-1]:
        shown.live.stop()


@contextmanager
def status(message: str, quiet: bool = False) -> Iterator[None]:
    """Show ``message`` on stderr during the ``with`` block; quiet: show nothing.

    A terminal shows a spinner, from one second after the start of the process on; a pipe gets a line every half minute.
    """
    shown = Progress(transient=True, later=True)
    shown.columns = (progress.SpinnerColumn(), *shown.columns)
    shown.add_task(message, total=None)
    with nullcontext() if quiet else shown:
        yield


OnProgress = Callable[[int, int, int], None]  # steps done, all steps, tokens so far


class Bar(Progress):
    """A progress bar for one task on stderr; a context manager, and a function to call with the progress.

    what: name of the task. unit: text after the counts, such as "MB", until a rate of tokens replaces it.
    A call ``bar(done, total, tokens)`` shows the progress: the number of steps done, which may be a fraction, the
    number of all steps, and the number of tokens so far (None: the text after the counts stays). It may be passed as
    ``OnProgress``.
    """

    def __init__(self, what: str, unit: str = "") -> None:
        columns = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TextColumn("{task.fields[rate]}"))
        super().__init__(*columns, progress.TimeRemainingColumn(), transient=True)
        self.task = self.add_task(what, total=None, rate=unit)
        self.began = time.perf_counter()

    def __call__(self, done: float, total: int, tokens: int | None = None) -> None:
        self.update(self.task, completed=done, total=total)
        if tokens is not None:
            self.update(self.task, rate=f"{tokens / (time.perf_counter() - self.began):.1f} tok/s")


def pace(task: progress.Task) -> str:
    """Return the rate and remaining time of a task as text, such as ``612 tokens/s, 9 min left``.

    task: its ``unit`` is what ``add_task(..., unit="tokens")`` was given. "" for a task without a unit, and while the
    rate is unknown.
    """
    unit, speed, left = task.fields.get("unit"), task.speed, task.time_remaining
    if not unit or not speed or not left:
        return ""
    return f"{speed:.{0 if speed >= 10 else 2}f} {unit}/s, {duration(left)} left"


def megabytes(size: float) -> str:
    """Return a number of bytes as text, such as ``340 MB`` or ``4.6 GB``."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.{0 if size >= 1e7 else 1}f} MB"


def duration(seconds: float) -> str:
    """Return a time as rounded text, such as ``40 s``, ``3 min``, ``2 h 10 min`` or ``3.0 days``."""
    if seconds < 90:
        return f"{max(round(seconds, -1 if seconds > 20 else 0), 1):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes / 1440:.1f} days"
