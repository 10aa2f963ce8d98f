"""Hide the progress bars and warnings that transformers prints."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

from specdec.base import terminal


@contextlib.contextmanager
def quiet_transformers(status: str = "") -> Iterator[None]:
    """Hide progress bars and warnings of transformers in a ``with`` block. Imports transformers.

    Everything that Python writes to ``sys.stderr`` meanwhile is dropped, by other threads, too.
    status: text that is shown on the terminal meanwhile; "": none.
    """
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    with terminal.status(status, quiet=not status), contextlib.redirect_stderr(io.StringIO()):
        transformers_logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
