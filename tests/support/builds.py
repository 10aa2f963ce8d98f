"""The native kernels: what needs them, and builds of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from specdec.runtimes.native import library

needs_native = pytest.mark.skipif(not library.runs(), reason="there are no native kernels here")


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
