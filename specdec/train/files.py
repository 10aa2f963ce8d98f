"""Writing to a run's output folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from specdec.base.errors import SpecDecError


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Say in one sentence that the disk is full, or whatever else keeps ``what`` from being written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpecDecError(
            f"cannot write {what} to '{folder}': {reason}; what is written stays, free space and --resume"
        ) from None
