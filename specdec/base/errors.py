"""What users see of a problem, an error or a warning: what is wrong, why, and what to do, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class SpecDecError(Exception):
    """A problem the user can act on. The command line prints it as one line and exits with code 2.

    outputs: what a generation had produced when it failed, a ``GenerationOutput`` per row; empty elsewhere.
    """

    outputs: Sequence[Any] = ()


class SettingError(SpecDecError):
    """An environment variable has a value that nothing here understands."""


class NotFiniteError(SpecDecError):
    """The model itself gives NaN or infinite logits: no runtime can serve it."""


class QueueFullError(SpecDecError):
    """As many requests wait as an engine lets wait."""


class ConstraintError(SpecDecError):
    """A constraint that cannot be used, or that a text cannot keep."""


class PromptTooLongError(SpecDecError):
    """A prompt does not fit the model's context."""


class SpecDecWarning(UserWarning):
    """Something the user may want to change. The command line prints it as one line on stderr and goes on."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest of ``known``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def one_line(error: BaseException) -> str:
    """The error's message as one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."
