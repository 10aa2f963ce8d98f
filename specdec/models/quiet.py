"""Hides what transformers prints."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

from specdec.base import terminal


@contextlib.contextmanager
def quiet_transformers(status: str = "") -> Iterator[None]:
    """Hide progress bars and warnings of transformers in the ``with`` block; show ``status`` instead, unless "".

    Imports transformers.
    """
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    with terminal.status(status, quiet=not status), contextlib.redirect_stderr(io.StringIO()):
        transformers_logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
