"""Errors and warnings for users: what is wrong, why, and what to do, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class SpecDecError(Exception):
    """A problem that the user can act on. The command line prints it as one line and exits with code 2.

    outputs: if a generation failed, the ``GenerationOutput`` of each answer so far, in order; empty for other errors.
    """

    outputs: Sequence[Any] = ()


class SettingError(SpecDecError):
    """Raised if an environment variable has an invalid value."""


class NotFiniteError(SpecDecError):
    """Raised if the model's own logits are NaN or infinite, so that trying another runtime would not help."""


class MemoryFullError(SpecDecError):
    """Raised if a device, or the machine, has no memory left, and another runtime would need no less memory."""


class QueueFullError(SpecDecError):
    """Raised if an engine refuses a request because its queue is full. The HTTP server answers with status 429."""


class ConstraintError(SpecDecError):
    """Raised if a constraint on the generated text, such as a JSON schema, is invalid or cannot be kept."""


class PromptTooLongError(SpecDecError):
    """Raised if a prompt does not fit the model's context."""


class SpecDecWarning(UserWarning):
    """A warning about something that the user may want to change. The command line prints it as one line on stderr."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` with the name of ``known`` that is most like ``name``; "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def how_to_install(extra: str) -> str:
    """Return the text "run pip install ..." that says how to install an extra of this package, for error messages.

    extra: its name in pyproject.toml. The package is on no index, so the text names the clone and the wheel.
    """
    return f"run pip install -e '.[{extra}]' in the clone of specdec, or pip install 'WHEEL[{extra}]'"


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python, PyTorch or a kernel says that memory is full."""
    kind = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kind or "can't allocate memory" in str(error)


def one_line(error: BaseException) -> str:
    """Return the message of an error as one line of at most 240 characters; without a message, the error's type."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."


@contextmanager
def errors_as(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn an OSError, or an error of ``kinds``, in the ``with`` block into a SpecDecError "``what``: reason".

    A SpecDecError passes unchanged.
    """
    caught: tuple[type[Exception], ...] = (OSError, *kinds)
    try:
        yield
    except SpecDecError:
        raise
    except caught as error:
        raise SpecDecError(f"{what}: {getattr(error, 'strerror', None) or one_line(error)}") from None
