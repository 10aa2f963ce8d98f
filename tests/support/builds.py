"""Builds of the native kernels."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from specdec.runtimes.native import library


@contextmanager
def build(level: str) -> Iterator[bool]:
    """The kernels of ``level`` for a while; whether this CPU has them."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(library.LEVEL, level)
            library.load.cache_clear()
            yield library.load().level == level
    finally:
        library.load.cache_clear()
        library.load()
