"""Training in these tests has some hundred rows, so that the ridge counts as less than one of them."""

import pytest

from specdec.base import ridge


@pytest.fixture(autouse=True)
def small_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "RIDGE", 0.3)
