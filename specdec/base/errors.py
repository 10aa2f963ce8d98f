"""Errors and warnings for users: what is wrong, why, and what to do, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class SpecDecError(Exception):
    """A problem that the user can act on. The command line prints it as one line and exits with code 2.

    outputs: a ``GenerationOutput`` per row until a generation failed; empty for other errors.
    """

    outputs: Sequence[Any] = ()


class SettingError(SpecDecError):
    """An environment variable has an invalid value."""


class NotFiniteError(SpecDecError):
    """The model's own logits are NaN or infinite, so no runtime can serve it."""


class QueueFullError(SpecDecError):
    """The engine's queue is full."""


class ConstraintError(SpecDecError):
    """A constraint is invalid, or a text cannot satisfy it."""


class PromptTooLongError(SpecDecError):
    """A prompt does not fit the model's context."""


class SpecDecWarning(UserWarning):
    """Something that the user may want to change. The command line prints it as one line on stderr."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the closest of ``known``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def how_to_install(extra: str) -> str:
    """The command that adds an extra. The package is on no index, so its name alone installs nothing of ours."""
    return f"run pip install -e '.[{extra}]' in the clone of specdec, or pip install 'WHEEL[{extra}]'"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, PyTorch or a kernel says that memory is full."""
    kind = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kind or "can't allocate memory" in str(error)


def one_line(error: BaseException) -> str:
    """The error's message as one line of at most 240 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."


@contextmanager
def errors_as(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Report an OSError, or one of ``kinds``, as a SpecDecError: ``what``, and the reason. A SpecDecError stays."""
    caught: tuple[type[Exception], ...] = (OSError, *kinds)
    try:
        yield
    except SpecDecError:
        raise
    except caught as error:
        raise SpecDecError(f"{what}: {getattr(error, 'strerror', None) or one_line(error)}") from None
