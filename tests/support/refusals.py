"""Errors for users: one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from specdec.base.errors import SpecDecError


@contextmanager
def refused(match: str) -> Iterator[pytest.ExceptionInfo[SpecDecError]]:
    """Check that the block raises a ``SpecDecError`` of one line that matches the pattern ``match``."""
    with pytest.raises(SpecDecError, match=match) as error:
        yield error
    assert "\n" not in str(error.value)
